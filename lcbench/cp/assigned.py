"""A batch of documents as a planner has assigned them: in each micro-batch sub-groups of ranks share some documents each.

A micro-batch has a sequence of its own, in which the documents of its sub-groups lie behind one another. It is one schedule of all
ranks, the sub-groups' schedules side by side. Nobody waits between micro-batches for ranks that it shares nothing with (ByteScale,
arXiv 2502.21231; FlexSP, arXiv 2412.01523; Hydraulis, arXiv 2412.07894).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lcbench.cp.base import Place, Scheduled, Strategy
from lcbench.cp.micro_batch import MicroBatch
from lcbench.cp.sub_groups import sub_problem
from lcbench.kernels.base import Kernel, Unsupported
from lcbench.masks.band import BandMask, Ints, spread
from lcbench.masks.documents import packed
from lcbench.masks.mask import Mask
from lcbench.planners.base import Assignment, Group
from lcbench.problem import Problem
from lcbench.schedule.beside import Member, beside
from lcbench.schedule.lowering import Lowering

if TYPE_CHECKING:
    from lcbench.cp.batch_run import BatchRun


@dataclass(frozen=True, eq=False)
class Assigned(Strategy):
    """An assignment of the documents of a batch at work.

    Attributes:
        assignment: to which ranks, in which micro-batch, and by which method.
        bounds: document i is tokens ``bounds[i] ... bounds[i + 1] - 1`` of the batch, (documents + 1,).
        methods: the strategies by their names in the assignment.

    Raises:
        ValueError: methods that lower their messages in different ways.
    """

    assignment: Assignment
    bounds: Ints
    methods: Mapping[str, Scheduled]

    def __post_init__(self) -> None:
        ways = {method.lowering for method in self.methods.values()}
        if len(ways) != 1:
            raise ValueError(f"methods of one batch have one lowering, not {', '.join(sorted(ways)) or 'none'}")

    @property
    def inside(self) -> dict[str, Scheduled]:
        return dict(self.methods)

    @property
    def lowering(self) -> Lowering:
        """That of its methods."""
        return next(iter(self.methods.values())).lowering

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        """Why a sub-group cannot share its documents as it should, which names the first such; None: all can."""
        if not isinstance(mask, BandMask):
            return "a batch of documents has a mask of bands, no block map"
        for number, group in self.assignment.groups:
            place = f"micro-batch {number}, {_named(group)}"
            if group.method not in self.methods:
                return f"{place}: method {group.method} is not one of {', '.join(self.methods)}"
            if group.offload:
                return f"{place}: offload={group.offload}, and a run keeps all of what backward needs on the device"
            if refused := _refused(problem, mask, self.bounds, group, self.methods):
                return f"{place}: {refused}"
        return None

    def micro_batches(self, problem: Problem, mask: BandMask) -> Iterator[MicroBatch]:
        """Each, in order; ``problem`` and ``mask`` are those of the batch, and there is nothing against them."""
        ranks = problem.scale.world_size
        for groups in self.assignment.micro_batches:
            first, members = 0, []
            for group in groups:
                strategy, own, tile = sub_problems(problem, mask, self.bounds, group, self.methods)
                stretches = np.array([[first, own.seqlen]], dtype=np.int64)
                members.append(Member(strategy.schedule(own, tile), np.array(group.ranks), stretches))
                first += own.seqlen
            documents = np.array([number for group in groups for number in group.documents], dtype=np.int64)
            tokens = spread(self.bounds[documents], self.bounds[documents + 1])[1]
            whole = packed(mask, self.bounds, documents)
            yield MicroBatch(beside(members, ranks), whole, replace(problem, seqlen=first), tokens)

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> BatchRun:
        from lcbench.cp.batch_run import BatchRun  # with torch, which planning does without

        if refused := self.unsupported(problem, mask):
            raise Unsupported(refused)
        assert isinstance(mask, BandMask)
        return BatchRun(self.micro_batches(problem, mask), kernel, problem, place, self.lowering)


def sub_problems(
    problem: Problem, mask: BandMask, bounds: Ints, group: Group, inside: Mapping[str, Scheduled]
) -> tuple[Scheduled, Problem, BandMask]:
    """A sub-group by itself: by which strategy it shares its documents, packed behind one another, and their problem and mask.

    Args:
        problem, mask: of the batch.
        bounds: of its documents, (documents + 1,).
        inside: strategies by name.
    """
    return inside[group.method], *sub_problem(problem, mask, bounds, group.ranks, group.documents)


def _refused(problem: Problem, mask: BandMask, bounds: Ints, group: Group, inside: Mapping[str, Scheduled]) -> str | None:
    strategy, own, tile = sub_problems(problem, mask, bounds, group, inside)
    refused = strategy.unsupported(own, tile)
    return f"{group.method}: {refused}" if refused else None


def _named(group: Group) -> str:
    ranks = ", ".join(map(str, group.ranks[:3])) + (", ..." if len(group.ranks) > 3 else "")
    return f"ranks {ranks}" if len(group.ranks) > 1 else f"rank {ranks}"
