"""FlashAttention-3 (arXiv 2407.08608): the Hopper build of flash-attention (``hopper/``), by the functions below its autograd.

Of its branch main: in the folder of that name of release 2.8.3 these functions take other arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import Gradients, OutLse, Platform, Saved, dims, half_on_cuda
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.kernels.varlen import OneCall, VarlenCall, VarlenKernel, VarlenRun
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


MODULE = "flash_attn_interface"
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_OPTIONS = (*_LENGTHS, "softmax_scale", "window_size_left", "window_size_right", "softcap")
CALLS = (
    LibraryCall(MODULE, "_flash_attn_forward", 3, (*_OPTIONS, "causal", "qv")),
    LibraryCall(MODULE, "_flash_attn_backward", 6, (*_OPTIONS, "is_causal", "dq", "dk", "dv")),
)


class _Run(OneCall):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float = 0.0) -> OutLse:
        return self._attend(q, k, v, None, scale, softcap)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qv: torch.Tensor | None, scale: float, softcap: float
    ) -> OutLse:
        """Attention whose scores are ``q k + qv v``."""
        from flash_attn_interface import _flash_attn_forward

        call = self.call
        out, lse, *_ = _flash_attn_forward(
            q, k, v, cu_seqlens_q=call.cu_q, cu_seqlens_k=call.cu_k, max_seqlen_q=call.max_q, max_seqlen_k=call.max_k,
            softmax_scale=scale, causal=call.causal, window_size_left=call.window[0], window_size_right=call.window[1],
            softcap=softcap, qv=qv,
        )  # fmt: skip
        return out, lse

    def backward(self, dout: torch.Tensor, saved: Saved, scale: float, softcap: float = 0.0) -> Gradients:
        from flash_attn_interface import _flash_attn_backward

        call, (dq, dk, dv) = self.call, saved.empty_gradients()
        _flash_attn_backward(
            dout, *saved, cu_seqlens_q=call.cu_q, cu_seqlens_k=call.cu_k, max_seqlen_q=call.max_q,
            max_seqlen_k=call.max_k, dq=dq, dk=dk, dv=dv, softmax_scale=scale, is_causal=call.causal,
            window_size_left=call.window[0], window_size_right=call.window[1], softcap=softcap,
        )  # fmt: skip
        return dq, dk, dv


@dataclass(frozen=True)
class _Latent(_Run):
    """Keys whose first numbers are the values: their product with queries is given apart from that of the other numbers."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float = 0.0) -> OutLse:
        dim_v = v.shape[2]
        return self._attend(q[..., dim_v:], k[..., dim_v:], v, q[..., :dim_v], scale, softcap)

    def backward(self, dout: torch.Tensor, saved: Saved, scale: float, softcap: float = 0.0) -> Gradients:
        raise AssertionError("flash-attn 3 has no backward of latent heads")


@dataclass(frozen=True)
class FlashAttn3(VarlenKernel):
    """flash-attn 3 on Hopper, half types, head dims up to 256, softcaps; latent heads of 256 to 512 values and up to 64 other
    numbers forward only, as a decode of DeepSeek has them.

    The limits of head dims are those that ``mha_fwd`` and ``mha_bwd`` check (``hopper/flash_api.cpp``).
    """

    softcaps: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("flash-attn-3",)
    run: ClassVar[Callable[[VarlenCall], VarlenRun]] = _Run

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if problem.backward and (_is_latent(problem.heads) or problem.heads.v > 256):
            return f"flash-attn 3 has no backward of head dims {dims(problem.heads)}; direction=forward runs"
        return super().unsupported(problem, mask)

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        heads = problem.heads
        besides = ((heads.dim, heads.v),) if _is_latent(heads) or (heads.dim <= 64 and heads.v <= 512) else ()
        reason = half_on_cuda(problem, platform, "flash-attn 3", least=(9, 0), most=(9, 0), besides=besides)
        odd = heads.dim % 8 or heads.v % 8
        return reason or (f"flash-attn 3 takes head dims in steps of 8, not {dims(heads)}" if odd else None)

    def missing(self) -> str | None:
        reason = unfit(*CALLS)
        return f"{reason}; the Hopper build of flash-attention's branch main is what runs" if reason else None

    def pads(self, heads: Heads, platform: Platform) -> bool:
        return not (_is_latent(heads) or heads.dim <= 64 or (128 < heads.dim <= 192 and 96 < heads.v <= 128))

    def ready(self, call: VarlenCall, heads: Heads, dtype: torch.dtype) -> VarlenRun:
        return (_Latent if _is_latent(heads) else _Run)(call)


def _is_latent(heads: Heads) -> bool:
    """Whether values are the first numbers of keys, of a size that the library takes so."""
    return heads.latent and 256 <= heads.v <= 512 and heads.dim - heads.v <= 64
