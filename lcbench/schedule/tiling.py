"""What every tile of a schedule is made of, worked out for all tiles at once: pairs, blocks that hold some, pieces, sizes.

The tokens of all operands of one side are cut into *units*, so that every operand is some runs of neighbouring units. What a
bundle of queries has with every unit of keys is a row of a matrix; a tile is a sum over a few stretches of that row, so the row is
summed up once and a tile is the difference of two of its entries per stretch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy import sparse

from lcbench.masks.band import LOWER, BandMask, Ints, areas, cropped, distinct, reindexed, spread
from lcbench.masks.block import BlockMap, Keep
from lcbench.masks.mask import Mask
from lcbench.schedule.block_sums import PORTION, BlockSums, cut_evenly
from lcbench.schedule.machine import Floats, Tiles
from lcbench.schedule.schedule import Schedule, Side, TileColumn

CACHED = 1 << 17  # values that are worked out together, so that they fit into a cache
BLOCK = 128  # rows and keys of the blocks that kernels compute or skip
# Of a bundle of queries with each unit of keys: pairs, covered pairs, pieces, keys that some row sees, and pieces that go on in the
# next unit.
PAIRS, COVERED, PIECES, READ, GO_ON = range(5)
VALUES = 5
DENSE = 16  # numbers of which at least one in so many is taken go into a table
SCATTERED = 2  # what a look at one part with one unit takes, in looks at one of a whole row of units
ALIKE = 2  # the same of a look at units that many parts meet
PRODUCT = 8  # products of a matrix with another that take no longer than such a look


@dataclass(frozen=True)
class Tiling:
    """All tiles of a schedule.

    Attributes:
        step, rank: when and by whom each is computed, (n,).
        again: whether the rank has computed others of these queries, so that the result is merged, (n,).
    """

    tiles: Tiles
    step: Ints
    rank: Ints
    again: Keep


def tiling(schedule: Schedule, mask: Mask) -> Tiling:
    """The tiles of a schedule in the order of its steps.

    Pieces are counted as a kernel gets them: what goes on from one shard to the next in memory is one. Those of a block map are
    the stretches of kept blocks in a row of blocks, and within a band mask the bands of both.
    """
    counts = [len(step.tiles) for step in schedule.steps]
    every = np.concatenate([np.empty((0, 4), dtype=np.int64), *(step.tiles for step in schedule.steps)])
    rank, group, q, k = every.T
    found = _found(schedule, mask, every)
    pieces = np.where(found[PAIRS] > 0, np.maximum(np.ceil(found[PIECES]), 1), 0)
    rows, keys = _sizes(schedule.q)[q], _sizes(schedule.k)[k]
    # No key has more pairs than there are rows; of a block map nothing else is known.
    read = np.minimum(np.ceil(np.maximum(found[READ], found[PAIRS] / np.maximum(rows, 1))), keys).astype(np.int64)
    tiles = Tiles(
        pairs=found[PAIRS], covered=np.maximum(found[COVERED], found[PAIRS]), rows=rows, keys=keys, read=read,
        pieces=pieces.astype(np.int64), q_heads=schedule.head_counts["q"][group],
        kv_heads=schedule.head_counts["kv"][group],
    )  # fmt: skip
    some = np.nonzero(tiles.pairs > 0)[0]
    again = np.zeros(len(tiles), dtype=bool)
    again[some] = _again(schedule, every[some])
    return Tiling(tiles, np.repeat(np.arange(len(schedule.steps)), counts), rank.copy(), again)  # a view would keep all columns


def _again(schedule: Schedule, tiles: Ints) -> Keep:
    """Whether each tile's rank has computed some of its heads of these queries in an earlier one, (n,)."""
    counts = schedule.head_counts["q"]
    every = np.concatenate([np.empty(0, dtype=np.int64), *(np.array(group.q) for group in schedule.heads)])
    group, begins = tiles[:, TileColumn.GROUP], np.cumsum(counts) - counts
    if len(every) > len(distinct(every)):  # groups share heads: head by head
        number, head = spread(begins[group], begins[group] + counts[group])
        head = every[head]
    else:
        number, head = np.arange(len(tiles)), group
    rank, q = tiles[number][:, [TileColumn.RANK, TileColumn.Q]].T
    results = (rank * (1 + int(every.max(initial=0)) + len(counts)) + head) * len(schedule.q.bundles) + q
    again = np.ones(len(results), dtype=bool)
    again[np.unique(results, return_index=True)[1]] = False
    found = np.zeros(len(tiles), dtype=bool)
    found[number[again]] = True
    return found


def _sizes(side: Side) -> Ints:
    """Tokens of each bundle, (bundles,)."""
    bundle, shard = side.spread(np.arange(len(side.bundles)))
    return np.bincount(bundle, weights=side.sizes[shard], minlength=len(side.bundles)).astype(np.int64)


