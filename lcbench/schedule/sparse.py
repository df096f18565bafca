"""Schedules of sparse attention: keys go only where their own head's queries see them, and heads are dealt out by their work.

Head-wise, sequence-wise and hybrid sparse context parallelism of DSV (arXiv 2502.07590, section 5) are one schedule on a grid of
ranks. Along a row heads are exchanged, so that each rank of the row has some heads of all the row's tokens. Along a column, whose
ranks have the same heads, each rank fetches the keys that its queries attend to by the maps of these heads. A grid of one row is
head-wise, one of one column is sequence-wise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lcbench.masks.band import BandMask, Ints, distinct
from lcbench.masks.block import ROWS, BlockMap, Keep
from lcbench.masks.convert import block_areas, needed_keys
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem
from lcbench.schedule.layout import Layout, contiguous
from lcbench.schedule.schedule import NO_ROWS, HeadGroup, Kind, Move, MoveColumn, Schedule, Side, Step, rows

MOST_CUTS = 1 << 14  # of the keys, at the ends of what is needed; with more of them whole stretches are sent


@dataclass(frozen=True, eq=False)
class Demand:
    """Which keys the queries of ranks, or of rows of them, see.

    Attributes:
        edges: where cells of keys begin, and where the last one ends, (cells + 1,). Of a cell all keys are sent, or none.
        stretch: the stretch of keys that each cell is a part of, (cells,).
        needed: whether some query sees a key of a cell, bool (maps, ranks, cells).
    """

    edges: Ints
    stretch: Ints
    needed: Keep

    @classmethod
    def of(cls, mask: Mask, q_edges: Ints, k_edges: Ints, owner: Ints) -> Demand:
        """Of neighbouring stretches between these edges: of queries, each with its rank as ``owner``, and of keys."""
        cells = _cells(mask, q_edges, k_edges)
        if len(cells) > MOST_CUTS:
            cells = k_edges
        needed = _needed(mask, q_edges, cells, owner)
        return cls(cells, np.searchsorted(k_edges, cells[:-1], side="right") - 1, needed)

    @cached_property
    def sizes(self) -> Ints:
        """Tokens of each cell, (cells,)."""
        return np.diff(self.edges)

    def of_rows(self, row: Ints) -> Demand:
        """Of rows of neighbouring ranks, which ``row`` names."""
        needed: Keep = np.logical_or.reduceat(self.needed, np.flatnonzero(np.diff(row, prepend=-1)), axis=1)
        return replace(self, needed=needed)

    def coarser(self, edges: Ints) -> Demand:
        """With fewer cells: those between some of the edges, which are those of stretches too."""
        needed: Keep = np.logical_or.reduceat(self.needed, np.searchsorted(self.edges, edges[:-1]), axis=2)
        return Demand(edges, np.arange(len(edges) - 1), needed)

    def all_heads(self) -> Demand:
        """What is needed for any head as needed for all of them."""
        needed: Keep = np.logical_or.reduce(self.needed, axis=0, keepdims=True)
        return replace(self, needed=needed)

    def of_keys(self, heads: Heads, q: Sequence[int]) -> tuple[list[tuple[int, ...]], Keep]:
        """Query heads, those of a key/value head together, in sets that read the same maps, as many of each of their key/value
        heads; and what is needed of keys for each set, (sets, stretches of queries, cells)."""
        each, of_map = heads.q // heads.kv, heads.q // len(self.needed)
        reading: dict[int, list[int]] = {}
        for head in q:
            reading.setdefault(head // each, []).append(head)
        sets: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for of_key in reading.values():
            sets.setdefault((len(of_key), tuple(dict.fromkeys(head // of_map for head in of_key))), []).extend(of_key)
        needed = [np.logical_or.reduce(self.needed[list(maps)]) if len(maps) > 1 else self.needed[maps[0]] for _, maps in sets]
        shape = 0, *self.needed.shape[1:]
        return [tuple(each) for each in sets.values()], np.stack(needed) if needed else np.zeros(shape, dtype=bool)


def pairs_of(mask: Mask, heads: Heads, q_edges: Ints) -> Ints:
    """Unmasked pairs of each query head with each of neighbouring stretches of queries, (query heads, stretches)."""
    if isinstance(mask, BandMask):
        row, _, pairs = block_areas(mask, q_edges, np.array([0, mask.num_k]))
        return np.tile(np.bincount(row, weights=pairs, minlength=len(q_edges) - 1).astype(np.int64), (heads.q, 1))
    parts = _cut(mask, q_edges, mask.k_edges[:0])
    high, wide = np.diff(parts.q_edges), np.diff(parts.k_edges).astype(np.float64)
    begins = np.searchsorted(parts.q_edges, q_edges[:-1])
    found = np.empty((mask.maps, len(begins)), dtype=np.int64)
    for number in range(mask.maps):
        whole, (row, _, pairs) = parts.whole(number), parts.cut(number)
        # Not by ``@``: a BLAS wakes all its threads for it, which take longer than this does.
        of_rows = [np.einsum("ij,j->i", some.astype(np.float64), wide) for some in np.array_split(whole, 1 + len(whole) // ROWS)]
        every = high * np.concatenate(of_rows) + np.bincount(row, weights=pairs, minlength=len(high))
        found[number] = np.add.reduceat(every, begins)
    return found[np.arange(heads.q) // (heads.q // mask.maps)]


def _cells(mask: Mask, q_edges: Ints, k_edges: Ints) -> Ints:
    """Where what is needed of keys may begin or end."""
    edges = [k_edges]
    if not isinstance(mask, BandMask):
        edges.append(mask.k_edges)
        q_edges = distinct(np.concatenate([q_edges, mask.q_edges]))
    if (bands := mask if isinstance(mask, BandMask) else mask.within) is not None:
        edges += needed_keys(bands, q_edges)[1:]
    return distinct(np.concatenate(edges))


def _needed(mask: Mask, q_edges: Ints, cells: Ints, owner: Ints) -> Keep:
    """See ``Demand``."""
    ranks = 1 + int(owner.max())
    if isinstance(mask, BandMask):
        row, begin, end = needed_keys(mask, q_edges)
        marks = np.zeros((ranks, len(cells)), dtype=np.int64)
        np.add.at(marks, (owner[row], np.searchsorted(cells, begin, side="right") - 1), 1)
        np.add.at(marks, (owner[row], np.searchsorted(cells, end)), -1)
        return (np.cumsum(marks, axis=1)[:, :-1] > 0)[None]
    parts = _cut(mask, q_edges, cells)
    of_part = owner[np.searchsorted(q_edges, parts.q_edges[:-1], side="right") - 1]
    order = np.argsort(of_part, kind="stable")
    begins, whole = np.searchsorted(of_part[order], np.arange(ranks)), np.searchsorted(parts.k_edges, cells[:-1])
    found = np.empty((mask.maps, ranks, len(whole)), dtype=bool)
    for number in range(mask.maps):
        seen = np.logical_or.reduceat(parts.keep(number)[order], begins, axis=0)
        found[number] = seen if len(whole) == seen.shape[1] else np.logical_or.reduceat(seen, whole, axis=1)
    return found


def _cut(mask: BlockMap, q_edges: Ints, k_edges: Ints) -> BlockMap:
    """The same map in blocks that none of these edges cut."""
    tops, lefts = (distinct(np.concatenate(each)) for each in ((mask.q_edges, q_edges), (mask.k_edges, k_edges)))
    row, column = (
        np.searchsorted(edges, parts[:-1], side="right") - 1 for edges, parts in ((mask.q_edges, tops), (mask.k_edges, lefts))
    )
    return replace(mask, q_edges=tops, k_edges=lefts, draw=lambda number: mask.drawn(number)[np.ix_(row, column)])


# -- heads over columns --------------------------------------------------------------------------------------------------


def dealt_heads(pairs: Ints, columns: int) -> list[tuple[int, ...]]:
    """The query heads of each column: those with most pairs first, each to the column whose busiest row then has least.

    Heads with the same pairs may change places: neighbours then come to one column, which reads fewer key/value heads.

    Args:
        pairs: of each query head and row, (heads, rows).
    """
    load = np.zeros((columns, pairs.shape[1]), dtype=np.int64)
    count = np.zeros(columns, dtype=np.int64)
    column = np.zeros(len(pairs), dtype=np.int64)
    for head in np.argsort(-pairs.sum(axis=1), kind="stable").tolist():
        column[head] = np.lexsort((count, (load + pairs[head]).max(axis=1)))[0]
        load[column[head]] += pairs[head]
        count[column[head]] += 1
    _, alike = np.unique(pairs, axis=0, return_inverse=True)
    for number in range(int(alike.max()) + 1):
        same = np.flatnonzero(alike.ravel() == number)
        column[same] = np.sort(column[same])
    return [tuple(np.flatnonzero(column == number).tolist()) for number in range(columns)]


# -- the schedule --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fetched:
    """What ranks fetch of keys, an entry per item, sorted by rank, head group and cell, (n,) each.

    Attributes:
        rank, group, cell: who needs what.
        stage: in which part it comes.
    """

    rank: Ints
    group: Ints
    cell: Ints
    stage: Ints

    @classmethod
    def of(cls, found: Sequence[tuple[int, int, Ints]], groups: tuple[HeadGroup, ...], sizes: Ints, stages: int) -> Fetched:
        """From (rank, head group, cells) of each, in parts of as many bytes as can be: whole head groups where that goes."""
        rank, group = (np.repeat([each[i] for each in found], [len(each[2]) for each in found]).astype(np.int64) for i in (0, 1))
        cell = np.concatenate([np.empty(0, dtype=np.int64), *(cells for _, _, cells in found)])
        weight = np.array([len(each.kv) for each in groups], dtype=np.int64)[group] * sizes[cell]
        total = np.bincount(rank, weights=weight).astype(np.int64)
        before = np.cumsum(weight) - (np.cumsum(total) - total)[rank]  # of the rank, this one with them
        return cls(rank, group, cell, (before - 1) * stages // np.maximum(total[rank], 1))

    def steps(
        self, local: Ints, source: Ints, row: Ints, own: Sequence[tuple[int, ...]]
    ) -> tuple[list[Step], tuple[tuple[int, ...], ...]]:
        """Steps in which each part travels while the part before it is computed, the local tiles first; and bundles of keys.

        Args:
            source: the rank that each item comes from, (n,).
            row: the bundle of queries of each rank, (ranks,).
            own: the first bundles of keys, those of local tiles.
        """
        bundles, tiles, moves = list(own), [local], []
        for stage in distinct(self.stage).tolist():
            now = np.flatnonzero(self.stage == stage)
            rank, group, cell = self.rank[now], self.group[now], self.cell[now]
            begins = np.flatnonzero(np.diff(rank, prepend=-1) | np.diff(group, prepend=-1))
            first = len(bundles)
            bundles += [tuple(part.tolist()) for part in np.split(cell, begins[1:])]
            moves.append((Move("kv", rows(source[now], rank, cell, group)),))
            tiles.append(rows(rank[begins], group[begins], row[rank[begins]], first + np.arange(len(begins))))
        return [Step(*step) for step in zip(tiles, [*moves, ()], strict=True)], tuple(bundles)


def sparse_edges(problem: Problem, parts: int) -> tuple[Ints, Ints]:
    """Edges of a stretch of queries for each rank, and of ``parts`` of keys for each: neighbours in the order of ranks."""
    ranks = problem.scale.world_size
    return edges_of(contiguous(problem.queries, ranks)), edges_of(contiguous(problem.seqlen, ranks * parts))


def owner_of_cells(demand: Demand, ranks: int) -> Ints:
    """The rank that owns each cell, where stretches of keys are those of ``sparse_edges``, (cells,)."""
    return demand.stretch * ranks // (1 + int(demand.stretch[-1]))


def edges_of(layout: Layout) -> Ints:
    """Where each of the stretches of a contiguous layout begins, and where the last one ends."""
    first = [runs[0].start for runs in layout.shards]
    return np.array([*first, layout.shards[-1][0].start + layout.size(len(layout) - 1)])


def grid_of_heads(problem: Problem, demand: Demand, pairs: Ints, degree: int, stages: int) -> Schedule:
    """Ranks ``i * degree ... (i + 1) * degree - 1`` exchange heads; those that have the same heads then fetch keys.

    Args:
        demand: of a stretch of queries for each rank, and of the parts of keys of ``sparse_edges``.
        pairs: of each query head and rank, (query heads, ranks).
        degree: ranks of a row.
        stages: parts in which keys are fetched, each while the one before it is computed.
    """
    ranks, heads = problem.scale.world_size, problem.heads
    every, owner = np.arange(ranks), owner_of_cells(demand, ranks)
    if 1 < degree == ranks:  # each has all keys of its heads
        demand, owner = demand.coarser(demand.edges[np.searchsorted(owner, np.arange(ranks + 1))]), every
    q = Side(contiguous(problem.queries, ranks), every, ())
    if degree == 1:
        return fetching(problem, demand, q, owner, stages)
    grid = every.reshape(-1, degree)
    row, column = np.divmod(every, degree)
    row_of_cell = row[owner]
    of_rows = demand.of_rows(row)
    known: dict[HeadGroup, int] = {}
    groups_of: list[list[int]] = []  # each column
    found: list[tuple[int, int, Ints]] = []
    for number, members in enumerate(dealt_heads(np.add.reduceat(pairs, grid[:, 0], axis=1), degree)):
        groups_of.append([])
        sets, needed = of_rows.of_keys(heads, members)
        for group, keys in _alike(heads, sets, needed & (row_of_cell != np.arange(len(grid))[:, None])):
            groups_of[-1].append(known.setdefault(group, len(known)))
            found += [
                (rank, known[group], np.flatnonzero(cells)) for rank, cells in zip(grid[:, number].tolist(), keys, strict=True)
            ]
    groups = tuple(known)
    fetched = Fetched.of(sorted(found, key=lambda each: each[:2]), groups, demand.sizes, stages)
    computed = np.array([(rank, group) for rank in every.tolist() for group in groups_of[column[rank]]], dtype=np.int64)
    local = rows(*computed.T, row[computed[:, 0]], row[computed[:, 0]])
    own = [tuple(np.flatnonzero(row_of_cell == number).tolist()) for number in range(len(grid))]
    steps, k = fetched.steps(local, grid[row_of_cell[fetched.cell], column[fetched.rank]], row, own)
    moves, returns = _exchanges(groups_of, row, column, owner)
    steps = [Step(NO_ROWS, moves), *steps, Step(NO_ROWS, (), returns)]
    q = replace(q, bundles=tuple(map(tuple, grid.tolist())))
    return Schedule(ranks, q, Side(_shards(demand.edges), owner, k), groups, tuple(steps))


def _exchanges(groups_of: Sequence[Sequence[int]], row: Ints, column: Ints, owner: Ints) -> tuple[tuple[Move, ...], Ints]:
    """The moves that bring what ranks of a row own to its other ranks, each for the head groups of its column, kept for backward;
    and the returns of the results. Rank i owns queries i, and ``owner`` the cells of keys."""
    every = np.arange(len(row))
    moves: dict[Kind, list[Move]] = {"q": [], "kv": []}
    sides: dict[Kind, Ints] = {"q": every, "kv": owner}
    for place in range(max(map(len, groups_of))):  # the head groups of that number of all columns may be one all-to-all
        group = np.array([each[place] if place < len(each) else -1 for each in groups_of])[column]
        for kind, of_shard in sides.items():
            to, shard = np.nonzero((row[:, None] == row[of_shard]) & (every[:, None] != of_shard) & (group >= 0)[:, None])
            moves[kind].append(Move(kind, rows(of_shard[shard], to, shard, group[to]), kept=True))
    brought = np.concatenate([move.rows for move in moves["q"]])
    returns = brought[:, [MoveColumn.TARGET, MoveColumn.SOURCE, MoveColumn.SHARD, MoveColumn.GROUP]]
    return (*moves["q"], *moves["kv"]), returns


def fetching(problem: Problem, demand: Demand, q: Side, owner: Ints, stages: int) -> Schedule:
    """Every rank computes all heads of its own queries, its own keys first, and fetches what else is needed head by head.

    Heads of which a rank needs the same keys come, and are computed, together.

    Args:
        demand: of all queries of each rank.
        q: the queries; bundles are made here: those of each rank.
        owner: of each cell of keys.
    """
    ranks, heads = problem.scale.world_size, problem.heads
    known: dict[HeadGroup, int] = {HeadGroup.of(heads, range(heads.q)): 0}
    sets, needed = demand.of_keys(heads, range(heads.q))
    found: list[tuple[int, int, Ints]] = []
    for rank in range(ranks):
        for group, cells in _alike(heads, sets, needed[:, rank] & (owner != rank)):
            if cells.any():
                found.append((rank, known.setdefault(group, len(known)), np.flatnonzero(cells)))
    groups = tuple(known)
    fetched = Fetched.of(sorted(found, key=lambda each: each[:2]), groups, demand.sizes, stages)
    q = replace(q, bundles=tuple(tuple(np.flatnonzero(q.owner == rank).tolist()) for rank in range(ranks)))
    own = [tuple(np.flatnonzero(owner == rank).tolist()) for rank in range(ranks)]
    every = np.arange(ranks)
    steps, k = fetched.steps(rows(every, 0, every, every), owner[fetched.cell], every, own)
    return Schedule(ranks, q, Side(_shards(demand.edges), owner, k), groups, tuple(steps))


def _alike(heads: Heads, sets: Sequence[tuple[int, ...]], needed: Keep) -> list[tuple[HeadGroup, Keep]]:
    """Sets of query heads for which the same is needed as one head group, and what that is.

    Sets with other numbers of query heads of a key/value head stay apart: together they would read copies of it.
    """
    each = heads.q // heads.kv
    known: dict[tuple[int, bytes], tuple[list[int], Keep]] = {}
    for of_set, keys in zip(sets, needed, strict=True):
        ratio = len(of_set) // len({head // each for head in of_set})
        known.setdefault((ratio, keys.tobytes()), ([], keys))[0].extend(of_set)
    return [(HeadGroup.of(heads, sorted(members)), keys) for members, keys in known.values()]


def _shards(edges: Ints) -> Layout:
    """A shard for each cell."""
    size = np.diff(edges)
    return Layout.of_stretches(np.arange(len(size)), edges[:-1], size, len(size))
