"""No context parallelism: one rank holds everything. The baseline every strategy is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import dealt, rings, sides
from lcbench.schedule.lowering import Lowering
from lcbench.schedule.schedule import Schedule, head_groups, singles


@dataclass(frozen=True)
class Local(Scheduled):
    """One tile: all queries on all keys, or all tokens from a state of zeros."""

    one_rank: ClassVar[bool] = True
    operators: ClassVar[tuple[str, ...]] = ("softmax", "linear")
    lowering: Lowering = field(default="auto", init=False)  # no option: one rank sends nothing

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if problem.scale.world_size != 1:
            return f"runs on one GPU, scale={problem.scale} has {problem.scale.world_size}"
        return None

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        q, k = dealt(*sides(problem, mask, 1, "contiguous"), np.arange(1), singles(1))
        return Schedule(1, q, k, head_groups(problem.heads, 1), rings([1]))