def _found(schedule: Schedule, mask: Mask, every: Ints) -> Floats:
    """Pairs, covered pairs, pieces and read keys of each tile, (4, tiles). Of heads with maps of their own a tile has the mean."""
    total = np.zeros((GO_ON, len(every)))
    if not len(every):
        return total
    queries, keys = Operands.of(schedule.q, every[:, TileColumn.Q]), Operands.of(schedule.k, every[:, TileColumn.K])
    if isinstance(mask, BandMask):
        return _looked_up(queries, keys, _of_bands(queries, keys, mask), every)
    shares, of_map = _shares(schedule, mask.maps), _of_maps(queries, keys, mask)
    for number in range(mask.maps):
        share = shares[every[:, TileColumn.GROUP], number]
        reads = share > 0
        if reads.any():
            total[:, reads] += share[reads] * _looked_up(queries, keys, of_map(number), every[reads])
    return total


def _of_bands(queries: Operands, keys: Operands, mask: BandMask) -> _Sheet:
    return _Stripes(queries, keys, mask) if queries.striped or keys.striped else _Bands(queries, keys, mask)


def _of_maps(queries: Operands, keys: Operands, mask: BlockMap) -> Callable[[int], _Sheet]:
    """What bundles have of each map; of blocks that a mask may cut as bands."""
    if mask.within is not None:
        return lambda number: _of_bands(queries, keys, mask.bands(number))
    blocks = BlockSums(queries.inside(), queries.tokens_in(mask.q_edges), keys.tokens_in(mask.k_edges), BLOCK)
    return lambda number: _Blocks(blocks, mask.keep(number))


