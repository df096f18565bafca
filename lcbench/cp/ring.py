"""Ring attention: queries stay, keys and values travel once around all ranks (Liu et al., arXiv 2310.01889).

The zigzag layout (chunks i and 2P-1-i on rank i) gives every rank the same share of a causal mask in every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import Order, check_order, deal, rings, too_short
from lcbench.schedule.schedule import Schedule, head_groups, singles


@dataclass(frozen=True)
class Ring(Scheduled):
    """``layout``: how tokens are dealt out; ``auto``: zigzag or contiguous, whichever is better balanced by exact area."""

    layout: Order = "auto"

    def __post_init__(self) -> None:
        check_order(self.layout)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return too_short(problem, problem.scale.world_size)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        shards = deal(mask, problem.seqlen, ranks, self.layout)
        return Schedule(ranks, shards, np.arange(ranks), head_groups(problem.heads, 1), singles(ranks), rings([ranks]))
