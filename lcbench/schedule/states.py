"""States of linear attention on their way among ranks: from what each is put together, that this is all of it, and when.

What n shards in the order of their tokens do to a state is n affine maps, one after the other (``kernels.linear``). A rank knows
those of its own shards, their *summaries*. Others come to it: the *state* after a shard, that is all maps up to it on a state of
zeros, or summaries of single shards. The state before a shard is the last state that came from before it, with the summaries of
the shards between. Nothing else is it: a shard that is missing, or in it twice, is a fault.

In backward everything is the same from the last shard to the first: the gradient of the state after a shard is made of what the
shards after it do. So shards have a *place* in a pass: their number in forward, counted from the last one in backward.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lcbench.masks.band import Ints, distinct
from lcbench.problem import Problem, Rule
from lcbench.schedule.adjoint import Traffic, Transfer
from lcbench.schedule.fault import ScheduleError, fault_at
from lcbench.schedule.payload import PAYLOADS
from lcbench.schedule.schedule import STATES, MoveColumn, Schedule

PASSES: dict[bool, tuple[str, str]] = {False: ("state", "summary"), True: ("dstate", "dsummary")}


@dataclass(frozen=True)
class Before:
    """From what the state before a shard is put together.

    Attributes:
        state: the place after which a state has come; None: none has, so the first summary is applied to zeros.
        summaries: the places whose maps follow, in order; the rank's own and those that have come.
    """

    state: int | None
    summaries: tuple[int, ...]


@dataclass
class _Come:
    """What comes to a rank for a head group: the time from which it is there, by place."""

    states: dict[int, int] = field(default_factory=dict)
    summaries: dict[int, int] = field(default_factory=dict)


class Arrivals:
    """Which states and summaries come to which rank, and when, in one pass of a schedule.

    Attributes:
        transfers: those that bring them, in the order of time.
    """

    def __init__(self, schedule: Schedule, moves: Traffic, *, backward: bool) -> None:
        self._backward, self._shards = backward, len(schedule.k)
        self._owner: Ints = schedule.k.owner[::-1] if backward else schedule.k.owner
        self._state, self._summary = PASSES[backward]
        self._heads = schedule.heads
        self.transfers: list[Transfer] = [t for t in moves.transfers if t.kind in PASSES[backward]]
        self._come: dict[tuple[int, int], _Come] = defaultdict(_Come)
        for transfer in self.transfers:
            for _, to, shard, group in transfer.rows.tolist():
                come = self._come[to, group]
                of_kind = come.states if transfer.kind == self._state else come.summaries
                of_kind.setdefault(self.place(transfer.kind, shard), transfer.end + 1)
        self._carriers = sorted({group for _, group in self._come})

    def parts(self, group: int) -> list[int]:
        """The head groups whose states make up that of a head group, in the order of their heads: itself, or its blocks."""
        heads = self._heads[group]
        inside = [i for i in self._carriers if set(self._heads[i].q) <= set(heads.q)]
        return inside if group not in inside and sum(len(self._heads[i]) for i in inside) == len(heads) else [group]

    def place(self, kind: str, shard: int) -> int:
        """Of a shard in this pass; of a gradient's state the place of the shard after it, from which it comes."""
        if not self._backward:
            return shard
        return self._shards - (2 if kind == self._state else 1) - shard

    def shard(self, kind: str, place: int) -> int:
        """The shard by which messages name what has a place: the inverse of ``place``."""
        return self.place(kind, place)

    def before(self, rank: int, group: int, place: int, time: int | None = None) -> Before | None:
        """What a rank puts together the state before a place from at a time; None where something is missing.

        Args:
            time: None: with all that ever comes.
        """
        come = self._come.get((rank, group), _Come())
        there = [at for at, when in come.states.items() if at < place and (time is None or when <= time)]
        state = max(there, default=None)
        between = range(0 if state is None else state + 1, place)
        for at in between:
            if self._owner[at] == rank:
                continue
            when = come.summaries.get(at)
            if when is None or (time is not None and when > time):
                return None
        return Before(state, tuple(between))

    def used(self, rank: int, group: int, before: Before) -> list[tuple[str, int, int, int]]:
        """(kind, rank, head group, shard) of what came from others, of what a state is put together from."""
        found = [] if before.state is None else [(self._state, rank, group, self.shard(self._state, before.state))]
        others = (at for at in before.summaries if self._owner[at] != rank)
        return [*found, *((self._summary, rank, group, self.shard(self._summary, at)) for at in others)]


