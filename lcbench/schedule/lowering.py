"""Which of a schedule's transfers go by collectives. It is found in the rows that move; no strategy is known by its name.

A transfer is a collective if its ranks form sets: each rank sends the same number of bytes to every other rank of its set, and one
of its operands holds the shards of all ranks of the set, its own included. A head exchange is an all-to-all, in both directions.
Keys and values of the same heads for every rank are an all-gather. Their gradients, which are summed where they arrive, are a
reduce-scatter. Everything else goes from point to point: hops of a ring, casts to the ranks that need something.

A head exchange may have uneven parts, where ranks have other numbers of tokens or of heads; some may have no head, or no tokens,
but no rank all of its set's. All-gather and reduce-scatter are for even ones only.

Every rank finds the same collectives, since each looks at the rows of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcbench.masks.band import Ints, distinct
from lcbench.problem import Problem
from lcbench.schedule.adjoint import SIDES, Bools, Traffic, Transfer
from lcbench.schedule.payload import element_bytes, token_bytes
from lcbench.schedule.schedule import Kind, MoveColumn, Schedule, TileColumn

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
        blocks: of each set the bytes from each of its ranks to each other; where these differ, what the rank that sends or
            receives most has with each other on average.
        even: whether each rank of any set sends as much to each other.
    """

    operation: Operation
    sets: tuple[tuple[int, ...], ...]
    blocks: tuple[float, ...]
    even: bool

    def of(self, rank: int) -> tuple[int, ...] | None:
        """The set of a rank, None where it takes no part."""
        return next((members for members in self.sets if rank in members), None)


def collectives(schedule: Schedule, moves: Traffic, problem: Problem, operations: tuple[Operation, ...]) -> list[Collective | None]:
    """The collective of each transfer; None for one that goes from point to point, or whose operation is not among those given."""
    if not operations:
        return [None] * len(moves.transfers)
    if problem not in moves.known:
        bundles = _bundles(schedule)
        moves.known[problem] = [_collective(schedule, transfer, problem, bundles) for transfer in moves.transfers]
    found: list[Collective | None] = moves.known[problem]
    return [each if each is not None and each.operation in operations else None for each in found]


@dataclass(frozen=True)
class _Bundle:
    """Shards with tokens of a bundle that a rank uses, ascending: all of them, and those of other ranks."""

    members: Ints
    others: Ints


Bundles = dict[tuple[Kind, int, int], list[_Bundle]]


def _bundles(schedule: Schedule) -> Bundles:
    """The bundles of several shards that ranks use, by side, rank and head group."""
    found: Bundles = {}
    for kind, column in zip(SIDES, (TileColumn.Q, TileColumn.K), strict=True):
        side, space = schedule.side(kind), (schedule.world_size, len(schedule.heads), len(schedule.side(kind).lengths))
        used: dict[int, None] = {}  # in the order of the steps
        for step in schedule.steps:
            tiles = step.tiles[side.lengths[step.tiles[:, column]] > 1]
            keys = np.ravel_multi_index(tiles[:, [TileColumn.RANK, TileColumn.GROUP, column]].T, space)
            used.update(dict.fromkeys(np.unique(keys).tolist()))
        rows = np.stack(np.unravel_index(np.array([*used], dtype=np.int64), space), axis=1)
        for rank, group, bundle in rows.tolist():
            members = distinct(side.members(bundle))
            members = members[side.sizes[members] > 0]
            found.setdefault((kind, rank, group), []).append(_Bundle(members, members[side.owner[members] != rank]))
    return found


def _collective(schedule: Schedule, transfer: Transfer, problem: Problem, bundles: Bundles) -> Collective | None:
    """The collective that a transfer is; None for one from point to point."""
    source, to, shard, group = transfer.rows.T
    if transfer.payload.combine == "scan":
        return _gathered_states(schedule, transfer, problem)
    gathers = transfer.payload.combine == "replace"
    holder, owner = (to, source) if gathers else (source, to)
    if (schedule.side(transfer.payload.side).owner[shard] != owner).any():
        return None
    pairs, place = np.unique(holder * schedule.world_size + owner, return_inverse=True)
    sizes = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(sizes, place, transfer.bytes(schedule, problem))
    block = int(sizes[0])
    sets = _sets(*np.divmod(pairs, schedule.world_size)) if block and (sizes == block).all() else {}
    held = _held(schedule, transfer, problem, bundles, holder, sets, block) if sets else None
    if held is None:
        return _uneven(schedule, transfer, bundles, holder, pairs[sizes > 0], sizes[sizes > 0])
    same = bool((group == group[0]).all()) and all(len(each) == 1 for each in held.values())
    operation: Operation = "all_to_all"
    if same and gathers:
        operation = "all_gather"
    elif same and transfer.payload.partial_sum:
        if element_bytes(transfer.payload.precision, problem) != element_bytes(transfer.payload.held, problem):
            return None  # on its way it would be summed in the inputs' type
        operation = "reduce_scatter"
    return Collective(operation, tuple(sorted(held)), (float(block),) * len(held), even=True)


