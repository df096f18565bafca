"""All traffic of a schedule, backward derived from forward, as data that ``verify`` counts and ``execute`` runs.

An item that moves makes a tree of ranks with its owner as the root. Backward computes the steps in reverse, and along each edge
of the tree the gradient travels back while its move's own step is computed again, so that a rank has the gradients of everything
beyond it before it passes on the sum. Values come back from a rank further out that used them later, which has them at hand; the
last user of all, which has no such neighbour, fetches them from the owner. Nothing is kept from forward but what a move says.

The adjoint of a returned partial result is the arrival of its query's output gradient, with the final LSE and ``delta`` =
rowsum(dout * out); a rank that computed all keys of its queries has both already and gets the output gradient only.

A gradient that nothing is added to any more travels in the inputs' type, all others in the accumulation type (or as
``Problem.reduce_dtype`` says).

Time is one line for both passes: forward step n of N is time n, backward of step n is time 2N - n, and what backward needs first
is fetched at time N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import Ints
from lcbench.problem import Problem
from lcbench.schedule.schedule import HeadGroup, Kind, Move, Schedule


@dataclass(frozen=True)
class Payload:
    """What a kind of message holds per token and head.

    Attributes:
        side: whose heads and tokens it has: those of queries or of keys and values.
        dims: elements, in head dimensions.
        extra: elements besides.
        precision: ``input``: the inputs' type; ``sum``: the accumulation type; ``transit``: what ``Problem.reduce_dtype`` says.
    """

    side: Kind
    dims: int
    extra: int
    precision: str


CARGO = {
    "q": Payload("q", 1, 0, "input"),
    "kv": Payload("kv", 2, 0, "input"),
    "out": Payload("q", 1, 0, "transit"),  # of some of the keys, with lse
    "lse": Payload("q", 0, 1, "sum"),
    "final": Payload("q", 1, 0, "input"),  # out of all keys of its rows
    "dout": Payload("q", 1, 0, "input"),
    "stats": Payload("q", 0, 2, "sum"),  # lse and delta
    "dq": Payload("q", 1, 0, "transit"),
    "dkv": Payload("kv", 2, 0, "transit"),
    "final_dq": Payload("q", 1, 0, "input"),  # gradients that nothing is added to any more
    "final_dkv": Payload("kv", 2, 0, "input"),
}


def element_bytes(precision: str, problem: Problem) -> int:
    """Bytes of an element of a precision class; sums are float32, or float64 for float64 inputs."""
    low = precision == "input" or (precision == "transit" and problem.reduce_dtype == "input")
    return problem.itemsize if low else max(problem.itemsize, 4)


def token_bytes(kind: str, group: HeadGroup, problem: Problem, precision: str | None = None) -> int:
    """Bytes per token of a message, or of what it holds in another precision."""
    cargo = CARGO[kind]
    heads = len(group) if cargo.side == "q" else len(group.kv)
    return heads * (cargo.dims * problem.heads.dim + cargo.extra) * element_bytes(precision or cargo.precision, problem)


def held_precision(kind: str) -> str:
    """What a buffer for a kind of message holds it in: sums in the accumulation type, whatever they travel in."""
    return "sum" if kind in ("dq", "dkv") else CARGO[kind].precision


@dataclass(frozen=True)
class Transfer:
    """Messages of one kind: rows (from, to, shard, head group) that leave at the begin of ``begin`` and are there after ``end``."""

    kind: str
    rows: Ints
    begin: int
    end: int
    channel: str = "main"

    def bytes(self, schedule: Schedule, problem: Problem) -> Ints:
        """Bytes of each row."""
        per_token = np.array([token_bytes(self.kind, group, problem) for group in schedule.heads])
        return schedule.sizes[self.rows[:, 2]] * per_token[self.rows[:, 3]]


@dataclass(frozen=True)
class Table:
    """Items at ranks: sorted ``keys`` with values in the same order."""

    keys: Ints
    values: Ints

    def find(self, keys: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Position of each key (any where it is missing), and whether it is there."""
        if not len(self.keys):
            return np.zeros(len(keys), dtype=np.int64), np.zeros(len(keys), dtype=bool)
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return place, self.keys[place] == keys


