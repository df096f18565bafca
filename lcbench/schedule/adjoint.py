"""All traffic of a schedule as data, that of backward derived from that of forward. ``verify`` counts it, ``execute`` runs it.

The moves of an item form a tree of ranks: its root is the owner, and each move is an edge. Below, rank 0 owns keys and values that
go to ranks 1 and 2 in step 0, and from rank 2 to rank 3 in step 1:

        forward                   values in backward          gradients in backward

          0                          0 -> 1                      1 -> 0   with step 0
    step 0 |                         0 -> 3                      3 -> 2   with step 1
        1 --+-- 2                    3 -> 2                      2 -> 0   with step 0: those of ranks 2 and 3
                | step 1
                3

Backward computes the steps in reverse order. The gradient goes back along each edge while the step of its move is computed again,
so a rank has the gradients of all ranks below it before it passes on their sum. A rank receives the values from a rank below it
that used them in a later step and so has them at hand already; a rank without one fetches them from the owner. Of what came in
forward only moves with ``kept`` are held for backward.

The adjoint of a returned partial result is the arrival of its query's output gradient, with the final LSE and ``delta`` =
rowsum(dout * out); a rank that computed all keys of its queries has both already and gets the output gradient only.

A gradient to which nothing is added any more travels in the inputs' type, all others in the accumulation type, or as
``Problem.reduce_dtype`` says.

Both passes share one time line: forward step n of N is time n, backward of step n is time 2N - n, and at time N what backward needs
first is fetched.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import Ints, distinct
from lcbench.problem import Problem
from lcbench.schedule.payload import APART, GATES, PAYLOADS, Payload, bytes_per_head
from lcbench.schedule.schedule import STATES, HeadGroup, Kind, Move, MoveColumn, Schedule, TileColumn

SIDES: tuple[Kind, ...] = ("q", "kv")
Bools = NDArray[np.bool_]
SPARSE = 4  # a table that has one of so many keys, or more, is looked up by place


@dataclass(frozen=True)
class Transfer:
    """Messages of one kind, rows as in ``Move``. They leave when time ``begin`` begins, and are there when time ``end`` ends."""

    kind: str
    rows: Ints
    begin: int
    end: int
    channel: str = "main"

    @property
    def payload(self) -> Payload:
        """What its messages hold."""
        return PAYLOADS[self.kind]

    def bytes(self, schedule: Schedule, problem: Problem) -> Ints:
        """Bytes of each row, (n,)."""
        side = self.payload.side
        each = bytes_per_head(self.kind, problem) * schedule.head_counts[side][self.rows[:, MoveColumn.GROUP]]
        return each * schedule.side(side).sizes[self.rows[:, MoveColumn.SHARD]] if self.payload.per_token else each


@dataclass(frozen=True)
class Table:
    """Items at ranks: sorted ``keys``, all below ``space``, with values in the same order."""

    keys: Ints
    values: Ints
    space: int

    def find(self, keys: Ints) -> tuple[Ints, Bools]:
        """Position of each key (any where it is missing), and whether it is there."""
        if not len(self.keys):
            return np.zeros(len(keys), dtype=np.int64), np.zeros(len(keys), dtype=bool)
        if self._places is not None:
            place = self._places[keys].astype(np.int64)
            return np.maximum(place, 0), place >= 0
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return place, self.keys[place] == keys

    @cached_property
    def _places(self) -> NDArray[np.int32] | None:
        """The position of every number below ``space``, -1 where it is no key; None where few are, and a search takes less."""
        if self.space > SPARSE * len(self.keys):
            return None
        places = np.full(self.space, -1, dtype=np.int32)
        places[self.keys] = np.arange(len(self.keys))
        return places


class Uses:
    """Which rank uses which item of one kind, when first and when last, and by which moves it came there.

    Attributes:
        side: the queries, or the keys, that it is about.
        table: values (first step, last step) of each (rank, shard, head group) that is used.
        moves: (step, move) of every move that has rows; the arrays below have an entry for each of their rows.
        rows: those of all moves, int64 (n, 4), as in ``Move``.
        kept: whether the receiver holds it for backward.
        keys: of the receiver, see ``key``.
        arrivals: positions in ``rows`` by the receiver's key.
    """

    def __init__(self, schedule: Schedule, kind: Kind) -> None:
        self._schedule, self.side = schedule, schedule.side(kind)
        self.table = self._used(TileColumn.Q if kind == "q" else TileColumn.K)
        moved = [(number, move) for number, step in enumerate(schedule.steps) for move in step.moves if move.kind == kind]
        self.moves: list[tuple[int, Move]] = [(n, m) for n, m in moved if len(m.rows)]
        self.rows = np.concatenate([np.empty((0, 4), dtype=np.int64), *(m.rows for _, m in self.moves)])
        self.kept = self._of_rows([m.kept for _, m in self.moves]).astype(bool)
        _, to, shard, group = self.rows.T
        self.keys = self.key(to, shard, group)
        order = np.argsort(self.keys, kind="stable")
        self.arrivals = Table(self.keys[order], order, self.space)

    def _used(self, column: int) -> Table:
        """(first step, last step) of use of every item of the bundles in a column of the tiles."""
        keys, steps = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for number, step in enumerate(self._schedule.steps):
            places, shards = self.side.spread(step.tiles[:, column])
            tiles = step.tiles[places]
            found = distinct(self.key(tiles[:, TileColumn.RANK], shards, tiles[:, TileColumn.GROUP]))
            keys.append(found)
            steps.append(np.full(len(found), number))
        every, when = np.concatenate(keys), np.concatenate(steps)
        order = np.argsort(every, kind="stable")
        every, when = every[order], when[order]
        starts = np.nonzero(np.diff(every, prepend=-1))[0]
        ends = np.append(starts[1:], len(every)) - 1
        values = np.column_stack([when[starts], when[ends]])
        return Table(every[starts], values, self.space)

    @cached_property
    def leaves(self) -> Ints:
        """The step in which each row begins to travel."""
        return self._of_rows([n for n, _ in self.moves])

    @cached_property
    def arrives(self) -> Ints:
        """The first step in which what each row brings may be used."""
        return self._of_rows([n + m.steps for n, m in self.moves])

    def _of_rows(self, of_moves: list[int]) -> Ints:
        """What each row has of its move."""
        return np.repeat(np.array(of_moves, dtype=np.int64), [len(m.rows) for _, m in self.moves])

    @property
    def space(self) -> int:
        """Above every key."""
        return self._schedule.world_size * len(self.side) * len(self._schedule.heads)

    def key(self, rank: Ints, shard: Ints, group: Ints) -> Ints:
        """One number per (rank, shard, head group)."""
        return (rank * len(self.side) + shard) * len(self._schedule.heads) + group

    def unkey(self, keys: Ints) -> tuple[Ints, Ints, Ints]:
        """(rank, shard, head group) of keys."""
        groups, shards = len(self._schedule.heads), len(self.side)
        return keys // groups // shards, keys // groups % shards, keys % groups

    @cached_property
    def users(self) -> Ints:
        """How many ranks use each item, (shards, head groups)."""
        _, shard, group = self.unkey(self.table.keys)
        count = np.zeros((len(self.side), len(self._schedule.heads)), dtype=np.int64)
        np.add.at(count, (shard, group), 1)
        return count

    @cached_property
    def computing(self) -> Ints:
        """Of queries: in how many places, a rank and a head group each, something of each item is computed, (shards, head groups):
        of groups that share heads in those of both."""
        groups = self._schedule.heads
        heads = np.zeros((len(groups), 1 + max(group.q[-1] for group in groups)), dtype=np.int64)
        for number, group in enumerate(groups):
            heads[number, list(group.q)] = 1
        found: Ints = self.users @ ((heads @ heads.T) > 0).astype(np.int64)
        return found

    @cached_property
    def parent(self) -> Ints:
        """For each row, the row by which its sender received the item; -1 where the sender received it by none."""
        source, _, shard, group = self.rows.T
        place, moved = self.arrivals.find(self.key(source, shard, group))
        return np.where(moved, self.arrivals.values[place], -1) if len(place) else place

    @cached_property
    def beyond(self) -> Ints:
        """For each row, how many ranks use the item among its receiver and the ranks below it in the tree."""
        parent = self.parent
        count = self.table.find(self.keys)[1].astype(np.int64)
        ends = np.cumsum([0, *(len(m.rows) for _, m in self.moves)])
        for begin, end in zip(ends[-2::-1], ends[:0:-1], strict=True):  # later moves first
            inner = np.arange(begin, end)[parent[begin:end] >= 0]
            np.add.at(count, parent[inner], count[inner])
        return count

    def fetches(self) -> tuple[Ints, Ints, Bools]:
        """What backward needs at ranks that do not own it: rows as in ``Move``, last step of use, whether kept from forward."""
        place, used = self.table.find(self.keys)
        steps = self.table.values
        last = np.where(used, steps[place, 1], -1) if len(steps) else np.full(len(place), -1)
        first = np.where(used, steps[place, 0], -1) if len(steps) else last
        source = self.side.owner[self.rows[:, MoveColumn.SHARD]]
        # The receiver of a move can give back to the sender what it uses later than the sender does. Of several receivers it is the
        # one that needs it longest in backward, since that one has it anyway.
        parent = self.parent
        able = np.nonzero((parent >= 0) & (last > last[parent]) & (last[parent] >= 0))[0]
        able = able[np.lexsort((self.rows[able, MoveColumn.TARGET], first[able], parent[able]))]
        chosen = able[np.nonzero(np.diff(parent[able], prepend=-1))[0]]
        source[parent[chosen]] = self.rows[chosen, MoveColumn.TARGET]
        found = np.column_stack([source, self.rows[:, MoveColumn.TARGET :]])[used]
        return found, last[used], self.kept[used]


@dataclass(frozen=True)
class Traffic:
    """Everything that a schedule sends, in the order of time, and who uses what.

    Attributes:
        transfers: every message, forward and backward.
        queries, keys: the uses of queries, and of keys with values.
        final: whether each (shard, head group) of queries is computed by one rank alone, and in this group alone, (shards, head
            groups).
        steps: N, steps of forward.
    """

    transfers: tuple[Transfer, ...]
    queries: Uses
    keys: Uses
    final: Bools
    steps: int

    @cached_property
    def known(self) -> dict[Hashable, Any]:
        """As ``Schedule.known``."""
        return {}

    def backward_time(self, step: int) -> int:
        """The time at which backward of a step is computed."""
        return 2 * self.steps - step

    def apart(self) -> Traffic:
        """The same with keys and values, and their gradients, in messages of their own."""
        return replace(
            self, transfers=tuple(replace(t, kind=kind) for t in self.transfers for kind in APART.get(t.kind, (t.kind,)))
        )


def traffic(schedule: Schedule, *, backward: bool, gates: bool = False) -> Traffic:
    """The messages of forward and, derived from them, of backward; ``gates``: whether those go along with keys and values."""
    asked = ("traffic", backward, gates)
    if asked not in schedule.known:
        schedule.known[asked] = _traffic(schedule, backward=backward, gates=gates)
    found: Traffic = schedule.known[asked]
    return found


def _traffic(schedule: Schedule, *, backward: bool, gates: bool) -> Traffic:
    queries, keys = Uses(schedule, "q"), Uses(schedule, "kv")
    final = queries.computing == 1
    found = list(_forward(schedule, final))
    if backward:
        found += _backward(schedule, queries, keys, final)
        found = sorted([*found, *_state_gradients(schedule)], key=lambda transfer: transfer.begin)
    if gates:
        found = [each for t in found for each in (t, *(replace(t, kind=GATES[t.kind]) for _ in range(t.kind in GATES)))]
    parts = (part for whole in found for part in _by_kind(whole, schedule.kinds))
    return Traffic(tuple(t for t in parts if len(t.rows)), queries, keys, final, len(schedule.steps))


def _by_kind(transfer: Transfer, kinds: Ints | None) -> Iterator[Transfer]:
    """A transfer in one for each kind of sub-groups that has a part in it."""
    if kinds is None:
        yield transfer
        return
    of = kinds[transfer.rows[:, MoveColumn.SOURCE]]
    for kind in distinct(of).tolist():
        yield replace(transfer, rows=_picked(transfer.rows, of == kind))


def _forward(schedule: Schedule, final: Bools) -> Iterator[Transfer]:
    for number, step in enumerate(schedule.steps):
        for move in step.moves:
            yield Transfer(move.kind, move.rows, number, number + move.steps - 1, move.channel)
        alone = final[step.returns[:, MoveColumn.SHARD], step.returns[:, MoveColumn.GROUP]]
        partial = _picked(step.returns, ~alone)
        yield Transfer("final", _picked(step.returns, alone), number, number)
        yield Transfer("out", partial, number, number)
        yield Transfer("lse", partial, number, number)


def _backward(schedule: Schedule, queries: Uses, keys: Uses, final: Bools) -> Iterator[Transfer]:
    count = len(schedule.steps)
    values = [_Values(kind, uses, count) for kind, uses in zip(SIDES, (queries, keys), strict=True)]
    gradients: dict[int, list[Transfer]] = {}
    for gradient in _gradients(schedule, queries, keys):
        gradients.setdefault(gradient.begin, []).append(gradient)
    for time in range(count, 2 * count + 1):
        step = 2 * count - time
        for each in values:
            yield from each.fetched(step, time, final)
        yield from gradients.get(time, ())


class _Values:
    """The items of one kind that backward needs at ranks that do not own them, in the order of their last step of use."""

    def __init__(self, kind: Kind, uses: Uses, steps: int) -> None:
        rows, last, kept = uses.fetches()
        order = np.argsort(last, kind="stable")
        self._kind, self._rows, self._kept = kind, rows[order], kept[order]
        self._begins = np.searchsorted(last[order], np.arange(steps + 1))

    def fetched(self, step: int, time: int, final: Bools) -> Iterator[Transfer]:
        """What leaves while backward of ``step`` is computed: what the step before it uses and no later one does."""
        if not step:
            return
        now = slice(self._begins[step - 1], self._begins[step])
        rows = self._rows[now]
        yield Transfer(self._kind, _picked(rows, ~self._kept[now]), time, time)
        if self._kind == "q":
            yield Transfer("dout", rows, time, time)
            partial = ~final[rows[:, MoveColumn.SHARD], rows[:, MoveColumn.GROUP]]
            yield Transfer("stats", _picked(rows, partial), time, time)


def _gradients(schedule: Schedule, queries: Uses, keys: Uses) -> Iterator[Transfer]:
    """The gradients that go back along every move, those of queries first among those that leave at the same time."""
    count = len(schedule.steps)
    shared = {"q": queries.computing > queries.users, "kv": _shared_heads(schedule.heads, keys)}
    for kind, uses in zip(SIDES, (queries, keys), strict=True):
        shard, group = uses.rows[:, [MoveColumn.SHARD, MoveColumn.GROUP]].T
        alone = (uses.beyond == uses.users[shard, group]) & ~shared[kind][shard, group]
        ends = np.cumsum([len(m.rows) for _, m in uses.moves])
        gradient = PAYLOADS[kind].gradient
        for (number, move), part in zip(uses.moves, np.split(alone, ends[:-1]), strict=False):
            back = move.rows[:, [MoveColumn.TARGET, MoveColumn.SOURCE, MoveColumn.SHARD, MoveColumn.GROUP]]
            begin, end = 2 * count - (number + move.steps - 1), 2 * count - number
            yield Transfer(PAYLOADS[gradient].final, _picked(back, part), begin, end, move.channel)
            yield Transfer(gradient, _picked(back, ~part), begin, end, move.channel)


def _state_gradients(schedule: Schedule) -> Iterator[Transfer]:
    """The gradient of a state goes back where the state came from, later moves first. A rank that got the summary of a shard owes
    that shard's owner what its own shard does to the gradient of any state.

    After the last forward step nothing moves, so what moves in step n goes back at time 2N - 1 - n, and what needs it is computed
    at the time after.
    """
    last = 2 * len(schedule.steps) - 1
    of_rank = np.zeros(schedule.world_size, dtype=np.int64)
    of_rank[schedule.k.owner] = np.arange(len(schedule.k))
    for number, step in reversed(list(enumerate(schedule.steps))):
        for move in step.moves:
            if move.kind in STATES:
                source, to, shard, group = move.rows.T
                back = np.stack([to, source, shard if move.kind == "state" else of_rank[to], group], axis=1)
                begin = max(last - (number + move.steps - 1), last // 2 + 1)
                yield Transfer(PAYLOADS[move.kind].gradient, back, begin, last - number, move.channel)


def _picked(rows: Ints, which: Bools) -> Ints:
    """Some of the rows; where they are all, the rows themselves: of thousands of ranks a copy is a gigabyte."""
    return rows if which.all() else rows[which]


def _shared_heads(groups: tuple[HeadGroup, ...], keys: Uses) -> Bools:
    """Whether each (shard of keys, head group) has a key/value head that the group holds twice, or that another group of this shard
    reads too, so that gradients add up."""
    read = np.zeros((len(groups), max(head for group in groups for head in group.kv) + 1), dtype=np.int64)
    for number, group in enumerate(groups):
        np.add.at(read[number], list(group.kv), 1)
    twice = (keys.users > 0).astype(np.int64) @ read > 1  # (shards, key/value heads)
    return np.stack([twice[:, list(group.kv)].any(axis=1) for group in groups], axis=1)
