"""Proof that a schedule computes a mask: every unmasked pair once, nothing used before it arrived, results back at their owners.

It is numpy without processes, so a test proves schedules of thousands of ranks. Messages need no proof of their own: both ends of a
message are read from the same row, and all messages of a step are under way together, so no rank waits for one that is not sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import BandMask, Ints, spread
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.adjoint import SIDES, Traffic, Transfer, Uses, traffic
from lcbench.schedule.fault import ScheduleError, fault_at
from lcbench.schedule.layout import tile_areas
from lcbench.schedule.lowering import Operation
from lcbench.schedule.program import Program
from lcbench.schedule.schedule import STATES, Schedule, Side, TileColumn
from lcbench.schedule.states import check_stretches, received_bytes


@dataclass(frozen=True)
class ScheduleCost:
    """What a valid schedule costs.

    Attributes:
        step_pairs: unmasked pairs per step and rank, over the query heads that the rank computes, shape (steps, P); in linear
            attention tokens.
        forward_bytes, backward_bytes: sent per rank, shape (P,).
        forward_bytes_out, backward_bytes_out: the part of them that leaves the node.
    """

    schedule: Schedule
    problem: Problem
    traffic: Traffic
    step_pairs: Ints
    forward_bytes: Ints
    backward_bytes: Ints
    forward_bytes_out: Ints
    backward_bytes_out: Ints

    @property
    def rank_pairs(self) -> Ints:
        """Unmasked pairs, or tokens, per rank, shape (P,)."""
        return self.step_pairs.sum(axis=0)

    @property
    def imbalance(self) -> float:
        """Time of the steps, each as long as its busiest rank, over the mean work of a rank: 1.0 is perfect. In linear attention,
        whose ranks compute when their state has come, each by itself: the work of the busiest rank over the mean."""
        mean = self.rank_pairs.mean()
        if not mean:
            return 1.0
        busiest = self.rank_pairs.max() if self.problem.rule is not None else self.step_pairs.max(axis=1).sum()
        return float(busiest / mean)

    def buffer_bytes(self, rank: int, operations: tuple[Operation, ...] = ()) -> int:
        """Memory that a rank holds for buffers, besides its own tensors, where these operations go by collectives."""
        if self.problem.rule is not None:
            return received_bytes(self.schedule, self.traffic, self.problem, rank)
        return Program(self.schedule, self.traffic, self.problem, rank, operations).buffer_bytes


def verify(schedule: Schedule, mask: Mask, problem: Problem) -> ScheduleCost:
    """Check a schedule against a mask and count its work and its bytes.

    Raises:
        ScheduleError: it names the step and shows the grid.
    """
    for side, tokens in ((schedule.q, mask.num_q), (schedule.k, mask.num_k)):
        _check_shards(schedule, side, tokens)
    _check_heads(schedule, problem.heads.q)
    _check_rows(schedule, SIDES if problem.rule is None else (*SIDES, *STATES))
    moves = traffic(schedule, backward=problem.backward, gates=problem.rule is not None)
    for uses, kind in ((moves.queries, "queries"), (moves.keys, "keys")):
        _check_moves(schedule, uses, kind)
    _check_returns(schedule, moves.queries)
    step_pairs = _check_tiles(schedule, mask, problem) if problem.rule is None else check_stretches(schedule, moves, problem)
    forward = _bytes(schedule, [t for t in moves.transfers if t.begin < moves.steps], problem)
    backward = _bytes(schedule, [t for t in moves.transfers if t.begin >= moves.steps], problem)
    return ScheduleCost(schedule, problem, moves, step_pairs, forward[0], backward[0], forward[1], backward[1])


def _check_shards(schedule: Schedule, side: Side, count: int) -> None:
    tokens = np.sort(np.concatenate([side.shards.tokens(i) for i in range(len(side))]))
    if not np.array_equal(tokens, np.arange(count)):
        raise ScheduleError(f"the shards do not hold each of {count} tokens exactly once")
    if len(side.owner) != len(side) or not ((side.owner >= 0) & (side.owner < schedule.world_size)).all():
        raise ScheduleError(f"shards need an owner each, among {schedule.world_size} ranks")


def _check_heads(schedule: Schedule, heads: int) -> None:
    for group in schedule.heads:
        if not group.q or list(group.q) != sorted({*group.q} & {*range(heads)}):
            raise ScheduleError(f"head group {group} does not consist of some of the {heads} query heads, rising")


@dataclass(frozen=True)
class _HeadSets:
    """Sets of query heads that no head group parts.

    Attributes:
        members: the heads of each.
        begins, sets: those of head group g are ``sets[begins[g]:begins[g + 1]]``.
    """

    members: tuple[tuple[int, ...], ...]
    begins: Ints
    sets: Ints

    @classmethod
    def of(cls, schedule: Schedule, heads: int) -> _HeadSets:
        inside = np.zeros((len(schedule.heads), heads), dtype=bool)
        for number, group in enumerate(schedule.heads):
            inside[number, list(group.q)] = True
        alike: dict[bytes, list[int]] = {}
        for head, column in enumerate(inside.T):
            alike.setdefault(column.tobytes(), []).append(head)
        members = tuple(map(tuple, alike.values()))
        of_group, sets = np.nonzero(inside[:, [each[0] for each in members]])
        return cls(members, np.searchsorted(of_group, np.arange(len(inside) + 1)), sets)

    def spread(self, groups: Ints) -> tuple[Ints, Ints]:
        """(position in ``groups``, set) of every set of every head group."""
        number, place = spread(self.begins[groups], self.begins[groups + 1])
        return number, self.sets[place]


def _check_rows(schedule: Schedule, kinds: Sequence[str]) -> None:
    """Every tile, move and return names ranks, head groups, bundles and shards that there are; ``kinds``: of moves."""
    ranks, groups, queries = schedule.world_size, len(schedule.heads), len(schedule.q)
    for side in (schedule.q, schedule.k):
        for bundle in side.bundles:
            if not bundle or not all(0 <= shard < len(side) for shard in bundle):
                raise ScheduleError(f"bundle {bundle} does not consist of some of the shards 0 to {len(side) - 1}")
    bundles = len(schedule.q.bundles), len(schedule.k.bundles)
    for number, step in enumerate(schedule.steps):
        _check_range(number, "tile (rank, head group, bundle of queries, bundle of keys)", step.tiles, (ranks, groups, *bundles))
        for move in step.moves:
            if move.kind not in kinds or move.steps < 1:
                raise ScheduleError(f"step {number}: a move of {move.kind} in {move.steps} steps; kinds are {', '.join(kinds)}")
            shards = len(schedule.side(move.kind))
            _check_range(number, "move (from rank, to rank, shard, head group)", move.rows, (ranks, ranks, shards, groups))
        _check_range(number, "return (from rank, to rank, shard, head group)", step.returns, (ranks, ranks, queries, groups))


def _check_range(step: int, what: str, found: Ints, ends: tuple[int, ...]) -> None:
    """Raises ScheduleError unless rows are integers (n, 4), each column from 0 to below its end."""
    if found.ndim != 2 or found.shape[1] != len(ends) or found.dtype != np.int64:
        raise ScheduleError(f"step {step}: {what} has rows of shape {found.shape} and type {found.dtype}, not (n, 4) of int64")
    wrong = ((found < 0) | (found >= np.array(ends))).any(axis=1)
    if wrong.any():
        row, last = found[np.argmax(wrong)].tolist(), [end - 1 for end in ends]
        raise ScheduleError(f"step {step}: {what} {row} is out of range; the largest numbers are {last}")


def _check_moves(schedule: Schedule, uses: Uses, kind: str) -> None:
    """Each item comes to a rank once, from one that has it, before it is used there; nothing is sent for nothing."""
    source, to, shard, group = uses.rows.T
    keys = uses.keys
    _none(schedule, uses, uses.leaves, to == uses.side.owner[shard], kind, "come to their owner")
    _, repeated = np.unique(keys, return_index=True)
    again = np.ones(len(keys), dtype=bool)
    again[repeated] = False
    _none(schedule, uses, uses.leaves, again, kind, "come a second time")
    lacking = (source != uses.side.owner[shard]) & ((uses.parent < 0) | (uses.arrives[uses.parent] > uses.leaves))
    _none(schedule, uses, uses.leaves, lacking, kind, "are sent by a rank that does not hold them yet")
    _, used = uses.table.find(keys)
    sends_on = np.isin(keys, uses.key(source, shard, group))
    _none(schedule, uses, uses.leaves, ~used & ~sends_on, kind, "are sent and never used")

    rank, shard, group = uses.unkey(uses.table.keys)
    place, arrived = uses.arrivals.find(uses.table.keys)
    first = uses.table.values[:, 0]
    when = uses.arrives[uses.arrivals.values[place]] if len(uses.rows) else first
    early = np.nonzero((rank != uses.side.owner[shard]) & (~arrived | (when > first)))[0]
    if len(early):
        i = early[np.argmin(first[early])]
        raise fault_at(
            schedule, int(first[i]), f"rank {rank[i]} computes before {kind} of shard {shard[i]}, heads {group[i]}, are there"
        )


def _none(schedule: Schedule, uses: Uses, steps: Ints, wrong: NDArray[np.bool_], kind: str, what: str) -> None:
    """Raises ScheduleError for the first of the rows that are wrong."""
    found = np.nonzero(wrong)[0]
    if len(found):
        source, to, shard, group = uses.rows[found[0]].tolist()
        raise fault_at(schedule, int(steps[found[0]]), f"{kind} of shard {shard}, heads {group}, {what} (rank {source} to {to})")


def _check_returns(schedule: Schedule, uses: Uses) -> None:
    """Every rank that computes others' queries returns each result once, when it is complete."""
    rank, shard, group = uses.unkey(uses.table.keys)
    owed = rank != schedule.q.owner[shard]
    for number, step in enumerate(schedule.steps):
        source, to, of, heads = step.returns.T
        place, known = uses.table.find(uses.key(source, of, heads))
        for wrong, what in (
            (to != schedule.q.owner[of], "to a rank that does not own it"),
            (~known | ~owed[place] if len(owed) else ~known, "which it does not owe"),
            (uses.table.values[place, 1] >= number if len(owed) else ~known, "before it is computed"),
        ):
            if wrong.any():
                i = int(np.argmax(wrong))
                raise fault_at(schedule, number, f"rank {source[i]} returns shard {of[i]}, heads {heads[i]}, {what}")
        owed[place] = False
    if owed.any():
        i = int(np.argmax(owed))
        raise fault_at(schedule, len(schedule.steps) - 1, f"rank {rank[i]} never returns shard {shard[i]}, heads {group[i]}")


