"""Sequence-wise sparse context parallelism of DSV (arXiv 2502.07590, section 5): ranks fetch the critical keys of their queries.

Every rank computes its own queries, which are neighbours, with all heads. For each head it fetches the blocks of keys that its
queries attend to by the map of that head, and no others. They travel in ``stages`` parts, each while the part before it is
computed; the rank's own keys are computed first. Gradients go straight back to the owners.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_count, too_few_queries
from lcbench.schedule.layout import contiguous
from lcbench.schedule.schedule import Schedule, Side
from lcbench.schedule.sparse import Demand, fetching, owner_of_cells, sparse_edges


@dataclass(frozen=True)
class SparseSequence(Scheduled):
    """``stages``: parts of the remote keys."""

    stages: int = 2

    def __post_init__(self) -> None:
        check_count("stages", self.stages)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return too_few_queries(problem)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        every = np.arange(problem.scale.world_size)
        q_edges, k_edges = sparse_edges(problem, self.stages)
        demand, queries = Demand.of(mask, q_edges, k_edges, every), Side(contiguous(problem.queries, len(every)), every, ())
        return fetching(problem, demand, queries, owner_of_cells(demand, len(every)), self.stages)
