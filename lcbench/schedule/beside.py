"""Schedules of sub-groups of ranks as one schedule of all ranks: each runs its own steps, from the first on, beside the others.

Every sub-group has a sequence of its own, which is some stretches of the whole sequence. Ranks of different sub-groups send one
another nothing. A rank may be in none, and then has no tokens and nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from lcbench.masks.band import Ints, spread
from lcbench.schedule.layout import Layout, Spans
from lcbench.schedule.schedule import NO_ROWS, HeadGroup, Kind, Move, MoveColumn, Schedule, Side, Step, TileColumn


@dataclass(frozen=True, eq=False)
class Member:
    """A sub-group at work.

    Attributes:
        schedule: over its own p ranks and its own sequence.
        ranks: which rank each of these is among all, (p,).
        stretches: (start, size) in the whole sequence of each stretch of its sequence, in order, (n, 2).
    """

    schedule: Schedule
    ranks: Ints
    stretches: Ints


def beside(members: Sequence[Member], ranks: int) -> Schedule:
    """One schedule of ``ranks`` ranks from those of sub-groups, none of which share a rank or a token.

    Raises:
        ValueError: a sub-group with other ranks than its schedule has, or a rank in two of them.
    """
    _check(members, ranks)
    heads = {group: None for member in members for group in member.schedule.heads}
    number = {group: place for place, group in enumerate(heads)}
    shared = all(member.schedule.k is member.schedule.q for member in members)
    q = _side(members, "q")
    joined = _Joined(members, number, q, q if shared else _side(members, "kv"))
    steps = tuple(joined.step(time) for time in range(max(len(member.schedule.steps) for member in members)))
    kinds = _kinds(members, ranks)
    return Schedule(ranks, joined.q, joined.k, tuple(heads), steps, kinds if kinds.any() else None)


def _check(members: Sequence[Member], ranks: int) -> None:
    for member in members:
        if len(member.ranks) != member.schedule.world_size:
            raise ValueError(f"a sub-group of {len(member.ranks)} ranks has a schedule of {member.schedule.world_size}")
    every = np.concatenate([member.ranks for member in members])
    times = np.bincount(every, minlength=ranks)
    if len(times) > ranks or (times > 1).any():
        raise ValueError(f"sub-groups have rank {int(times.argmax())} {int(times.max())} times, of ranks 0 to {ranks - 1}")


def _kinds(members: Sequence[Member], ranks: int) -> Ints:
    """The kind of sub-group of each rank, (ranks,): 0 where nothing can be a collective, since no kernel call takes several shards
    at once; else those of one kind have as many ranks, and do the same with shards of one size, or of any sizes where the same of
    them have tokens."""
    known: dict[tuple[object, ...], int] = {}
    found = np.zeros(ranks, dtype=np.int64)
    for member in members:
        schedule = member.schedule
        if all(len(bundle) == 1 for side in schedule.sides.values() for bundle in side.bundles):
            continue
        each = [side.sizes for side in schedule.sides.values()]
        even = all((size == size[0]).all() for size in each)
        sizes = [int(size[0]) if even else tuple((size > 0).tolist()) for size in each]
        key = (schedule.world_size, schedule.heads, *sizes, schedule.q.bundles, schedule.k.bundles, len(schedule.steps))
        found[member.ranks] = known.setdefault(key, len(known) + 1)
    return found


def _side(members: Sequence[Member], kind: Kind) -> Side:
    """The shards, owners and bundles of all, one sub-group's behind another's."""
    sides = [member.schedule.side(kind) for member in members]
    placed = [_placed(side.shards, member.stretches) for side, member in zip(sides, members, strict=True)]
    runs = np.cumsum([0, *(len(spans.every) for spans in placed)])
    begins = [spans.begins[:-1] + first for spans, first in zip(placed, runs[:-1].tolist(), strict=True)]
    layout = Layout(Spans(np.concatenate([spans.every for spans in placed]), np.concatenate([*begins, runs[-1:]])))
    owner = np.concatenate([member.ranks[side.owner] for side, member in zip(sides, members, strict=True)])
    firsts = _firsts(map(len, sides)).tolist()
    bundles = (
        tuple(shard + first for shard in bundle)
        for side, first in zip(sides, firsts, strict=True)
        for bundle in side.bundles
    )  # fmt: skip
    return Side(layout, owner, tuple(bundles))


def _firsts(counts: Iterable[int]) -> Ints:
    """What numbers of each begin with when all are numbered one behind the other."""
    every = np.array(list(counts), dtype=np.int64)
    return np.cumsum(every) - every


def _placed(layout: Layout, stretches: Ints) -> Spans:
    """The runs of shards of a sequence that is some stretches of the whole one: each is cut where a stretch ends."""
    start, size, stride = layout.spans.T
    last = start + stride * np.maximum(size - 1, 0)
    edges = np.concatenate([[0], np.cumsum(stretches[:, 1])])
    meets = np.searchsorted(edges, start, side="right") - 1, np.searchsorted(edges, last, side="right")
    run, stretch = spread(meets[0], np.where(size > 0, meets[1], meets[0]))
    begin, end = (-(-(edge - start[run]) // stride[run]) for edge in (edges[stretch], edges[stretch + 1]))
    begin, end = np.maximum(begin, 0), np.minimum(end, size[run])
    some = begin < end
    run, stretch, begin, end = (each[some] for each in (run, stretch, begin, end))
    moved = start[run] + stride[run] * begin + (stretches[:, 0] - edges[:-1])[stretch]
    every = np.stack([moved, end - begin, np.where(end - begin > 1, stride[run], 1)], axis=1)
    return Spans(every, np.searchsorted(run, layout.begins))


class _Joined:
    """Numbers of ranks, shards, bundles and head groups of sub-groups, as those of all."""

    def __init__(self, members: Sequence[Member], number: dict[HeadGroup, int], q: Side, k: Side) -> None:
        self._members, self.q, self.k = members, q, k
        self._groups = [np.array([number[group] for group in m.schedule.heads], dtype=np.int64) for m in members]
        self._shards: dict[Kind, list[int]] = {}
        self._bundles: dict[Kind, list[int]] = {}
        for kind in ("q", "kv"):
            sides = [member.schedule.side(kind) for member in members]
            self._shards[kind] = _firsts(map(len, sides)).tolist()
            self._bundles[kind] = _firsts(len(side.bundles) for side in sides).tolist()

    def step(self, time: int) -> Step:
        """What all do at a time; those that are done do nothing."""
        tiles, returns = [NO_ROWS], [NO_ROWS]
        moves: dict[tuple[Kind, tuple[bool, int, str]], list[Ints]] = {}
        for place, member in enumerate(self._members):
            if time >= len(member.schedule.steps):
                continue
            own = member.schedule.steps[time]
            if len(own.tiles):
                tiles.append(self._tiles(place, own.tiles))
            for move in own.moves:
                kind = cast(Kind, move.kind)  # no strategy of sub-groups moves states
                moved = self._moved(place, move.rows, kind)
                moves.setdefault((kind, (move.kept, move.steps, move.channel)), []).append(moved)
            if len(own.returns):
                returns.append(self._moved(place, own.returns, "q"))
        together = [Move(kind, np.concatenate(rows), *how) for (kind, how), rows in moves.items()]
        return Step(np.concatenate(tiles), tuple(together), np.concatenate(returns))

    def _tiles(self, place: int, tiles: Ints) -> Ints:
        found = np.empty_like(tiles)
        found[:, TileColumn.RANK] = self._members[place].ranks[tiles[:, TileColumn.RANK]]
        found[:, TileColumn.GROUP] = self._groups[place][tiles[:, TileColumn.GROUP]]
        found[:, TileColumn.Q] = tiles[:, TileColumn.Q] + self._bundles["q"][place]
        found[:, TileColumn.K] = tiles[:, TileColumn.K] + self._bundles["kv"][place]
        return found

    def _moved(self, place: int, rows: Ints, kind: Kind) -> Ints:
        found = np.empty_like(rows)
        for column in (MoveColumn.SOURCE, MoveColumn.TARGET):
            found[:, column] = self._members[place].ranks[rows[:, column]]
        found[:, MoveColumn.SHARD] = rows[:, MoveColumn.SHARD] + self._shards[kind][place]
        found[:, MoveColumn.GROUP] = self._groups[place][rows[:, MoveColumn.GROUP]]
        return found
