"""Blocks with most softmax weight by the LSE of an earlier step, as few of them as have a share of it: AdaSpa (arXiv 2502.21079,
"Fused LSE-Cached Search").

In a diffusion model, which keys matter and the LSE of a query change little from step to step. So the weights ``exp(s_ij - LSE_i)`` of
this step's queries and keys, summed over blocks, take one pass over them if the LSE is that of an earlier step; by itself it would take
two. What is found is used for several steps (``every``).

Each map keeps, in each row of blocks, the blocks of highest sums, as few as together have ``recall`` of the row's. Heads differ in how
many these are: that is what the paper calls head-adaptive. It gives each head one number of blocks for all of its rows, from the mean
recall of these; here rows differ too, so that no row falls short. ``density`` bounds the number from above.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lcbench.masks.band import Ints
from lcbench.masks.block import Keep
from lcbench.problem import Problem
from lcbench.selectors.base import Features, Rows
from lcbench.selectors.choosing import Budgeted, by_head, check_share, of_columns, of_maps, scores, steady
from lcbench.selectors.partial import hide, keep_best, runs

if TYPE_CHECKING:
    import torch

CACHE = 1 << 18  # scores that are in memory at once: on a CPU in its cache
MEMORY = 1 << 26


@dataclass(frozen=True)
class AdaSpa(Budgeted):
    """A selector by block sums with an LSE of before.

    Attributes:
        recall: share of a row's weight that the blocks have that are kept, above 0; 1: as many as there may be.
        density: share of the blocks that a block of queries sees that is kept at most.

    Raises:
        ValueError: a ``recall`` that is no such share.
    """

    needs_lse: ClassVar[bool] = True

    density: float | None = field(default=1.0, kw_only=True)
    recall: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("recall", self.recall)

    def of_keys(self, k: torch.Tensor, sizes: Ints, problem: Problem) -> Features:
        return {"k": k}

    def of_all(self, features: Features, edges: Ints, problem: Problem) -> Features:
        return {"k": by_head(features["k"])}

    def score(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> torch.Tensor:
        """Sums of ``exp(s_ij - LSE_i)`` over blocks, (maps, columns)."""
        import torch

        assert rows.lse is not None
        heads, q = problem.heads, by_head(rows.q)
        each, found = heads.q // heads.kv, q.new_zeros((heads.q, len(rows.pairs)))
        lse = rows.lse.T[..., None].to(q)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)  # of queries that see no key
        together = max(1, (CACHE if q.device.type == "cpu" else MEMORY) // (each * len(rows.q) * self.k_block))
        for head in range(heads.kv):
            group = slice(head * each, (head + 1) * each)
            for columns in runs(rows.pairs > 0, together):
                keys_of = keys["k"][head : head + 1, edges[columns.start] : edges[columns.stop]]
                weights = torch.exp_(scores(q[group], keys_of, problem).sub_(lse[group]))
                hide(weights, rows, edges, columns, 0.0)
                found[group, columns.start : columns.stop] = of_columns(weights.sum(1), self.k_block, 0.0).sum(-1)
        return of_maps(found, self.maps(heads))

    def keep(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> Keep:
        with steady(rows.q.device):
            found = self.score(rows, keys, edges, problem)
        most, always = self.budget(rows), self.always(rows, edges)
        counts = np.full(len(found), most)
        if self.recall < 1:
            sums = found.double().sort(dim=1, descending=True).values.cumsum(1).cpu().numpy()
            counts = np.minimum(counts, 1 + (sums < self.recall * sums[:, -1:]).sum(1))
        return keep_best(found.masked_fill(found.new_tensor(rows.pairs == 0, dtype=bool_of()), -1.0), counts, always, rows, edges)
