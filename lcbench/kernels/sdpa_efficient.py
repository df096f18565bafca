"""torch's ``efficient`` backend of scaled_dot_product_attention (the CUTLASS kernel of xformers), called below the dispatcher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.kernels.base import Gradients, OutLse, Platform, Saved, half_on_cuda, per_kv_head, per_query_head
from lcbench.kernels.pieces import PiecesKernel
from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch


ALIGNED = 32  # rows that the kernel's LSE is padded to


@dataclass(frozen=True)
class SDPAEfficient(PiecesKernel):
    """torch's memory-efficient backend on CUDA, half types and float32, head dims up to 1024, of values another than of keys."""

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        dtypes = ("bfloat16", "float16", "float32")
        return half_on_cuda(problem, platform, "torch's memory-efficient kernel", head_dim=1024, dtypes=dtypes)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> OutLse:
        import torch

        k, v = (per_query_head(x, q.shape[1], 1) for x in (k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
        return out, lse[..., : q.shape[2]]

    def adjoint(self, dout: torch.Tensor, saved: Saved, causal: bool, scale: float) -> Gradients:
        import torch

        q, k, v, out, lse = saved
        keys, values = (per_query_head(x, q.shape[1], 1) for x in (k, v))
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % ALIGNED), value=torch.inf).contiguous()
        # The kernel's backward reads out by the strides of a packed (B, S, H, D) tensor, whatever its own are.
        out = out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        # Without dropout the random state is never read.
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            dout, q, keys, values, None, out, lse, seed, seed, 0.0, [True, True, True, False], causal, scale=scale
        )
        return dq, per_kv_head(dk, k.shape[1], 1), per_kv_head(dv, k.shape[1], 1)