def backward_times(schedule: Schedule, moves: Traffic) -> Ints:
    """When backward of each tile is computed, in the order of the steps, (tiles,).

    A stretch of own tokens waits for the gradient of the state after it, and for nothing else; but what this rank has to send and
    to get of states comes first, since others wait for that. Any other tile comes when its step is undone.
    """
    steps, tiles = moves.steps, [(number, *row) for number, step in enumerate(schedule.steps) for row in step.tiles.tolist()]
    arrivals = Arrivals(schedule, moves, backward=True)
    if not arrivals.transfers:
        return np.array([2 * steps - number for number, *_ in tiles], dtype=np.int64)
    busy = np.full(schedule.world_size, steps + 1, dtype=np.int64)
    for transfer in arrivals.transfers:
        np.maximum.at(busy, transfer.rows[:, MoveColumn.SOURCE], transfer.begin)
        np.maximum.at(busy, transfer.rows[:, MoveColumn.TARGET], transfer.end + 1)
    found = []
    for number, rank, _, _, k in tiles:
        own = (schedule.k.owner[schedule.k.members(k)] == rank).all()
        found.append(int(busy[rank]) if own else 2 * steps - number)
    return np.array(found, dtype=np.int64)


def summarised(schedule: Schedule, moves: Traffic, *, backward: bool) -> frozenset[int]:
    """The ranks that need the summaries of their own shards in a pass, since others wait for something with these in it."""
    return frozenset(
        rank for transfer in moves.transfers if transfer.kind in PASSES[backward]
        for rank in distinct(transfer.rows[:, MoveColumn.SOURCE]).tolist()
    )  # fmt: skip


def received_bytes(schedule: Schedule, moves: Traffic, problem: Problem, rank: int) -> int:
    """Memory for what comes to a rank, in the pass with more of it."""
    found = [0, 0]
    for transfer in moves.transfers:
        mine = transfer.rows[:, MoveColumn.TARGET] == rank
        if mine.any():
            found[transfer.begin >= moves.steps] += int(transfer.bytes(schedule, problem)[mine].sum())
    return max(found)


def products(q: Any, kv: Any, rule: Rule | None) -> Any:
    """Products of a vector with a state, or of two vectors that make one, of 2 Dk Dv FLOPs each, that the recurrence has for a
    token: each query head reads a state, and each key/value head adds to one, with the delta rule what it has read of it."""
    return q + (2 if rule == "gated_delta_rule" else 1) * kv


def summary_share(problem: Problem, *, backward: bool) -> float:
    """What the summary of some tokens is of their pass, by products: what is added to a state, with the delta rule to one with the
    Dk columns of its transition beside it; in backward what queries, and with the delta rule keys, add to its gradient."""
    heads, delta = problem.heads, problem.rule == "gated_delta_rule"
    own = heads.q + (2 * heads.kv * delta) if backward else heads.kv * (2 * (1 + heads.dim / heads.v) if delta else 1)
    return float(own / products(heads.q, heads.kv, problem.rule)) / (2 if backward else 1)


# -- proof ---------------------------------------------------------------------------------------------------------------


def check_stretches(schedule: Schedule, moves: Traffic, problem: Problem) -> Ints:
    """Check that each token is computed once for each query head, from the state of all tokens before it, each of them once.

    Returns:
        Tokens that each rank computes in each step, over its query heads, (steps, P).

    Raises:
        ScheduleError: it names the step.
    """
    _check_order(schedule)
    _check_heads(schedule, moves)
    forward = Arrivals(schedule, moves, backward=False)
    used = _check_sent(schedule, forward, moves, backward=False)
    tokens = np.zeros((len(schedule.steps), schedule.world_size), dtype=np.int64)
    times = np.zeros((problem.heads.q, len(schedule.k)), dtype=np.int64)
    for number, step in enumerate(schedule.steps):
        for rank, group, q, k in step.tiles.tolist():
            members, heads = schedule.k.members(k), schedule.heads[group]
            if not np.array_equal(schedule.q.members(q), members) or (np.diff(members) != 1).any():
                raise fault_at(schedule, number, f"rank {rank} computes bundles q{q}k{k}, which are no stretch of tokens on itself")
            for part in forward.parts(group):
                before = forward.before(rank, part, int(members[0]), number)
                if before is None:
                    named = f"shards 0 to {members[0] - 1}, heads {part},"
                    raise fault_at(
                        schedule, number, f"rank {rank} computes shard {members[0]} before the state of {named} is there"
                    )
                used.update(forward.used(rank, part, before))
            times[np.ix_(heads.q, members)] += 1
            tokens[number, rank] += int(schedule.k.sizes[members].sum()) * len(heads)
            if (times[np.ix_(heads.q, members)] > 1).any():
                raise fault_at(schedule, number, f"rank {rank} computes shards {members.tolist()}, heads {group}, a second time")
    _check_used(schedule, forward, used)
    missing = np.argwhere((times == 0) & (schedule.k.sizes > 0))
    if len(missing):
        head, shard = missing[0].tolist()
        raise fault_at(schedule, len(schedule.steps) - 1, f"nobody computed shard {shard} of query head {head}")
    if problem.backward:
        _check_backward(schedule, moves)
    return tokens


