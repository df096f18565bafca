"""Megatron-Core's hybrid context parallelism: a power of two of ranks per document, by greedy steps of balanced load.

After ``BalancedCPScheduler`` of Megatron-LM (megatron/core/pipeline_parallel/hybrid_cp_schedule.py at 00caa53): a document takes
2^ceil(log2(tokens / capacity)) ranks. Documents, the longest first, are cut into as many buckets of equal work as there are sizes
of groups. A step takes the next document of the first bucket whose head has a place: on free ranks, else in the least loaded
group of its size. It ends when no head has one or, once a smaller group came, when the loads of all ranks are within 5 %. Then
what was put last into the heaviest group goes back while that makes the ranks more level, and groups of the smallest size double
until no rank is idle.

Other than there: work is the seconds of the cost instead of tokens^2 / ranks, no barrier stands between steps, and documents that
a group has in a step may be packed.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Floats, Group, Planner, Say
from lcbench.planners.fixed import shorter_than_fixed
from lcbench.planners.packing import Seconds, best_fit_decreasing, check_longest, descending, in_order, smallest
from lcbench.planners.placing import side_by_side


@dataclass
class _Share:
    """A group of a step as it fills: how many ranks, their load in seconds, the documents in the order in which they came."""

    degree: int
    load: float = 0.0
    documents: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class MegatronHybrid(Planner):
    """Steps of groups of powers of two, one after the other.

    Attributes:
        slack: by which share of the highest load the loads of a step may differ.
        packed: documents that a group has in a step share micro-batches as far as the capacity goes; False: each is a forward and
            backward of its own, as Megatron-LM has it.
        fallback: what ``fixed`` gives is taken where that is shorter by the cost, which Megatron-LM does not look at.

    Raises:
        ValueError: a slack below 0 or from 1 on, or ``packed`` or ``fallback`` that is neither true nor false.
    """

    slack: float = 0.05
    packed: bool = True
    fallback: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.slack, bool) or not isinstance(self.slack, int | float) or not 0 <= self.slack < 1:
            raise ValueError(f"planner.slack={self.slack} is no share from 0 to below 1")
        for name, value in (("packed", self.packed), ("fallback", self.fallback)):
            if not isinstance(value, bool):
                raise ValueError(f"planner.{name}={value} is neither true nor false")

    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        degrees = [d for d in cost.degrees if d <= fleet.ranks and (d & (d - 1) == 0 or d == fleet.ranks)]
        check_longest(documents, degrees, fleet)
        seconds = Seconds(documents, cost)
        own = [smallest(int(tokens), degrees, fleet) or fleet.ranks for tokens in documents.tokens]
        work = np.array([seconds.by_method(degree)[:, n].min() for n, degree in enumerate(own)])
        left, groups = descending(documents.tokens), list[Group]()
        while left:
            say(f"{len(documents) - len(left)} of {len(documents)} documents are planned")
            shares, left = self._step(left, own, work, fleet.ranks)
            _fill(shares, degrees, fleet.ranks)
            for share, ranks in zip(shares, side_by_side([s.degree for s in shares], fleet), strict=True):
                groups += [seconds.made(ranks, one, fleet) for one in self._micro_batches(share, documents, fleet)]
        greedy = in_order(groups)
        return shorter_than_fixed(greedy, documents, fleet, cost) if self.fallback else greedy

    def _step(self, left: list[int], own: list[int], work: Floats, ranks: int) -> tuple[list[_Share], list[int]]:
        """The groups of a step, and the documents that it leaves, in the order in which the next looks at them."""
        buckets = _buckets(left, own, work)
        shares: list[_Share] = []
        lightest: dict[int, list[tuple[float, int]]] = {}  # by degree: heaps of (load, number of the share)
        free, largest = ranks, own[left[0]]
        while buckets:
            bucket = next((b for b in buckets if own[b[0]] in lightest or own[b[0]] <= free), None)
            if bucket is None:
                break
            number = bucket.popleft()
            degree, took = own[number], float(work[number])
            if degree <= free:
                free -= degree
                shares.append(_Share(degree, took, [number]))
                heapq.heappush(lightest.setdefault(degree, []), (took, len(shares) - 1))
            else:
                load, place = lightest[degree][0]
                shares[place].load = load + took
                shares[place].documents.append(number)
                heapq.heapreplace(lightest[degree], (load + took, place))
            buckets = [b for b in buckets if b]
            if degree < largest and not free and self._is_level(shares):
                break
        back = [number for bucket in buckets for number in bucket]
        if not free:
            back += self._trimmed(shares, work)
        return shares, back

    def _trimmed(self, shares: list[_Share], work: Floats) -> list[int]:
        """Documents that come out of the heaviest share, the last first, as long as that makes loads more level."""
        back = []
        while not self._is_level(shares):
            heaviest = max(shares, key=lambda s: s.load)
            others = [share.load for share in shares if share is not heaviest]
            lighter = heaviest.load - float(work[heaviest.documents[-1]])
            if len(heaviest.documents) < 2 or max(lighter, *others) - min(lighter, *others) >= heaviest.load - min(others):
                break
            back.append(heaviest.documents.pop())
            heaviest.load = lighter
        return back

    def _is_level(self, shares: Sequence[_Share]) -> bool:
        """Whether the loads differ by the slack at most."""
        loads = np.array([share.load for share in shares])
        return bool(loads.max() - loads.min() <= self.slack * loads.max())

    def _micro_batches(self, share: _Share, documents: Documents, fleet: Fleet) -> list[list[int]]:
        """The documents of a share, micro-batch by micro-batch."""
        if not self.packed:
            return [[number] for number in share.documents]
        packed = best_fit_decreasing(documents.tokens[share.documents], share.degree * fleet.capacity)
        return [[share.documents[place] for place in places] for places in packed]


def _buckets(left: Sequence[int], own: Sequence[int], work: Floats) -> list[deque[int]]:
    """Documents in their order, cut into at most as many buckets as there are sizes of groups among them, each of at most 1.1 parts
    of the work where more than one document is in it; what is left over at the end is in the last."""
    count = len({own[number] for number in left})
    target = float(work[left].sum()) / count
    buckets, load = [deque[int]()], 0.0
    for place, number in enumerate(left):
        full = load + float(work[number]) > 1.1 * target or len(left) - place <= count - len(buckets)
        if buckets[-1] and full:
            buckets.append(deque())
            load = 0.0
        buckets[-1].append(number)
        load += float(work[number])
    return buckets


def _fill(shares: list[_Share], degrees: Sequence[int], ranks: int) -> None:
    """Double groups, the first of the smallest size each time, until no rank is idle or the next does not fit."""
    while True:
        share = min(shares, key=lambda s: s.degree)
        free = ranks - sum(s.degree for s in shares)
        larger = min(2 * share.degree, ranks)
        if larger not in degrees or not 0 < larger - share.degree <= free:
            return
        share.degree = larger
