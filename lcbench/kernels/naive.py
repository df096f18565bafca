"""Attention with all scores in memory: the baseline that other kernels' memory is measured against, for short sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import Kernel, Platform, Prepared, Rounding, Saved, accumulation_dtype, per_kv_head, per_query_head
from lcbench.masks.band import BandMask
from lcbench.masks.convert import points
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

    from lcbench.kernels.base import Gradients, OutLse


@dataclass(frozen=True)
class Naive(Kernel):
    """Plain attention in operations of torch, on any device and in any type."""

    softcaps: ClassVar[bool] = True

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return too_many_scores(problem, platform)

    def holds_scores(self, platform: Platform) -> bool:
        return True

    def rounding(self, platform: Platform) -> Rounding:
        return Rounding(scores=True)

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BandMask)
        return PreparedNaive(mask, device)


def too_many_scores(problem: Problem, platform: Platform) -> str | None:
    """Why the scores of a problem do not fit into a device's memory, or None.

    Every strategy needs at least one tile of a rank's share of the queries and of the keys.
    """
    queries, keys = (-(-tokens // problem.scale.world_size) for tokens in (problem.queries, problem.seqlen))
    needed = 2 * 4 * problem.heads.q * queries * keys  # scores and weights
    if platform.memory_bytes and needed > platform.memory_bytes:
        return f"holds all scores: {needed / 2**30:.0f} GiB or more, the device has {platform.memory_bytes / 2**30:.0f}"
    return None


class PreparedNaive:
    """The mask as a matrix, (Tq, Tk) bool."""

    calls = 1

    def __init__(self, mask: BandMask, device: torch.device) -> None:
        self.allowed = points(mask, device)

    def _scores(self, q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
        """Scores (Hq, Tq, Tk) in the accumulation type, -inf for pairs outside of the mask."""
        import torch

        scores = torch.einsum("qhd,khd->hqk", q, per_query_head(k, q.shape[1], 1)).to(accumulation_dtype(q.dtype)) * scale
        if softcap:
            scores = torch.tanh(scores.div_(softcap)).mul_(softcap)
        return scores.masked_fill_(~self.allowed, -torch.inf)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        import torch

        scores = self._scores(q, k, softmax_scale, softcap)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
        out = torch.einsum("hqk,khd->qhd", weights.to(v.dtype), per_query_head(v, q.shape[1], 1))
        return out, lse.T.contiguous()

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float, softcap: float = 0.0) -> Gradients:
        import torch

        q, k, v, out, lse = saved
        sums = accumulation_dtype(q.dtype)
        finite = torch.where(lse == -torch.inf, 0.0, lse).T[..., None]
        scores = self._scores(q, k, softmax_scale, softcap)
        weights = torch.exp(scores - finite)
        delta = (dout.to(sums) * out).sum(-1).T[..., None]
        dscores = torch.einsum("qhd,khd->hqk", dout, per_query_head(v, q.shape[1], 1)).to(sums) - delta
        dscores = dscores * weights * softmax_scale
        if softcap:
            dscores *= 1 - torch.where(self.allowed, scores / softcap, 0.0) ** 2
        dscores = dscores.to(q.dtype)
        dq = torch.einsum("hqk,khd->qhd", dscores, per_query_head(k, q.shape[1], 1))
        dk = torch.einsum("hqk,qhd->khd", dscores, q)
        dv = torch.einsum("hqk,qhd->khd", weights.to(q.dtype), dout)
        return dq, per_kv_head(dk, k.shape[1], 1), per_kv_head(dv, k.shape[1], 1)