def _check_order(schedule: Schedule) -> None:
    if schedule.q is not schedule.k:
        raise ScheduleError("linear attention needs a query for every key, dealt out alike")
    tokens = np.concatenate([schedule.k.shards.tokens(i) for i in range(len(schedule.k))])
    if (np.diff(tokens) != 1).any():
        raise ScheduleError("the shards are not stretches of tokens in their order, which states go through")


def _check_heads(schedule: Schedule, moves: Traffic) -> None:
    """Of the head groups whose states move each has key/value heads of its own, and each rank one shard: who has which summary is
    then known."""
    carriers = {group for t in moves.transfers if t.kind in STATES for group in t.rows[:, MoveColumn.GROUP].tolist()}
    every = [head for group in carriers for head in schedule.heads[group].kv]
    if len(set(every)) < len(every):
        raise ScheduleError("states move, and some key/value head is in two of their head groups, or twice in one")
    if carriers and not np.array_equal(np.sort(schedule.k.owner), np.arange(schedule.world_size)):
        raise ScheduleError("states move, and some rank has no shard, or several")


Item = tuple[str, int, int, int]  # kind, rank that it comes to, head group, shard


def _check_sent(schedule: Schedule, arrivals: Arrivals, moves: Traffic, *, backward: bool) -> set[Item]:
    """Whoever sends a state can put it together, a summary is its owner's, and nothing comes twice; what that makes use of."""
    state, _ = PASSES[backward]
    used: set[Item] = set()
    come: set[Item] = set()
    for transfer in arrivals.transfers:
        step = min(transfer.begin, 2 * moves.steps - 1 - transfer.end) if backward else transfer.begin
        for source, to, shard, group in transfer.rows.tolist():
            named = f"{transfer.kind} of shard {shard}, heads {group}, (rank {source} to {to})"
            if (transfer.kind, to, group, shard) in come or source == to:
                raise fault_at(schedule, step, f"{named} comes a second time")
            come.add((transfer.kind, to, group, shard))
            if transfer.kind == state:
                before = arrivals.before(source, group, arrivals.place(state, shard) + 1, transfer.begin)
                if before is None:
                    raise fault_at(schedule, step, f"{named} is sent by a rank that cannot put it together yet")
                used.update(arrivals.used(source, group, before))
            elif schedule.k.owner[shard] != source:
                raise fault_at(schedule, step, f"{named} is sent by a rank that does not own the shard")
    return used


def _check_used(schedule: Schedule, arrivals: Arrivals, used: set[Item]) -> None:
    """Nothing is sent for nothing, but for an all-gather: each rank of it gets the summaries of all others."""
    for transfer in arrivals.transfers:
        source, to = transfer.rows[:, MoveColumn.SOURCE], transfer.rows[:, MoveColumn.TARGET]
        if PAYLOADS[transfer.kind].width == "summary":
            ranks = len(distinct(np.concatenate([source, to])))
            if len(distinct(source * schedule.world_size + to)) == ranks * (ranks - 1):
                continue
        for one, other, shard, group in transfer.rows.tolist():
            if (transfer.kind, other, group, shard) not in used:
                named = f"{transfer.kind} of shard {shard}, heads {group},"
                raise fault_at(schedule, transfer.begin, f"{named} is sent and never used (rank {one} to {other})")


def _check_backward(schedule: Schedule, moves: Traffic) -> None:
    """The moves of forward, turned round, bring every rank the gradient of the state after its tokens."""
    arrivals = Arrivals(schedule, moves, backward=True)
    _check_sent(schedule, arrivals, moves, backward=True)
    if not arrivals.transfers:
        return
    for number, step in enumerate(schedule.steps):
        for rank, group, _, k in step.tiles.tolist():
            last = int(schedule.k.members(k)[-1])
            if any(arrivals.before(rank, part, len(schedule.k) - 1 - last) is None for part in arrivals.parts(group)):
                named = f"rank {rank}, shard {last}, heads {group}"
                raise fault_at(schedule, number, f"backward of this schedule brings no gradient of the state after it to {named}")
