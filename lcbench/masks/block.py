"""Dynamic block-sparse masks: a grid of blocks, each kept or not at all, per head or for all heads.

Blocks need not be equal, so cutting a block map along any rows and columns, in any order and stride, leaves a block map:
every strategy can run one. What is kept is drawn when it is first asked for, one map at a time, so a plan never draws it.

A map may lie within a band mask, such as blocks that a selector chose under a causal mask: then a pair counts where its block is
kept and the band mask has it. The band mask is cut like the map, so this is closed under the same operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import OPEN, BandMask, DoesNotFit, Ints, TokenSpan, cropped, spread
from lcbench.masks.cover import Cover, by_rows, cover
from lcbench.problem import Heads

Keep = NDArray[np.bool_]
Sharing = Literal["all_heads", "kv_head", "q_head"]
Sizes = Literal["uniform", "variable"]
Stretches = tuple[Ints, Ints, Ints]
Pattern = Callable[[np.random.Generator, Ints, Ints, int], Keep]

MAX_BLOCKS = 1 << 30  # of one head, a byte each
ROWS = 64  # of blocks that are summed up together, so that they fit into a cache


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Blocks ``q_edges[i]:q_edges[i+1]`` x ``k_edges[j]:k_edges[j+1]`` of the plane, kept or not.

    Attributes:
        q_edges, k_edges: rising token positions from 0 to the number of queries and keys.
        maps: how many maps there are; query head h of n reads map ``h // (n // maps)``, so 1 is shared by all heads.
        draw: the kept blocks of a map, bool (rows of blocks, columns of blocks).
        within: the pairs that may count at all, of every head; None: all of them.
    """

    q_edges: Ints
    k_edges: Ints
    maps: int
    draw: Callable[[int], Keep]
    within: BandMask | None = None
    _drawn: dict[int, Keep] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for a band mask of another shape."""
        if (own := self.within) is not None and (own.num_q, own.num_k) != (self.num_q, self.num_k):
            raise ValueError(f"blocks of {self.num_q} x {self.num_k} tokens within a mask of {own.num_q} x {own.num_k}")

    @property
    def num_q(self) -> int:
        """Queries."""
        return int(self.q_edges[-1])

    @property
    def num_k(self) -> int:
        """Keys."""
        return int(self.k_edges[-1])

    def drawn(self, number: int) -> Keep:
        """Blocks of one map as they were drawn, those among them that have no pair ``within``."""
        if number not in self._drawn:
            self._drawn[number] = self.draw(number)
        return self._drawn[number]

    def keep(self, number: int) -> Keep:
        """Kept blocks of one map; each has a pair that counts."""
        return self.drawn(number) if self._cover is None else self.drawn(number) & self._cover.some

    def keeps(self) -> Keep:
        """Kept blocks of all maps: bool (maps, rows of blocks, columns of blocks)."""
        return np.stack([self.keep(i) for i in range(self.maps)])

    def whole(self, number: int) -> Keep:
        """Kept blocks of one map of which all pairs count."""
        return self.drawn(number) if self._cover is None else self.drawn(number) & self._cover.whole

    def cut(self, number: int) -> tuple[Ints, Ints, Ints]:
        """Kept blocks of one map of which some pairs count and others do not: (row, column, pairs that do), sorted."""
        if self._cover is None:
            return (np.empty(0, dtype=np.int64),) * 3
        row, column, pairs = self._cover.row, self._cover.column, self._cover.pairs
        kept = self.drawn(number)[row, column]
        return row[kept], column[kept], pairs[kept]

    @property
    def blocks_cut(self) -> int:
        """Kept blocks over all maps that ``within`` takes pairs from."""
        return sum(len(self.cut(i)[0]) for i in range(self.maps))

    @cached_property
    def _cover(self) -> Cover | None:
        return None if self.within is None else cover(self.within, self.q_edges, self.k_edges)

    def __len__(self) -> int:
        """Kept blocks over all maps."""
        return sum(int(self.keep(i).sum()) for i in range(self.maps))

    @cached_property
    def _row_pairs(self) -> Ints:
        """Pairs of whole blocks of a query of each row of blocks, over all maps, (rows of blocks,)."""
        widths, total = np.diff(self.k_edges).astype(np.float64), np.zeros(len(self.q_edges) - 1)
        for number in range(self.maps):
            keep = self.whole(number)
            for begin in range(0, len(keep), ROWS):
                # Not by ``@``: a BLAS wakes all its threads for it, which take longer than this does.
                total[begin : begin + ROWS] += np.einsum("ij,j->i", keep[begin : begin + ROWS].astype(np.float64), widths)
        return total.astype(np.int64)

    @cached_property
    def _area(self) -> int:
        """Unmasked pairs over all maps."""
        return int(np.diff(self.q_edges) @ self._row_pairs) + sum(int(self.cut(i)[2].sum()) for i in range(self.maps))

    def pairs(self, q_heads: int) -> int:
        """Unmasked pairs over all query heads, exact: what was drawn, not the density that was asked for."""
        return self._area * (q_heads // self.maps)

    @property
    def density(self) -> float:
        """Share of the planes' pairs that count, over all maps, 0 to 1."""
        pairs = self.maps * self.num_q * self.num_k
        return self._area / pairs if pairs else 0.0

    def row_area(self, runs: Sequence[TokenSpan]) -> int:
        """Pairs whose query lies in ``runs``, over all maps."""
        if self.within is not None:
            rows = np.concatenate([run.start + run.stride * np.arange(run.size, dtype=np.int64) for run in runs])
            return self._pairs_of(self.within, np.sort(rows))
        edges, blocks = _cut(self.q_edges, runs)
        return int(np.diff(edges) @ self._row_pairs[blocks])

    def _pairs_of(self, within: BandMask, rows: Ints) -> int:
        """Pairs of sorted rows over all maps, from the intervals of keys that a band mask lets each row see."""
        tops, total = np.searchsorted(rows, self.q_edges), 0
        for first in range(0, len(self.q_edges) - 1, ROWS):
            last = min(first + ROWS, len(self.q_edges) - 1)
            some = rows[tops[first] : tops[last]]
            at, *interval = within.intervals(some)
            if not len(at):
                continue
            # In how many maps each block is kept, and kept keys of all maps before it.
            kept = np.pad(np.sum([self.drawn(i)[first:last] for i in range(self.maps)], axis=0), ((0, 0), (0, 1)))
            before = np.cumsum(np.pad(kept[:, :-1] * np.diff(self.k_edges), ((0, 0), (1, 0))), axis=1)
            block = (np.searchsorted(self.q_edges, some, side="right") - 1 - first)[at]
            begin, end = (
                before[block, column] + kept[block, column] * (token - self.k_edges[column])
                for token in interval
                for column in [np.searchsorted(self.k_edges, token, side="right") - 1]
            )
            total += int((end - begin).sum())
        return total

    def of_heads(self, first: int, count: int, total: int) -> BlockMap:
        """The map of query heads ``first ... first + count - 1`` of ``total``."""
        each = total // self.maps
        index = np.arange(first, first + count) // each
        whole = first % each == 0 and count % each == 0
        kept = np.unique(index) if whole or index[0] == index[-1] else index
        return BlockMap(self.q_edges, self.k_edges, len(kept), lambda i: self.drawn(int(kept[i])), self.within)

    def in_any_head(self) -> BlockMap:
        """One map of the blocks that some map keeps."""
        return BlockMap(
            self.q_edges, self.k_edges, 1, lambda _: np.logical_or.reduce([self.drawn(i) for i in range(self.maps)]), self.within
        )

    def transpose(self) -> BlockMap:
        """Queries and keys change places."""
        within = None if self.within is None else self.within.transpose()
        return BlockMap(self.k_edges, self.q_edges, self.maps, lambda i: self.drawn(i).T, within)

    def tile(self, q_runs: Sequence[TokenSpan], k_runs: Sequence[TokenSpan]) -> BlockMap:
        """The map of tokens of ``q_runs`` as queries x tokens of ``k_runs`` as keys, in local positions."""
        q_edges, rows = _cut(self.q_edges, q_runs)
        k_edges, columns = _cut(self.k_edges, k_runs)
        within = None if self.within is None else _binding(self.within.tile(q_runs, k_runs))
        return BlockMap(q_edges, k_edges, self.maps, lambda i: self.drawn(i)[np.ix_(rows, columns)], within)

    def merged(self) -> BlockMap:
        """The same map with as few bands ``within`` as can be; blocks are merged by ``bands``, when a kernel asks for them."""
        if self.within is None:
            return self
        return BlockMap(self.q_edges, self.k_edges, self.maps, self.drawn, self.within.merged())

    def corners(self, side: str) -> Ints:
        """First and last rows (``side="q"``) or columns (``"k"``) of the blocks, and of the bands ``within``, sorted."""
        edges = self.q_edges if side == "q" else self.k_edges
        bands = [] if self.within is None else [self.within.corners(side)]
        return np.unique(np.concatenate([edges[:-1], edges[1:] - 1, *bands]))

    def bands(self, number: int) -> BandMask:
        """One map as bands, for kernels that know no blocks: adjacent kept blocks become one rectangle, or, where blocks of a
        stretch are cut, what ``within`` has of it."""
        whole, cut = self.parted(number)
        return BandMask(self.num_q, self.num_k, np.concatenate([self._rectangles(*whole), cut.bands]))

    def parted(self, number: int) -> tuple[Stretches, BandMask]:
        """One map as stretches of whole blocks, as ``stretches`` gives them, and bands: what ``within`` has of the other
        stretches."""
        rows, begin, end = stretches(self.keep(number))
        if self.within is None:
            return (rows, begin, end), BandMask.of(self.num_q, self.num_k, [])
        columns, cut_rows, cut_columns = len(self.k_edges), *self.cut(number)[:2]
        of = np.searchsorted(rows * columns + begin, cut_rows * columns + cut_columns, side="right") - 1
        cut = np.bincount(of, minlength=len(rows)) > 0
        bands = self._bounded(self.within, rows[cut], begin[cut], end[cut])
        return (rows[~cut], begin[~cut], end[~cut]), bands

    def _rectangles(self, rows: Ints, begin: Ints, end: Ints) -> Ints:
        """Stretches of blocks as bands, (n, 6)."""
        # A stretch of columns that the rows of blocks below have as well is one rectangle with them.
        order = np.lexsort((rows, end, begin))
        rows, begin, end = rows[order], begin[order], end[order]
        follows = (np.diff(rows) == 1) & (np.diff(begin) == 0) & (np.diff(end) == 0)
        first = np.nonzero(np.concatenate([[True], ~follows]))[0] if len(rows) else np.empty(0, dtype=np.int64)
        last = np.concatenate([first[1:], [len(rows)]]) - 1 if len(rows) else first
        corners = [self.q_edges[rows[first]], self.q_edges[rows[last] + 1], self.k_edges[begin[first]], self.k_edges[end[first]]]
        bound = np.full(len(first), OPEN)
        return BandMask.of(self.num_q, self.num_k, np.stack([*corners, -bound, bound], axis=1)).bands

    def _bounded(self, within: BandMask, rows: Ints, begin: Ints, end: Ints) -> BandMask:
        """What a band mask has of stretches of blocks, which are sorted."""
        parts, row = by_rows(within.bands, self.q_edges)
        left, right = self.k_edges[begin], self.k_edges[end]
        # Of its own row, the stretches that end behind a part's first key and begin before its end.
        each = self.num_k + 1
        first = np.searchsorted(rows * each + right, row * each + parts[:, 2], side="right")
        part, stretch = spread(first, np.searchsorted(rows * each + left, row * each + parts[:, 3]))
        bands, _ = cropped(parts[part], None, None, left[stretch], right[stretch])
        return BandMask(self.num_q, self.num_k, bands).merged()

    def csr(self, number: int) -> tuple[Ints, Ints]:
        """One map as index lists: columns of blocks of row i are ``indices[indptr[i]:indptr[i+1]]``."""
        rows, columns = np.nonzero(self.keep(number))
        indptr = np.searchsorted(rows, np.arange(len(self.q_edges)))
        return indptr.astype(np.int64), columns.astype(np.int64)


