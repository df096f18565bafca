"""The reference kernel: float64, a block of rows at a time, the mask point by point. Slow, simple, independent of the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import Gradients, Kernel, OutLse, Platform, Prepared, Saved
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 22  # scores of one block of rows, over all heads


@dataclass(frozen=True)
class Reference(Kernel):
    """Float64 attention in operations of torch, on any device; inputs of any type, results in float64."""

    softcaps: ClassVar[bool] = True

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return None

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BandMask)
        return PreparedReference(mask)


@dataclass
class PreparedReference:
    """A band mask, tested pair by pair for each block of rows."""

    mask: BandMask
    calls: int = 1

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        import torch

        out = torch.zeros((*q.shape[:2], v.shape[2]), dtype=torch.float64, device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
        values = _per_query_head(v, q)
        for rows, scores, _ in self._scores(q, k, softmax_scale, softcap):
            top = scores.amax(-1)
            row_lse = scores.logsumexp(-1)
            weights = torch.exp(scores - torch.where(top == -torch.inf, 0.0, row_lse)[..., None])
            out[rows] = torch.einsum("hqk,khd->qhd", weights, values)
            lse[rows] = row_lse.T
        return out, lse

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float, softcap: float = 0.0) -> Gradients:
        import torch

        q, k, v, out, lse = saved
        keys, values = _per_query_head(k, q), _per_query_head(v, q)
        queries, dout64 = q.double(), dout.double()
        delta = (dout64 * out.double()).sum(-1)
        dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        finite = torch.where(lse == -torch.inf, 0.0, lse).double()
        for rows, scores, slopes in self._scores(q, k, softmax_scale, softcap):
            weights = torch.exp(scores - finite[rows].T[..., None])
            dv += torch.einsum("hqk,qhd->khd", weights, dout64[rows])
            dscores = weights * (torch.einsum("qhd,khd->hqk", dout64[rows], values) - delta[rows].T[..., None])
            if slopes is not None:
                dscores *= slopes
            dq[rows] = torch.einsum("hqk,khd->qhd", dscores, keys) * softmax_scale
            dk += torch.einsum("hqk,qhd->khd", dscores, queries[rows]) * softmax_scale
        groups = (k.shape[1], -1)
        return dq, dk.unflatten(1, groups).sum(2), dv.unflatten(1, groups).sum(2)

    def _scores(
        self, q: torch.Tensor, k: torch.Tensor, softmax_scale: float, softcap: float
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
        """Blocks of rows, their scores (Hq, rows, Tk), -inf for pairs outside of the mask, and the derivatives of capped scores."""
        import torch

        keys = _per_query_head(k, q)
        height = max(1, BLOCK_ELEMENTS // max(1, q.shape[1] * k.shape[0]))
        k_index = torch.arange(k.shape[0], device=q.device)
        for begin in range(0, q.shape[0], height):
            rows = slice(begin, min(begin + height, q.shape[0]))
            q_index = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            allowed = torch.zeros(len(q_index), len(k_index), dtype=torch.bool, device=q.device)
            for q0, q1, k0, k1, lo, hi in self.mask:
                if q0 < rows.stop and rows.start < q1:
                    inside = (q0 <= q_index) & (q_index < q1) & (k0 <= k_index) & (k_index < k1)
                    allowed |= inside & (lo <= k_index - q_index) & (k_index - q_index <= hi)
            scores = torch.einsum("qhd,khd->hqk", q[rows].double(), keys) * softmax_scale
            slopes = None
            if softcap:
                bent = torch.tanh(scores / softcap)
                scores, slopes = softcap * bent, 1 - bent**2
            yield rows, scores.masked_fill(~allowed, -torch.inf), slopes


def _per_query_head(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x.double().repeat_interleave(q.shape[1] // x.shape[1], 1)