class Uses:
    """Which rank uses which item, when first and when last; and how the item came there."""

    def __init__(self, schedule: Schedule, kind: Kind) -> None:
        self._schedule = schedule
        column = 2 if kind == "q" else 3
        keys, steps = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for number, step in enumerate(schedule.steps):
            places, shards = schedule.spread(step.tiles[:, column])
            found = np.unique(self.key(step.tiles[places, 0], shards, step.tiles[places, 1]))
            keys.append(found)
            steps.append(np.full(len(found), number))
        every, when = np.concatenate(keys), np.concatenate(steps)
        order = np.argsort(every, kind="stable")
        every, when = every[order], when[order]
        starts = np.nonzero(np.diff(every, prepend=-1))[0]
        ends = np.append(starts[1:], len(every)) - 1
        # (first step, last step) of each (rank, shard, head group)
        self.table = Table(every[starts], np.column_stack([when[starts], when[ends]]))

        moved = [(number, move) for number, step in enumerate(schedule.steps) for move in step.moves if move.kind == kind]
        self.moves: list[tuple[int, Move]] = [(n, m) for n, m in moved if len(m.rows)]
        self.rows = np.concatenate([np.empty((0, 4), dtype=np.int64), *(m.rows for _, m in self.moves)])
        lengths = [len(m.rows) for _, m in self.moves]
        self.arrives = np.repeat([n + m.steps for n, m in self.moves], lengths).astype(np.int64)  # usable from this step on
        self.leaves = np.repeat([n for n, _ in self.moves], lengths).astype(np.int64)
        self.kept = np.repeat([m.kept for _, m in self.moves], lengths).astype(bool)
        self.keys = self.key(self.rows[:, 1], self.rows[:, 2], self.rows[:, 3])
        order = np.argsort(self.keys, kind="stable")
        self.arrivals = Table(self.keys[order], order)  # values: row of ``rows``

    def key(self, rank: Ints, shard: Ints, group: Ints) -> Ints:
        """One number per (rank, shard, head group)."""
        return (rank * len(self._schedule.shards) + shard) * len(self._schedule.heads) + group

    def unkey(self, keys: Ints) -> tuple[Ints, Ints, Ints]:
        groups, shards = len(self._schedule.heads), len(self._schedule.shards)
        return keys // groups // shards, keys // groups % shards, keys % groups

    @cached_property
    def users(self) -> Ints:
        """Ranks that use each item, (shards, head groups)."""
        _, shard, group = self.unkey(self.table.keys)
        count = np.zeros((len(self._schedule.shards), len(self._schedule.heads)), dtype=np.int64)
        np.add.at(count, (shard, group), 1)
        return count

    @cached_property
    def parent(self) -> Ints:
        """For each row that moves, the row by which its sender got the item; -1 where the sender got it by none."""
        place, moved = self.arrivals.find(self.key(self.rows[:, 0], self.rows[:, 2], self.rows[:, 3]))
        return np.where(moved, self.arrivals.values[place], -1) if len(place) else place

    @cached_property
    def beyond(self) -> Ints:
        """For each row that moves, how many ranks use the item at its end or further on."""
        parent = self.parent
        count = self.table.find(self.keys)[1].astype(np.int64)
        ends = np.cumsum([0, *(len(m.rows) for _, m in self.moves)])
        for begin, end in zip(ends[-2::-1], ends[:0:-1], strict=True):  # later moves first
            inner = np.arange(begin, end)[parent[begin:end] >= 0]
            np.add.at(count, parent[inner], count[inner])
        return count

    def fetches(self) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        """What backward needs at ranks that do not own it: rows (from, to, shard, group), last step of use, kept from forward."""
        place, used = self.table.find(self.keys)
        steps = self.table.values
        last = np.where(used, steps[place, 1], -1) if len(steps) else np.full(len(place), -1)
        first = np.where(used, steps[place, 0], -1) if len(steps) else last
        source = self._schedule.owner[self.rows[:, 2]]
        # A move's receiver can give back to its sender what it uses later than the sender does; of several the one that
        # is done with it last in backward, since it has it anyway.
        parent = self.parent
        able = np.nonzero((parent >= 0) & (last > last[parent]) & (last[parent] >= 0))[0]
        able = able[np.lexsort((self.rows[able, 1], first[able], parent[able]))]
        chosen = able[np.nonzero(np.diff(parent[able], prepend=-1))[0]]
        source[parent[chosen]] = self.rows[chosen, 1]
        found = np.column_stack([source, self.rows[:, 1:]])[used]
        return found, last[used], self.kept[used]


