"""Blocks with most softmax weight: what any selector is measured against.

A block's score is the sum of the softmax weights of its pairs, exact over the cell's own mask, and summed over the query heads of
a map. So no map that keeps as many blocks of keys for each block of queries keeps more weight. It computes all products of queries
and keys, which is what sparse attention is there to save: it is no way to be fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.masks.band import Ints
from lcbench.problem import Problem
from lcbench.selectors.base import Effort, Features, Rows, Selector, blocks_of
from lcbench.selectors.choosing import (
    Budgeted,
    by_head,
    by_head_effort,
    of_columns,
    of_maps,
    reach,
    scores,
    seen_blocks,
)
from lcbench.selectors.partial import hide

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Oracle(Budgeted):
    """It has no options of its own."""

    def unsupported(self, problem: Problem) -> str | None:
        if problem.softmax.sink:
            return "selector=oracle is not given the sinks of softmax=sink, and its weights would not be exact"
        return None

    def of_keys(self, k: torch.Tensor, sizes: Ints, problem: Problem) -> Features:
        return {"k": k}

    def of_all(self, features: Features, edges: Ints, problem: Problem) -> Features:
        return {"k": by_head(features["k"])}

    def scoring(self, problem: Problem, pairs: float) -> Effort:
        return by_head_effort(problem) + masses_effort(self, problem, pairs)

    def score(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> torch.Tensor:
        return of_maps(block_masses(rows, keys["k"], edges, self.k_block, problem), self.maps(problem.heads))


# Scores scaled, hidden, exponentials of a softmax, their sum, and sums over queries and keys: numbers that are read and written per
# pair; and operations per key/value head.
WEIGHED, WEIGHING = 12, 14


def masses_effort(selector: Selector, problem: Problem, pairs: float) -> Effort:
    """What ``block_masses`` of all blocks of queries takes, by ``pairs`` of a query head."""
    every, rows = problem.heads.q * pairs, blocks_of(selector, problem)[0]
    return Effort(
        2.0 * problem.heads.dim * every, WEIGHED * problem.sum_itemsize * every, float(WEIGHING * rows * problem.heads.kv)
    )


def block_masses(rows: Rows, k: torch.Tensor, edges: Ints, size: int, problem: Problem) -> torch.Tensor:
    """Softmax weight that a block of queries has in blocks of keys, summed over its queries, in the type of sums.

    Args:
        k: all keys, (Hk, S, D), as ``by_head`` gives them.
        size: keys of a block.

    Returns:
        (Hq, last - first), of the blocks that ``reach`` names; their sum is the number of queries that see a key.
    """
    import torch

    first, last = reach(rows)
    begin, end = int(edges[first]), int(edges[last])
    q, blind = by_head(rows.q), torch.from_numpy(~seen_blocks(rows, edges).any(1)).to(rows.q.device)
    each, masses = len(q) // len(k), []
    for head in range(len(k)):
        found = scores(q[head * each : (head + 1) * each], k[head : head + 1, begin:end], problem)
        found = hide(found, rows, edges, range(first, last), -torch.inf)
        weights = torch.softmax(found, -1).masked_fill_(blind[:, None], 0.0)
        masses.append(of_columns(weights.sum(1), size, 0.0).sum(-1))
    return torch.cat(masses)
