"""TokenRing: keys and values stay, queries travel once around, results return the other way meanwhile (arXiv 2412.20501)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcbench.cp.base import Dealt
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import dealt, sides
from lcbench.schedule.schedule import NO_ROWS, Move, Schedule, Step, head_groups, rows, singles


@dataclass(frozen=True)
class TokenRing(Dealt):
    """Queries travel around, keys and values stay."""

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        every = np.arange(ranks)
        steps = []
        for hop in range(ranks + (ranks > 1)):
            held, before = (every - hop) % ranks, (every - hop + 1) % ranks
            steps.append(
                Step(
                    tiles=rows(every, 0, held, every) if hop < ranks else NO_ROWS,
                    moves=(Move("q", rows(every, (every + 1) % ranks, held, 0)),) if hop < ranks - 1 else (),
                    returns=rows(every, before, before, 0) if hop >= 2 else NO_ROWS,
                )
            )
        q, k = dealt(*sides(problem, mask, ranks, self.layout), every, singles(ranks))
        return Schedule(ranks, q, k, head_groups(problem.heads, 1), tuple(steps))
