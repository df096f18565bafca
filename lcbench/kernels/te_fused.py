"""Transformer Engine's fused attention, which is cuDNN's: sequences of many lengths with a causal bound and a left window.

Called as Transformer Engine's own context parallelism calls it, below autograd, with the out and LSE of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.kernels.base import Platform, Prepared, half_on_cuda, importable
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
class TEFused:
    takes: ClassVar[str] = "bands"

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return None

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "Transformer Engine's fused attention", least=(9, 0), head_dim=128)

    def missing(self) -> str | None:
        return importable("transformer_engine.pytorch")

    def calls(self, mask: BandMask, platform: Platform) -> int:
        return count_varlen(mask, STYLE)

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BandMask)
        return prepare_varlen(mask, device, _Library(), STYLE)


class _Library:
    def forward(
        self, call: VarlenCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from transformer_engine.pytorch.cpp_extensions import fused_attn_fwd

        out, aux, *_ = fused_attn_fwd(
            True, call.max_q, call.max_k, call.cu_q, call.cu_k, q, k, v, q.dtype, _backend(), attn_scale=scale, dropout=0.0,
            **_options(call, fused_attn_fwd),
        )  # fmt: skip
        return out, aux[0].squeeze(-1).T  # (T, H, 1)

    def backward(
        self,
        call: VarlenCall,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import inspect

        import torch
        from transformer_engine.pytorch.cpp_extensions import fused_attn_bwd

        # Without dropout the random state is never read.
        aux = [lse.T.contiguous()[..., None], torch.zeros(2, dtype=torch.int64, device=q.device)]
        dtypes: list[Any] = [q.dtype]
        if "dqkv_dtype" in inspect.signature(fused_attn_bwd).parameters:
            import transformer_engine_torch as tex

            dtypes.append(tex.DType.kBFloat16 if q.dtype == torch.bfloat16 else tex.DType.kFloat16)
        dq, dk, dv, *_ = fused_attn_bwd(
            call.max_q, call.max_k, call.cu_q, call.cu_k, q, k, v, out, dout, *dtypes, aux, _backend(),
            attn_scale=scale, dropout=0.0,
            **_options(call, fused_attn_bwd),
        )  # fmt: skip
        return dq, dk, dv


def _options(call: VarlenCall, function: Any) -> dict[str, Any]:
    import inspect

    known = inspect.signature(function).parameters
    return {
        "cu_seqlens_q_padded": call.cu_q, "cu_seqlens_kv_padded": call.cu_k, "qkv_layout": "thd_thd_thd",
        "attn_mask_type": "padding" if call.window == (-1, -1) else "padding_causal_bottom_right", "window_size": call.window,
        **{name: value for name, value in FORMATS.items() if name in known},
    }  # fmt: skip


def _backend() -> Any:
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

    return FusedAttnBackend["F16_arbitrary_seqlen"]