@dataclass(frozen=True)
class Traffic:
    """Everything that a schedule sends, in the order of time, and who uses what.

    ``final``: whether each (shard, head group) of queries is computed by one rank alone.
    """

    transfers: tuple[Transfer, ...]
    queries: Uses
    keys: Uses
    final: NDArray[np.bool_]
    steps: int

    def backward_time(self, step: int) -> int:
        return 2 * self.steps - step


def traffic(schedule: Schedule, *, backward: bool) -> Traffic:
    """The messages of forward and, derived from them, of backward."""
    queries, keys = Uses(schedule, "q"), Uses(schedule, "kv")
    final = queries.users == 1
    found = list(_forward(schedule, final))
    if backward:
        found += _backward(schedule, queries, keys, final)
    return Traffic(tuple(t for t in found if len(t.rows)), queries, keys, final, len(schedule.steps))


def _forward(schedule: Schedule, final: NDArray[np.bool_]) -> Iterator[Transfer]:
    for number, step in enumerate(schedule.steps):
        for move in step.moves:
            yield Transfer(move.kind, move.rows, number, number + move.steps - 1, move.channel)
        alone = final[step.returns[:, 2], step.returns[:, 3]]
        yield Transfer("final", step.returns[alone], number, number)
        yield Transfer("out", step.returns[~alone], number, number)
        yield Transfer("lse", step.returns[~alone], number, number)


def _backward(schedule: Schedule, queries: Uses, keys: Uses, final: NDArray[np.bool_]) -> Iterator[Transfer]:
    count = len(schedule.steps)
    shared = _shared_heads(schedule.heads)
    fetched = []
    for kind, uses in (("q", queries), ("kv", keys)):
        rows, last, kept = uses.fetches()
        order = np.argsort(last, kind="stable")
        begins = np.searchsorted(last[order], np.arange(count + 1))
        fetched.append((kind, rows[order], kept[order], begins))
    grads: dict[int, list[tuple[str, int, Move, NDArray[np.bool_]]]] = {}
    for kind, uses in (("q", queries), ("kv", keys)):
        shard, group = uses.rows[:, 2:].T
        alone = (uses.beyond == uses.users[shard, group]) & ~(shared[group] & (kind == "kv"))
        ends = np.cumsum([len(m.rows) for _, m in uses.moves])
        for (number, move), part in zip(uses.moves, np.split(alone, ends[:-1]), strict=False):
            grads.setdefault(number + move.steps - 1, []).append((kind, number, move, part))
    for time in range(count, 2 * count + 1):
        step = 2 * count - time
        for kind, rows, kept, begins in fetched if step else []:  # what is used in step - 1 and not after
            now = slice(begins[step - 1], begins[step])
            yield Transfer(kind, rows[now][~kept[now]], time, time)
            if kind == "q":
                arriving = rows[now]
                yield Transfer("dout", arriving, time, time)
                yield Transfer("stats", arriving[~final[arriving[:, 2], arriving[:, 3]]], time, time)
        for kind, number, move, alone in grads.get(step, []):
            back = move.rows[:, [1, 0, 2, 3]]
            end = 2 * count - number
            yield Transfer(f"final_d{kind}", back[alone], time, end, move.channel)
            yield Transfer(f"d{kind}", back[~alone], time, end, move.channel)


def _shared_heads(groups: tuple[HeadGroup, ...]) -> NDArray[np.bool_]:
    """Whether each group has a key/value head that it holds twice or that another group reads too: gradients add up."""
    readers: dict[int, int] = {}
    for group in groups:
        for head in group.kv:
            readers[head] = readers.get(head, 0) + 1
    return np.array([any(readers[head] > 1 for head in group.kv) for group in groups])
