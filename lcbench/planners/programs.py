"""Which groups there are in a micro-batch and how many documents of each bucket they share, as mixed-integer linear programs.

HiGHS is bounded by nodes, never by seconds, so that the same batch always has the same plan.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import Ints
from lcbench.planners.base import Floats

AREA = 1e-3  # weight of mean busy seconds of the ranks beside the makespan: of plans that end at once, that which computes least


@dataclass(frozen=True, eq=False)
class Sharing:
    """Groups to be chosen for documents of some buckets.

    Attributes:
        counts: documents of each bucket, (Q,).
        tokens: that each document of a bucket counts as in a group's memory, (Q,).
        degrees: of groups, ascending, (G,).
        seconds: a document of each bucket at each degree, (Q, G); infinite where it cannot be.
        overhead_s: of a group of each degree, (G,).
        ranks: N.
        capacity: tokens that a rank holds; None: what a group shares need not fit it at once.
    """

    counts: Ints
    tokens: Ints
    degrees: Ints
    seconds: Floats
    overhead_s: Floats
    ranks: int
    capacity: int | None

    @property
    def scale(self) -> float:
        """Seconds that are about the makespan: those of the cheapest degrees, spread over all ranks, or of the longest document."""
        busy = (self.seconds * self.degrees).min(axis=1)
        return max(float((busy * self.counts).sum()) / self.ranks, float(self.seconds.min(axis=1).max()))


def exact(sharing: Sharing, gap: float, nodes: int) -> list[tuple[int, Ints]] | None:
    """FlexSP's program (arXiv 2412.01523, 4.1), with groups g of degree d_g, of which each may be used (y) or not, and A documents
    of each bucket in each group::

        minimise M + AREA * sum_g d_g (sum_b A[b, g] t[b, g] + o_g y_g) / N
        sum_g d_g y_g <= N,   sum_g A[b, g] = counts[b],   sum_b A[b, g] s_b <= d_g C y_g,   sum_b A[b, g] t[b, g] + o_g y_g <= M

    Of groups of one degree, which are alike, those in front are used and have more of what takes longest.

    Args:
        gap: relative, at which it may stop.
        nodes: of the search, at most.

    Returns:
        (degree, (Q,) documents of each bucket) of the groups that are used; None where there are none within these nodes.
    """
    assert sharing.capacity is not None
    kinds = np.repeat(np.arange(len(sharing.degrees)), sharing.ranks // sharing.degrees)
    degrees, groups, buckets = sharing.degrees[kinds], len(kinds), len(sharing.counts)
    seconds, overhead = sharing.seconds[:, kinds] / sharing.scale, sharing.overhead_s[kinds] / sharing.scale
    possible = np.isfinite(seconds)
    seconds = np.where(possible, seconds, 0.0)
    # Variables: A, bucket by bucket, then y, then M.
    size = buckets * groups + groups + 1
    rows: list[Floats] = []
    low: list[float] = []
    high: list[float] = []

    def row(least: float, most: float, **parts: Any) -> None:
        own = np.zeros(size)
        own[: buckets * groups] = parts.get("a", np.zeros((buckets, groups))).reshape(-1)
        own[buckets * groups : -1] = parts.get("y", 0.0)
        own[-1] = parts.get("m", 0.0)
        rows.append(own)
        low.append(least)
        high.append(most)

    row(-np.inf, sharing.ranks, y=degrees.astype(float))
    for bucket, count in enumerate(sharing.counts):
        chosen = np.zeros((buckets, groups))
        chosen[bucket] = 1
        row(count, count, a=chosen)
    for group, kind in enumerate(kinds):
        unit = np.eye(groups)[group]
        row(-np.inf, 0, a=np.outer(sharing.tokens / (degrees[group] * sharing.capacity), unit), y=-unit)
        row(-np.inf, 0, a=np.outer(seconds[:, group], unit), y=overhead[group] * unit, m=-1.0)
        if group and kinds[group - 1] == kind:
            before = np.eye(groups)[group - 1]
            row(0, np.inf, a=np.outer(seconds[:, group], before - unit), y=overhead[group] * (before - unit))
    spread = AREA / sharing.ranks * degrees
    upper = np.where(possible, sharing.counts[:, None], 0).reshape(-1)
    x = _solved(
        np.r_[(seconds * spread).reshape(-1), overhead * spread, 1.0], np.array(rows), low, high,
        np.r_[np.ones(size - 1), 0], np.r_[upper, np.ones(groups), np.inf], gap, nodes,
    )  # fmt: skip
    if x is None:
        return None
    shares = np.rint(x[: buckets * groups]).astype(np.int64).reshape(buckets, groups)
    return [(int(degrees[group]), shares[:, group]) for group in np.flatnonzero(shares.any(axis=0))]


def alike(sharing: Sharing, gap: float, nodes: int) -> tuple[Ints, Ints] | None:
    """The same with the groups of a degree taken together, for many ranks: n_d groups of degree d share A[b, d] documents of each
    bucket as if these could be cut. For a makespan M, by bisection the least that has an answer::

        minimise sum_d d n_d   (at most N)
        sum_d A[b, d] = counts[b],   sum_b A[b, d] s_b <= n_d d C,   sum_b A[b, d] t[b, d] + n_d o_d <= n_d M

    The bisection is over programs without integrality; in the last one groups are whole, with as much more of M as that needs.
    Shares are rounded then.

    Returns:
        (groups of each degree, (G,); documents of each bucket at each degree, (Q, G)); None where there are none.
    """
    longest = float(sharing.seconds.min(axis=1).max()) / sharing.scale
    under, over = max(longest, 1e-9), max(longest, 1.0)
    while _within(sharing, over, False, gap, nodes) is None:
        under, over = over, over * 1.5
        if over > 1e6:  # what fits no micro-batch
            return None
    while over / under > 1 + gap / 2:
        middle = (under + over) / 2
        under, over = (under, middle) if _within(sharing, middle, False, gap, nodes) is not None else (middle, over)
    for _ in range(40):
        if (x := _within(sharing, over, True, gap, nodes)) is not None:
            shares = x[: -len(sharing.degrees)].reshape(sharing.seconds.shape)
            return np.rint(x[-len(sharing.degrees) :]).astype(np.int64), np.stack([*map(_rounded, shares, sharing.counts)])
        over *= 1 + gap
    return None


def _within(sharing: Sharing, makespan: float, whole: bool, gap: float, nodes: int) -> Floats | None:
    """Shares, bucket by bucket, and groups of each degree that need fewest ranks within a makespan; None where these are more than
    there are.

    Args:
        makespan: in ``sharing.scale``.
        whole: groups are whole.
    """
    kinds, buckets = len(sharing.degrees), len(sharing.counts)
    size = buckets * kinds + kinds
    seconds, overhead = sharing.seconds / sharing.scale, sharing.overhead_s / sharing.scale
    possible = np.isfinite(seconds) & (seconds + overhead <= makespan * (1 + 1e-9))
    if not possible.any(axis=1).all():
        return None
    rows, counts = [], sharing.counts.tolist()
    for bucket in range(buckets):
        own = np.zeros(size)
        own[bucket * kinds : (bucket + 1) * kinds] = 1
        rows.append(own)
    for kind in range(kinds):
        busy = np.zeros(size)
        busy[kind : buckets * kinds : kinds] = np.where(possible[:, kind], seconds[:, kind], 0) / makespan
        busy[buckets * kinds + kind] = overhead[kind] / makespan - 1
        rows.append(busy)
        if sharing.capacity is not None:
            held = np.zeros(size)
            held[kind : buckets * kinds : kinds] = sharing.tokens / (sharing.degrees[kind] * sharing.capacity)
            held[buckets * kinds + kind] = -1
            rows.append(held)
    rest = len(rows) - buckets
    # So little that it decides between programs of as many ranks only: the fewer busy seconds.
    wasted = AREA * np.where(possible, seconds * sharing.degrees, 0).reshape(-1)
    upper = np.r_[np.where(possible, sharing.counts[:, None], 0).reshape(-1), sharing.ranks // sharing.degrees]
    x = _solved(
        np.r_[wasted, sharing.degrees.astype(float)], np.array(rows), [*counts, *[-np.inf] * rest], [*counts, *[0.0] * rest],
        np.r_[np.zeros(buckets * kinds), np.full(kinds, int(whole))], upper, gap, nodes,
    )  # fmt: skip
    return x if x is not None and x[buckets * kinds :] @ sharing.degrees <= sharing.ranks * (1 + 1e-6) else None


def _solved(
    target: Floats, rows: NDArray[Any], low: list[float], high: list[float], whole: NDArray[Any], upper: NDArray[Any], gap: float,
    nodes: int,
) -> Floats | None:  # fmt: skip
    """The least ``target @ x`` with ``low <= rows @ x <= high`` and ``0 <= x <= upper``, or None."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import
    from scipy.sparse import csr_array

    # Presolving, HiGHS often prints a line of its own (else seldom), and is no faster on programs of this size.
    with _printing_to_stderr():
        found = milp(
            target, constraints=LinearConstraint(csr_array(rows), low, high), integrality=whole, bounds=Bounds(0.0, upper),
            options={"node_limit": nodes, "mip_rel_gap": gap, "presolve": False},
        )  # fmt: skip
    return None if found.x is None else np.asarray(found.x)


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """What a library writes to the process's own stdout goes to its stderr: stdout may be a command's JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _rounded(shares: Floats, count: int) -> Ints:
    """Whole numbers near to shares that add up to a count: what is largest of a whole is rounded up."""
    whole = np.floor(shares + 1e-6).astype(np.int64)
    whole[np.argsort(whole - shares, kind="stable")[: count - int(whole.sum())]] += 1
    return whole
