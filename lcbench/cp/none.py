"""No context parallelism: one rank holds everything. The baseline every strategy is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lcbench.cp.ring import Ring
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.schedule import Schedule


@dataclass(frozen=True)
class Local:
    one_rank: ClassVar[bool] = True

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if problem.scale.world_size != 1:
            return f"runs on one GPU, scale={problem.scale} has {problem.scale.world_size}"
        return None

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        return Ring("contiguous").schedule(problem, mask)  # of one rank
