"""Layers with an associative memory read a sequence segment by segment, in one of two orders (``lcbench.workloads.memory_model``).

Phases: ``forward`` and, unless direction=forward, ``backward``, through all segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel
from lcbench.masks.band import BandMask
from lcbench.masks.causal import causal
from lcbench.masks.mask import Mask
from lcbench.problem import ALONE, Mesh, Problem
from lcbench.selectors.base import Selector
from lcbench.workloads.base import Attended, Work, Workload
from lcbench.workloads.memory_model import MemoryModel
from lcbench.workloads.memory_parts import made_of
from lcbench.workloads.models import not_of_layers
from lcbench.workloads.parts import Made, Share

if TYPE_CHECKING:
    from lcbench.measure.session import Gang
    from lcbench.workloads.remembering import MemorySession


@dataclass(frozen=True)
class RecurrentMemory(MemoryModel, Workload):
    """Layers of a ``MemoryModel``, on one rank."""

    def misfit(self, mesh: Mesh) -> str | None:
        return None if mesh == ALONE else f"mesh={mesh}: a sequence with a memory is read by one rank"

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Any) -> str | None:
        if problem.scale.world_size != 1:
            return f"scale={problem.scale}: a memory is read and written by one rank; cp=none"
        batch = "it reads one sequence, all of whose tokens are new"
        if reason := not_of_layers(problem, batch, "sums of a memory are beyond what float16 holds; bfloat16 runs"):
            return reason
        if not isinstance(mask, BandMask) or not np.array_equal(mask.bands, causal(problem.seqlen).bands):
            return "it sees what came before, in the segment or by the memory: mask=causal only"
        if problem.seqlen % self.segment:
            return f"workload.segment={self.segment} does not divide seqlen={problem.seqlen}"
        for size in self.group_sizes(problem):
            if reason := kernel.unsupported(*self.of_group(problem, size)):
                return f"the kernel does not run {size} segments side by side: {reason}"
        return None

    def made(self, share: Share, recompute: Any) -> Made:
        return made_of(self, share.problem, fused=share.fused)

    def attends(self, problem: Problem, mask: Mask, selector: Selector | None) -> list[Attended]:
        """One group after the other: of each size as many as there are."""
        sizes = [len(group) for group in self.groups(self.segments(problem))]
        return [(*self.of_group(problem, size), sizes.count(size) / len(sizes)) for size in self.group_sizes(problem)]

    def input_bytes(self, problem: Problem) -> float:
        """Of the tokens and, with backward, of the gradients of what comes out."""
        return problem.seqlen * self.model.hidden * problem.itemsize * (2 if problem.backward else 1)

    def start(self, work: Work, draw: int, gang: Gang) -> MemorySession:
        from lcbench.workloads.remembering import MemorySession  # with torch, which planning does without

        return MemorySession(self, work, gang, draw)
