"""How the documents of a batch are shared out before it runs: by a planner, on the first rank of those that share the sequence."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import Ints
from lcbench.masks.mask import Mask
from lcbench.measure import progress
from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Infeasible, Planner, Say
from lcbench.planners.telling import telling
from lcbench.schedule.layout import documents
from lcbench.workloads.base import Work

if TYPE_CHECKING:
    from lcbench.measure.session import Gang  # with torch, which predictions do without


@dataclass(frozen=True, eq=False)
class Planned:
    """The plan of a batch.

    Attributes:
        bounds: of its documents in the sequence, (documents + 1,).
        documents: their tokens and pairs.
        fleet: the ranks that share the sequence.
        assignment: what the planner gave.
        wrong: why that is no assignment of these documents; None if it is one.
        seconds: that the planner took, on one rank, without what its costs rest on being made ready.
        predicted_s: makespan of the batch by these costs.
        basis: what they rest on, in words.
    """

    bounds: Ints
    documents: Documents
    fleet: Fleet
    assignment: Assignment
    wrong: str | None
    seconds: float
    predicted_s: float
    basis: str

    @property
    def metrics(self) -> dict[str, float]:
        """What is known of it without a run."""
        tokens = self.documents.tokens
        degrees = sum(len(group.ranks) * int(tokens[list(group.documents)].sum()) for _, group in self.assignment.groups)
        return {
            "batch/tokens": float(tokens.sum()), "batch/documents": float(len(tokens)),
            "batch/micro_batches": float(len(self.assignment.micro_batches)), "batch/groups": float(len(self.assignment.groups)),
            "batch/degree": degrees / float(tokens.sum()), "plan/seconds": self.seconds, "plan/predicted_s": self.predicted_s,
        }  # fmt: skip

    def held(self, tokens: Ints) -> Ints:
        """How many of a rank's tokens are of each micro-batch, (micro-batches,)."""
        number = np.zeros(len(self.documents), dtype=np.int64)
        for micro_batch, group in self.assignment.groups:
            number[list(group.documents)] = micro_batch
        return np.bincount(number[self._documents_of(tokens)], minlength=len(self.assignment.micro_batches))

    def strays(self, rank: int, tokens: Ints) -> str | None:
        """Why these are not tokens that a rank has by the assignment; None: they are."""
        given = {document for _, group in self.assignment.groups if rank in group.ranks for document in group.documents}
        others = sorted(set(np.unique(self._documents_of(tokens)).tolist()) - given)
        return f"rank {rank} has tokens of document {others[0]}, which the assignment gives to others" if others else None

    def _documents_of(self, tokens: Ints) -> Ints:
        return np.asarray(np.searchsorted(self.bounds, tokens, side="right") - 1, dtype=np.int64)

    @property
    def notes(self) -> dict[str, Any]:
        return {
            "assignment": self.assignment.plain(), "documents": self.documents.tokens.tolist(), "plan_cost": self.basis,
        }  # fmt: skip


def planned(work: Work, mask: Mask, gang: Gang, capacity: int) -> Planned | str:
    """The plan of the documents of a mask, the same on every rank of a context-parallel group, or why there is none. Collective.

    Args:
        capacity: tokens that a rank may have in a micro-batch.
    """
    assert work.planner is not None
    assert work.cost is not None, "nobody has said what documents cost"
    scale = work.problem.scale
    fleet = Fleet(scale.world_size, scale.gpus_per_node, capacity)
    found: Planned | str | None = None
    if gang.cp_rank == 0:
        try:
            found = plan_of(work.planner, mask, fleet, work.cost(), telling(progress.own.mark))
        except Infeasible as refused:
            found = str(refused)
    found = gang.ranks.broadcast_object(found)
    assert found is not None
    return found


def plan_of(planner: Planner, mask: Mask, fleet: Fleet, cost: Cost, say: Say = lambda _: None) -> Planned:
    """The plan of the documents of a mask, timed; ``say`` as of ``Planner.plan``.

    Raises:
        Infeasible: there is none.
    """
    every = documents_of(mask)[1]
    begun, before_s = time.perf_counter(), cost.prepared_s
    assignment = planner.plan(every, fleet, cost, say).without_spare_ranks(every, cost)
    seconds = time.perf_counter() - begun - (cost.prepared_s - before_s)
    return as_assigned(mask, assignment, fleet, cost, seconds)


def as_assigned(mask: Mask, assignment: Assignment, fleet: Fleet, cost: Cost, seconds: float) -> Planned:
    """The plan of the documents of a mask that is this assignment, which took so many seconds to find."""
    bounds, every = documents_of(mask)
    wrong = assignment.wrong(every, fleet)
    predicted_s = float("nan") if wrong else assignment.makespan_s(every, cost, fleet.ranks)
    return Planned(bounds, every, fleet, assignment, wrong, seconds, predicted_s, cost.basis)


def documents_of(mask: Mask) -> tuple[Ints, Documents]:
    """Bounds of the documents of a mask in its sequence, (documents + 1,), and their tokens and pairs."""
    bounds, pairs = documents(mask)
    return bounds, Documents(np.diff(bounds), pairs)


def padding(held: NDArray[np.int64]) -> float:
    """The share of a batch that would be padding if every rank had as many tokens as the fullest one in each micro-batch.

    Args:
        held: tokens of each rank in each micro-batch, (micro-batches, ranks).
    """
    return 1 - float(held.sum()) / float(held.shape[1] * held.max(1).sum())


def idle_share(assignment: Assignment, spans: list[list[list[float]]]) -> float:
    """The share of the makespan that ranks wait, mean over the ranks: before the last rank of their sub-group has come, between
    micro-batches, and behind their last one.

    Args:
        spans: of each rank a list of [micro-batch, begin, end of forward, end], in seconds from a common begin.
    """
    ends = [span[-1] for own in spans for span in own]
    began = {(rank, int(span[0])): span[1] for rank, own in enumerate(spans) for span in own}
    busy = np.zeros(len(spans))
    together: dict[tuple[int, int], float] = {}
    for number, group in assignment.groups:
        last = max((began[rank, number] for rank in group.ranks if (rank, number) in began), default=0.0)
        together |= {(rank, number): last for rank in group.ranks}
    for rank, own in enumerate(spans):
        busy[rank] = sum(max(0.0, span[-1] - together[rank, int(span[0])]) for span in own)
    return 1 - float(busy.mean()) / max(ends)