def _check_tiles(schedule: Schedule, mask: Mask, problem: Problem) -> Ints:
    """Each tile with pairs is computed once for each query head, none twice; and the pairs of each step and rank."""
    every = _HeadSets.of(schedule, problem.heads.q)
    pairs, times = _tile_pairs(schedule, mask, problem, every)
    computed = np.zeros((len(times), len(schedule.q), len(schedule.k)), dtype=bool)
    step_pairs = np.zeros((len(schedule.steps), schedule.world_size), dtype=np.int64)
    for number, step in enumerate(schedule.steps):
        for part in schedule.shard_tiles(step):
            place, heads = every.spread(part[:, TileColumn.GROUP])
            rank, group, q, k = part[place].T
            flat = np.ravel_multi_index((heads, q, k), computed.shape)
            repeated = np.ones(len(flat), dtype=bool)
            repeated[np.unique(flat, return_index=True)[1]] = False
            repeated |= computed.ravel()[flat]
            if repeated.any():
                i = int(np.argmax(repeated))
                raise fault_at(schedule, number, f"rank {rank[i]} computes q{q[i]}k{k[i]}, heads {group[i]}, a second time")
            computed.ravel()[flat] = True
            np.add.at(step_pairs[number], rank, pairs[heads % len(pairs), q, k] * times[heads])
    missing = np.argwhere((pairs > 0) & ~computed)
    if len(missing):
        heads, q, k = missing[0].tolist()
        named = f"query heads {', '.join(map(str, every.members[heads]))}"
        raise fault_at(schedule, len(schedule.steps) - 1, f"nobody computed q{q}k{k} of {named}")
    return step_pairs


