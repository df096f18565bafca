"""FlashAttention-4: flash-attn-4 on PyPI, written in NVIDIA's CuTe DSL for Hopper and Blackwell, by the functions below autograd.

A window's negative bound is an offset there, and no bound is None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import Gradients, OutLse, Platform, Saved, half_on_cuda
from lcbench.kernels.library import LibraryCall, flash_attention_2_is_here, unfit
from lcbench.kernels.varlen import OneCall, VarlenCall, VarlenKernel, VarlenRun
from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch


MODULE = "flash_attn.cute.interface"
LIBRARIES = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")
_OPTIONS = (
    "softmax_scale", "causal", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "window_size_left",
    "window_size_right", "softcap",
)  # fmt: skip
CALLS = (
    LibraryCall(MODULE, "_flash_attn_fwd", 3, (*_OPTIONS, "return_lse")),
    LibraryCall(MODULE, "_flash_attn_bwd", 6, _OPTIONS),
)


class _Run(OneCall):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float = 0.0) -> OutLse:
        from flash_attn.cute.interface import _flash_attn_fwd

        call = self.call
        out, lse, *_ = _flash_attn_fwd(
            q, k, v, cu_seqlens_q=call.cu_q, cu_seqlens_k=call.cu_k, max_seqlen_q=call.max_q, max_seqlen_k=call.max_k,
            softmax_scale=scale, causal=call.causal, return_lse=True, softcap=softcap, **_window(call),
        )  # fmt: skip
        return out, lse

    def backward(self, dout: torch.Tensor, saved: Saved, scale: float, softcap: float = 0.0) -> Gradients:
        from flash_attn.cute.interface import _flash_attn_bwd

        q, k, v, out, lse = saved
        call = self.call
        dq, dk, dv, *_ = _flash_attn_bwd(
            q, k, v, out, dout, lse, softmax_scale=scale, causal=call.causal, cu_seqlens_q=call.cu_q, cu_seqlens_k=call.cu_k,
            max_seqlen_q=call.max_q, max_seqlen_k=call.max_k, softcap=softcap,
            **_window(call),
        )  # fmt: skip
        return dq, dk, dv


@dataclass(frozen=True)
class FlashAttn4(VarlenKernel):
    """flash-attn-4 from compute capability 9.0 on, half types, head dims up to 256 on Hopper, 128 and 192:128 elsewhere, softcaps.

    The limits of head dims are those of its ``_validate_head_dims``.
    """

    softcaps: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = LIBRARIES
    run: ClassVar[Callable[[VarlenCall], VarlenRun]] = _Run

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return _limits(problem, platform) or no_softcap_backward(problem, platform)

    def missing(self) -> str | None:
        return overwritten(unfit(*CALLS))


def _limits(problem: Problem, platform: Platform) -> str | None:
    if platform.capability[0] == 9:
        return half_on_cuda(problem, platform, "flash-attn-4", least=(9, 0))
    besides = ((192, 128),) if platform.capability[0] in (10, 11) else ()
    return half_on_cuda(problem, platform, "flash-attn-4", least=(9, 0), head_dim=128, besides=besides)


def no_softcap_backward(problem: Problem, platform: Platform) -> str | None:
    """Why it computes no softcapped scores on a platform. A softcap is a function of scores to it, which its backward does not have
    everywhere."""
    if problem.softmax.softcap and problem.backward and platform.capability[0] == 12:
        return "flash-attn-4 has no backward of softcapped scores on this device; direction=forward runs"
    return None


def overwritten(reason: str | None) -> str | None:
    """A reason with its likely cause: flash-attn 2 holds an old ``flash_attn/cute``, which it installs over flash-attn-4's."""
    if reason and flash_attention_2_is_here():
        return f"{reason}; flash-attn 2 is here, which installs an old flash_attn/cute: install flash-attn-4 after it"
    return reason


def _window(call: VarlenCall) -> dict[str, int | None]:
    left, right = (None if bound < 0 or call.causal else bound for bound in call.window)
    return {"window_size_left": left, "window_size_right": right}
