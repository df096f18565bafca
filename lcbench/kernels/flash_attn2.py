"""FlashAttention-2 (arXiv 2307.08691): the library flash-attn, by the functions below its autograd, which take any out and LSE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import Gradients, OutLse, Platform, Saved, half_on_cuda
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.kernels.varlen import OneCall, VarlenCall, VarlenKernel, VarlenRun
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


MODULE = "flash_attn.flash_attn_interface"
_OPTIONS = ("dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap")
CALLS = (
    LibraryCall(MODULE, "_flash_attn_varlen_forward", 7, _OPTIONS),
    LibraryCall(MODULE, "_flash_attn_varlen_backward", 13, (*_OPTIONS, "alibi_slopes", "deterministic")),
)


class _Run(OneCall):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float = 0.0) -> OutLse:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        call = self.call
        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, call.cu_q, call.cu_k, call.max_q, call.max_k, dropout_p=0.0, softmax_scale=scale, causal=call.causal,
            window_size_left=call.window[0], window_size_right=call.window[1], softcap=softcap,
        )  # fmt: skip
        return out, lse

    def backward(self, dout: torch.Tensor, saved: Saved, scale: float, softcap: float = 0.0) -> Gradients:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        call, gradients = self.call, saved.empty_gradients()
        _flash_attn_varlen_backward(
            dout, *saved, *gradients, call.cu_q, call.cu_k, call.max_q, call.max_k, dropout_p=0.0, softmax_scale=scale,
            causal=call.causal, window_size_left=call.window[0], window_size_right=call.window[1], softcap=softcap,
            alibi_slopes=None, deterministic=False,
        )  # fmt: skip
        return gradients


@dataclass(frozen=True)
class FlashAttn2(VarlenKernel):
    """flash-attn 2 from compute capability 8.0 on, half types, head dims up to 256, softcaps."""

    softcaps: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("flash-attn",)
    run: ClassVar[Callable[[VarlenCall], VarlenRun]] = _Run

    def pads(self, heads: Heads, platform: Platform) -> bool:
        return True

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "flash-attn")

    def missing(self) -> str | None:
        return unfit(*CALLS)
