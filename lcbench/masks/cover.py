"""How much of each block of a grid a band mask has: whole blocks, and the pairs of those that it cuts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import BandMask, Ints, areas, cropped, spread


@dataclass(frozen=True, eq=False)
class Cover:
    """The blocks of a grid of which a mask has something.

    Attributes:
        whole: bool (rows of blocks, columns of blocks): all of the block's pairs count.
        row, column, pairs: the blocks of which some pairs count and others do not, and how many do, sorted by row, then column.
    """

    whole: NDArray[np.bool_]
    row: Ints
    column: Ints
    pairs: Ints

    @cached_property
    def some(self) -> NDArray[np.bool_]:
        """bool (rows of blocks, columns of blocks): a pair of the block counts."""
        found = self.whole.copy()
        found[self.row, self.column] = True
        return found


def cover(mask: BandMask, q_edges: Ints, k_edges: Ints) -> Cover:
    """What a mask has of the blocks ``q_edges[i]:q_edges[i+1]`` x ``k_edges[j]:k_edges[j+1]``.

    Runs of whole blocks are found as such. Only blocks at the edges of bands are looked at one by one: the time goes with the rows
    of blocks and with the blocks that are cut.
    """
    parts, row = by_rows(mask.bands, q_edges)
    q0, q1, k0, k1, lo, hi = parts.T
    first, last = blocks_of(k_edges, k0, k1)
    # Columns that the last row already sees and the first one still does, rounded inwards to whole blocks.
    begin = np.searchsorted(k_edges, np.maximum(k0, q1 - 1 + lo))
    end = np.searchsorted(k_edges, np.minimum(k1, q0 + hi + 1), side="right") - 1
    runs = (q0 == q_edges[row]) & (q1 == q_edges[row + 1]) & (begin < end)
    begin, end = np.where(runs, begin, last), np.where(runs, end, last)
    # Bands are disjoint, so no block is begun or ended twice.
    steps = np.zeros((len(q_edges) - 1, len(k_edges)), dtype=np.int8)
    np.add.at(steps, (row[runs], begin[runs]), 1)
    np.add.at(steps, (row[runs], end[runs]), -1)
    whole = np.cumsum(steps[:, :-1], axis=1, dtype=np.int8).view(np.bool_)

    (before, left), (after, right) = spread(first, begin), spread(end, last)
    part, column = np.concatenate([before, after]), np.concatenate([left, right])
    cut, kept = cropped(parts[part], None, None, k_edges[column], k_edges[column + 1])
    places, at = np.unique((row[part] * (len(k_edges) - 1) + column)[kept], return_inverse=True)
    pairs = np.zeros(len(places), dtype=np.int64)
    np.add.at(pairs, at.reshape(-1), areas(cut))
    row, column = np.divmod(places, max(1, len(k_edges) - 1))
    # Several bands may make up a block together.
    full = pairs == np.diff(q_edges)[row] * np.diff(k_edges)[column]
    whole[row[full], column[full]] = True
    return Cover(whole, row[~full], column[~full], pairs[~full])


def by_rows(bands: Ints, q_edges: Ints) -> tuple[Ints, Ints]:
    """Bands cut along rows of blocks: (parts in normal form, the row of blocks of each), in the order of the bands."""
    number, row = spread(*blocks_of(q_edges, bands[:, 0], bands[:, 1]))
    parts, kept = cropped(bands[number], q_edges[row], q_edges[row + 1], None, None)
    return parts, row[kept]


def blocks_of(edges: Ints, begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """(first, last + 1) of the blocks that hold tokens ``begin ... end - 1``."""
    return np.searchsorted(edges, begin, side="right") - 1, np.searchsorted(edges, end - 1, side="right")
