"""Blocks with most softmax weight by the LSE of an earlier step, as few as have a share of it: AdaSpa (arXiv 2502.21079, "Fused
LSE-Cached Search with Head-adaptive Hierarchical Block Sparse Attention").

In a diffusion model, which keys matter and the LSE of a query change little from step to step. So the weights ``exp(s_ij -
LSE_i)`` of a step's queries and keys, summed over blocks, take one pass over them where the LSE is that of an earlier step; else
they take two. What is chosen is used for several steps (``every``).

Each map keeps in each row of blocks those of the highest sums, as few as together have ``recall`` of the row's. So heads differ
in how many they keep, as in the paper, and here rows do as well: no row of a head falls short for another's sake. ``density``
bounds the number from above.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lcbench.masks.band import Ints
from lcbench.masks.block import Keep
from lcbench.problem import Problem
from lcbench.selectors.base import Effort, Features, Rows
from lcbench.selectors.choosing import Budgeted, by_head, by_head_effort, check_share, of_columns, of_maps, reach, scores
from lcbench.selectors.oracle import masses_effort
from lcbench.selectors.partial import at_once, hide, runs

if TYPE_CHECKING:
    import torch


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

    def asked(self, rows: Rows, edges: Ints) -> tuple[int, Keep] | None:
        return super().asked(rows, edges) if self.recall == 1 else None

    def scoring(self, problem: Problem, pairs: float) -> Effort:
        return by_head_effort(problem) + masses_effort(self, problem, pairs)

    def of_keys(self, k: torch.Tensor, sizes: Ints, problem: Problem) -> Features:
        return {"k": k}

    def of_all(self, features: Features, edges: Ints, problem: Problem) -> Features:
        return {"k": by_head(features["k"])}

    def score(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> torch.Tensor:
        """Sums of ``exp(s_ij - LSE_i)`` over blocks, (maps, columns)."""
        import torch

        assert rows.lse is not None
        heads, q, (first, last) = problem.heads, by_head(rows.q), reach(rows)
        each, found = heads.q // heads.kv, q.new_zeros((heads.q, last - first))
        lse = rows.lse.T[..., None].to(q)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)  # of queries that see no key
        for head in range(heads.kv):
            group = slice(head * each, (head + 1) * each)
            for columns in runs(rows.pairs > 0, at_once(rows, each, self.k_block)):
                k = keys["k"][head : head + 1, edges[columns.start] : edges[columns.stop]]
                weights = hide(scores(q[group], k, problem).sub_(lse[group]).exp_(), rows, edges, columns, 0.0)
                found[group, columns.start - first : columns.stop - first] = of_columns(weights.sum(1), self.k_block, 0.0).sum(-1)
        return of_maps(found, self.maps(heads))

    def counts(self, scores: torch.Tensor, always: Keep, rows: Rows) -> Ints:
        import torch

        counts = super().counts(scores, always, rows)
        if self.recall < 1:
            forced = torch.from_numpy(always).to(scores.device)
            order = scores.masked_fill(forced, torch.inf).sort(dim=1, descending=True, stable=True).indices
            sums = scores.double().gather(1, order).cumsum(1)
            counts = np.minimum(counts, 1 + (sums < self.recall * sums[:, -1:]).sum(1).cpu().numpy())
        return counts
