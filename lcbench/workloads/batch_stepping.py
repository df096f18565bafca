"""A training step of a batch of documents as ``measure_cell`` runs it: a session of ``workload=batch_step``.

The check is that of ``workload=block``, over the tokens of all micro-batches of all ranks at once: it knows nothing of sub-groups.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from lcbench.cp.assigned import Assigned
from lcbench.cp.base import RankRun
from lcbench.cp.batch_run import BatchRun
from lcbench.measure.session import Cost, Counted, Gang
from lcbench.planners.base import Assignment
from lcbench.workloads.base import Work
from lcbench.workloads.batch_training import BatchTraining, OwnPart
from lcbench.workloads.micro_batches import counted as counted_plan
from lcbench.workloads.micro_batches import watched
from lcbench.workloads.parts import BATCH
from lcbench.workloads.planned import planned
from lcbench.workloads.recompute.none import NoRecompute
from lcbench.workloads.recompute.offload import Offload
from lcbench.workloads.recompute.swapping import Swapping
from lcbench.workloads.started import Started, started
from lcbench.workloads.step import BlockSession, CountedRun
from lcbench.workloads.trained import Trained
from lcbench.workloads.transformer import Attention
from lcbench.workloads.watch import Watch


class BatchStepSession(BlockSession):
    """One draw of a step of a batch on this rank.

    Attributes:
        planned: how its documents are shared out.
    """

    training: BatchTraining

    def __init__(self, options: Trained, capacity: int, work: Work, number: int, gang: Gang) -> None:
        whole = work.make_mask(number)
        found = planned(work, whole, gang, capacity)
        self.refused = found if isinstance(found, str) else _offloads(found.assignment, work)
        if isinstance(found, str) or self.refused:
            return
        self.planned = found
        if found.wrong:
            self.wrong, self.prepare_s = f"the planner's assignment: {found.wrong}", 0.0
            return
        # What goes to the host is the layers' business, of which attention is a part.
        strategy = Assigned(_on_device(found.assignment), found.bounds, work.strategy.inside)
        self._gantt: list[list[list[float]]] = []
        super().__init__(options, replace(work, strategy=strategy, make_mask=lambda _: whole), number, gang)

    def _begun(self, number: int) -> Started | str:
        def refuses(run: RankRun) -> str | None:
            assert isinstance(run, BatchRun)
            return next(filter(None, (self._work.recompute.refuses(part.run) for part in run.parts)), None)

        return started(self._work, number, self._gang, refuses)

    def _trained(self) -> BatchTraining:
        rank, assignment = self._gang.cp_rank, self.planned.assignment
        shares = {number: group.offload for number, group in assignment.groups if rank in group.ranks}
        policies = {share: Offload(ratio=share) if share else self._work.recompute for share in shares.values()}
        run = self.run.run
        assert isinstance(run, BatchRun)
        self._runs = [CountedRun(part.run) for part in run.parts]
        self._numbers = [part.number for part in run.parts]
        parts = [
            OwnPart(counted, part.rows.stop - part.rows.start, policies[shares[part.number]], partial(run.ended, part))
            for counted, part in zip(self._runs, run.parts, strict=True)
        ]
        swaps = isinstance(self._work.recompute, Swapping) or any(group.offload for _, group in assignment.groups)
        return BatchTraining(
            self._block, self._work, Attention(self.run), self._work.recompute, self._gang, parts, swaps=swaps
        )  # fmt: skip

    def _passes(self) -> list[CountedRun]:
        return self._runs

    # -- what it is made of ----------------------------------------------------------------------------------------

    def costs(self) -> dict[str, Cost]:
        """Of the batch, what forward, head and backward cost together, and the memory of backward: what the others read may still
        be there."""
        forward, head, backward = (self._of_parts()[part] for part in ("forward", "head", "backward"))
        parts = forward, head, backward
        batch = Cost(
            sum(part.flops for part in parts), sum(part.least_bytes_sent for part in parts), backward.least_memory_bytes,
            sum(part.recomputed for part in parts),
        )  # fmt: skip
        return {phase: batch if phase == BATCH else Cost(0.0, 0.0, 0.0) for phase in self.phases()}

    def counted(self) -> Counted:
        counted = super().counted()
        run = self.run.run
        assert isinstance(run, BatchRun)
        counted.metrics.update(counted_plan(self.planned, run, self._gang))
        counted.notes.update(self.planned.notes)
        return counted

    def shares(self) -> dict[str, float]:
        """What of a step is attention, and when micro-batches begin and end, by steps of their own: that with the median time is
        told. Collective."""
        shares = super().shares()
        self._gantt, idle = watched(self.planned, self._gang, self._moments)
        return shares | {"batch/idle_share": idle}

    def _moments(self) -> list[list[float]]:
        """Of each of this rank's micro-batches its number, and when it begins, its forward through the layers ends, and it ends."""
        watch = Watch(self._gang.device.type == "cuda")
        begun = watch.now()
        marks, last = [], begun

        def done(part: str, _: Any) -> None:
            nonlocal last
            if part in ("forward", "backward"):
                marks.extend([last, watch.now()] if part == "forward" else [watch.now()])
                last = marks[-1]

        self.training.step(done)
        seconds = [watch.between(begun, mark) for mark in marks]
        return [[float(number), *seconds[3 * i : 3 * i + 3]] for i, number in enumerate(self._numbers)]

    def remarks(self) -> dict[str, Any]:
        return {"gantt": self._gantt}


def _offloads(assignment: Assignment, work: Work) -> str | None:
    """Why groups that put a share of what backward needs into the host's memory do not go with a cell's recomputation."""
    share = max((group.offload for _, group in assignment.groups), default=0.0)
    if not share or isinstance(work.recompute, NoRecompute):
        return None
    return (
        f"the planner offloads {share:.3g} of what backward needs of a group, of which the cell's recompute=... leaves less; "
        "write recompute=none, or a planner that does not offload"
    )


def _on_device(assignment: Assignment) -> Assignment:
    return Assignment(tuple(tuple(replace(group, offload=0.0) for group in groups) for groups in assignment.micro_batches))
