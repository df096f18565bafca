"""Which ranks a group gets: those of one node where a node has enough of them, else of as few nodes as can be."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lcbench.planners.base import Fleet, Floats


def is_near(ranks: Sequence[int], fleet: Fleet) -> bool:
    """Whether these ranks lie on as few nodes as so many can."""
    return len({rank // fleet.per_node for rank in ranks}) == -(-len(ranks) // fleet.per_node)


def side_by_side(degrees: Sequence[int], fleet: Fleet) -> list[tuple[int, ...]]:
    """Ranks of groups that are at work at once, in the order of the degrees. The largest are placed first.

    Raises:
        ValueError: more ranks than there are.
    """
    if sum(degrees) > fleet.ranks:
        raise ValueError(f"groups of {sum(degrees)} ranks side by side on {fleet.ranks}")
    free = np.ones(fleet.ranks, dtype=np.bool_)
    placed: list[tuple[int, ...]] = [()] * len(degrees)
    for number in sorted(range(len(degrees)), key=lambda one: -degrees[one]):
        placed[number] = nearest(degrees[number], free, fleet)
        free[list(placed[number])] = False
    return placed


def nearest(degree: int, free: NDArray[np.bool_], fleet: Fleet) -> tuple[int, ...]:
    """So many of the free ranks, ascending: whole nodes while the group is larger than one, then those of the node with fewest free
    ranks that has enough; inside a node where they begin at a multiple of their number, if they can.

    Args:
        free: (ranks,).

    Raises:
        ValueError: fewer are free.
    """
    if degree > int(free.sum()):
        raise ValueError(f"a group of {degree} ranks where {int(free.sum())} are free")
    by_node = free.reshape(-1, fleet.per_node).copy()
    taken: list[int] = []
    while len(taken) < degree:
        wanted = min(degree - len(taken), fleet.per_node)
        counts = by_node.sum(axis=1)
        enough = np.nonzero(counts >= wanted)[0]
        node = int(enough[counts[enough].argmin()]) if len(enough) else int(counts.argmax())
        inside = _aligned(by_node[node], min(wanted, int(counts[node])))
        by_node[node, inside] = False
        taken += [node * fleet.per_node + one for one in inside]
    return tuple(sorted(taken))


def _aligned(free: NDArray[np.bool_], count: int) -> list[int]:
    """Places of so many free ranks of a node: adjacent from a multiple of their number on, or adjacent, or the first."""
    runs = [begin for begin in range(len(free) - count + 1) if free[begin : begin + count].all()]
    if runs:
        begin = next((one for one in runs if one % count == 0), runs[0])
        return list(range(begin, begin + count))
    return np.nonzero(free)[0][:count].tolist()


class Timetable:
    """Until when ranks are at work, as groups are put on them one after the other.

    Args:
        fleet: the ranks, which are free at 0.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        # Of each node, (free from, rank), ascending.
        self._nodes = [
            [(0.0, rank) for rank in range(begin, begin + fleet.per_node)] for begin in range(0, fleet.ranks, fleet.per_node)
        ]

    def free(self) -> Floats:
        """(ranks,), from when on each is free."""
        times = np.zeros(self._fleet.ranks)
        for node in self._nodes:
            for time, rank in node:
                times[rank] = time
        return times

    @property
    def end(self) -> float:
        """When the last rank is done."""
        return max(node[-1][0] for node in self._nodes)

    def put(self, degree: int, seconds: float) -> tuple[float, tuple[int, ...]]:
        """A group begins as early as it can on as few nodes as can be: its end and its ranks, ascending. Of ranks that are free by
        then it gets those that became so last, and of equal nodes the fullest, which leaves to others what is free for longer."""
        per_node = self._fleet.per_node
        whole, rest = divmod(degree - 1, per_node)
        begins = [node[rest][0] for node in self._nodes]
        first: list[int] = []
        if whole:  # nodes that are taken whole: those that are free first, without the one of which the rest is taken
            first = sorted(range(len(self._nodes)), key=lambda n: self._nodes[n][-1][0])
            ends = [self._nodes[n][-1][0] for n in first[: whole + 1]]
            among = set(first[:whole])
            begins = [max(begin, ends[whole if n in among else whole - 1]) for n, begin in enumerate(begins)]
        begin = min(begins)
        free = {n: bisect_right(self._nodes[n], (begin, self._fleet.ranks)) for n, at in enumerate(begins) if at == begin}
        (chosen, *others) = free
        if others:
            chosen = min(free, key=lambda n: (-sum(time for time, _ in self._nodes[n][free[n] - rest - 1 : free[n]]), free[n]))
        taken = [rank for _, rank in self._take(chosen, free[chosen] - rest - 1, rest + 1, begin + seconds)]
        for node in [n for n in first if n != chosen][:whole]:
            taken += [rank for _, rank in self._take(node, 0, per_node, begin + seconds)]
        return begin + seconds, tuple(sorted(taken))

    def _take(self, node: int, first: int, count: int, until: float) -> list[tuple[float, int]]:
        """So many ranks of a node from a place on, which are at work until then."""
        ranks = self._nodes[node]
        taken = ranks[first : first + count]
        ranks[first : first + count] = [(until, rank) for _, rank in taken]
        ranks.sort()
        return taken