def chosen(keeps: Keep, q_edges: Ints, k_edges: Ints, within: BandMask) -> BlockMap:
    """The map of blocks that were chosen, of which the pairs count that a band mask has.

    Args:
        keeps: bool (maps, rows of blocks, columns of blocks).
    """
    return BlockMap(q_edges, k_edges, len(keeps), lambda i: keeps[i], _binding(within))


def _binding(within: BandMask) -> BandMask | None:
    """A band mask, or None where it takes no pair away."""
    return None if within.area == within.num_q * within.num_k else within


def drawn(
    seqlen: int,
    heads: Heads,
    seed: Sequence[int],
    pattern: Pattern,
    *,
    density: float,
    block_size: int,
    sizes: Sizes,
    per: Sharing,
) -> BlockMap:
    """A square block map with a pattern drawn anew for each map.

    Args:
        pattern: (random generator, row edges, column edges, how many columns ``density`` stands for) to kept blocks.
        density: share of the columns, above 0; at least one column.
        block_size: tokens per block; of ``variable`` sizes the mean, drawn from half of it, rounded down, to as much above it.
        per: which heads have a map of their own.
    Raises:
        ValueError: options that no length can satisfy.
        DoesNotFit: more blocks than can be held.
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"mask.density={density} is no share of blocks above 0 and up to 1, such as 0.2")
    if sizes not in get_args(Sizes):
        raise ValueError(f"mask.sizes={sizes} is not one of {', '.join(get_args(Sizes))}")
    if per not in get_args(Sharing):
        raise ValueError(f"mask.per={per} is not one of {', '.join(get_args(Sharing))}")
    blocks = -(-seqlen // block_size)
    if blocks * blocks > MAX_BLOCKS:
        raise DoesNotFit(f"{blocks} x {blocks} blocks of {block_size} tokens are more than {MAX_BLOCKS}; take larger blocks")
    maps = {"all_heads": 1, "kv_head": heads.kv, "q_head": heads.q}[per]
    if sizes == "uniform":
        q_edges = k_edges = np.minimum(np.arange(blocks + 1) * block_size, seqlen)
    else:
        random = np.random.default_rng([*seed, 0])
        q_edges, k_edges = (_variable(random, seqlen, block_size) for _ in range(2))
    count = max(1, round(density * (len(k_edges) - 1)))
    return BlockMap(q_edges, k_edges, maps, lambda i: pattern(np.random.default_rng([*seed, 1 + i]), q_edges, k_edges, count))


def _variable(random: np.random.Generator, seqlen: int, mean: int) -> Ints:
    low = max(1, mean // 2)
    sizes = random.integers(low, 2 * mean - low + 1, 1 + seqlen // low)
    edges = np.cumsum(sizes)
    return np.concatenate([[0], edges[edges < seqlen], [seqlen]]).astype(np.int64)


def _cut(edges: Ints, runs: Sequence[TokenSpan]) -> tuple[Ints, Ints]:
    """Edges of the blocks in local positions of ``runs``, and which block each is a part of; empty parts are left out."""
    parts, blocks, offset = [], [], 0
    for run in runs:
        local = (-((run.start - edges) // run.stride)).clip(0, run.size)
        inside = np.nonzero(np.diff(local))[0]
        parts.append(local[inside] + offset)
        blocks.append(inside)
        offset += run.size
    starts = np.concatenate([*parts, [offset]]).astype(np.int64)
    return starts, np.concatenate([*blocks, np.empty(0, dtype=np.int64)]).astype(np.int64)


def stretches(keep: Keep) -> Stretches:
    """(row, first column, last column + 1) of every stretch of kept blocks, sorted by row, then column."""
    step = np.diff(np.pad(keep, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (rows, begin), (_, end) = np.nonzero(step == 1), np.nonzero(step == -1)
    return rows, begin, end


def kept_first(keep: Keep) -> tuple[Ints, Ints]:
    """Of (..., rows, columns): kept columns per row (..., rows), and each row's columns (..., rows, columns), the kept first."""
    return keep.sum(-1), np.argsort(~keep, axis=-1, kind="stable")


def uniform_blocks(mask: BlockMap, size: int) -> bool:
    """Whether every block has ``size`` tokens on both sides; the last ones may be cut short by the end of the sequence."""
    sides = (np.diff(edges) for edges in (mask.q_edges, mask.k_edges))
    return all((side[:-1] == size).all() and (side[-1:] <= size).all() for side in sides)
