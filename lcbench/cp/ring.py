"""Ring attention: queries stay, keys and values travel once around all ranks (Liu et al., arXiv 2310.01889).

The zigzag layout (chunks i and 2P-1-i on rank i) gives every rank the same share of a causal mask in every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcbench.cp.base import Dealt
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import dealt, rings, sides
from lcbench.schedule.schedule import Schedule, head_groups, singles


@dataclass(frozen=True)
class Ring(Dealt):
    """Keys and values travel around, queries stay."""

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        q, k = dealt(*sides(problem, mask, ranks, self.layout), np.arange(ranks), singles(ranks))
        return Schedule(ranks, q, k, head_groups(problem.heads, 1), rings([ranks]))
