"""No context parallelism: one rank holds everything. The baseline every strategy is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import rings
from lcbench.schedule.layout import contiguous
from lcbench.schedule.lowering import Lowering
from lcbench.schedule.schedule import Schedule, head_groups, singles


@dataclass(frozen=True)
class Local(Scheduled):
    """One tile: all queries on all keys."""

    one_rank: ClassVar[bool] = True
    lowering: Lowering = field(default="auto", init=False)  # no option: one rank sends nothing

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if problem.scale.world_size != 1:
            return f"runs on one GPU, scale={problem.scale} has {problem.scale.world_size}"
        return None

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        shards = contiguous(problem.seqlen, 1)
        return Schedule(1, shards, np.arange(1), head_groups(problem.heads, 1), singles(1), rings([1]))
