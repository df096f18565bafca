"""ByteScale's hybrid data parallelism (HDP; arXiv 2502.21231): one flat group of ranks, of which a sequence takes as many as its
tokens need.

A sequence of L tokens takes ceil(L / capacity) ranks, any number and any of them; short ones are packed, best fit, on one rank.
Sequences are handed out from the longest to the shortest, each to the ranks that have executed least so far, so that ranks end
together while they run different numbers of micro-batches. (The paper cuts the sorted sequences into buckets of equal FLOPs and
takes one bucket after the other; without pipeline stages that is this order.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lcbench.masks.band import Ints
from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Floats, Group, Infeasible, Offload, Planner, Say
from lcbench.planners.fixed import shorter_than_fixed
from lcbench.planners.packing import Seconds, best_fit_decreasing, in_order, longest_first

TARGETS = 16  # times that ``spread`` tries for the batch
WIDENED, WIDER = 32, 4  # assignments that it tries then, and sizes of a group among these
NOTHING_WAITS = (
    "planner.offload=true: this has no activations of layers that wait for backward; workload=batch_step with recompute=none has"
)
HALF = 0.5  # of a token: what is held of offloaded documents is rounded up to whole tokens


@dataclass(frozen=True)
class BytescaleHDP(Planner):
    """Attributes:
    spread: whether a sequence that would take longer than the others together is spread over more ranks than its tokens need. The
        paper's rule is false: its batches are so large that no sequence does.
    offload: whether a sequence takes fewer ranks with a share of its activations in the host's memory: the least share that makes
        them fewest, and no more than is moved there while forward computes.
    fallback: what ``fixed`` gives is taken where that is shorter by the cost, which ByteScale does not look at.

    Raises:
        ValueError: one of them that is neither true nor false.
    """

    spread: bool = True
    offload: bool = False
    fallback: bool = True

    def __post_init__(self) -> None:
        for name in ("spread", "offload", "fallback"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"planner.{name}={value} is neither true nor false")

    def unsupported(self, documents: Documents, fleet: Fleet) -> str | None:
        return None if fleet.waits or not self.offload else NOTHING_WAITS

    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        sizes = np.array([size for size in cost.degrees if size <= fleet.ranks], dtype=np.int64)
        if self.offload and cost.offloads is None:
            raise Infeasible(NOTHING_WAITS)
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
        if self.spread:
            best = _widened(best, documents, fleet, cost, sizes)
        handed = best.assignment(documents, fleet, cost)
        return shorter_than_fixed(handed, documents, fleet, cost) if self.fallback else handed


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


def _widened(best: _Shared, documents: Documents, fleet: Fleet, cost: Cost, sizes: Ints) -> _Shared:
    """The same with the document that ends last on the next larger groups, as long as that ends the batch sooner."""
    tried, place = 0, 0
    while tried < WIDENED and place < len(wider := sizes[sizes > best.degrees[best.last]][:WIDER]):
        degrees = best.degrees.copy()
        degrees[best.last] = wider[place]
        found = _Shared.of(documents, fleet, cost, degrees)
        best, place = (found, 0) if found.ends < best.ends else (best, place + 1)
        tried += 1
    return best


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
        packs: of each rank, the documents that it has alone, by micro-batch.
        ends: seconds until the last rank is done.
        last: the longest document of what that rank does last.
        degrees: (n,), ranks of each document.
    """

    wide: list[tuple[int, tuple[int, ...]]]
    packs: list[list[list[int]]]
    ends: float
    last: int
    degrees: Ints

    @classmethod
    def of(cls, documents: Documents, fleet: Fleet, cost: Cost, degrees: Ints) -> _Shared:
        """Hand documents out, from the longest to the shortest, to the ranks that are free first."""
        seconds = _seconds(documents, cost, degrees)
        order = np.argsort(-documents.tokens, kind="stable")
        free = np.zeros(fleet.ranks)
        wide = []
        for number in order[degrees[order] > 1].tolist():
            ranks, ends = _soonest(free, int(degrees[number]), float(seconds[number]), documents.of([number]), fleet, cost)
            free[list(ranks)] = ends
            wide.append((number, ranks))
        alone = np.nonzero(degrees == 1)[0]
        overhead_s = cost.overhead_s(1)
        # Micro-batches of one rank are as good as full, so a document bears its share of what each takes whatever is in it.
        filled = np.minimum(documents.tokens[alone], fleet.capacity)
        own_s = seconds[alone] - overhead_s
        shares = longest_first(own_s + overhead_s * filled / fleet.capacity, free)
        packs = [best_fit_decreasing(filled[share], fleet.capacity) for share in shares]
        sums = np.array([own_s[share].sum() + overhead_s * len(own) for share, own in zip(shares, packs, strict=True)])
        named = [
            [alone[np.array(share)[pack]].tolist() for pack in own] for share, own in zip(shares, packs, strict=True)
        ]  # fmt: skip
        slowest = int((free + sums).argmax())
        last = named[slowest][0][0] if named[slowest] else next(number for number, ranks in reversed(wide) if slowest in ranks)
        return cls(wide, named, float((free + sums)[slowest]), last, degrees)

    def assignment(self, documents: Documents, fleet: Fleet, cost: Cost) -> Assignment:
        """Micro-batches of these: wide documents first, each a group; then what each rank has alone."""
        known = Seconds(documents, cost)

        def group(ranks: tuple[int, ...], numbers: list[int]) -> Group:
            made = known.made(ranks, numbers, fleet)
            most = -(-int(documents.tokens[numbers].sum()) // len(ranks))
            return made if most <= fleet.capacity else replace(made, offload=1 - (fleet.capacity - HALF) / most)

        alone = (group((rank,), pack) for rank, packs in enumerate(self.packs) for pack in packs)
        return in_order([*(group(ranks, [number]) for number, ranks in self.wide), *alone])


def _soonest(
    free: Floats, count: int, seconds: float, own: Documents, fleet: Fleet, cost: Cost
) -> tuple[tuple[int, ...], float]:  # fmt: skip
    """The ranks that are done soonest with a document, and when: those that are free first, or, where that is sooner since they
    are nearer to each other, some on as few nodes as can be.

    Args:
        free: (N,), when each is.
        seconds: that ranks near to each other take.
    """
    per_node, nodes = fleet.per_node, free.reshape(-1, fleet.per_node)
    if count < per_node:
        some = np.argsort(np.sort(nodes, axis=1)[:, count - 1], kind="stable")[:1]
    else:
        some = np.argsort(nodes.max(axis=1), kind="stable")[: -(-count // per_node)]
    soon = some[:, None] * per_node + np.argsort(nodes[some], axis=1, kind="stable")
    near = tuple(sorted(soon.ravel()[:count].tolist()))
    ends = float(free[list(near)].max()) + seconds
    first = np.argsort(free, kind="stable")[:count]
    begin = float(free[first].max())
    if begin + seconds < ends:
        ranks = tuple(np.sort(first).tolist())
        if (sooner := begin + cost.group(own, ranks)[0]) < ends:
            return ranks, sooner
    return near, ends
