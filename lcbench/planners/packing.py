"""What planners share: packing documents into bins, sharing out work, seconds of groups, and groups one behind the other."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lcbench.masks.band import Ints
from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Floats, Group, Infeasible
from lcbench.planners.placing import is_near


def descending(sizes: Sequence[float] | Ints | Floats) -> list[int]:
    """Numbers of sizes, the largest first; of equal ones, the first first."""
    return np.argsort(-np.asarray(sizes), kind="stable").tolist()


def best_fit_decreasing(sizes: Sequence[int] | Ints, capacity: int) -> list[list[int]]:
    """Bins of numbers of sizes: the largest first, each into the fullest bin that has room for it. At most 11/9 of the fewest bins
    and one (Johnson, 1973); n log n searches.

    Raises:
        ValueError: a size above the capacity.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (what is left, bin), ascending
    whole = np.asarray(sizes).tolist()
    for number in descending(sizes):
        size = whole[number]
        place = bisect_left(rooms, (size, -1))
        if place < len(rooms):
            left, chosen = rooms.pop(place)
        elif size <= capacity:
            left, chosen = capacity, len(bins)
            bins.append([])
        else:
            raise ValueError(f"{size} is more than the capacity of {capacity}")
        bins[chosen].append(number)
        insort(rooms, (left - size, chosen))
    return bins


def longest_first(
    weights: Sequence[float] | Ints | Floats, loads: Sequence[float] | Floats, most: int | None = None
) -> list[list[int]]:
    """Numbers of weights per bin: the heaviest first, each to the bin that has least (Graham's LPT).

    Args:
        loads: what the bins have already.
        most: how many a bin takes; None: any number.

    Raises:
        ValueError: more weights than all bins take.
    """
    if most is not None and len(weights) > most * len(loads):
        raise ValueError(f"{len(weights)} weights for {len(loads)} bins of at most {most}")
    bins: list[list[int]] = [[] for _ in loads]
    heap = [(float(load), place) for place, load in enumerate(loads)]
    heapq.heapify(heap)
    values = np.asarray(weights).tolist()
    for number in descending(weights):
        load, place = heap[0]
        bins[place].append(number)
        if len(bins[place]) == most:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (load + values[number], place))
    return bins


def level(sizes: Sequence[int] | Ints, bins: int, capacity: int) -> list[list[int]] | None:
    """Numbers of sizes in so many bins, as level as ``longest_first`` makes them, each within the capacity; None where the bins
    that this fills do not hold all. A bin may be empty."""
    shared = longest_first(sizes, [0.0] * bins)
    whole = np.asarray(sizes)
    return shared if all(int(whole[one].sum()) <= capacity for one in shared) else None


def in_order(groups: Iterable[Group]) -> Assignment:
    """Groups of which each rank has its own in this order, each in the first micro-batch in which its ranks have none."""
    micro_batches: list[list[Group]] = []
    last: dict[int, int] = {}  # the first micro-batch in which a rank has nothing yet
    for group in groups:
        place = max(last.get(rank, 0) for rank in group.ranks)
        last |= dict.fromkeys(group.ranks, place + 1)
        if place == len(micro_batches):
            micro_batches.append([])
        micro_batches[place].append(group)
    return Assignment(tuple(map(tuple, micro_batches)))


@dataclass(frozen=True, eq=False)
class Seconds:
    """Seconds of documents in groups by a cost, as ``Assignment.seconds`` counts them. Each degree is asked for once.

    Attributes:
        documents: the batch.
        cost: what they cost.
    """

    documents: Documents
    cost: Cost
    _by_method: dict[int, Floats] = field(default_factory=dict, init=False)

    def by_method(self, degree: int) -> Floats:
        """(methods, documents), what each adds to a group of ``degree`` ranks; infinite where that cannot be."""
        if degree not in self._by_method:
            self._by_method[degree] = np.stack([self.cost.documents_s(self.documents, degree, m) for m in self.cost.methods])
        return self._by_method[degree]

    def alone(self, degree: int) -> Floats:
        """(documents,), of a group of ``degree`` ranks that has nothing but this one, by its fastest method, with the overhead."""
        return np.asarray(self.by_method(degree).min(axis=0) + self.cost.overhead_s(degree))

    def group(self, numbers: Sequence[int], degree: int) -> tuple[float, str]:
        """Of a group of ``degree`` ranks that are near to each other, with the overhead, and the method that is fastest for all."""
        sums = self.by_method(degree)[:, list(numbers)].sum(axis=1)
        fastest = int(sums.argmin())
        return float(sums[fastest]) + self.cost.overhead_s(degree), self.cost.methods[fastest]

    def made(self, ranks: Sequence[int], numbers: Iterable[int], fleet: Fleet) -> Group:
        """The group of these ranks with these documents in the order of the batch, by the method that is fastest where they are."""
        held = sorted(numbers)
        near = is_near(ranks, fleet)
        _, method = self.group(held, len(ranks)) if near else self.cost.group(self.documents.of(held), ranks)
        return Group(tuple(ranks), tuple(held), method)


def smallest(tokens: int, degrees: Sequence[int], fleet: Fleet) -> int | None:
    """The first of ascending degrees whose ranks hold so many tokens; None where none does."""
    return next((degree for degree in degrees if degree >= fleet.needed(tokens)), None)


def check_longest(documents: Documents, degrees: Sequence[int], fleet: Fleet) -> int:
    """The smallest of ascending degrees that holds the longest document; the first where there are no documents.

    Args:
        degrees: those that come into question, which is what the message says.

    Raises:
        Infeasible: none holds it, or there is none.
    """
    if not degrees:
        raise Infeasible(f"no method can run a group of any size that this planner makes on {fleet.ranks} ranks")
    longest = int(documents.tokens.argmax()) if len(documents) else 0
    tokens = int(documents.tokens[longest]) if len(documents) else 0
    degree = smallest(tokens, degrees, fleet)
    if degree is None:
        most = f"the largest group that this planner makes on {fleet.ranks}, {degrees[-1]} ranks of {fleet.capacity}"
        raise Infeasible(f"document {longest} has {tokens} tokens; {most}, holds {degrees[-1] * fleet.capacity}")
    return degree