def _gathered_states(schedule: Schedule, transfer: Transfer, problem: Problem) -> Collective | None:
    """The all-gather that a transfer of summaries is: every rank of a set has one, which all others of the set get."""
    source, to, shard, group = transfer.rows.T
    sizes, pairs = transfer.bytes(schedule, problem), distinct(to * schedule.world_size + source)
    if (schedule.k.owner[shard] != source).any() or len(pairs) < len(transfer.rows) or (sizes != sizes[0]).any() or not sizes[0]:
        return None
    sets = _sets(*np.divmod(pairs, schedule.world_size))
    one = all(len(distinct(each[source == rank])) == 1 for each in (shard, group) for rank in sets)
    if not sets or not one:
        return None
    members = tuple(sorted(set(sets.values())))
    return Collective("all_gather", members, (float(sizes[0]),) * len(members), even=True)


def _uneven(
    schedule: Schedule, transfer: Transfer, bundles: Bundles, holder: Ints, pairs: Ints, sizes: Ints
) -> Collective | None:  # fmt: skip
    """The head exchange of uneven parts that a transfer is; None for any other.

    Ranks of a set have a head group of their own, if they have one, for which they hold the shards of all of them. ``pairs``:
    (holder, owner) as one number each, of all that have something to send; ``sizes``: bytes of each.
    """
    side, ranks = schedule.side(transfer.payload.side), schedule.world_size
    some = side.sizes[transfer.rows[:, MoveColumn.SHARD]] > 0
    rows, holder = transfer.rows[some], holder[some]
    holders, owners = np.divmod(pairs, ranks)
    group = np.full(ranks, -1)
    group[holder] = rows[:, MoveColumn.GROUP]
    # A ring, a cast: what ends most searches, without a look at bundles.
    if not len(pairs) or (group[holder] != rows[:, MoveColumn.GROUP]).any() or (group[holders] == group[owners]).any():
        return None
    tokens = np.bincount(side.owner, weights=side.sizes, minlength=ranks)
    sets = _exchanging(holders, owners, tokens > 0)
    groups = {each: [number for number in group[list(each)].tolist() if number >= 0] for each in sets.values()}
    if not sets or any(len(set(each)) < len(each) for each in groups.values()):
        return None
    held: dict[tuple[int, ...], set[bytes]] = {}
    order = np.argsort(holder, kind="stable")
    for places in np.split(order, np.nonzero(np.diff(holder[order]))[0] + 1):
        rank = int(holder[places[0]])
        found = _bundle(schedule, transfer, bundles, rank, rows[places])
        if found is None:
            return None
        held.setdefault(sets[rank], set()).add(found[0].tobytes())
    for members_of_set, (whole, *others) in held.items():
        owning = {rank for rank in members_of_set if tokens[rank]}
        if others or len(owning) < 2 or owning != set(side.owner[np.frombuffer(whole, dtype=np.int64)].tolist()):
            return None
    busiest = np.maximum(*(np.bincount(each, weights=sizes, minlength=ranks) for each in (holders, owners)))
    ordered = tuple(sorted(held))
    blocks = tuple(float(busiest[list(each)].max()) / (len(each) - 1) for each in ordered)
    return Collective("all_to_all", ordered, blocks, even=False)


def _exchanging(holders: Ints, owners: Ints, owning: Bools) -> dict[int, tuple[int, ...]]:
    """The set of each rank, from all pairs (holder, owner), sorted: these owners, and all who hold what they own; none if they
    form no sets. ``owning``: whether a rank has tokens, and so is among the owners of what it holds."""
    ranks, starts = np.unique(holders, return_index=True)
    together: dict[tuple[int, ...], set[int]] = {}
    for rank, others in zip(ranks.tolist(), np.split(owners, starts[1:]), strict=True):
        owned = tuple(sorted([rank, *others.tolist()])) if owning[rank] else tuple(others.tolist())
        together.setdefault(owned, set(owned)).add(rank)
    sets = {rank: each for each in (tuple(sorted(members)) for members in together.values()) for rank in each}
    return sets if len(sets) == sum(map(len, together.values())) else {}


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
    found = _bundle(schedule, transfer, bundles, rank, rows)
    if found is None:
        return None
    members, group = found
    side = schedule.side(transfer.payload.side)
    tokens = int(side.sizes[members[side.owner[members] == rank]].sum())
    return members.tobytes() if tokens * token_bytes(transfer.kind, schedule.heads[group], problem) == block else None


def _bundle(schedule: Schedule, transfer: Transfer, bundles: Bundles, rank: int, rows: Ints) -> tuple[Ints, int] | None:
    """The bundle of a rank, its sorted shards that have tokens, which holds what comes to it, or leaves it, and shards of its own;
    and its head group. None if there is none."""
    side = schedule.side(transfer.payload.side)
    shards, groups = distinct(rows[:, MoveColumn.SHARD]), distinct(rows[:, MoveColumn.GROUP])
    if len(groups) > 1 or len(shards) < len(rows):
        return None
    group, shards = int(groups[0]), shards[side.sizes[shards] > 0]
    held = bundles.get((transfer.payload.side, rank, group), ())
    return next(((bundle.members, group) for bundle in held if np.array_equal(bundle.others, shards)), None)


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
