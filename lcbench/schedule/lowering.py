"""Which of a schedule's transfers go by collectives. It is found in the rows that move; no strategy is known by its name.

A transfer is a collective if its ranks form sets: each rank sends the same number of bytes to every other rank of its set, and one
of its operands holds the shards of all ranks of the set, its own included. A head exchange is an all-to-all, in both directions.
Keys and values of the same heads for every rank are an all-gather. Their gradients, which are summed where they arrive, are a
reduce-scatter. Everything else goes from point to point: hops of a ring, casts to the ranks that need something, shards of uneven
sizes.

Every rank finds the same collectives, since each looks at the rows of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lcbench.masks.band import Ints, distinct
from lcbench.problem import Problem
from lcbench.schedule.adjoint import SIDES, Traffic, Transfer
from lcbench.schedule.payload import element_bytes
from lcbench.schedule.schedule import Kind, MoveColumn, Schedule, TileColumn
from lcbench.schedule.schedule import rows as table

Lowering = Literal["auto", "p2p"]
Operation = Literal["all_to_all", "all_gather", "reduce_scatter"]
OPERATIONS: dict[str, tuple[Operation, ...]] = {
    "nccl": ("all_to_all", "all_gather", "reduce_scatter"),
    # Its reduce-scatter is an all-reduce per rank, and its all-gather takes longer than messages do (docs/strategies.md).
    "gloo": ("all_to_all",),
}


@dataclass(frozen=True)
class Collective:
    """A transfer as a collective.

    Attributes:
        operation: ``all_to_all``, ``all_gather`` or ``reduce_scatter``.
        sets: the ranks of each set, ascending; a rank is in one at most.
        block: bytes from each rank of a set to each other.
    """

    operation: Operation
    sets: tuple[tuple[int, ...], ...]
    block: int

    def of(self, rank: int) -> tuple[int, ...] | None:
        """The set of a rank, None where it takes no part."""
        return next((members for members in self.sets if rank in members), None)


def collectives(schedule: Schedule, moves: Traffic, problem: Problem, operations: tuple[Operation, ...]) -> list[Collective | None]:
    """The collective of each transfer; None for one that goes from point to point, or whose operation is not among those given."""
    if not operations:
        return [None] * len(moves.transfers)
    bundles = _bundles(schedule)
    found = (_collective(schedule, transfer, problem, bundles) for transfer in moves.transfers)
    return [each if each is not None and each.operation in operations else None for each in found]


Bundles = dict[tuple[Kind, int, int], list[Ints]]


def _bundles(schedule: Schedule) -> Bundles:
    """The bundles of several shards that ranks use, by side, rank and head group."""
    found: dict[tuple[Kind, int, int], dict[int, None]] = {}
    for side, column in zip(SIDES, (TileColumn.Q, TileColumn.K), strict=True):
        several = schedule.side(side).lengths > 1
        for step in schedule.steps:
            tiles = step.tiles[several[step.tiles[:, column]]]
            for rank, group, bundle in np.unique(tiles[:, [TileColumn.RANK, TileColumn.GROUP, column]], axis=0).tolist():
                found.setdefault((side, rank, group), {})[bundle] = None
    return {key: [schedule.side(key[0]).members(i) for i in numbers] for key, numbers in found.items()}


def _collective(schedule: Schedule, transfer: Transfer, problem: Problem, bundles: Bundles) -> Collective | None:
    """The collective that a transfer is; None for one from point to point."""
    source, to, shard, group = transfer.rows.T
    gathers = transfer.payload.combine == "replace"
    holder, owner = (to, source) if gathers else (source, to)
    if (schedule.side(transfer.payload.side).owner[shard] != owner).any():
        return None
    pairs, place = np.unique(holder * schedule.world_size + owner, return_inverse=True)
    sizes = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(sizes, place, transfer.bytes(schedule, problem))
    block = int(sizes[0])
    if not block or (sizes != block).any():
        return None
    sets = _sets(*np.divmod(pairs, schedule.world_size))
    held = _held(schedule, transfer, problem, bundles, holder, sets, block) if sets else None
    if held is None:
        return None
    same = bool((group == group[0]).all()) and all(len(each) == 1 for each in held.values())
    operation: Operation = "all_to_all"
    if same and gathers:
        operation = "all_gather"
    elif same and transfer.payload.partial_sum:
        if element_bytes(transfer.payload.precision, problem) != element_bytes(transfer.payload.held, problem):
            return None  # on its way it would be summed in the inputs' type
        operation = "reduce_scatter"
    return Collective(operation, tuple(sorted(held)), block)


def _sets(holders: Ints, owners: Ints) -> dict[int, tuple[int, ...]]:
    """The set of each rank, from all pairs (rank, another one that it exchanges with), sorted; none if they form no sets."""
    ranks, starts = np.unique(holders, return_index=True)
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    sets: dict[int, tuple[int, ...]] = {}
    for rank, others in zip(ranks.tolist(), np.split(owners, starts[1:]), strict=True):
        members = tuple(sorted([rank, *others.tolist()]))
        sets[rank] = known.setdefault(members, members)
    whole = all(sets.get(other) is members for members in sets.values() for other in members)
    return sets if whole else {}


def _held(
    schedule: Schedule,
    transfer: Transfer,
    problem: Problem,
    bundles: Bundles,
    holder: Ints,
    sets: dict[int, tuple[int, ...]],
    block: int,
) -> dict[tuple[int, ...], set[bytes]] | None:
    """The bundles that the ranks of each set hold, as ``_whole`` names them; None if a rank has none for what comes or leaves."""
    held: dict[tuple[int, ...], set[bytes]] = {}
    order = np.argsort(holder, kind="stable")
    cuts = np.nonzero(np.diff(holder[order]))[0] + 1
    for places in np.split(order, cuts):
        rank = int(holder[places[0]])
        bundle = _whole(schedule, transfer, problem, bundles, rank, transfer.rows[places], block)
        if bundle is None:
            return None
        held.setdefault(sets[rank], set()).add(bundle)
    return held


def _whole(
    schedule: Schedule, transfer: Transfer, problem: Problem, bundles: Bundles, rank: int, rows: Ints, block: int
) -> bytes | None:
    """The one bundle of a rank that holds what comes to it, or leaves it, and as much of its own, named by its sorted shards; None
    if there is none.
    """
    shards, groups = distinct(rows[:, MoveColumn.SHARD]), distinct(rows[:, MoveColumn.GROUP])
    if len(groups) > 1 or len(shards) < len(rows):
        return None
    group = int(groups[0])
    for bundle in bundles.get((transfer.payload.side, rank, group), ()):
        members = distinct(bundle)
        own = members[schedule.side(transfer.payload.side).owner[members] == rank]
        if np.array_equal(members, distinct(np.concatenate([shards, own]))):
            mine = replace(transfer, rows=table(rank, rank, own, group))
            return members.tobytes() if int(mine.bytes(schedule, problem).sum()) == block else None
    return None


def sets_of(moves: Traffic, found: list[Collective | None]) -> list[tuple[str, tuple[int, ...]]]:
    """(channel, ranks) of every set once, in an order that is the same on all ranks."""
    seen = {
        (transfer.channel, members): None
        for transfer, each in zip(moves.transfers, found, strict=True)
        for members in (each.sets if each is not None else ())
    }
    return list(seen)


def operations_of(lowering: Lowering, backend: str) -> tuple[Operation, ...]:
    """The operations that go by collectives over a backend of torch.distributed."""
    return OPERATIONS.get(backend, ()) if lowering == "auto" else ()
