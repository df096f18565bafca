"""torch's ``cudnn`` backend of scaled_dot_product_attention, called below the dispatcher."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from lcbench.kernels.base import Gradients, OutLse, Platform, Prepared, Saved, half_on_cuda, per_kv_head, per_query_head
from lcbench.kernels.cudnn import cudnn_dims, too_old_for_dims
from lcbench.kernels.pieces import PiecesKernel
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SDPACudnn(PiecesKernel):
    """torch's cuDNN backend on CUDA, half types, head dims up to 128 and 192:128 (``cudnn_dims``)."""

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "torch's cuDNN kernel", head_dim=128, besides=cudnn_dims(platform))

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        too_old_for_dims(heads, device)
        return super().prepare(mask, heads, dtype, device)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> OutLse:
        if q.shape[2] == k.shape[2] == 1:  # cuDNN refuses it; 9.19 does
            out, lse = self.attend(_twice(q), k, v, False, scale)
            return out[:, :, :1], lse[:, :, :1]
        out, lse = _raw(q, per_query_head(k, q.shape[1], 1), per_query_head(v, q.shape[1], 1), causal, scale)
        return out, lse.reshape(q.shape[:3])

    def adjoint(self, dout: torch.Tensor, saved: Saved, causal: bool, scale: float) -> Gradients:
        import torch

        q, k, v, out, lse = saved
        if q.shape[2] == k.shape[2] == 1:
            # A second query adds nothing to dk and dv where its dout is zero.
            dout = torch.cat([dout, torch.zeros_like(dout)], 2)
            dq, dk, dv = self.adjoint(dout, Saved(_twice(q), k, v, _twice(out), _twice(lse)), False, scale)
            return dq[:, :, :1], dk, dv
        keys, values = (per_query_head(x, q.shape[1], 1) for x in (k, v))
        lse = lse.contiguous()
        lse = lse[..., None] if _lse_dims(q.device) == 4 else lse
        # Without dropout the random state is never read; there is no bias and there are no sequences.
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout,
            q,
            keys,
            values,
            out.to(q.dtype),
            lse,
            seed,
            seed,
            None,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            scale=scale,
        )
        return dq, per_kv_head(dk, k.shape[1], 1), per_kv_head(dv, k.shape[1], 1)


def _twice(x: torch.Tensor) -> torch.Tensor:
    """(B, H, 1, ...) as (B, H, 2, ...)."""
    import torch

    return torch.cat([x, x], 2)


def _raw(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse


@cache
def _lse_dims(device: torch.device) -> int:
    """Dimensions of the LSE that this torch exchanges with cuDNN, (B, H, S) or (B, H, S, 1): releases differ."""
    import torch

    tiny = torch.zeros((1, 1, 128, 64), dtype=torch.bfloat16, device=device)
    return _raw(tiny, tiny, tiny, False, 1.0)[1].dim()
