"""Which ranks a group gets: those of one node where a node has enough of them, else of as few nodes as can be."""

from __future__ import annotations

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


def earliest(degree: int, busy: Floats, fleet: Fleet) -> tuple[int, ...]:
    """So many ranks on as few nodes as can be that are all free as early as can be, ascending. Of those that are free by then, the ones
    that became so last, which leaves to others what is free for longer.

    Args:
        busy: (ranks,), until when each is at work.
    """
    by_node = busy.reshape(-1, fleet.per_node)
    ordered = np.sort(by_node, axis=1)
    whole, rest = (degree - 1) // fleet.per_node, (degree - 1) % fleet.per_node + 1
    # The group needs ``rest`` ranks of one node and all ranks of ``whole`` others: those that are free first, without that one.
    begins = ordered[:, rest - 1]
    if whole:
        full = ordered[:, -1]
        first = np.argsort(full, kind="stable")
        others = np.full(len(full), full[first[whole - 1]])
        others[first[:whole]] = full[first[whole]]
        begins = np.maximum(begins, others)
    begin = begins.min()
    equal = np.nonzero(begins == begin)[0]
    waste = np.maximum(begin - by_node[equal], 0).sum(axis=1)  # of what is idle there until then
    node = int(equal[waste.argmin()])
    # Sorted by the time since which they are idle; of equal ones, the first.
    inside = np.argsort(np.where(by_node[node] <= begin, -by_node[node], np.inf), kind="stable")[:rest]
    chosen = (node * fleet.per_node + inside).tolist()
    if whole:
        for one in [int(n) for n in first if n != node][:whole]:
            chosen += range(one * fleet.per_node, (one + 1) * fleet.per_node)
    return tuple(sorted(chosen))
