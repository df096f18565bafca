"""No context parallelism: one rank holds everything. The baseline every strategy is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcbench.cp.layout import contiguous
from lcbench.cp.schedule import Mesh, Schedule, ring_steps
from lcbench.masks.mask import Mask
from lcbench.problem import Problem


@dataclass(frozen=True)
class Local:
    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if problem.scale.world_size != 1:
            return f"runs on one GPU, scale={problem.scale} has {problem.scale.world_size}"
        return None

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        mesh, layout = Mesh.of(ring=1), contiguous(problem.seqlen, 1)
        return Schedule(mesh, layout, layout, np.zeros(1, dtype=np.int64), ring_steps(mesh, "ring"))
