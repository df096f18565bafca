"""No context parallelism: one rank holds everything. The baseline every strategy is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lcbench.cp.base import Scheduled
from lcbench.cp.ring import Ring
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.lowering import Lowering
from lcbench.schedule.schedule import Schedule


@dataclass(frozen=True)
class Local(Scheduled):
    one_rank: ClassVar[bool] = True
    lowering: Lowering = field(default="auto", init=False)  # no option: one rank sends nothing

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if problem.scale.world_size != 1:
            return f"runs on one GPU, scale={problem.scale} has {problem.scale.world_size}"
        return None

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        return Ring("contiguous").schedule(problem, mask)  # of one rank
