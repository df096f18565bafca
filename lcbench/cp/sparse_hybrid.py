"""Hybrid sparse context parallelism of DSV (arXiv 2502.07590, section 5): heads inside of nodes, the sequence across them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_count, too_few_queries
from lcbench.schedule.schedule import Schedule
from lcbench.schedule.sparse import Demand, grid_of_heads, pairs_of, sparse_edges


@dataclass(frozen=True)
class SparseHybrid(Scheduled):
    """``heads_degree``."""

    heads_degree: int | Literal["auto"] = "auto"
    stages: int = 2

    def __post_init__(self) -> None:
        if self.heads_degree != "auto":
            check_count("heads_degree", self.heads_degree)
        check_count("stages", self.stages)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return too_few_queries(problem)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        every = np.arange(problem.scale.world_size)
        q_edges, k_edges = sparse_edges(problem, self.stages)
        demand = Demand.of(mask, q_edges, k_edges, every)
        degree = 1 if self.heads_degree == "auto" else self.heads_degree
        return grid_of_heads(problem, demand, pairs_of(mask, problem.heads, q_edges), degree, self.stages)
