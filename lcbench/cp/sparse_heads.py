"""Head-wise sparse context parallelism of DSV (arXiv 2502.07590, section 5): heads are dealt out by their work.

An all-to-all gives every rank the whole sequence for its heads, as in Ulysses. Heads have maps of their own, and so more or less
work: the head with most pairs goes first, each to the rank that then has least. Ranks have any number of heads, and none if there
are fewer of them than ranks. A key/value head is copied to every rank that has a query head of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import too_few_queries
from lcbench.schedule.schedule import Schedule
from lcbench.schedule.sparse import Demand, grid_of_heads, pairs_of, sparse_edges


@dataclass(frozen=True)
class SparseHeads(Scheduled):
    """It has no options of its own."""

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return too_few_queries(problem)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        q_edges, k_edges = sparse_edges(problem, 1)
        # Every rank gets all keys of its heads, so nothing is asked of the mask but what work heads are.
        demand = Demand(k_edges, np.arange(ranks), np.ones((1, ranks, ranks), dtype=bool))
        return grid_of_heads(problem, demand, pairs_of(mask, problem.heads, q_edges), ranks, 1)
