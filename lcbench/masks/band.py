"""The mask algebra: a static mask is a set of disjoint bands of the (query, key) plane.

A band is a rectangle with two diagonal bounds::

    q0 <= q < q1,    k0 <= k < k1,    lo <= k - q <= hi

Cropping a band, re-indexing it under a strided layout and transposing it each leave a band, and its area has a closed
form; so FLOPs, load balance and the part of a mask that one tile needs are exact at any length without a matrix.

All operations are vectorised over the bands: a mask is one int64 array of shape (n, 6), its rows in normal form, that is
tight (every row and column of a rectangle is touched) and with bounds that reach no further than the rectangle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

OPEN = 1 << 61  # a diagonal bound that binds nowhere; its sums with token indices still fit 64 bits

# Merging compares bands pairwise, so it is tried on short lists only.
MERGE_LIMIT = 16


class Band(NamedTuple):
    """One rectangle ``[q0, q1) x [k0, k1)`` with ``lo <= k - q <= hi``."""

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int = -OPEN
    hi: int = OPEN


class Run(NamedTuple):
    """``size`` tokens ``start, start + stride, ...``: how a layout names the tokens of a shard."""

    start: int
    size: int
    stride: int = 1


@dataclass(frozen=True, eq=False)
class BandMask:
    """Which of ``num_q`` x ``num_k`` pairs count: those inside one of the disjoint ``bands`` (int64, (n, 6))."""

    num_q: int
    num_k: int
    bands: Ints

    @classmethod
    def of(cls, num_q: int, num_k: int, bands: Iterable[Sequence[int]] | Ints) -> BandMask:
        """A mask from disjoint bands, each clipped to the plane and brought to normal form; empty ones are dropped."""
        array = bands if isinstance(bands, np.ndarray) else np.array(list(bands), dtype=np.int64).reshape(-1, 6)
        return cls(num_q, num_k, _crop(array, 0, num_q, 0, num_k))

    def __iter__(self) -> Iterator[Band]:
        return (Band(*row) for row in self.bands.tolist())

    def __len__(self) -> int:
        return len(self.bands)

    @property
    def areas(self) -> Ints:
        """Number of pairs in each band, shape (n,)."""
        return _area(self.bands)

    @property
    def area(self) -> int:
        """Number of unmasked pairs, exact."""
        return int(self.areas.sum())

    @property
    def density(self) -> float:
        return self.area / (self.num_q * self.num_k) if self.num_q and self.num_k else 0.0

    def crop(self, q0: int, q1: int, k0: int, k1: int) -> BandMask:
        """The part inside a rectangle, in coordinates that start at its corner."""
        return BandMask(q1 - q0, k1 - k0, _shift(_crop(self.bands, q0, q1, k0, k1), -q0, -k0))

    def transpose(self) -> BandMask:
        """Queries and keys change places."""
        q0, q1, k0, k1, lo, hi = self.bands.T
        return BandMask(self.num_k, self.num_q, np.stack([k0, k1, q0, q1, -hi, -lo], axis=1))

    def tile(self, q_runs: Sequence[Run], k_runs: Sequence[Run]) -> BandMask:
        """The mask of one tile: tokens of ``q_runs`` as queries x tokens of ``k_runs`` as keys, in local positions.

        Raises:
            ValueError: two runs with different strides (a band would not stay one band).
        """
        parts = []
        q_offset = 0
        for q in q_runs:
            k_offset = 0
            for k in k_runs:
                parts.append(_shift(_reindex(self.bands, q, k), q_offset, k_offset))
                k_offset += k.size
            q_offset += q.size
        bands = np.concatenate(parts) if parts else np.empty((0, 6), dtype=np.int64)
        num_k = sum(k.size for k in k_runs)
        return BandMask(q_offset, num_k, bands)

    def merged(self) -> BandMask:
        """Fewer bands for the same pairs, by joining two wherever their union is one band.

        The smallest band around two disjoint ones contains both, so it is their union exactly when the areas agree.
        """
        if not 1 < len(self.bands) <= MERGE_LIMIT:
            return self
        bands = list(self.bands[np.lexsort((self.bands[:, 2], self.bands[:, 0]))])
        joined = True
        while joined:
            joined = False
            for i in range(len(bands)):
                for j in range(i + 1, len(bands)):
                    hull = _hull(bands[i], bands[j])
                    areas = _area(np.stack([hull, bands[i], bands[j]]))
                    if areas[0] == areas[1] + areas[2]:
                        bands[i] = hull
                        del bands[j]
                        joined = True
                        break
                if joined:
                    break
        return BandMask(self.num_q, self.num_k, np.stack(bands))

    def row_area(self, runs: Sequence[Run]) -> int:
        """Number of pairs whose query lies in ``runs``: the work of a rank that owns these queries."""
        total = 0
        for run in runs:
            # Over all keys a row's pairs do not depend on how keys are indexed, so each residue of the keys is one run.
            for residue in range(run.stride):
                keys = Run(residue, max(0, -(-(self.num_k - residue) // run.stride)), run.stride)
                total += int(_area(_reindex(self.bands, run, keys)).sum())
        return total


def _crop(bands: Ints, q0: int, q1: int, k0: int, k1: int) -> Ints:
    cropped = bands.copy()
    cropped[:, 0] = np.maximum(bands[:, 0], q0)
    cropped[:, 1] = np.minimum(bands[:, 1], q1)
    cropped[:, 2] = np.maximum(bands[:, 2], k0)
    cropped[:, 3] = np.minimum(bands[:, 3], k1)
    return _normal(cropped)


def _shift(bands: Ints, dq: int, dk: int) -> Ints:
    return bands + np.array([dq, dq, dk, dk, dk - dq, dk - dq], dtype=np.int64)


def _normal(bands: Ints) -> Ints:
    """Tight bands only: rows, then columns that no pair touches are cut away; empty bands go."""
    q0, q1, k0, k1, lo, hi = bands.T
    q0, q1 = np.maximum(q0, k0 - hi), np.minimum(q1, k1 - lo)
    k0, k1 = np.maximum(k0, q0 + lo), np.minimum(k1, q1 + hi)
    lo, hi = np.maximum(lo, k0 - q1 + 1), np.minimum(hi, k1 - 1 - q0)
    full: NDArray[np.bool_] = (q0 < q1) & (k0 < k1) & (lo <= hi)
    return np.stack([q0, q1, k0, k1, lo, hi], axis=1)[full]


def _reindex(bands: Ints, q: Run, k: Run) -> Ints:
    """Bands over the positions inside two runs: ``k.start + s*j - q.start - s*i`` between lo and hi bounds ``j - i``."""
    stride = k.stride if q.size == 1 else q.stride
    if k.size > 1 and k.stride != stride:
        raise ValueError(f"runs of different strides ({q.stride} and {k.stride}) do not keep a band a band")
    q0, q1, k0, k1, lo, hi = bands.T
    offset = k.start - q.start
    local = np.stack(
        [
            _ceil_div(q0 - q.start, stride).clip(0, q.size),
            _ceil_div(q1 - q.start, stride).clip(0, q.size),
            _ceil_div(k0 - k.start, stride).clip(0, k.size),
            _ceil_div(k1 - k.start, stride).clip(0, k.size),
            _ceil_div(lo - offset, stride),
            (hi - offset) // stride,
        ],
        axis=1,
    )
    return _normal(local)


def _hull(a: Ints, b: Ints) -> Ints:
    low, high = np.minimum(a, b), np.maximum(a, b)
    return np.array([low[0], high[1], low[2], high[3], low[4], high[5]])


def _ceil_div(a: Ints, b: int) -> Ints:
    return -((-a) // b)


def _area(bands: Ints) -> Ints:
    q0, q1, k0, k1, lo, hi = bands.T
    return _pairs_below(q0, q1, k0, k1, hi) - _pairs_below(q0, q1, k0, k1, lo - 1)


def _pairs_below(q0: Ints, q1: Ints, k0: Ints, k1: Ints, bound: Ints) -> Ints:
    """Pairs of each rectangle with ``k - q <= bound``: row q has clip(q + bound - k0 + 1, 0, width) of them."""
    width = k1 - k0

    def summed(top: Ints) -> Ints:  # sum of clip(x, 0, width) over all x <= top
        inside = top.clip(0, width)
        return inside * (inside + 1) // 2 + (top - width).clip(0) * width

    bound = bound.clip(k0 - q1, k1 - q0)
    return summed(q1 - 1 + bound - k0 + 1) - summed(q0 + bound - k0)
