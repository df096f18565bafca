"""torch's ``math`` backend of scaled_dot_product_attention, with the mask as a matrix: every score in memory.

Its backward is written out here, since torch's own knows the weights of its own keys only, not the LSE of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import OutLse, Prepared, accumulation_dtype, heads_first
from lcbench.kernels.naive import Naive, PreparedNaive
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.problem import Heads

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SDPAMath(Naive):
    """torch's math forward, and the backward of ``naive``."""

    softcaps: ClassVar[bool] = False

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BandMask)
        return PreparedMath(mask, accumulation_dtype(dtype), device)


class PreparedMath(PreparedNaive):
    """The mask as a matrix (Tq, Tk) that is added to the scores, 0 or -inf, in the accumulation type."""

    def __init__(self, mask: BandMask, dtype: torch.dtype, device: torch.device) -> None:
        import torch

        super().__init__(mask, device)
        # Below the dispatcher a mask is added to the scores, also a boolean one.
        self._bias = torch.zeros(self.allowed.shape, dtype=dtype, device=device).masked_fill_(~self.allowed, -torch.inf)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        import torch

        assert not softcap, "torch's math forward knows no softcap"

        # The backend itself computes half types in float32; it is given them so because the weights are to stay float32 too.
        heads = [heads_first(x).to(self._bias.dtype) for x in (q, k, v)]
        out, weights = torch.ops.aten._scaled_dot_product_attention_math(
            *heads, self._bias, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1).to(q.dtype), self._lse(weights[0], q, k, softmax_scale)

    def _lse(self, weights: torch.Tensor, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        """LSE (Tq, Hq) from weights (Hq, Tq, Tk): log(weight) = score - LSE, read off at each row's largest weight."""
        import torch

        sums = torch.float64 if q.dtype == torch.float64 else torch.float32
        largest, at = (x.T for x in weights.max(-1))  # (Tq, Hq)
        kv_head = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
        score = (q.to(sums) * k[at, kv_head].to(sums)).sum(-1) * scale
        return torch.where(self.allowed.any(1)[:, None], score - torch.log(largest.to(sums)), -torch.inf)
