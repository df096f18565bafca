"""ByteScale's hybrid data parallelism (HDP; arXiv 2502.21231): one flat group of ranks, of which a sequence takes as many as its
tokens need.

A sequence of L tokens takes ceil(L / capacity) ranks, any number and any of them; short ones are packed, best fit, on one rank.
Sequences are handed out from the longest to the shortest, each to the ranks that have executed least so far, so that ranks end
together while they run different numbers of micro-batches. (The paper cuts the sorted sequences into buckets of equal FLOPs and
takes one bucket after the other; without pipeline stages that is this order.)
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lcbench.masks.band import Ints
from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Floats, Group, Infeasible, Offload, Planner, Say

TARGETS = 16  # times that ``spread`` tries for the batch
HALF = 0.5  # of a token: what is held of offloaded documents is rounded up to whole tokens


@dataclass(frozen=True)
class BytescaleHDP(Planner):
    """Attributes:
    spread: whether a sequence that would take longer than the others together is spread over more ranks than its tokens need. The
        paper's rule is false: its batches are so large that no sequence does.
    offload: whether a sequence takes fewer ranks with a share of its activations in the host's memory: the least share that makes
        them fewest, and no more than is moved there while forward computes.
    """

    spread: bool = True
    offload: bool = False

    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        sizes = np.array([size for size in cost.degrees if size <= fleet.ranks], dtype=np.int64)
        if self.offload and cost.offloads is None:
            raise Infeasible("planner.offload=true: what this cell computes has no activations of layers to offload")
        fewest = _fewest(documents, fleet, cost, sizes, cost.offloads if self.offload else None)
        best: _Shared | None = None
        choices = _spread(documents, fleet, cost, sizes, fewest, say) if self.spread else [fewest]
        for number, degrees in enumerate(choices):
            found = _Shared.of(documents, fleet, cost, degrees)
            if best is None or found.ends < best.ends:
                best = found
            if len(choices) > 1:
                say(f"bytescale_hdp: {number + 1} of {len(choices)} degrees of long sequences tried, best {best.ends:.3g} s")
        assert best is not None
        return best.assignment(documents, fleet, cost, cost.offloads if self.offload else None)


def _fewest(documents: Documents, fleet: Fleet, cost: Cost, sizes: Ints, offloads: Offload | None) -> Ints:
    """(n,): the fewest ranks that can share each.

    Raises:
        Infeasible: one that no ranks hold, or no method shares.
    """
    needed = -(-documents.tokens // fleet.capacity)
    if offloads is not None and len(documents):
        needed = np.minimum(needed, _with_offload(documents, fleet, cost, sizes, offloads))
    places = np.searchsorted(sizes, needed)
    for place in range(len(sizes)):
        at = np.nonzero(places == place)[0]
        if len(at):
            places[at[~np.isfinite(cost.documents_s(documents.of(at), int(sizes[place])))]] += 1
    if len(none := np.nonzero(places == len(sizes))[0]):
        first = none[0]
        raise Infeasible(
            f"document {first} of {documents.tokens[first]} tokens needs {needed[first]} ranks of {fleet.capacity} tokens; there "
            f"are {fleet.ranks}, and methods share a document among {sizes[-1]} of them at most"
        )
    return np.asarray(sizes[places], dtype=np.int64)


def _with_offload(documents: Documents, fleet: Fleet, cost: Cost, sizes: Ints, offloads: Offload) -> Ints:
    """(n,): D(s) of the paper: the fewest ranks that hold what is not offloaded, where the rest is moved to the host no slower than
    forward computes."""
    fewest = np.full(len(documents), np.iinfo(np.int64).max)
    for size in sizes[::-1].tolist():
        forward_s = offloads.forward * cost.documents_s(documents, size)
        moved = np.minimum(1.0, forward_s / offloads.seconds(documents.tokens / size))
        held = -(-documents.tokens // size) * (1 - offloads.gone(moved))
        fewest[held <= fleet.capacity - HALF] = size
    return fewest


def _spread(documents: Documents, fleet: Fleet, cost: Cost, sizes: Ints, fewest: Ints, say: Say) -> list[Ints]:
    """Degrees of all documents to choose from, each (n,): those at which none takes longer than a time that the batch may take."""
    seconds = _seconds(documents, cost, fewest)
    even = float(fewest @ seconds) / fleet.ranks  # no assignment with these degrees is faster
    long = np.nonzero(seconds > even)[0]
    if not len(long):
        return [fewest]
    say(f"bytescale_hdp: {len(long)} of {len(documents)} sequences take longer than an even share of the batch")
    table = np.full((len(sizes), len(long)), np.inf)
    for place, size in enumerate(sizes.tolist()):
        wide = np.nonzero(fewest[long] <= size)[0]
        table[place, wide] = cost.documents_s(documents.of(long[wide]), size) + cost.overhead_s(size)
    low = max(even, float(table.min(0).max()))
    choices = {fewest.tobytes(): fewest}
    for target in np.geomspace(low, max(low, float(seconds.max())), TARGETS).tolist():
        fits = table <= target
        degrees = fewest.copy()
        degrees[long] = sizes[np.where(fits.any(0), fits.argmax(0), table.argmin(0))]
        choices[degrees.tobytes()] = degrees
    return list(choices.values())


def _seconds(documents: Documents, cost: Cost, degrees: Ints) -> Floats:
    """(n,): each alone among so many ranks."""
    seconds = np.empty(len(documents))
    for size in np.unique(degrees).tolist():
        at = degrees == size
        seconds[at] = cost.documents_s(documents.of(np.nonzero(at)[0]), size) + cost.overhead_s(size)
    return seconds


@dataclass(frozen=True)
class _Shared:
    """Which ranks have which documents.

    Attributes:
        wide: documents of several ranks, with these, in the order in which they begin.
        single: of each rank, the documents that it has alone.
        ends: seconds until the last rank is done.
    """

    wide: list[tuple[int, tuple[int, ...]]]
    single: dict[int, list[int]]
    ends: float

    @classmethod
    def of(cls, documents: Documents, fleet: Fleet, cost: Cost, degrees: Ints) -> _Shared:
        """Hand documents out, from the longest to the shortest, to the ranks that are free first."""
        seconds = _seconds(documents, cost, degrees)
        order = np.argsort(-documents.tokens, kind="stable")
        free = np.zeros(fleet.ranks)
        wide = []
        for number in order[degrees[order] > 1].tolist():
            ranks, ends = _soonest(free, int(degrees[number]), float(seconds[number]), documents.of([number]), fleet, cost)
            free[ranks] = ends
            wide.append((number, tuple(ranks.tolist())))
        # Micro-batches of one rank are as good as full, so a document bears its share of what each takes whatever is in it.
        idle_s = cost.overhead_s(1)
        own = seconds - idle_s + idle_s * np.minimum(1.0, documents.tokens / fleet.capacity)
        single: dict[int, list[int]] = defaultdict(list)
        queue = [(float(ends), rank) for rank, ends in enumerate(free)]
        heapq.heapify(queue)
        alone = np.nonzero(degrees == 1)[0]
        for number in alone[np.argsort(-own[alone], kind="stable")].tolist():
            ends, rank = queue[0]
            single[rank].append(number)
            heapq.heapreplace(queue, (ends + float(own[number]), rank))
        return cls(wide, single, max(ends for ends, _ in queue))

    def assignment(self, documents: Documents, fleet: Fleet, cost: Cost, offloads: Offload | None) -> Assignment:
        """Micro-batches of these: wide documents first, each a group; then what each rank has alone, packed."""
        micro_batches: dict[int, list[Group]] = defaultdict(list)
        behind = np.zeros(fleet.ranks, dtype=np.int64)

        def add(ranks: tuple[int, ...], numbers: Sequence[int]) -> None:
            own = documents.of(numbers)
            share = 0.0
            if offloads is not None and (most := -(-int(own.tokens.sum()) // len(ranks))) > fleet.capacity:
                share = 1 - (fleet.capacity - HALF) / most
            place = int(behind[list(ranks)].max())
            micro_batches[place].append(Group(ranks, tuple(numbers), cost.group(own, ranks)[1], share))
            behind[list(ranks)] = place + 1

        for number, ranks in self.wide:
            add(ranks, [number])
        for rank, numbers in sorted(self.single.items()):
            for pack in _packed(documents.tokens, numbers, fleet.capacity):
                add((rank,), pack)
        return Assignment(tuple(tuple(micro_batches[place]) for place in sorted(micro_batches)))


def _soonest(free: Floats, count: int, seconds: float, own: Documents, fleet: Fleet, cost: Cost) -> tuple[Ints, float]:
    """The ranks that are done soonest with a document, and when: those that are free first, or, where that is sooner since they
    are nearer to each other, some on as few nodes as can be.

    Args:
        free: (N,), when each is.
        seconds: that ranks near to each other take.
    """
    first = np.sort(np.argsort(free, kind="stable")[:count])
    nodes = free.reshape(-1, fleet.per_node)
    if count < fleet.per_node:
        node = int(np.argmin(np.sort(nodes, axis=1)[:, count - 1]))
        near = node * fleet.per_node + np.argsort(nodes[node], kind="stable")[:count]
    else:
        some = np.argsort(nodes.max(axis=1), kind="stable")[: -(-count // fleet.per_node)]
        of_nodes = (some[:, None] * fleet.per_node + np.argsort(nodes[some], axis=1, kind="stable")).ravel()
        near = of_nodes[:count]
    ends = float(free[near].max()) + seconds
    if free[first].max() < free[near].max() and (sooner := float(free[first].max()) + cost.group(own, first.tolist())[0]) < ends:
        return first, sooner
    return np.sort(near), ends


def _packed(tokens: Ints, numbers: list[int], capacity: int) -> list[list[int]]:
    """Documents in as few packs of so many tokens as best fit, from the longest on, finds; one that is longer has its own."""
    packs: list[list[int]] = []
    left: list[int] = []
    for number in sorted(numbers, key=lambda number: (-int(tokens[number]), number)):
        size = int(tokens[number])
        place = min((at for at, room in enumerate(left) if room >= size), key=left.__getitem__, default=None)
        if place is None:
            packs.append([number])
            left.append(max(0, capacity - size))
        else:
            packs[place].append(number)
            left[place] -= size
    return packs
