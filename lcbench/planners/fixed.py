"""One degree for every document, as training with a static context-parallel size has it: what other planners are held against.

The ranks are cut into replicas of that degree. Documents are packed into sequences of the length that a replica holds, every
replica has as many of these (some may stay short or empty), and tokens say what is level, since a data loader knows no costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Infeasible, Planner, Say
from lcbench.planners.packing import Seconds, best_fit_decreasing, check_longest, in_order, level, longest_first


@dataclass(frozen=True)
class Fixed(Planner):
    """As few micro-batches as best-fit-decreasing packing needs; where that many also hold level shares, the level ones.

    Attributes:
        degree: of every group; it divides the ranks. None: the smallest that holds the longest document.

    Raises:
        ValueError: a degree below 1.
    """

    degree: int | None = None

    def __post_init__(self) -> None:
        if self.degree is not None and (isinstance(self.degree, bool) or not isinstance(self.degree, int) or self.degree < 1):
            raise ValueError(f"planner.degree={self.degree} is neither null nor a whole number of at least 1")

    def unsupported(self, documents: Documents, fleet: Fleet) -> str | None:
        if self.degree is not None and fleet.ranks % self.degree:
            return f"planner.degree={self.degree} does not divide {fleet.ranks} ranks"
        return None

    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        possible = [degree for degree in cost.degrees if fleet.ranks % degree == 0]
        if self.degree is not None and self.degree not in possible:
            raise Infeasible(f"planner.degree={self.degree} is none of {possible}, which can be run and divide {fleet.ranks}")
        degree = check_longest(documents, possible if self.degree is None else [self.degree], fleet)
        replicas = [tuple(range(begin, begin + degree)) for begin in range(0, fleet.ranks, degree)]
        room = degree * fleet.capacity
        packed = best_fit_decreasing(documents.tokens, room)
        rounds = -(-len(packed) // len(replicas))
        sequences = [one for one in level(documents.tokens, rounds * len(replicas), room) or packed if one]
        sizes = [int(documents.tokens[one].sum()) for one in sequences]
        seconds = Seconds(documents, cost)
        dealt = longest_first(sizes, [0.0] * len(replicas), most=rounds)
        own = zip(replicas, dealt, strict=True)
        return in_order(seconds.made(replica, sequences[n], fleet) for replica, numbers in own for n in numbers)


def shorter_than_fixed(assignment: Assignment, documents: Documents, fleet: Fleet, cost: Cost) -> Assignment:
    """An assignment, or what ``Fixed`` gives where there is that and it is shorter by the cost."""
    try:
        fixed = Fixed().plan(documents, fleet, cost)
    except Infeasible:  # no one degree holds all
        return assignment
    return min((assignment, fixed), key=lambda one: one.makespan_s(documents, cost, fleet.ranks))
