"""Blocks with the keys that queries and keys of a low rank find critical, for adjacent queries together: DSV (arXiv 2502.07590).

DSV has two small matrices for each head, of ``rank`` columns: ``(q W_q)(k W_k)^T`` predicts ``q k^T``. The keys of the highest
predictions are critical. Neighbours in a video have much the same ones, so queries choose by groups (of 2 x 2 x 2 in space and
time).

DSV trains its matrices beside the model. Nothing is trained here: they are the best ones for the inputs at hand, in closed form.
Let ``C_q`` be the second moments of a head's queries and ``C_k`` the covariance of its keys. The mean squared error of the
predictions of ``q (k - mean)^T``, over queries and keys that are drawn independently, is ``|C_q^1/2 (1 - W_q W_k^T) C_k^1/2|^2``.
With the singular values ``C_q^1/2 C_k^1/2 = U S V^T`` it is least for the first ``rank`` columns of::

    W_q = C_q^-1/2 U S^1/2,    W_k = C_k^-1/2 V S^1/2

At the head's own dimension predictions are exact. The mean key adds the same to all predictions of a query. Moments are those of
``sample`` tokens, evenly apart, which all ranks are told; query heads that share a key/value head share its matrices.

A group is ``group`` adjacent queries, and its query their mean. Attention runs on blocks here, on critical keys there; so a
block's score is the softmax weight that its critical keys have among all critical ones by their predictions, summed over the
groups of a block of queries and the heads of a map. (How many critical keys it has would not do: one sink has more weight than
many others.) Nothing but these sums is kept of the predictions of a block of queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lcbench.masks.band import Ints
from lcbench.problem import Problem
from lcbench.selectors.base import Effort, Features, Round, Rows, blocks_of, check_whole
from lcbench.selectors.choosing import (
    SUMMING,
    Budgeted,
    block_means,
    by_head,
    by_head_effort,
    check_share,
    each_block,
    of_columns,
    of_maps,
    reach,
    scores,
    steady,
)
from lcbench.selectors.partial import hide

if TYPE_CHECKING:
    import torch

PREDICTED = 30  # numbers read and written per prediction: hidden, counted, the highest, those below them, a softmax, sums
RIDGE = 1e-6  # of the mean variance, added to every direction: a sample may not have all of them


@dataclass(frozen=True)
class Dsv(Budgeted):
    """A selector by predictions of low rank.

    Attributes:
        rank: numbers of a predicted query and key, at most the head's.
        critical: share of the keys that a group sees that are critical to it, above 0 and up to 1, at least one key.
        group: adjacent queries that share critical keys.
        sample: tokens, at least, that the matrices are worked out from.

    Raises:
        ValueError: a number that an option may not be.
    """

    rank: int = 16
    critical: float = 0.1
    group: int = 8
    sample: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("critical", self.critical)
        for name in ("rank", "group", "sample"):
            check_whole(name, getattr(self, name), 1)

    def unsupported(self, problem: Problem) -> str | None:
        if self.rank > problem.heads.dim:
            return f"selector.rank={self.rank} is more than the {problem.heads.dim} numbers of a head of heads={problem.heads}"
        return None

    def rounds(self, problem: Problem) -> Sequence[Round]:
        def sampled(x: torch.Tensor, tokens: int, block: int) -> torch.Tensor:
            """(1, n, H, D): of a block's rows (T, H, D), so many that those of all blocks are at least ``sample``."""
            count = -(-self.sample // -(-tokens // block))
            return x[((np.arange(count) + 0.5) * len(x) / count).astype(np.int64).tolist()][None]

        def projected(k: torch.Tensor, known: Features) -> torch.Tensor:
            """(T, Hk, rank): keys of a low rank, in the type of the inputs."""
            return ((by_head(k) - known["k_mean"]) @ known["w_k"]).transpose(0, 1).to(k.dtype)

        moments = Round(
            keys=lambda k, sizes, known: {"k_sample": each_block(lambda own: sampled(own, problem.seqlen, self.k_block), k, sizes)},
            by_block=("k_sample",),
            queries=lambda rows, known: {"q_sample": sampled(rows.q, problem.queries, self.q_block)},
            all=lambda found, edges: predictors(found["q_sample"].flatten(0, 1), found["k_sample"].flatten(0, 1), self.rank),
        )
        low = Round(
            keys=lambda k, sizes, known: {"k_low": each_block(lambda own: projected(own, known), k, sizes)},
            all=lambda found, edges: {"k_low": by_head(found["k_low"]), "w_q": found["w_q"]},
        )
        return moments, low

    def scoring(self, problem: Problem, pairs: float) -> Effort:
        (rows, columns), heads, size = blocks_of(self, problem), problem.heads, problem.sum_itemsize
        predicted, grouped = heads.q * pairs / self.group, problem.queries * heads.q / self.group
        flops = 2.0 * self.rank * (predicted + heads.dim * (problem.seqlen * heads.kv + grouped))
        moved = size * (PREDICTED * predicted + 4 * heads.dim * (problem.seqlen * heads.kv + problem.queries * heads.q))
        kernels = float(SUMMING * rows * heads.kv + 5 * columns)
        told = by_head_effort(problem, self.rank / heads.dim)
        return told + Effort(flops, moved, kernels, told=float(self.sample * (heads.q + heads.kv) * heads.dim * problem.itemsize))

    def score(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> torch.Tensor:
        import torch

        heads, (first, last) = problem.heads, reach(rows)
        each, begin, end = heads.q // heads.kv, int(edges[first]), int(edges[last])
        sizes = np.diff(np.append(np.arange(0, len(rows.q), self.group), len(rows.q)))
        q, found = by_head(block_means(rows.q, sizes)), []
        for head in range(heads.kv):
            own = q[head * each : (head + 1) * each] @ keys["w_q"][head]
            predicted = scores(own, keys["k_low"][head : head + 1, begin:end], problem)
            hide(predicted, rows, edges, range(first, last), -torch.inf, self.group)
            seen = (predicted[0] > -torch.inf).sum(-1)
            count = torch.round(self.critical * seen.double()).long().clamp_(1)
            least = predicted.topk(int(count.max()), dim=-1).values.gather(-1, (count - 1).expand(each, -1)[..., None])
            weights = torch.softmax(predicted.masked_fill_(predicted < least, -torch.inf), -1).nan_to_num_(0.0)
            found.append(of_columns(weights.sum(1), self.k_block, 0.0).sum(-1))
        return of_maps(torch.cat(found), self.maps(heads))


def predictors(q: torch.Tensor, k: torch.Tensor, rank: int) -> Features:
    """``W_q`` and ``W_k`` of each key/value head, (Hk, D, rank), and its mean key (Hk, 1, D), in the type of sums, from queries
    (n, Hq, D) and keys (m, Hk, D)."""
    import torch

    from lcbench.kernels.base import accumulation_dtype

    with steady(torch.device("cpu")):
        queries = q.cpu().double().unflatten(1, (k.shape[1], -1)).transpose(0, 1).flatten(1, 2)
        keys = k.cpu().double().transpose(0, 1)
        mean = keys.mean(1, keepdim=True)
        (q_root, q_inverse), (k_root, k_inverse) = roots(queries), roots(keys - mean)
        u, s, v = torch.linalg.svd(q_root @ k_root)
        u, v = (x[..., :rank] * s[:, None, :rank].sqrt() for x in (u, v.mT))
        found = {"w_q": q_inverse @ u, "w_k": k_inverse @ v, "k_mean": mean}
    return {name: x.to(k.device, accumulation_dtype(k.dtype)) for name, x in found.items()}


def roots(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The root of the second moments of (H, n, D), and its inverse, (H, D, D)."""
    import torch

    moments = x.mT @ x / x.shape[1]
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)
    ridge = RIDGE * torch.where(mean > 0, mean, 1.0)
    values, vectors = torch.linalg.eigh(moments)
    values = (values.clamp_min(0.0) + ridge[:, None]).sqrt()
    return (vectors * values[:, None]) @ vectors.mT, (vectors / values[:, None]) @ vectors.mT
