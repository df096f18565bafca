"""Which of a schedule's transfers are collectives, seen from what moves and never from who planned it.

A transfer is one if ranks come in sets: each rank sends as many bytes to every other of its set, and has in one operand the shards
of all of them, its own included. A head exchange is an all-to-all, in both directions. Keys and values of the same heads for
every rank are an all-gather; their gradients on the way back, summed where they arrive, a reduce-scatter. All else goes from
point to point: hops of a ring, casts to those who need something, shards of uneven sizes.

Every rank finds the same, since it looks at all ranks' rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcbench.problem import Problem
from lcbench.schedule.adjoint import Traffic, Transfer, element_bytes
from lcbench.schedule.schedule import Schedule

Lowering = Literal["auto", "p2p"]
Operation = Literal["all_to_all", "all_gather", "reduce_scatter"]
OPERATIONS: dict[str, tuple[Operation, ...]] = {
    "nccl": ("all_to_all", "all_gather", "reduce_scatter"),
    # Its reduce-scatter is an all-reduce per rank, and its all-gather takes longer than messages do (docs/strategies.md).
    "gloo": ("all_to_all",),
}
VALUES = ("q", "kv", "dout", "stats")
SUMS = ("dq", "dkv")


@dataclass(frozen=True)
class Collective:
    """How a transfer is done together.

    Attributes:
        operation: ``all_to_all``, ``all_gather`` or ``reduce_scatter``.
        sets: the ranks of each set, ascending; a rank is in one at most.
        block: bytes from each rank of a set to each other.
    """

    operation: Operation
    sets: tuple[tuple[int, ...], ...]
    block: int

    def of(self, rank: int) -> tuple[int, ...] | None:
        """The set of a rank."""
        return next((members for members in self.sets if rank in members), None)


def collectives(schedule: Schedule, moves: Traffic, problem: Problem, operations: tuple[Operation, ...]) -> list[Collective | None]:
    """How each transfer is done together; None for one that goes from point to point, or whose operation is not asked for."""
    if not operations:
        return [None] * len(moves.transfers)
    bundles = _bundles(schedule)
    found = (_collective(schedule, transfer, problem, bundles) for transfer in moves.transfers)
    return [each if each is not None and each.operation in operations else None for each in found]


Bundles = dict[tuple[str, int, int], list[tuple[int, ...]]]


def _bundles(schedule: Schedule) -> Bundles:
    """The bundles of several shards that ranks use, by side, rank and head group."""
    found: dict[tuple[str, int, int], dict[int, None]] = {}
    several = np.array([len(bundle) > 1 for bundle in schedule.bundles], dtype=bool)
    for side, column in (("q", 2), ("kv", 3)):
        for step in schedule.steps:
            tiles = step.tiles[several[step.tiles[:, column]]][:, [0, 1, column]] if len(step.tiles) else step.tiles[:, :3]
            for rank, group, bundle in np.unique(tiles, axis=0).tolist():
                found.setdefault((side, rank, group), {})[bundle] = None
    return {key: [schedule.bundles[i] for i in numbers] for key, numbers in found.items()}


def _collective(schedule: Schedule, transfer: Transfer, problem: Problem, bundles: Bundles) -> Collective | None:
    source, to, shard, group = transfer.rows.T
    gathers = transfer.kind in VALUES
    holder, owner = (to, source) if gathers else (source, to)
    if (schedule.owner[shard] != owner).any():
        return None
    pairs, place = np.unique(holder * schedule.world_size + owner, return_inverse=True)
    sizes = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(sizes, place, transfer.bytes(schedule, problem))
    block = int(sizes[0])
    if not block or (sizes != block).any():
        return None
    holders, owners = np.divmod(pairs, schedule.world_size)
    ranks, starts = np.unique(holders, return_index=True)
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    sets: dict[int, tuple[int, ...]] = {}
    for rank, others in zip(ranks.tolist(), np.split(owners, starts[1:]), strict=True):
        members = tuple(sorted([rank, *others.tolist()]))
        sets[rank] = known.setdefault(members, members)
    if any(sets.get(other) is not members for rank, members in sets.items() for other in members):
        return None
    held: dict[tuple[int, ...], set[frozenset[int]]] = {}
    order = np.argsort(holder, kind="stable")
    cuts = np.nonzero(np.diff(holder[order]))[0] + 1
    for rows in np.split(order, cuts):
        rank = int(holder[rows[0]])
        bundle = _whole(schedule, transfer, problem, bundles, rank, shard[rows].tolist(), set(group[rows].tolist()), block)
        if bundle is None:
            return None
        held.setdefault(sets[rank], set()).add(bundle)
    same = len(np.unique(group)) == 1 and all(len(each) == 1 for each in held.values())
    operation: Operation = "all_to_all"
    if same and gathers:
        operation = "all_gather"
    elif same and transfer.kind in SUMS:
        if element_bytes("transit", problem) != element_bytes("sum", problem):
            return None  # on its way it would be summed in the inputs' type
        operation = "reduce_scatter"
    return Collective(operation, tuple(sorted(known)), block)


def _whole(
    schedule: Schedule,
    transfer: Transfer,
    problem: Problem,
    bundles: Bundles,
    rank: int,
    shards: list[int],
    groups: set[int],
    block: int,
) -> frozenset[int] | None:
    """The one bundle of a rank that holds what comes to it, or leaves it, and as much of its own; None if there is none."""
    if len(groups) > 1 or len(set(shards)) < len(shards):
        return None
    (group,) = groups
    others = set(shards)
    side = "kv" if transfer.kind.endswith("kv") else "q"
    for bundle in bundles.get((side, rank, group), ()):
        members = frozenset(bundle)
        own = [shard for shard in members if schedule.owner[shard] == rank]
        if members == others.union(own):
            rows = np.array([[rank, rank, shard, group] for shard in own], dtype=np.int64).reshape(-1, 4)
            mine = Transfer(transfer.kind, rows, transfer.begin, transfer.end)
            return members if int(mine.bytes(schedule, problem).sum()) == block else None
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
    """What may go by a collective over a backend of torch.distributed."""
    return OPERATIONS.get(backend, ()) if lowering == "auto" else ()
