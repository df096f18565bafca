"""Transformer Engine's fused attention, which is cuDNN's: sequences of many lengths with a causal bound and a left window.

Called as Transformer Engine's own context parallelism calls it, below autograd, with the out and LSE of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.kernels.base import Gradients, OutLse, Platform, Saved, Unsupported, half_on_cuda, importable
from lcbench.kernels.cudnn import cudnn_dims, refused_cudnn, too_old_for_dims
from lcbench.kernels.library import LibraryCall, signature_of, unfit
from lcbench.kernels.varlen import CAUSAL, Style, VarlenCall, VarlenKernel, VarlenRun
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


LIBRARIES = ("transformer-engine", "transformer-engine-torch")
# Releases differ in what they take; where one takes these, their defaults are wrong for packed sequences.
FORMATS = {"o_format": "thd", "do_format": "thd", "dqkv_layout": "thd_thd_thd"}


class _Run:
    def __init__(self, call: VarlenCall) -> None:
        import torch
        from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

        if torch.backends.cudnn.version() == 91400 and call.window[0] >= 0 and call.max_k > 1024:
            raise Unsupported("cuDNN 9.14.0 gets a left window over more than 1024 keys of packed sequences wrong")
        self._call, self._backend = call, FusedAttnBackend["F16_arbitrary_seqlen"]
        options = {
            "cu_seqlens_q_padded": call.cu_q, "cu_seqlens_kv_padded": call.cu_k, "qkv_layout": "thd_thd_thd", "dropout": 0.0,
            "attn_mask_type": "padding" if call.window == (-1, -1) else "padding_causal_bottom_right", "window_size": call.window,
        }  # fmt: skip
        self._forward_options = options | _formats("fused_attn_fwd")
        self._backward_options = options | _formats("fused_attn_bwd")
        self._names_type = _names_type()
        # Without dropout the random state is never read.
        self._rng_state = torch.zeros(2, dtype=torch.int64, device=call.cu_q.device)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> OutLse:
        from transformer_engine.pytorch.cpp_extensions import fused_attn_fwd

        call = self._call
        q, k, v = _packed(q, k, v)
        out, aux, *_ = fused_attn_fwd(
            True, call.max_q, call.max_k, call.cu_q, call.cu_k, q, k, v, q.dtype, self._backend, attn_scale=scale,
            **self._forward_options,
        )  # fmt: skip
        return out, aux[0].squeeze(-1).T  # (T, H, 1)

    def backward(self, dout: torch.Tensor, saved: Saved, scale: float) -> Gradients:
        import torch
        from transformer_engine.pytorch.cpp_extensions import fused_attn_bwd

        q, k, v, out, lse = saved
        call, aux = self._call, [lse.T.contiguous()[..., None], self._rng_state]
        dout, q, k, v, out = _packed(dout, q, k, v, out)
        dtypes: list[Any] = [q.dtype]
        if self._names_type:
            import transformer_engine_torch as tex

            dtypes.append(tex.DType.kBFloat16 if q.dtype == torch.bfloat16 else tex.DType.kFloat16)
        dq, dk, dv, *_ = fused_attn_bwd(
            call.max_q, call.max_k, call.cu_q, call.cu_k, q, k, v, out, dout, *dtypes, aux, self._backend, attn_scale=scale,
            **self._backward_options,
        )  # fmt: skip
        return dq, dk, dv


@dataclass(frozen=True)
class TEFused(VarlenKernel):
    """Transformer Engine's fused attention, from compute capability 9.0 on, half types, head dims as of ``cudnn``."""

    style: ClassVar[Style] = CAUSAL
    contiguous_kv: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = LIBRARIES
    run: ClassVar[Callable[[VarlenCall], VarlenRun]] = _Run

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        named = "Transformer Engine's fused attention"
        return half_on_cuda(problem, platform, named, least=(9, 0), head_dim=128, besides=cudnn_dims(platform))

    def missing(self) -> str | None:
        return importable("transformer_engine.pytorch") or unfit(*_calls()) or refused_cudnn()

    def ready(self, call: VarlenCall, heads: Heads, dtype: torch.dtype) -> VarlenRun:
        too_old_for_dims(heads, call.cu_q.device)
        return super().ready(call, heads, dtype)


MODULE = "transformer_engine.pytorch.cpp_extensions"
_OPTIONS = (
    "attn_scale", "cu_seqlens_q_padded", "cu_seqlens_kv_padded", "qkv_layout", "dropout", "attn_mask_type", "window_size"
)  # fmt: skip


def _calls() -> tuple[LibraryCall, ...]:
    """The functions as this release takes them."""
    forward, backward = (LibraryCall(MODULE, name) for name in ("fused_attn_fwd", "fused_attn_bwd"))
    if unfit(forward, backward):
        return forward, backward
    return (
        forward._replace(positional=10, keywords=(*_OPTIONS, *_formats("fused_attn_fwd"))),
        backward._replace(positional=13 if _names_type() else 12, keywords=(*_OPTIONS, *_formats("fused_attn_bwd"))),
    )


def _parameters(function: str) -> Collection[str]:
    signature = signature_of(getattr(import_module(MODULE), function))
    return signature.parameters if signature else ()


def _formats(function: str) -> dict[str, str]:
    """Those of ``FORMATS`` that a function of this release takes."""
    known = _parameters(function)
    return {name: value for name, value in FORMATS.items() if name in known}


def _names_type() -> bool:
    """Whether backward wants the type of gradients: until 2.14."""
    return "dqkv_dtype" in _parameters("fused_attn_bwd")


def _packed(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Its C++ takes data pointers and the strides of packed tensors for granted, and says nothing about others."""
    return [x.contiguous() for x in tensors]
