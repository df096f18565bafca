"""Masks as tables of tiles, from which our Triton kernels read the columns that each of their blocks of rows visits.

A block of rows has stretches of columns that it sees whole, and stretches that are tested against a few bands. Tiles without a
pair are in neither. Whole stretches consist of tiles of ``width`` columns, tested ones of tiles of ``tested_width``. The time to
build the tables grows with the number of bands and of tiles at their edges, not with queries times keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from lcbench.masks.band import BandMask, Ints, spread
from lcbench.masks.block import BlockMap
from lcbench.masks.cover import by_rows


@dataclass(frozen=True)
class TileTables:
    """Blocks of rows b of map m, as entries ``e = m * len(rows) + b`` of the lists.

    Attributes:
        rows: (blocks, 2): first row, last row + 1.
        order: (maps, blocks): blocks by falling work, so that the longest begin first.
        whole_at: (entries, 2): where the stretches of an entry begin in ``whole``, and how many tiles they have in all.
        whole: (n, 2): columns (begin, end) that every row of the block sees; a multiple of ``width`` long.
        tested_at: (entries, 2): as ``whole_at``, for ``tested``.
        tested: (n, 4): (begin, end, first band, last band + 1): a column counts where one of these bands has it. A multiple of
            ``tested_width`` long; the last tile may reach beyond the last column.
        bands: (n, 6), as in ``BandMask``.
        height: the most rows of a block.
        width, tested_width: columns per tile.
    """

    rows: Ints
    order: Ints
    whole_at: Ints
    whole: Ints
    tested_at: Ints
    tested: Ints
    bands: Ints
    height: int
    width: int
    tested_width: int

    @property
    def single(self) -> bool:
        """Whether every tested tile has one band."""
        return bool((self.tested[:, 3] - self.tested[:, 2] == 1).all())


class _Listed(NamedTuple):
    """The lists of ``TileTables`` with the entry of each stretch, both sorted by entry."""

    whole_entry: Ints
    whole: Ints
    tested_entry: Ints
    tested: Ints
    bands: Ints

    def joined(self, other: _Listed) -> _Listed:
        """With the stretches of another one, whose bands are put behind these."""
        more = other.tested + np.array([0, 0, len(self.bands), len(self.bands)])
        of_whole, of_tested = (
            np.concatenate(entries) for entries in ((self.whole_entry, other.whole_entry), (self.tested_entry, other.tested_entry))
        )
        by_whole, by_tested = (np.argsort(entry, kind="stable") for entry in (of_whole, of_tested))
        whole, tested = np.concatenate([self.whole, other.whole]), np.concatenate([self.tested, more])
        bands = np.concatenate([self.bands, other.bands])
        return _Listed(of_whole[by_whole], whole[by_whole], of_tested[by_tested], tested[by_tested], bands)


MakeTables: TypeAlias = Callable[[int, int, int], TileTables]  # tables of one mask for (height, width, tested width)


def of_bands(mask: BandMask, height: int, width: int, tested_width: int) -> TileTables:
    """Tables of a band mask, for blocks of ``height`` rows and tiles of ``width`` and ``tested_width`` columns.

    ``width`` is a multiple of ``tested_width``. Every tile begins at a multiple of ``tested_width``.
    """
    tops = np.arange(0, mask.num_q, height)
    edges = np.append(tops, mask.num_q)
    rows = np.stack([edges[:-1], edges[1:]], axis=1)
    return _tables(rows, 1, _of_bands([mask], edges, width, tested_width), height, width, tested_width)


def _of_bands(masks: Sequence[BandMask], edges: Ints, width: int, tested_width: int) -> _Listed:
    """Lists of band masks of one shape, one after the other, for blocks of rows between ``edges``."""
    each, grid, blocks = width // tested_width, tested_width, len(edges) - 1
    cut = [by_rows(mask.bands, edges) for mask in masks]
    parts = np.concatenate([bands for bands, _ in cut])
    # Rows of all masks behind one another: entries.
    row = np.concatenate([of + number * blocks for number, (_, of) in enumerate(cut)])
    q0, q1, k0, k1, lo, hi = parts.T
    covers = q1 - q0 == np.tile(np.diff(edges), len(masks))[row]
    # Columns that the last row already sees and the first one still does, rounded inwards to whole tiles.
    begin = -(-np.maximum(k0, q1 - 1 + lo) // grid)
    end = np.minimum(k1, q0 + hi + 1) // grid
    end = begin + np.maximum(end - begin, 0) // each * each
    first, last = k0 // grid, -(-k1 // grid)
    some = covers & (begin < end)
    begin, end = np.where(some, begin, last), np.where(some, end, last)

    order = np.lexsort((begin[some], row[some]))
    whole = np.stack([begin[some], end[some]], axis=1)[order] * grid
    whole_row = row[some][order]

    before, columns = spread(first, begin)
    after, later = spread(end, last)
    part, column = np.concatenate([before, after]), np.concatenate([columns, later])
    order = np.lexsort((column, row[part]))
    tested_row, tested, used = _tested(row[part[order]], column[order], part[order], parts, grid)
    return _Listed(whole_row, whole, tested_row, tested, used)


def _tested(row: Ints, column: Ints, part: Ints, parts: Ints, width: int) -> tuple[Ints, Ints, Ints]:
    """(row, (begin, end, first band, last band + 1), bands) of tiles given as one entry per band that touches them.

    Neighbouring tiles that the same bands touch become one stretch.
    """
    if not len(row):
        return row, np.zeros((0, 4), dtype=np.int64), parts[:0]
    starts = np.nonzero(np.concatenate([[True], (np.diff(row) != 0) | (np.diff(column) != 0)]))[0]
    count = np.diff(np.append(starts, len(row)))
    tile_row, tile_column = row[starts], column[starts]
    # Entry by entry against the tile before, as far as both have equally many.
    tile, place = spread(np.zeros(len(starts), dtype=np.int64), count)
    previous = np.maximum(tile - 1, 0)
    differs = part != part[np.minimum(starts[previous] + place, len(part) - 1)]
    differing = np.bincount(tile, weights=differs, minlength=len(starts))
    follows = np.zeros(len(starts), dtype=bool)
    follows[1:] = (np.diff(tile_row) == 0) & (np.diff(tile_column) == 1) & (np.diff(count) == 0) & (differing[1:] == 0)
    heads = np.nonzero(~follows)[0]
    ends = np.append(heads[1:], len(starts)) - 1
    _, entry = spread(starts[heads], starts[heads] + count[heads])
    bands_end = np.cumsum(count[heads])
    stretches = [tile_column[heads] * width, (tile_column[ends] + 1) * width, bands_end - count[heads], bands_end]
    return tile_row[heads], np.stack(stretches, axis=1), parts[part[entry]]


def of_blocks(mask: BlockMap, height: int, width: int, tested_width: int) -> TileTables:
    """Tables of a block map, its maps one after the other; sizes as for ``of_bands``.

    Blocks of rows end where the map's blocks end, so that kept blocks are seen whole. What whole tiles leave of a stretch of kept
    blocks is tested. Stretches with blocks that are cut are taken as bands, of which tiles at an edge are tested.
    """
    heights = np.diff(mask.q_edges)
    number, piece = spread(np.zeros(len(heights), dtype=np.int64), -(-heights // height))
    rows = np.stack([begin := mask.q_edges[number] + piece * height, np.minimum(begin + height, mask.q_edges[number + 1])], axis=1)
    first = np.searchsorted(number, np.arange(len(heights)))
    parted = [mask.parted(i) for i in range(mask.maps)]
    entries, found = [], []
    for i, ((block, left, right), _) in enumerate(parted):
        stretch, row = spread(first[block], np.append(first, len(number))[block + 1])
        order = np.argsort(row, kind="stable")
        entries.append(i * len(number) + row[order])
        found.append(np.stack([mask.k_edges[left], mask.k_edges[right]], axis=1)[stretch[order]])
    entry, stretch = np.concatenate(entries), np.concatenate(found)
    begin, end = stretch.T
    rest = begin + (end - begin) // width * width
    some, left = begin < rest, rest < end
    ends, band = np.unique(np.stack([rest[left], end[left]], axis=1), axis=0, return_inverse=True)
    bands = np.zeros((len(ends), 6), dtype=np.int64)
    bands[:, 1], bands[:, 2:4], bands[:, 4:] = mask.num_q, ends, (-mask.num_q, mask.num_k)
    band = band.reshape(-1)  # numpy 2.0 gives it another shape
    tiles = -(-(end - rest)[left] // tested_width)
    tested = np.stack([rest[left], rest[left] + tiles * tested_width, band, band + 1], axis=1)
    listed = _Listed(entry[some], np.stack([begin, rest], axis=1)[some], entry[left], tested, bands)
    if any(len(cut) for _, cut in parted):
        edges = np.append(rows[:, 0], mask.num_q)
        listed = listed.joined(_of_bands([cut for _, cut in parted], edges, width, tested_width))
    return _tables(rows, mask.maps, listed, height, width, tested_width)


def _tables(rows: Ints, maps: int, listed: _Listed, height: int, width: int, tested_width: int) -> TileTables:
    whole_entry, whole, tested_entry, tested, bands = listed
    ats = []
    for entry, stretch, tile in ((whole_entry, whole, width), (tested_entry, tested, tested_width)):
        tiles = np.bincount(entry, weights=(stretch[:, 1] - stretch[:, 0]) // tile, minlength=maps * len(rows)).astype(np.int64)
        ats.append(np.stack([np.searchsorted(entry, np.arange(maps * len(rows))), tiles], axis=1))
    work = ats[0][:, 1] * width + ats[1][:, 1] * tested_width
    order = np.argsort(-work.reshape(maps, -1), axis=1, kind="stable")
    return TileTables(rows, order, ats[0], whole, ats[1], tested, bands, height, width, tested_width)
