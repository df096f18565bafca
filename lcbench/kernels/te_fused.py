"""Transformer Engine's fused attention, which is cuDNN's: sequences of many lengths with a causal bound and a left window.

Called as Transformer Engine's own context parallelism calls it, below autograd, with the out and LSE of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcbench.kernels.base import Kernel, Platform, Prepared, half_on_cuda, importable
from lcbench.kernels.varlen import Style, VarlenCall, count_varlen, prepare_varlen
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


STYLE = Style(gaps=False, right=False)
# Releases differ in what they take; where one takes these, their defaults are wrong for packed sequences.
FORMATS = {"o_format": "thd", "do_format": "thd", "dqkv_layout": "thd_thd_thd"}


@dataclass(frozen=True)
class TEFused(Kernel):
    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "Transformer Engine's fused attention", least=(9, 0), head_dim=128)

    def missing(self) -> str | None:
        return importable("transformer_engine.pytorch")

    def calls(self, mask: BandMask, platform: Platform) -> int:
        return count_varlen(mask, STYLE)

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BandMask)
        return prepare_varlen(mask, device, _Run, STYLE)


class _Run:
    def __init__(self, call: VarlenCall) -> None:
        import inspect

        import torch
        from transformer_engine.pytorch.cpp_extensions import fused_attn_bwd, fused_attn_fwd
        from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

        self._call, self._backend = call, FusedAttnBackend["F16_arbitrary_seqlen"]
        options = {
            "cu_seqlens_q_padded": call.cu_q, "cu_seqlens_kv_padded": call.cu_k, "qkv_layout": "thd_thd_thd", "dropout": 0.0,
            "attn_mask_type": "padding" if call.window == (-1, -1) else "padding_causal_bottom_right", "window_size": call.window,
        }  # fmt: skip
        known = [inspect.signature(function).parameters for function in (fused_attn_fwd, fused_attn_bwd)]
        self._forward_options, self._backward_options = (
            options | {name: value for name, value in FORMATS.items() if name in parameters} for parameters in known
        )
        self._names_type = "dqkv_dtype" in known[1]
        # Without dropout the random state is never read.
        self._rng_state = torch.zeros(2, dtype=torch.int64, device=call.cu_q.device)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        from transformer_engine.pytorch.cpp_extensions import fused_attn_fwd

        call = self._call
        q, k, v = _packed(q, k, v)
        out, aux, *_ = fused_attn_fwd(
            True, call.max_q, call.max_k, call.cu_q, call.cu_k, q, k, v, q.dtype, self._backend, attn_scale=scale,
            **self._forward_options,
        )  # fmt: skip
        return out, aux[0].squeeze(-1).T  # (T, H, 1)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch
        from transformer_engine.pytorch.cpp_extensions import fused_attn_bwd

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


def _packed(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Its C++ takes data pointers and the strides of packed tensors for granted, and says nothing about others."""
    return [x.contiguous() for x in tensors]
