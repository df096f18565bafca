"""Blocks whose mean key is most like the queries: MoBA's gate (arXiv 2502.13189, section 2.2, equations 5 to 7).

There a query's score of a block is its product with the mean of the block's keys, and the query attends to the blocks of highest
scores and always to its own. Here the queries of a block attend to the same blocks, and a block's score is the mean of theirs:
``q_block=1`` is the paper's gate. Its gate has no weights to train, so nothing is missing.

The means are what ranks tell each other: a block of keys is one key to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lcbench.masks.band import Ints
from lcbench.problem import Problem
from lcbench.selectors.base import Effort, Features, Rows, blocks_of
from lcbench.selectors.choosing import SUMMING, Budgeted, block_means, blocks_seen, by_head, of_maps, products, reach

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Moba(Budgeted):
    """It has no options of its own; ``local=1`` keeps the queries' own block."""

    def of_keys(self, k: torch.Tensor, sizes: Ints, problem: Problem) -> Features:
        return {"mean": block_means(k, sizes)}

    def by_block(self) -> tuple[str, ...]:
        return ("mean",)

    def of_all(self, features: Features, edges: Ints, problem: Problem) -> Features:
        return {"mean": by_head(features["mean"])}

    def scoring(self, problem: Problem, pairs: float) -> Effort:
        (rows, columns), heads, size = blocks_of(self, problem), problem.heads, problem.sum_itemsize
        summed = 4 * size * heads.dim * (problem.seqlen * heads.kv + problem.queries * heads.q)
        means = float(columns * heads.kv * heads.dim * size)
        products = 2.0 * heads.q * heads.dim * blocks_seen(self, problem, pairs)
        return Effort(products, float(summed), float(SUMMING * (rows + columns)), 2 * means, means)

    def score(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> torch.Tensor:
        first, last = reach(rows)
        q = by_head(block_means(rows.q, np.array([len(rows.q)])))
        return of_maps(products(q, keys["mean"][:, first:last])[:, 0], self.maps(problem.heads))
