"""FlashAttention-3 (arXiv 2407.08608): the Hopper build of flash-attention (``hopper/``), by the functions below its autograd.

Of its branch main: in the folder of that name of release 2.8.3 these functions take other arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import Gradients, OutLse, Platform, Saved, half_on_cuda
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.kernels.varlen import OneCall, VarlenCall, VarlenKernel, VarlenRun
from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch


MODULE = "flash_attn_interface"
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_OPTIONS = (*_LENGTHS, "softmax_scale", "window_size_left", "window_size_right")
CALLS = (
    LibraryCall(MODULE, "_flash_attn_forward", 3, (*_OPTIONS, "causal")),
    LibraryCall(MODULE, "_flash_attn_backward", 6, (*_OPTIONS, "is_causal", "dq", "dk", "dv")),
)


class _Run(OneCall):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> OutLse:
        from flash_attn_interface import _flash_attn_forward

        call = self.call
        out, lse, *_ = _flash_attn_forward(
            q, k, v, cu_seqlens_q=call.cu_q, cu_seqlens_k=call.cu_k, max_seqlen_q=call.max_q, max_seqlen_k=call.max_k,
            softmax_scale=scale, causal=call.causal, window_size_left=call.window[0], window_size_right=call.window[1],
        )  # fmt: skip
        return out, lse

    def backward(self, dout: torch.Tensor, saved: Saved, scale: float) -> Gradients:
        import torch
        from flash_attn_interface import _flash_attn_backward

        q, k, v, out, lse = saved
        call = self.call
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_backward(
            dout, q, k, v, out, lse, cu_seqlens_q=call.cu_q, cu_seqlens_k=call.cu_k, max_seqlen_q=call.max_q,
            max_seqlen_k=call.max_k, dq=dq, dk=dk, dv=dv, softmax_scale=scale, is_causal=call.causal,
            window_size_left=call.window[0], window_size_right=call.window[1],
        )  # fmt: skip
        return dq, dk, dv


@dataclass(frozen=True)
class FlashAttn3(VarlenKernel):
    """flash-attn 3 on Hopper, half types, head dims up to 256."""

    libraries: ClassVar[tuple[str, ...]] = ("flash-attn-3",)
    run: ClassVar[Callable[[VarlenCall], VarlenRun]] = _Run

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "flash-attn 3", least=(9, 0), most=(9, 0))

    def missing(self) -> str | None:
        reason = unfit(*CALLS)
        return f"{reason}; the Hopper build of flash-attention's branch main is what runs" if reason else None
