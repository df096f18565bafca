"""Ulysses: an all-to-all gives every rank the whole sequence for its share of the heads (arXiv 2309.14509).

KV heads are replicated where there are fewer of them than ranks; their gradients are summed over the replicas. With several
stages the heads of a rank come in as many parts, and the exchange of one part runs while another is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_count, gathered, indivisible_heads, returned, too_few_heads, too_short
from lcbench.schedule.layout import contiguous
from lcbench.schedule.schedule import NO_ROWS, Move, Schedule, Step, head_groups, rows


@dataclass(frozen=True)
class Ulysses(Scheduled):
    """``uneven_heads``: let ranks have different numbers of query heads; ``stages``: parts of a rank's heads."""

    uneven_heads: bool = False
    stages: int = 1

    def __post_init__(self) -> None:
        check_count("stages", self.stages)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        ranks = problem.scale.world_size
        refused = None if self.uneven_heads else indivisible_heads(problem.heads, ranks)
        return refused or too_few_heads(problem.heads, ranks * self.stages) or too_short(problem, ranks)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        every = np.arange(ranks)
        groups = head_groups(problem.heads, ranks * self.stages)  # of rank r: r * stages and what follows
        steps = []
        for time in range(self.stages + 2):
            moves: tuple[Move, ...] = ()
            tiles = returns = NO_ROWS
            if time < self.stages:  # heads of this stage come in
                moves = gathered(every[None], every * self.stages + time)
            if 1 <= time <= self.stages:
                tiles = rows(every, every * self.stages + time - 1, 0, 0)
            if time >= 2:
                returns = returned(every[None], every * self.stages + time - 2)
            steps.append(Step(tiles, moves, returns))
        whole = (tuple(range(ranks)),)
        return Schedule(ranks, contiguous(problem.seqlen, ranks), every, groups, whole, tuple(steps))