def _shares(schedule: Schedule, maps: int) -> Floats:
    """Which share of the heads of each group reads each map, (groups, maps)."""
    each = (1 + max(group.q[-1] for group in schedule.heads)) // maps
    shares = np.zeros((len(schedule.heads), maps))
    for number, group in enumerate(schedule.heads):
        np.add.at(shares[number], np.array(group.q) // each, 1 / len(group))
    return shares


# -- operands as runs of units -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    """The operands of one side.

    Attributes:
        place: the number of each bundle of the schedule among those of this side, -1 for others.
        start, size, stride: of each unit; units of neighbouring tokens lie behind one another without a gap.
        first, last: of each run of units, ``last`` not included.
        runs: where the runs of each bundle begin, (bundles of this side + 1,).
        striped: whether units are stripes, which are never joined.
        hard: whether no operand goes on from a unit to the next.
    """

    place: Ints
    start: Ints
    size: Ints
    stride: Ints
    first: Ints
    last: Ints
    runs: Ints
    striped: bool
    hard: Keep

    @classmethod
    def of(cls, side: Side, bundles: Ints) -> Operands:
        """Those of the tiles whose bundles of a side are ``bundles``."""
        used = distinct(bundles)
        place = np.full(len(side.bundles), -1, dtype=np.int64)
        place[used] = np.arange(len(used))
        number, start, size, stride = (np.concatenate(each) for each in zip(*_spans(side, used), strict=True))
        runs = np.searchsorted(number, np.arange(len(used) + 1))
        if (stride > 1).any():
            every = np.unique(np.stack([start, size, stride], axis=1), axis=0)
            code = {row: i for i, row in enumerate(map(tuple, every.tolist()))}
            first = np.array(
                [code[row] for row in zip(start.tolist(), size.tolist(), stride.tolist(), strict=True)], dtype=np.int64
            )
            return cls(place, every[:, 0], every[:, 1], every[:, 2], first, first + 1, runs, True, np.ones(len(every), dtype=bool))
        edges, places = _ranked(np.concatenate([start, start + size]))
        first, last = places[: len(start)], places[len(start) :]
        joined = np.bincount(first + 1, minlength=len(edges) + 1) - np.bincount(last, minlength=len(edges) + 1)
        hard = np.cumsum(joined)[1:-1] == 0  # of the end of each unit
        return cls(place, edges[:-1], np.diff(edges), np.ones(len(edges) - 1, dtype=np.int64), first, last, runs, False, hard)

    def __len__(self) -> int:
        """Units."""
        return len(self.start)

    @cached_property
    def edges(self) -> Ints:
        """Where units begin, and where the last one ends; of units that are no stripes."""
        return np.append(self.start, self.start[-1:] + self.size[-1:])

    def inside(self, *, going_on: bool = False) -> sparse.csr_array:
        """How often each bundle has each unit, (bundles, units); ``going_on``: and the unit behind it in the same run."""
        number, unit = spread(self.first, self.last - going_on)
        bundle = np.repeat(np.arange(len(self.runs) - 1), np.diff(self.runs))[number]
        return sparse.coo_array((np.ones(len(unit)), (bundle, unit)), shape=(len(self.runs) - 1, len(self))).tocsr()

    def before(self, edges: Ints) -> Ints:
        """How many tokens of each unit lie before each edge, (units, edges)."""
        return np.clip(-((self.start[:, None] - edges) // self.stride[:, None]), 0, self.size[:, None])

    def tokens_in(self, edges: Ints) -> sparse.csr_array:
        """How many tokens of each unit lie between neighbouring edges, which all units are between, (units, edges - 1)."""
        if not self.striped:
            until = self.start + self.size
            unit, block = spread(np.searchsorted(edges, self.start, side="right") - 1, np.searchsorted(edges, until))
            tokens = np.minimum(edges[block + 1], until[unit]) - np.maximum(edges[block], self.start[unit])
            return sparse.coo_array((tokens.astype(np.float64), (unit, block)), shape=(len(self), len(edges) - 1)).tocsr()
        parts = []
        for first, last in cut_evenly(np.full(len(self), len(edges))):
            part = replace(self, start=self.start[first:last], size=self.size[first:last], stride=self.stride[first:last])
            parts.append(sparse.csr_array(np.diff(part.before(edges), axis=1).astype(np.float64)))
        return sparse.vstack(parts, format="csr")


def _ranked(values: Ints) -> tuple[Ints, Ints]:
    """Every value once, sorted, and which of these each value is. None is below 0."""
    top = int(values.max(initial=-1)) + 1
    if top > DENSE * len(values):
        found = distinct(values)
        return found, np.searchsorted(found, values)
    there = np.zeros(top, dtype=bool)  # a look at a table takes a tenth of a search
    there[values] = True
    places = np.cumsum(there, dtype=np.int32)
    return np.flatnonzero(there), places[values].astype(np.int64) - 1


def _spans(side: Side, bundles: Ints) -> Iterator[tuple[Ints, Ints, Ints, Ints]]:
    """(place in ``bundles``, start, size, stride) of their spans, in portions; spans that continue one another are one."""
    start, size, stride = side.shards.spans.T
    begins = side.shards.begins
    lengths = np.cumsum(side.lengths[bundles])
    cuts = np.nonzero(np.diff(lengths // PORTION))[0] + 1
    for first, part in zip([0, *cuts.tolist()], np.split(bundles, cuts), strict=True):
        number, shard = side.spread(part)
        place, span = spread(begins[shard], begins[shard + 1])
        kept = size[span] > 0
        number, span = number[place[kept]], span[kept]
        end = start[span] + size[span]
        goes_on = (np.diff(number) == 0) & (start[span[1:]] == end[:-1]) & (stride[span[1:]] == 1) & (stride[span[:-1]] == 1)
        begin = np.nonzero(np.concatenate([np.ones(min(len(span), 1), dtype=bool), ~goes_on]))[0]
        until = np.append(begin[1:], len(span)) - 1
        whole = begin == until  # the tokens of a stripe lie apart
        taken = np.where(whole, size[span[begin]], end[until] - start[span[begin]]) if len(span) else size[:0]
        yield first + number[begin], start[span[begin]], taken, stride[span[begin]]


# -- what bundles of queries have with units of keys ---------------------------------------------------------------------


_Cut = Callable[[Ints, int, int], Iterator["_Besides"]]


class _Sheet:
    """Values of bundles of queries with units of keys."""

    def of(self, first: int, last: int) -> Floats:
        """(5, bundles first to last, units of keys)."""
        raise NotImplementedError

    def stretches(self, first: int, last: int) -> Iterator[tuple[Ints, int, Floats]]:
        """The same in stretches of units: which of these bundles have something there, its first unit, and their values."""
        yield np.arange(last - first), 0, self.of(first, last)

    def scattered(self) -> _Scattered | None:
        """A look at what meets alone; None where all that could meet takes less, or is all there is."""
        return None


_Look = Callable[[Operands, _Sheet, int, int, Ints, Ints], Floats]


def _looked_up(queries: Operands, keys: Operands, sheet: _Sheet, tiles: Ints) -> Floats:
    """Pairs, covered pairs, pieces and keys that are read of tiles, (4, tiles)."""
    q, k = queries.place[tiles[:, TileColumn.Q]], keys.place[tiles[:, TileColumn.K]]
    bundles, every = len(queries.runs) - 1, len(keys.runs) - 1
    lookups, runs = int((keys.runs[k + 1] - keys.runs[k]).sum()), len(keys.first)
    look: _Look
    if (scattered := sheet.scattered()) is not None:
        look, width = scattered, every
    elif lookups < bundles * runs:
        look, width = _one_by_one, len(keys) + 1
    else:
        look, width = _AllAtOnce(keys), every
    found = np.zeros((GO_ON, len(tiles)))
    order = np.argsort(q, kind="stable")
    for first, last in cut_evenly(np.full(bundles, width)):
        here = order[slice(*np.searchsorted(q[order], [first, last]))]
        if len(here):
            found[:, here] = look(keys, sheet, first, last, q[here] - first, k[here])
    return found


def _one_by_one(keys: Operands, sheet: _Sheet, first: int, last: int, row: Ints, bundle: Ints) -> Floats:
    """What bundles of queries first to last, a row each, have with bundles of keys, (4, n), looked up run by run in their sums."""
    sums = np.zeros((VALUES, last - first, len(keys) + 1))
    np.cumsum(sheet.of(first, last), axis=2, out=sums[:, :, 1:])
    number, run = spread(keys.runs[bundle], keys.runs[bundle + 1])
    at, begin, end = row[number], keys.first[run], keys.last[run]
    values = [sums[column, at, end] - sums[column, at, begin] for column in range(GO_ON)]
    values[PIECES] -= sums[GO_ON, at, end - 1] - sums[GO_ON, at, begin]  # within a run a piece that goes on is the same
    return np.stack([np.bincount(number, weights=value, minlength=len(row)) for value in values])


class _AllAtOnce:
    """The same by products, for every row with every bundle: where most of them are tiles."""

    def __init__(self, keys: Operands) -> None:
        self._inside = keys.inside().T.tocsr()
        self._going = keys.inside(going_on=True).T.tocsr()

    def __call__(self, keys: Operands, sheet: _Sheet, first: int, last: int, row: Ints, bundle: Ints) -> Floats:
        found = np.zeros((GO_ON, last - first, self._inside.shape[1]))
        for rows, begin, values in sheet.stretches(first, last):
            inside, going = (each[begin : begin + values.shape[2]] for each in (self._inside, self._going))
            some = distinct(inside.indices)
            here = np.ix_(np.arange(GO_ON), rows, some)
            found[here] += _product(values[:GO_ON], inside, some)
            if going.nnz:
                found[PIECES][here[1:]] -= _product(values[GO_ON:], going, some)[0]
        return found[:, row, bundle]


def _product(values: Floats, units: sparse.csr_array, columns: Ints) -> Floats:
    """Values (n, rows, units) times ``units`` in the columns in which it has something, (n, rows, columns)."""
    packed = sparse.csr_array(
        (units.data, np.searchsorted(columns, units.indices), units.indptr), shape=(units.shape[0], len(columns))
    )
    found: Floats = values.reshape(-1, values.shape[2]) @ packed
    return found.reshape(*values.shape[:2], len(columns))


@dataclass(frozen=True)
class _Range:
    """Units of keys that parts of bands have something with.

    Attributes:
        first, last: of each part, ``last`` not included, (parts,).
        products: (value, height of each part (parts,), number of each unit (units,)): a part and a unit add their product to it.
    """

    first: Ints
    last: Ints
    products: tuple[tuple[int, Floats, Floats], ...]


# Of numbers of parts and units, (n,) each: what is added to some of the values.
_Besides = tuple[Ints, Ints, tuple[tuple[int, Floats], ...]]


class _Scattered:
    """What bundles have with one another, from each part of a band with each unit of keys that it meets.

    Where documents are short these are few: a part meets some units of a million, those of its document.

    Args:
        bundle: of queries, of each part, sorted.
        cut: what parts have with units to begin to end besides: ``_Bands._cut``.
    """

    def __init__(self, keys: Operands, bundle: Ints, ranges: Sequence[_Range], cut: _Cut) -> None:
        self._bundle, self._cut, self._units = bundle, cut, len(keys)
        self._inside, going = _Entries.of(keys.inside()), _Entries.of(keys.inside(going_on=True))
        self._sums: list[tuple[_Range, _Entries, list[tuple[int, Floats, Floats]]]] = []
        self._met = np.zeros(len(bundle), dtype=np.int64)
        for each in ranges:
            # Of what goes on in the next unit of a run there is one piece less.
            less = [column == GO_ON for column, _, _ in each.products]
            entries = (going if all(less) else self._inside).of_units(np.any([units for _, _, units in each.products], axis=0))
            self._met += entries.begins[each.last] - entries.begins[each.first]
            products = [
                (PIECES if one_less else column, height, entries.spread(-units if one_less else units))
                for one_less, (column, height, units) in zip(less, each.products, strict=True)
            ]
            self._sums.append((each, entries, products))

    def __call__(self, keys: Operands, sheet: _Sheet, first: int, last: int, row: Ints, bundle: Ints) -> Floats:
        width = self._inside.bundles
        found = np.zeros((GO_ON, last - first, width))
        begin, end = np.searchsorted(self._bundle, [first, last])
        for one, other in cut_evenly(self._met[begin:end], CACHED) if begin < end else ():
            here = np.arange(begin + one, begin + other)
            low, high = self._bundle[here[0]], self._bundle[here[-1]] + 1
            added = self._added(here, (self._bundle[here] - low) * width, (high - low) * width)
            found[:, low - first : high - first] += added.reshape(GO_ON, -1, width)
        return found[:, row, bundle]

    def _added(self, here: Ints, row: Ints, size: int) -> Floats:
        """What parts have whose rows begin at ``row`` of ``size`` places, (4, size)."""
        found = np.zeros((GO_ON, size))
        for each, entries, products in self._sums:
            first = entries.begins[each.first[here]]
            count = np.where(products[0][1][here] > 0, entries.begins[each.last[here]] - first, 0)
            entry = np.repeat(first - np.cumsum(count) + count, count)
            entry += np.arange(len(entry))
            place = np.repeat(row, count)
            place += entries.bundle.take(entry)
            for column, height, units in products:
                weights = np.repeat(height[here], count)
                weights *= units.take(entry)
                found[column] += np.bincount(place, weights=weights, minlength=size)
        self._add_cut(found, here, row)
        return found

    def _add_cut(self, found: Floats, here: Ints, row: Ints) -> None:
        """Add to (4, places) what parts have besides, whose rows begin at ``row``."""
        for part, unit, besides in self._cut(here, 0, self._units):
            number, entry = spread(self._inside.begins[unit], self._inside.begins[unit + 1])
            place = row[part[number]] + self._inside.bundle[entry]
            for column, value in besides:
                weights = value[number] * self._inside.times[entry]
                found[column] += np.bincount(place, weights=weights, minlength=found.shape[1])


class _Alike(_Scattered):
    """The same where many parts meet the same units, as all of a document do: these units are summed up once for each bundle.

    Args:
        bundle, ranges, cut: as of ``_Scattered``.
    """

    def __init__(self, keys: Operands, bundle: Ints, ranges: Sequence[_Range], cut: _Cut) -> None:
        super().__init__(keys, bundle, ranges, cut)
        # Which range of units each part meets, (parts,), and by value: heights of parts, and the sums over the units of each range
        # with each bundle, (ranges, bundles).
        self._tables: list[tuple[Ints, int, Floats, Floats]] = []
        width = self._inside.bundles
        for each, entries, products in self._sums:
            first, last, of_part = _distinct_ranges(each.first, each.last, len(keys))
            number, entry = spread(entries.begins[first], entries.begins[last])
            place = number * width + entries.bundle[entry]
            for column, height, units in products:
                table = np.bincount(place, weights=units[entry], minlength=len(first) * width).reshape(-1, width)
                self._tables.append((of_part, column, height, np.asarray(table, dtype=np.float64)))

    def __call__(self, keys: Operands, sheet: _Sheet, first: int, last: int, row: Ints, bundle: Ints) -> Floats:
        width = self._inside.bundles
        here = np.arange(*np.searchsorted(self._bundle, [first, last]))
        own = self._bundle[here] - first
        found = np.zeros((GO_ON, last - first, width))
        for of_part, column, height, table in self._tables:
            shape = last - first, len(table)
            place = own * shape[1] + of_part[here]
            found[column] += np.bincount(place, weights=height[here], minlength=shape[0] * shape[1]).reshape(shape) @ table
        self._add_cut(found.reshape(GO_ON, -1), here, own * width)
        return found[:, row, bundle]


def _distinct_ranges(first: Ints, last: Ints, units: int) -> tuple[Ints, Ints, Ints]:
    """Each of some ranges of units once, sorted, and which of these each is."""
    codes, places = np.unique(first * (units + 1) + last, return_inverse=True)
    return *np.divmod(codes, units + 1), places


@dataclass(frozen=True)
class _Entries:
    """Which bundles have each unit, unit by unit.

    Attributes:
        begins: where the entries of each unit begin, and where the last one's end, (units + 1,).
        bundle: of each entry.
        times: how often it has the unit.
        bundles: how many there are.
    """

    begins: Ints
    bundle: Ints
    times: Floats
    bundles: int

    @classmethod
    def of(cls, inside: sparse.csr_array) -> _Entries:
        """From (bundles, units)."""
        columns = inside.tocsc()
        return cls(columns.indptr.astype(np.int64), columns.indices.astype(np.int64), columns.data, columns.shape[0])

    def of_units(self, some: Keep) -> _Entries:
        """Without the entries of the other units."""
        if some.all():
            return self
        unit = np.repeat(np.arange(len(some)), np.diff(self.begins))
        kept = some[unit]
        begins = np.concatenate([[0], np.cumsum(np.bincount(unit[kept], minlength=len(some)))])
        return _Entries(begins, self.bundle[kept], self.times[kept], self.bundles)

    def spread(self, units: Floats) -> Floats:
        """What each entry has of what units have."""
        spread_out: Floats = np.repeat(units, np.diff(self.begins)) * self.times
        return spread_out


class _Bands(_Sheet):
    """Bands cut by neighbouring units."""

    def __init__(self, queries: Operands, keys: Operands, mask: BandMask) -> None:
        self._queries, self._keys = queries, keys
        edges = queries.edges
        number, row = spread(np.searchsorted(edges, mask.bands[:, 0], side="right") - 1, _last(edges, mask.bands[:, 1]))
        inner = (row >= 0) & (row < len(queries))
        number, row = number[inner], row[inner]
        parts, kept = _cropped_rows(mask.bands, number, edges[row], edges[row + 1])
        number, row = number[kept], row[kept]
        inside = queries.inside().tocsc()
        place, entry = spread(inside.indptr[row].astype(np.int64), inside.indptr[row + 1].astype(np.int64))
        bundle = inside.indices[entry]
        order = np.argsort(bundle, kind="stable")
        place = place[order]
        self._parts, self._bundle = parts.take(place, axis=0), bundle[order]
        tall, last_of_band = _stacked(self._parts, self._bundle, number[place], parted=bool((np.diff(keys.runs) > 1).any()))
        first, last = _span_of(keys, parts)  # of parts in the order of bands, in which neighbours are looked up near one another
        first_whole, last_whole, first, last = (each[place] for each in (*self._whole_units(parts, first, last), first, last))
        edges = keys.edges
        self._hard_before = np.maximum.accumulate(np.where(np.concatenate([[True], keys.hard[:-1]]), edges[:-1], edges[0]))
        pad = np.where(keys.hard, -(edges[1:] - self._hard_before) % BLOCK, 0)
        follows = _follows(keys, mask)
        begins = (follows < 0).astype(np.float64)  # units of keys that do not go on with what an operand has of a document
        filled = -(-(keys.size + keys.size[follows]) // BLOCK) * BLOCK - -(-keys.size[follows] // BLOCK) * BLOCK
        filled = np.where(follows >= 0, filled, keys.size + pad)
        high = (self._parts[:, 1] - self._parts[:, 0]).astype(np.float64)
        self._first, self._last, self._ones = first, last, last_of_band
        self._cuts = (first, first_whole), (last_whole, last)
        self._ranges = (
            _Range(
                first_whole, last_whole, ((PAIRS, high, keys.size.astype(np.float64)), (COVERED, tall, filled.astype(np.float64)))
            ),
            _Range(first, last, ((PIECES, last_of_band, begins), (READ, last_of_band, keys.size.astype(np.float64)))),
            _Range(first, np.maximum(last - 1, first), ((GO_ON, last_of_band, np.ones(len(keys))),)),
        )

    def of(self, first: int, last: int) -> Floats:
        here = np.arange(*np.searchsorted(self._bundle, [first, last]))
        return self._values(here, np.arange(first, last), 0, len(self._keys))

    def stretches(self, first: int, last: int) -> Iterator[tuple[Ints, int, Floats]]:
        here = np.arange(*np.searchsorted(self._bundle, [first, last]))
        width = max(1, CACHED // (last - first))
        if width < len(self._keys):  # parts by where they begin, so that those of a stretch are near one another
            here = here[np.argsort(self._first[here], kind="stable")]
        begins, ends = self._first[here], self._last[here]
        longest = int((ends - begins).max(initial=0))
        for begin in range(0, len(self._keys), width):
            end = min(begin + width, len(self._keys))
            near = slice(*np.searchsorted(begins, [begin - longest, end])) if width < len(self._keys) else slice(None)
            some = here[near][ends[near] > begin]
            if len(some):
                bundles = distinct(self._bundle[some])
                yield bundles - first, begin, self._values(some, bundles, begin, end)

    def _values(self, here: Ints, bundles: Ints, begin: int, end: int) -> Floats:
        """(5, bundles, units begin to end) of these parts."""
        row, shape = np.searchsorted(bundles, self._bundle[here]), (len(bundles), end - begin)
        values = np.empty((VALUES, *shape))
        for each in self._ranges:
            first, last = (np.clip(bound[here], begin, end) - begin for bound in (each.first, each.last))
            for column, height, units in each.products:
                np.multiply(_risen(row, first, last, height[here], *shape), units[begin:end], out=values[column])
        for number, unit, besides in self._cut(here, begin, end):
            flat = row[number] * shape[1] + unit - begin
            for column, value in besides:
                values[column] += np.bincount(flat, weights=value, minlength=values[column].size).reshape(shape)
        return values

    def scattered(self) -> _Scattered | None:
        bundles, width, units = len(self._queries.runs) - 1, len(self._keys.runs) - 1, len(self._keys)
        if ALIKE * self._looks_alike(bundles, width) <= bundles * units:
            return _Alike(self._keys, self._bundle, self._ranges, self._cut)
        meetings = int((self._last - self._first).sum()) * int((self._keys.last - self._keys.first).sum()) / max(units, 1)
        if SCATTERED * (meetings + bundles * width) > bundles * units:
            return None
        return _Scattered(self._keys, self._bundle, self._ranges, self._cut)

    def _looks_alike(self, bundles: int, width: int) -> int:
        """What ``_Alike`` takes, in looks at a part with a unit of keys."""
        (first, first_whole), (last_whole, last) = self._cuts
        cut = int((first_whole - first + last - last_whole).sum())
        first, last, _ = _distinct_ranges(first_whole, last_whole, len(self._keys))
        return cut + int((last - first).sum()) + len(first) * bundles * width // PRODUCT

    def _whole_units(self, parts: Ints, begin: Ints, end: Ints) -> tuple[Ints, Ints]:
        """(first, last) units of keys of which every query of a part sees every key: they need not be looked at one by one."""
        edges = self._keys.edges
        q0, q1, k0, k1, lo, hi = parts.T
        first = np.searchsorted(edges, np.maximum(k0, q1 - 1 + lo))
        last = np.searchsorted(edges, np.minimum(k1, q0 + hi + 1), side="right") - 1
        last = np.minimum(last, np.where(self._keys.hard[end - 1], end, end - 1))  # where it ends it is filled up
        first = np.clip(first, begin, end)
        return first, np.maximum(last, first)

    def _cut(self, here: Ints, begin: int, end: int) -> Iterator[_Besides]:
        """What parts have with units of keys, of begin to end, besides what each has with a range of them.

        That is pairs and covered pairs of units of which some query does not see every key, first of those before the units that
        are seen whole, then of those behind; and, to be taken away, keys that are not read where parts begin and end.
        """
        keys, edges = self._keys, self._keys.edges
        for cut in self._cuts:
            number, unit = spread(*(np.clip(each[here], begin, end) for each in cut))
            parts = self._parts.take(here[number], axis=0)
            found, kept = cropped(parts, None, None, edges[unit], edges[unit + 1])
            number, unit = number[kept], unit[kept]
            begins = np.maximum(parts[kept, 2], self._hard_before[unit])
            ends = keys.hard[unit] | (parts[kept, 3] <= edges[unit + 1])
            pad = np.where(ends, -(found[:, 3] - begins) % BLOCK, 0)
            yield number, unit, ((PAIRS, areas(found).astype(np.float64)), (COVERED, covered(found, pad)))
        parts, first, last = self._parts[here], self._first[here], self._last[here] - 1
        for unit, unseen in ((first, parts[:, 2] - edges[first]), (last, edges[last + 1] - parts[:, 3])):
            number = np.flatnonzero((begin <= unit) & (unit < end) & (first <= last) & (unseen > 0))
            yield number, unit[number], ((READ, -self._ones[here[number]] * unseen[number]),)


def _cropped_rows(bands: Ints, number: Ints, begin: Ints, end: Ints) -> tuple[Ints, Keep]:
    """Bands, by number, each in rows of its own: as ``cropped``, in portions that fit into a cache."""
    found = [
        cropped(bands.take(number[first:last], axis=0), begin[first:last], end[first:last], None, None)
        for first, last in cut_evenly(np.full(len(number), len(LOWER)), CACHED)
    ]
    parts, kept = zip(*found, strict=True)
    return np.concatenate(parts), np.concatenate(kept)


def _stacked(parts: Ints, bundle: Ints, band: Ints, *, parted: bool) -> tuple[Floats, Floats]:
    """Rows that a kernel computes of each part of a band, and whether it is the last of those that are one piece.

    Parts of one band that lie behind one another in an operand are one piece, where the later one sees all that the earlier one
    sees. Blocks are filled up once: what comes before the last part counts what it adds.

    Args:
        parted: whether operands of keys are in several runs. Else parts that see different keys are pieces of their own.
    """
    high = parts[:, 1] - parts[:, 0]
    goes_on = (bundle[1:] == bundle[:-1]) & (band[1:] == band[:-1])
    goes_on &= (parts[1:, 2] <= parts[:-1, 2]) & (parts[1:, 3] >= parts[:-1, 3])
    goes_on &= parted | (parts[1:, 2:4] == parts[:-1, 2:4]).all(axis=1)
    ends = np.append(np.nonzero(~goes_on)[0], len(parts) - 1) if len(parts) else np.empty(0, dtype=np.int64)
    total = np.cumsum(high)
    last = ends[np.searchsorted(ends, np.arange(len(parts)))] if len(parts) else ends
    below = total[last] - total if len(parts) else total  # rows of the parts that follow
    tall = -(-(high + below) // BLOCK) * BLOCK - -(-below // BLOCK) * BLOCK
    return tall.astype(np.float64), (np.arange(len(parts)) == last).astype(np.float64)


def _follows(keys: Operands, mask: BandMask) -> Ints:
    """The unit that each unit of keys follows in the one operand that has it, if both are of one band, else -1, (units,).

    Such are the two stretches of a document on a rank of a zigzag: a kernel gets them as one.
    """
    found = np.full(len(keys), -1, dtype=np.int64)
    single = (keys.last - keys.first == 1) & (np.bincount(keys.first, minlength=len(keys))[keys.first] == 1)
    order = np.argsort(mask.bands[:, 2], kind="stable")
    starts = mask.bands[order, 2]
    band = order[np.maximum(np.searchsorted(starts, keys.start, side="right") - 1, 0)] if len(order) else found
    bundle = np.repeat(np.arange(len(keys.runs) - 1), np.diff(keys.runs))
    one, other = keys.first[:-1], keys.first[1:]
    pair = single[:-1] & single[1:] & (bundle[:-1] == bundle[1:]) & (band[one] == band[other])
    # A document is a band that begins where its keys do, and sees them all.
    whole = mask.bands[band, 3] >= keys.edges[1:] if len(order) else np.zeros(len(keys), dtype=bool)
    pair &= whole[one] & whole[other]
    found[other[pair]] = one[pair]
    return np.where(found[np.maximum(found, 0)] >= 0, -1, found) if (found >= 0).any() else found  # pairs, no chains


def _risen(row: Ints, begin: Ints, end: Ints, height: Floats, rows: int, width: int) -> Floats:
    """A sum of steps, each ``height`` from ``begin`` to ``end`` (not included) in its row, (rows, width)."""
    flat = np.concatenate([row * (width + 1) + begin, row * (width + 1) + end])
    changes = np.bincount(flat, weights=np.concatenate([height, -height]), minlength=rows * (width + 1))
    risen: Floats = np.cumsum(changes.reshape(rows, width + 1)[:, :-1], axis=1)
    return risen


def _span_of(keys: Operands, bands: Ints) -> tuple[Ints, Ints]:
    """The first unit of keys that each band has a part in, and the one after the last."""
    edges = keys.edges
    first = np.searchsorted(edges, bands[:, 2], side="right") - 1
    return np.maximum(first, 0), np.minimum(_last(edges, bands[:, 3]), len(keys))


def _last(edges: Ints, end: Ints) -> Ints:
    """One past the stretch that holds token ``end - 1``."""
    return np.searchsorted(edges, end - 1, side="right")


def covered(bands: Ints, pad: Ints | None = None) -> Floats:
    """Pairs of the blocks of 128 x 128 that hold a pair of each band, (n,), where the blocks begin at the band's corner.

    Args:
        pad: keys that a band is filled up with; None: up to whole blocks.
    """
    q0, q1, k0, k1, lo, hi = bands.T
    height, width = (q1 - q0).astype(np.float64), (k1 - k0).astype(np.float64)
    tall = np.ceil(height / BLOCK) * BLOCK
    wide = width + (-(k1 - k0) % BLOCK if pad is None else pad)
    # Along a diagonal that cuts the band each row of blocks computes half a block more.
    cuts = (lo > k0 - (q1 - 1)).astype(np.float64) + (hi < (k1 - 1) - q0)
    found: Floats = np.minimum(tall * wide, areas(bands) * (tall / np.maximum(height, 1)) * (wide / np.maximum(width, 1))
                               + cuts * 0.5 * BLOCK * np.minimum(tall, wide))  # fmt: skip
    return found


class _Stripes(_Sheet):
    """Bands met by stripes of tokens: each stripe of queries with each of keys is a mask of its own."""

    def __init__(self, queries: Operands, keys: Operands, mask: BandMask) -> None:
        self._queries, self._keys, self._mask, self._inside = queries, keys, mask, queries.inside()

    def of(self, first: int, last: int) -> Floats:
        inside = self._inside[first:last]
        used = distinct(inside.indices)
        values = np.zeros((VALUES, len(used), len(self._keys)))
        q, k = (np.stack([side.start, side.size, side.stride]) for side in (self._queries, self._keys))
        for band in self._mask.bands:
            some = np.nonzero(np.diff(self._queries.before(band[:2]))[used, 0])[0]
            others = np.nonzero(np.diff(self._keys.before(band[2:4]))[:, 0])[0]
            at, to = np.repeat(some, len(others)), np.tile(others, len(some))
            (start, size, stride), of_k = q[:, used[at]], k[:, to]
            # Between stripes of different strides a band is none: queries one by one, which have any stride.
            single = (size > 1) & (of_k[1] > 1) & (stride != of_k[2])
            number, row = spread(np.zeros_like(size), np.where(single, size, 1))
            of_q = np.stack([start[number] + stride[number] * row, np.where(single, 1, size)[number], stride[number]])
            parts, kept = reindexed(np.broadcast_to(band, (len(number), 6)), of_q, of_k[:, number])
            number = number[kept]
            for column, value in ((PAIRS, areas(parts)), (COVERED, covered(parts)), (PIECES, 1), (READ, parts[:, 3] - parts[:, 2])):
                np.add.at(values[column], (at[number], to[number]), value)
        return np.stack([inside[:, used] @ value for value in values])


class _Blocks(_Sheet):
    """A map of block maps, met by units."""

    def __init__(self, blocks: BlockSums, keep: Keep) -> None:
        self._blocks, self._keep = blocks, keep

    def of(self, first: int, last: int) -> Floats:
        values = self._blocks.of(first, last, self._keep)
        return np.concatenate([values, np.zeros_like(values[:2])])
