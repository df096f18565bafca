"""Where in one stretch of memory tensors lie whose lifetimes are known, so that its end is as low as can be: MEMO's placement of
transient tensors (arXiv 2407.12117), in two levels: within a layer, then layers as blocks.

Two tensors that live at once must not share memory. The problem is dynamic storage allocation, which is NP-hard; small cases are
solved exactly as a mixed-integer program, larger ones by best fit. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

PAIRS = 150  # that live at once, up to which a case is solved exactly
LIMIT_S = 2.0  # of the exact solution; the best that was found by then is taken


@dataclass(frozen=True)
class Lifetime:
    """A tensor's memory, from the moment ``begin`` on and before the moment ``end``."""

    bytes: int
    begin: int
    end: int

    def meets(self, other: Lifetime) -> bool:
        return self.begin < other.end and other.begin < self.end


@dataclass(frozen=True)
class Placement:
    """Offsets of tensors in one stretch of memory.

    Attributes:
        offsets: of each, in bytes.
        peak: the end of the last.
        bound: the largest sum of what lives at once; no placement has a lower peak.
        exact: whether it is known that none has a lower one.
    """

    offsets: tuple[int, ...]
    peak: int
    bound: int
    exact: bool


def place(lifetimes: Sequence[Lifetime], *, pairs: int = PAIRS, limit_s: float = LIMIT_S) -> Placement:
    """Offsets with a peak as low as can be: exact with at most so many ``pairs`` that live at once, within ``limit_s`` seconds."""
    found = best_fit(lifetimes)
    if found.exact or len(_meeting(lifetimes)) > pairs:
        return found
    return _exact(lifetimes, found, limit_s)


def lower_bound(lifetimes: Sequence[Lifetime]) -> int:
    """The largest sum of bytes that live at once."""
    changes = sorted(
        [(each.end, -each.bytes) for each in lifetimes if each.end > each.begin]
        + [(each.begin, each.bytes) for each in lifetimes if each.end > each.begin]
    )
    return int(np.cumsum([0, *(change for _, change in changes)]).max())


def best_fit(lifetimes: Sequence[Lifetime]) -> Placement:
    """Largest first, then who lives longest, each in the smallest gap that it fits into between those before it that it meets."""
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].bytes, lifetimes[i].begin - lifetimes[i].end)):
        own = lifetimes[index]
        gaps, end = [], 0
        for offset, size in sorted((offsets[i], lifetimes[i].bytes) for i in placed if lifetimes[i].meets(own)):
            if offset - end >= own.bytes:
                gaps.append((offset - end, end))
            end = max(end, offset + size)
        offsets[index] = min(gaps)[1] if gaps else end
        placed.append(index)
    return _placement(lifetimes, offsets, lower_bound(lifetimes))


def _placement(lifetimes: Sequence[Lifetime], offsets: Sequence[int], bound: int, exact: bool = False) -> Placement:
    peak = max((offset + each.bytes for offset, each in zip(offsets, lifetimes, strict=True)), default=0)
    return Placement(tuple(offsets), peak, bound, exact or peak == bound)


def _meeting(lifetimes: Sequence[Lifetime]) -> list[tuple[int, int]]:
    """Pairs that live at once and have memory."""
    return [
        (i, j)
        for i, j in combinations(range(len(lifetimes)), 2)
        if lifetimes[i].meets(lifetimes[j]) and lifetimes[i].bytes and lifetimes[j].bytes
    ]


def _exact(lifetimes: Sequence[Lifetime], known: Placement, limit_s: float) -> Placement:
    """The mixed-integer program: of each pair that meets one lies below the other, and the peak is above all.

    Args:
        known: a placement, which is taken where the solver finds no better one in time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import
    from scipy.sparse import coo_array

    meeting, count = _meeting(lifetimes), len(lifetimes)
    size = np.array([each.bytes for each in lifetimes], dtype=float) / known.peak
    peak, rows = count + len(meeting), 2 * len(meeting) + count  # the variables: offsets, who lies below, the peak
    # o_i + s_i <= o_j + z and o_j + s_j <= o_i + 1 - z: z is 0 where i lies below j. Sizes are shares of the known peak.
    entries: list[tuple[int, int, float]] = []
    upper = np.empty(rows)
    for number, (i, j) in enumerate(meeting):
        z, row = count + number, 2 * number
        entries += [(row, i, 1), (row, j, -1), (row, z, -1), (row + 1, j, 1), (row + 1, i, -1), (row + 1, z, 1)]
        upper[row], upper[row + 1] = -size[i], 1 - size[j]
    for i in range(count):
        entries += [(2 * len(meeting) + i, i, 1), (2 * len(meeting) + i, peak, -1)]
        upper[2 * len(meeting) + i] = -size[i]
    at, of, values = zip(*entries, strict=True)
    least = np.zeros(peak + 1)
    least[peak] = known.bound / known.peak
    found = milp(
        np.eye(peak + 1)[peak],
        constraints=LinearConstraint(coo_array((values, (at, of)), shape=(rows, peak + 1)).tocsr(), ub=upper),
        integrality=np.r_[np.zeros(count), np.ones(len(meeting)), 0],
        bounds=Bounds(least, np.ones(peak + 1)),
        options={"time_limit": limit_s, "mip_rel_gap": 0.0},
    )
    if found.x is None:
        return known
    below = [(i, j) if found.x[count + number] < 0.5 else (j, i) for number, (i, j) in enumerate(meeting)]
    offsets = _stacked(lifetimes, below, found.x[:count])
    # What is smaller than the solver's tolerance may have been put anywhere.
    fits = all(_apart(offsets[i], lifetimes[i].bytes, offsets[j], lifetimes[j].bytes) for i, j in meeting)
    solved = _placement(lifetimes, offsets, known.bound, exact=found.status == 0)
    return solved if fits and solved.peak <= known.peak else known


def _apart(offset: int, size: int, other: int, other_size: int) -> bool:
    return offset + size <= other or other + other_size <= offset


def _stacked(lifetimes: Sequence[Lifetime], below: Sequence[tuple[int, int]], order: Sequence[float]) -> list[int]:
    """Whole offsets, as low as may be, where of each pair the first lies below the second.

    Args:
        order: offsets that nearly fit.
    """
    offsets = [0] * len(lifetimes)
    under: list[list[int]] = [[] for _ in lifetimes]
    for low, high in below:
        under[high].append(low)
    for index in sorted(range(len(lifetimes)), key=lambda i: order[i]):
        offsets[index] = max((offsets[low] + lifetimes[low].bytes for low in under[index]), default=0)
    return offsets