def _tile_pairs(schedule: Schedule, mask: Mask, problem: Problem, every: _HeadSets) -> tuple[Ints, Ints]:
    """Unmasked pairs of every two shards, (1 or sets of heads, shards, shards), and how many times they count for each set."""
    total, lengths = problem.heads.q, np.array([len(each) for each in every.members])
    if isinstance(mask, BandMask):
        pairs = tile_areas(mask, schedule.q.shards, schedule.k.shards)[None]
        found = int(pairs.sum()) * total
    else:
        maps = [tile_areas(mask.bands(i), schedule.q.shards, schedule.k.shards) for i in range(mask.maps)]
        each = total // mask.maps
        pairs = np.array([np.sum([maps[h // each] for h in heads], axis=0) for heads in every.members])
        lengths = np.ones_like(lengths)
        found = int(pairs.sum())
    if found != mask.pairs(total):
        raise ScheduleError(f"the tiles hold {found} pairs, the mask {mask.pairs(total)}")
    return pairs, lengths


def _bytes(schedule: Schedule, transfers: list[Transfer], problem: Problem) -> tuple[Ints, Ints]:
    """Bytes that each rank sends, and those of them that leave its node."""
    per_node = problem.scale.gpus_per_node
    every, outside = (np.zeros(schedule.world_size, dtype=np.int64) for _ in range(2))
    for transfer in transfers:
        source, to, _, _ = transfer.rows.T
        size = transfer.bytes(schedule, problem)
        np.add.at(every, source, size)
        leaves = source // per_node != to // per_node
        np.add.at(outside, source[leaves], size[leaves])
    return every, outside
