"""One rank's part of a schedule: its operands, messages and buffers, worked out before anything runs. There are no tensors here.

A buffer holds memory from its birth to its death, both on the time line of ``adjoint``. Buffers that do not overlap in time share
a slot. A ring thus runs on two slots for keys and values, whatever P is. Here is forward on rank 0 of four ranks:

    time      0                1                2                3
    slot 0    [shard 3 comes   is used, goes]   [shard 1 comes   is used]
    slot 1                     [shard 2 comes   is used, goes]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np

from lcbench.masks.band import Ints, distinct
from lcbench.problem import Problem
from lcbench.schedule.adjoint import SIDES, Traffic, Transfer
from lcbench.schedule.lowering import Collective, Operation, collectives
from lcbench.schedule.payload import PAYLOADS, Payload, bytes_per_head, element_bytes, token_bytes
from lcbench.schedule.schedule import Kind, MoveColumn, Schedule, TileColumn

ROUND = 4  # sums of one head group that a rank receives in one round; two rounds are under way at once
MOST_STRETCHES = 3  # so many messages of one kind to one rank at the same time, or more, are copied together and sent as one
ALIGNMENT = 256  # bytes; enough for tensors of any type and for a GPU's loads


class Operand(NamedTuple):
    """One side of tiles: ``q``, ``kv``, ``dout``, ``stats``, ``dq`` or ``dkv`` of a bundle of shards for a head group."""

    kind: str
    group: int
    bundle: tuple[int, ...]

    @property
    def payload(self) -> Payload:
        """What it holds."""
        return PAYLOADS[self.kind]


class Piece(NamedTuple):
    """Rows ``begin:end`` of a buffer, or, where ``buffer`` is None, of this rank's own tensor, for the heads of a group."""

    buffer: Operand | None
    group: int
    begin: int
    end: int


class OwnPart(NamedTuple):
    """Rows ``begin:end`` of this rank's own tensor, which are rows ``at:until`` of an operand's buffer."""

    begin: int
    end: int
    at: int
    until: int


@dataclass
class Buffer:
    """Memory that is needed from time ``birth`` to time ``death``, both included.

    Attributes:
        bytes: its size.
        round: the round of its time, if it is needed in this round only.
        slot: the memory that it is given; buffers of other times have the same.
    """

    bytes: int
    birth: int
    death: int
    round: int | None = None
    slot: int = -1

    def lives(self, birth: int, death: int) -> None:
        """Need it at these times too."""
        self.birth, self.death = min(self.birth, birth), max(self.death, death)


@dataclass
class Message:
    """What goes to one rank, or comes from one, as one stretch of memory.

    Attributes:
        kind: a key of ``PAYLOADS``.
        peer: the other rank.
        group: head group.
        begin, end: it leaves when time ``begin`` begins and has arrived when time ``end`` ends.
        pieces: where its rows lie on this rank, in order.
        tokens: its rows.
        round: messages of one time go in rounds, so that sums from many ranks do not need room all at once.
        staging: room for a message that is not one stretch of memory, or that is to be added to something.
        offset: bytes of the staging before it.
    """

    kind: str
    peer: int
    group: int
    begin: int
    end: int
    channel: str
    pieces: list[Piece]
    tokens: int
    round: int = 0
    staging: Buffer | None = None
    offset: int = 0

    @property
    def payload(self) -> Payload:
        """What it holds."""
        return PAYLOADS[self.kind]

    @property
    def inside(self) -> int | None:
        """The only round in which its staging is needed; None if it is under way for longer than one time."""
        return self.round if self.begin == self.end else None


End = tuple[Buffer | Operand | Piece, int]


@dataclass
class Exchange:
    """A collective as one rank of its set sees it: a block for, or from, each rank of the set, in their order.

    Attributes:
        ranks: the set, ascending.
        sent, received: bytes of the block for, or from, each rank of the set; 0 for this rank's own where it is not among them.
        even: whether all of them have one size, on all ranks.
        packed: what is copied into the source before it leaves; nothing where the source is a buffer as it is.
        source, target: staging, an operand's buffer, or a piece of this rank's own tensor, with its bytes.
    """

    operation: Operation
    kind: str
    ranks: tuple[int, ...]
    begin: int
    end: int
    channel: str
    round: int
    sent: tuple[int, ...]
    received: tuple[int, ...]
    even: bool
    packed: list[Message]
    source: End
    target: End

    @property
    def payload(self) -> Payload:
        """What it holds."""
        return PAYLOADS[self.kind]


@dataclass(frozen=True)
class TileCall:
    """A tile of this rank: head group, and the shards of its queries and of its keys."""

    group: int
    q: tuple[int, ...]
    k: tuple[int, ...]

    def operand(self, kind: str) -> Operand:
        """Its operand of a kind."""
        return Operand(kind, self.group, self.q if PAYLOADS[kind].side == "q" else self.k)


@dataclass
class RankStep:
    """What a rank does at one time.

    Attributes:
        filled: operands whose own part is copied into their buffers first.
        zeroed: gradients whose buffers are cleared first.
        sends, receives: messages that leave, or begin to arrive.
        exchanges: collectives that begin.
        exchanged: what these bring into staging.
        tiles: what is computed meanwhile, in order.
        arrivals: messages that have arrived by the end, to be taken from their staging.
        flushes: operands whose own part of results or gradients goes to this rank's own at the end.
        rounds: in how many rounds messages go.
    """

    filled: list[tuple[Operand, list[OwnPart]]] = field(default_factory=list)
    zeroed: list[Operand] = field(default_factory=list)
    sends: list[Message] = field(default_factory=list)
    receives: list[Message] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    exchanged: list[Message] = field(default_factory=list)
    tiles: list[TileCall] = field(default_factory=list)
    arrivals: list[Message] = field(default_factory=list)
    flushes: list[tuple[Operand, list[OwnPart]]] = field(default_factory=list)
    rounds: int = 1

    def kinds_needed(self) -> set[str]:
        """Kinds of what leaves or is filled in."""
        return {m.kind for m in self.sends} | {e.kind for e in self.exchanges} | {operand.kind for operand, _ in self.filled}


class Program:
    """What a rank does, time by time: 0 to N - 1 are forward and, with backward, N to 2N backward.

    Attributes:
        steps: a ``RankStep`` for each time.
        slots: bytes of each piece of memory that buffers share.
        kept_slots: those in which something that came in forward is held for backward.
        finals: operands (group, bundle) of queries that are not this rank's own but whose every key it computes.
        sends_stats: whether LSE and delta of this rank's own queries are needed elsewhere or in a buffer.
        lowered: the collective of each transfer; None for one from point to point.
        begin: by side, this rank's shards in order, and the first row of each in this rank's own tensors.
        tokens: by side, rows of these tensors.

    Args:
        operations: what may go by a collective.
        planes: keys and values of an operand lie apart, (2, T, Hk, D), for a kernel that wants each contiguous; without,
            any stretch of tokens is one stretch of memory, (T, Hk, 2, D).

    Raises:
        ValueError: this rank uses a shard in two bundles, or a bundle of queries some of which it computes alone.
    """

    def __init__(
        self,
        schedule: Schedule,
        moves: Traffic,
        problem: Problem,
        rank: int,
        operations: tuple[Operation, ...] = (),
        *,
        planes: bool = False,
    ) -> None:
        self._schedule, self._traffic, self._problem, self._rank, self._planes = schedule, moves, problem, rank, planes
        self.lowered = collectives(schedule, moves, problem, operations)
        self._bytes_per_head = {kind: bytes_per_head(kind, problem) for kind in {transfer.kind for transfer in moves.transfers}}
        # Operands whose own part a collective brings, with when, and gradients whose own part it takes home.
        self._brought: dict[Operand, list[int]] = defaultdict(list)
        self._taken: set[Operand] = set()
        self.begin: dict[Kind, dict[int, int]] = {}
        self.tokens: dict[Kind, int] = {}
        self._sizes: dict[Kind, list[int]] = {}
        for kind, side in schedule.sides.items():
            own = side.own(rank)
            begins = np.cumsum([0, *side.sizes[own]]).tolist()
            self.begin[kind], self.tokens[kind] = dict(zip(own, begins, strict=False)), begins[-1]
            self._sizes[kind] = side.sizes.tolist()
        self.steps = [RankStep() for _ in range(2 * moves.steps + 1 if problem.backward else moves.steps)]
        # (side, shard, head group): the bundle that this rank uses it in, and its first row there.
        self._home: dict[tuple[Kind, int, int], tuple[tuple[int, ...], int]] = {}
        self._use: dict[tuple[Kind, int, tuple[int, ...]], list[int]] = defaultdict(list)  # steps of each (side, group, bundle)
        # Buffers of an operand: one that is needed in forward and, fetched again, in backward has one for each.
        self._lives: dict[Operand, list[Buffer]] = defaultdict(list)
        self.finals: set[tuple[int, tuple[int, ...]]] = set()
        self._place_tiles()
        self._place_homes()
        self._place_operands()
        self._place_messages()
        self._place_sums()
        self._place_own_parts()
        self.slots: list[int] = []
        self._give_slots()
        self.kept_slots = {self._lives[operand][0].slot for operand in self._kept() if self._lives[operand]}
        self.sends_stats = any("stats" in step.kinds_needed() for step in self.steps)

    # -- operands --------------------------------------------------------------------------------------------------

    def local(self, operand: Operand) -> tuple[int, int] | None:
        """The rows (begin, end) of this rank's own tensor that are the operand as it is, or None where it needs a buffer."""
        side = operand.payload.side
        group = self._schedule.heads[operand.group]
        in_order = isinstance(group.q_heads if side == "q" else group.kv_heads, slice)
        if not in_order or any(shard not in self.begin[side] for shard in operand.bundle):
            return None
        begin = end = self.begin[side][operand.bundle[0]]
        for shard in operand.bundle:
            if self.begin[side][shard] != end:
                return None
            end += self._sizes[side][shard]
        return begin, end

    def buffer(self, operand: Operand, time: int) -> Buffer:
        """The memory of an operand at a time."""
        return next(b for b in self._lives[operand] if b.birth <= time <= b.death)

    def operand_tokens(self, operand: Operand) -> int:
        """Rows of an operand."""
        sizes = self._sizes[operand.payload.side]
        return sum(sizes[shard] for shard in operand.bundle)

    def _place_tiles(self) -> None:
        """The tiles of each time: backward computes those of a step in reverse order."""
        q_bundles, k_bundles = self._schedule.q.bundles, self._schedule.k.bundles
        for number, step in enumerate(self._schedule.steps):
            for _, group, q, k in step.tiles[step.tiles[:, TileColumn.RANK] == self._rank].tolist():
                call = TileCall(group, q_bundles[q], k_bundles[k])
                self.steps[number].tiles.append(call)
                if self._problem.backward:
                    self.steps[self._traffic.backward_time(number)].tiles.insert(0, call)
                self._use["q", group, call.q].append(number)
                self._use["kv", group, call.k].append(number)

    def _place_homes(self) -> None:
        """The one place of each shard in memory, for a side and a head group."""
        for side, group, bundle in self._use:
            offset = 0
            for shard in bundle:
                known = self._home.setdefault((side, shard, group), (bundle, offset))
                if known != (bundle, offset):
                    raise ValueError(f"rank {self._rank} uses shard {shard} in two bundles, {known[0]} and {bundle}")
                offset += self._sizes[side][shard]

    def _place_operands(self) -> None:
        """Buffers of operands that are not this rank's own tensor as it is."""
        for (side, group, bundle), steps in self._use.items():
            if self.local(Operand(side, group, bundle)) is not None:
                continue
            first, last = steps[0], steps[-1]
            self._live(Operand(side, group, bundle), first, last)
            needed = [side, *self._row_kinds(group, bundle)] if side == "q" else [side]
            for kind in needed if self._problem.backward else []:
                self._live(Operand(kind, group, bundle), *map(self._traffic.backward_time, (last, first)))

    def _row_kinds(self, group: int, bundle: tuple[int, ...]) -> list[str]:
        """What backward needs of the queries of a bundle besides themselves; notes those that this rank computes alone."""
        alone = {bool(self._traffic.final[shard, group]) for shard in bundle}
        if len(alone) > 1:
            raise ValueError(f"some queries of bundle {bundle} are computed by one rank alone, others are not")
        if not alone.pop():
            return ["dout", "stats"]
        self.finals.add((group, bundle))
        return ["dout"]

    def _live(self, operand: Operand, birth: int, death: int) -> None:
        """Need a buffer for an operand from ``birth`` to ``death``: its buffer of that pass, or a new one."""
        middle = self._traffic.steps
        for buffer in self._lives[operand]:
            if (buffer.birth < middle) == (birth < middle):
                buffer.lives(birth, death)
                return
        group = self._schedule.heads[operand.group]
        per_token = token_bytes(operand.kind, group, self._problem, operand.payload.held)
        size = self.operand_tokens(operand) * per_token
        self._lives[operand].append(Buffer(size, birth, death))

    # -- messages --------------------------------------------------------------------------------------------------

    def _place_messages(self) -> None:
        """The messages and collectives of each time, and the buffers that they need."""
        for transfer, together in zip(self._traffic.transfers, self.lowered, strict=True):
            if together is None:
                self._place_transfer(transfer, outgoing=True)
                self._place_transfer(transfer, outgoing=False)
            elif members := together.of(self._rank):
                self._place_exchange(transfer, together, members)
        for operand in self._kept():  # one buffer from the first use in forward to the last in backward
            lives = self._lives[operand]
            if lives:
                lives[:] = [Buffer(lives[0].bytes, min(b.birth for b in lives), max(b.death for b in lives))]

    def _kept(self) -> set[Operand]:
        """Operands of which something that comes in forward is held for backward."""
        kept: set[Operand] = set()
        for uses, kind in zip((self._traffic.queries, self._traffic.keys), SIDES, strict=True):
            mine = uses.rows[(uses.rows[:, MoveColumn.TARGET] == self._rank) & uses.kept]
            kept |= {self._operand(kind, shard, group) for _, _, shard, group in mine.tolist()}
        return kept

    def _place_transfer(self, transfer: Transfer, *, outgoing: bool) -> None:
        """The messages of a transfer that this rank sends, or receives, from point to point."""
        rows, peer = self._own_rows(transfer, outgoing=outgoing)
        if not len(rows):
            return
        rows = rows[np.lexsort((rows[:, MoveColumn.SHARD], rows[:, MoveColumn.GROUP], rows[:, peer]))]
        turns = dict(zip(rows[:, peer].tolist(), rounds_of(transfer, self._schedule, rows).tolist(), strict=True))
        for message in self._messages(transfer, rows, peer):
            step = self.steps[message.begin]
            message.round = turns[message.peer]
            step.rounds = max(step.rounds, message.round + 1)
            self._live_with(message, outgoing)
            (step.sends if outgoing else step.receives).append(message)
            if not outgoing:
                self.steps[message.end].arrivals.append(message)

    def _own_rows(self, transfer: Transfer, *, outgoing: bool) -> tuple[Ints, int]:
        """The rows that this rank sends, or receives, and the column of the other rank."""
        mine, peer = (MoveColumn.SOURCE, MoveColumn.TARGET) if outgoing else (MoveColumn.TARGET, MoveColumn.SOURCE)
        return transfer.rows[transfer.rows[:, mine] == self._rank], peer

    def _place_exchange(self, transfer: Transfer, together: Collective, ranks: tuple[int, ...]) -> None:
        """A collective. Its messages lie in its source and its target, block behind block; each may be an operand's buffer."""
        sends, receives = ({m.peer: m for m in self._blocks(transfer, outgoing)} for outgoing in (True, False))
        values = transfer.payload.combine == "replace"
        any_message = next(iter((*sends.values(), *receives.values())))
        held = None
        if mine := receives if values else sends:  # nothing: this rank has no head
            held = self._held_operand(transfer, ranks, next(iter(mine.values())).group)
            self._add_own_blocks(transfer, held, sends, receives)
        for rank, blocks in product(ranks, (sends, receives)):  # a rank without tokens has nothing that others hold
            blocks.setdefault(rank, replace(any_message, peer=rank, pieces=[], tokens=0))
        for rank in ranks:
            self._live_pieces(sends[rank], outgoing=True)
            self._live_pieces(receives[rank], outgoing=False)
        fits = held is not None and self._by_rank(held, ranks) and self._lies_as_sent(transfer)
        direct = fits and transfer.payload.plane is None
        # A rank's own gradients are added in their turn, whether keys and values travel together or apart.
        included = direct or (fits and not values) or together.operation != "all_to_all"
        # Sums of many ranks that are copied before they leave go in rounds, part by part of every block.
        scatter, tokens = together.operation == "reduce_scatter", sends[self._rank].tokens
        rounds = min(tokens, -(-len(ranks) // ROUND)) if scatter and not direct and transfer.begin == transfer.end else 1
        cuts = [tokens * turn // rounds for turn in range(rounds + 1)]
        self.steps[transfer.begin].rounds = max(self.steps[transfer.begin].rounds, rounds)
        for turn, (first, last) in enumerate(pairwise(cuts)):
            out, into = sends, receives
            if rounds > 1:
                out, into = ({rank: _part(m, first, last, turn) for rank, m in each.items()} for each in (sends, receives))
            self._place_round(transfer, together, ranks, out, into, held if direct else None, included, turn)
        if held is not None and direct and values:
            self._brought[held].append(transfer.begin)
        elif held is not None and included and not values:
            self._taken.add(held)

    def _place_round(
        self,
        transfer: Transfer,
        together: Collective,
        ranks: tuple[int, ...],
        out: dict[int, Message],
        into: dict[int, Message],
        direct: Operand | None,
        included: bool,
        turn: int,
    ) -> None:
        """One round of a collective, a block for, and from, each rank. ``direct``: the operand whose buffer is its end as it is;
        ``included``: whether this rank's own block is in it."""
        operation = together.operation
        values, gather, scatter = transfer.payload.combine == "replace", operation == "all_gather", operation == "reduce_scatter"
        members = [rank for rank in ranks if included or rank != self._rank]
        sent, received = (tuple(self._bytes(each[r]) if r in members else 0 for r in ranks) for each in (out, into))
        packed = [m for m in ([out[self._rank]] if gather else [out[rank] for rank in members]) if m.tokens]
        source: End
        target: End
        if gather and self._in_one_piece(out[self._rank]):
            source, packed = (out[self._rank].pieces[0], self._bytes(out[self._rank])), []
        elif direct is not None and not values:
            source, packed = (direct, sum(sent)), []
        else:
            source = self._staged(packed, transfer, turn)
        if direct is not None and values:
            target = direct, sum(received)
        else:
            target = self._staged([into[self._rank]] if scatter else [into[rank] for rank in members], transfer, turn)
        arriving = [self._rank] if scatter else [rank for rank in members if rank != self._rank or not values]
        landed = [into[rank] for rank in arriving if into[rank].staging is not None]
        begins, ends = self.steps[transfer.begin], self.steps[transfer.end]
        begins.exchanged += landed
        ends.arrivals += landed
        times = transfer.begin, transfer.end
        blocks = sent, received
        begins.exchanges.append(
            Exchange(
                operation, transfer.kind, ranks, *times, transfer.channel, turn, *blocks, together.even, packed, source, target
            )
        )

    def _staged(self, messages: list[Message], transfer: Transfer, turn: int) -> tuple[Buffer, int]:
        """Room for the messages of a round, one behind the other; and its bytes."""
        sizes = [self._bytes(message) for message in messages]
        memory = Buffer(sum(sizes), transfer.begin, transfer.end, turn if transfer.begin == transfer.end else None)
        for message, size, end in zip(messages, sizes, np.cumsum(sizes).tolist(), strict=True):
            if size:
                message.staging, message.offset = memory, end - size
        return memory, sum(sizes)

    def _bytes(self, message: Message) -> int:
        """Of a message on its way."""
        heads = self._schedule.heads[message.group].count(message.payload.side)
        return message.tokens * heads * self._bytes_per_head[message.kind]

    def _add_own_blocks(
        self, transfer: Transfer, held: Operand, sends: dict[int, Message], receives: dict[int, Message]
    ) -> None:  # fmt: skip
        """This rank's own part as a message from itself to itself: between its own tensor and the buffer of the operand."""
        sizes = self._sizes[transfer.payload.side]
        own = [s for s in held.bundle if s in self.begin[transfer.payload.side] and sizes[s]]
        tokens = sum(sizes[s] for s in own)
        ends = [self._pieces(transfer.kind, held.group, own), self._held_pieces(held, own)]
        if transfer.payload.combine != "replace":
            ends.reverse()
        for blocks, pieces in zip((sends, receives), ends, strict=True):
            blocks[self._rank] = Message(
                transfer.kind, self._rank, held.group, transfer.begin, transfer.end, transfer.channel, pieces, tokens
            )

    def _lies_as_sent(self, transfer: Transfer) -> bool:
        """Whether the buffer of an operand of the shards of all ranks, in their order, can be an end of a collective as it is."""
        if transfer.payload.combine == "replace":
            return not (self._planes and transfer.kind == "kv")
        return transfer.payload.combine == "add" and self._travels_as_held(transfer.payload)

    def _blocks(self, transfer: Transfer, outgoing: bool) -> Iterable[Message]:
        """One message for each other rank of a set, or from it, of all its shards in order."""
        rows, peer = self._own_rows(transfer, outgoing=outgoing)
        rows, sizes = rows[np.lexsort((rows[:, MoveColumn.SHARD], rows[:, peer]))], self._sizes[transfer.payload.side]
        for part in np.split(rows, np.nonzero(np.diff(rows[:, peer]))[0] + 1) if len(rows) else ():
            shards = [s for s in part[:, MoveColumn.SHARD].tolist() if sizes[s]]
            yield self._message(transfer, int(part[0, peer]), int(part[0, MoveColumn.GROUP]), shards)

    def _message(self, transfer: Transfer, peer: int, group: int, shards: list[int]) -> Message:
        """A message of some shards to a rank, or from it."""
        sizes = self._sizes[transfer.payload.side]
        tokens, pieces = sum(sizes[s] for s in shards), self._pieces(transfer.kind, group, shards)
        return Message(transfer.kind, peer, group, transfer.begin, transfer.end, transfer.channel, pieces, tokens)

    def _held_operand(self, transfer: Transfer, ranks: tuple[int, ...], group: int) -> Operand:
        """The operand of this rank that holds the shards of a set."""
        rows, other = self._own_rows(transfer, outgoing=transfer.payload.combine != "replace")
        sizes = self._sizes[transfer.payload.side]
        row = next(row for row in rows.tolist() if row[other] in ranks and sizes[row[MoveColumn.SHARD]])
        bundle, _ = self._home[transfer.payload.side, row[MoveColumn.SHARD], group]
        return Operand(transfer.payload.operand, group, bundle)

    def _held_pieces(self, held: Operand, shards: list[int]) -> list[Piece]:
        """Where shards lie in the buffer of an operand that holds them, this rank's own too."""
        pieces, offset, sizes = [], 0, self._sizes[held.payload.side]
        for shard in held.bundle:
            if shard in shards:
                pieces.append(Piece(held, held.group, offset, offset + sizes[shard]))
            offset += sizes[shard]
        return pieces

    def _by_rank(self, held: Operand, ranks: tuple[int, ...]) -> bool:
        """Whether the bundle of an operand is every rank's shards in order, rank behind rank."""
        side = self._schedule.side(held.payload.side)
        shards = [s for s in held.bundle if side.sizes[s]]
        owners = [int(side.owner[s]) for s in shards]
        return shards == [s for _, s in sorted(zip(owners, shards, strict=True))] and set(owners) <= set(ranks)

    def _messages(self, transfer: Transfer, rows: Ints, peer: int) -> Iterable[Message]:
        """Messages of sorted rows: per rank in column ``peer`` and head group, one for each stretch of shards."""
        sizes = self._sizes[transfer.payload.side]
        breaks_at = np.diff(rows[:, peer]) | np.diff(rows[:, MoveColumn.GROUP])
        for part in np.split(rows, np.nonzero(breaks_at)[0] + 1):
            shards = [s for s in part[:, MoveColumn.SHARD].tolist() if sizes[s]]
            # Shards of consecutive numbers mostly lie behind one another on both sides, so a message of them needs no copy.
            breaks = [i for i in range(1, len(shards)) if shards[i] != shards[i - 1] + 1]
            if len(breaks) >= MOST_STRETCHES:
                breaks = []
            for a, b in pairwise([0, *breaks, len(shards)] if shards else []):
                yield self._message(transfer, int(part[0, peer]), int(part[0, MoveColumn.GROUP]), shards[a:b])

    def _operand(self, kind: str, shard: int, group: int) -> Operand:
        """The operand of this rank that a kind of message about an item is about; one that is only passed on is one by itself."""
        payload = PAYLOADS[kind]
        bundle, _ = self._home.get((payload.side, shard, group), ((shard,), 0))
        return Operand(payload.operand, group, bundle)

    def _pieces(self, kind: str, group: int, shards: list[int]) -> list[Piece]:
        """Where the rows of a message lie; stretches that continue one another are one piece."""
        found: list[Piece] = []
        side = PAYLOADS[kind].side
        begins = self.begin[side]
        for shard in shards:
            size = self._sizes[side][shard]
            if shard in begins:
                piece = Piece(None, group, begins[shard], begins[shard] + size)
            else:
                _, offset = self._home.get((side, shard, group), ((shard,), 0))
                piece = Piece(self._operand(kind, shard, group), group, offset, offset + size)
            if found and found[-1].buffer == piece.buffer and found[-1].end == piece.begin:
                piece = Piece(piece.buffer, group, found.pop().begin, piece.end)
            found.append(piece)
        return found

    def _live_with(self, message: Message, outgoing: bool) -> None:
        """The buffers that a message needs, and its staging unless it leaves from, or arrives in, one stretch of memory."""
        self._live_pieces(message, outgoing)
        payload = message.payload
        as_it_is = payload.combine == "replace" or (outgoing and payload.partial_sum and self._travels_as_held(payload))
        if not (as_it_is and self._in_one_piece(message)):
            message.staging = Buffer(self._bytes(message), message.begin, message.end, message.inside)

    def _live_pieces(self, message: Message, outgoing: bool) -> None:
        """The buffers that a message leaves or enters are needed as long as it is under way."""
        for piece in message.pieces:
            if piece.buffer is None:
                continue
            if message.payload.combine == "replace":
                self._live(piece.buffer, message.begin, message.end)
            elif message.payload.combine == "add":  # from what arrives first until the sum has left
                self._live(piece.buffer, message.begin if outgoing else message.end, message.end)

    def _travels_as_held(self, payload: Payload) -> bool:
        """Whether it travels in the type in which buffers hold it."""
        return element_bytes(payload.precision, self._problem) == element_bytes(payload.held, self._problem)

    def _in_one_piece(self, message: Message) -> bool:
        """Whether the rows of a message are one stretch of memory."""
        (piece, *others) = message.pieces
        if others or message.payload.plane is not None:
            return False
        if self._planes and message.kind == "kv":  # keys and values lie apart, so only all of them are one stretch
            tokens = self.tokens["kv"] if piece.buffer is None else self.operand_tokens(piece.buffer)
            if (piece.begin, piece.end) != (0, tokens):
                return False
        if piece.buffer is not None:
            return True
        heads, group = self._problem.heads, self._schedule.heads[message.group]
        whole = len(group) == heads.q if message.payload.side == "q" else group.kv == tuple(range(heads.kv))
        return whole and message.kind != "stats"

    # -- sums, own parts, memory -----------------------------------------------------------------------------------

    def _place_sums(self) -> None:
        """Buffers for gradients of operands that are not this rank's own, from the last use in forward to the first."""
        if not self._problem.backward:
            return
        for (side, group, bundle), steps in self._use.items():
            if self.local(Operand(side, group, bundle)) is None:
                gradient = Operand(PAYLOADS[side].gradient, group, bundle)
                self._live(gradient, *map(self._traffic.backward_time, (steps[-1], steps[0])))
        for operand, lives in self._lives.items():
            if operand.payload.combine == "add":
                (life,) = lives
                self.steps[life.birth].zeroed.append(operand)

    def _place_own_parts(self) -> None:
        """In a bundle of own and other shards the own part is copied in at first; its results and gradients leave at last."""
        for operand, lives in list(self._lives.items()):
            parts = self._own_parts(operand)
            if not parts:
                continue
            if operand.payload.combine == "add":
                if operand not in self._taken:
                    first, _ = self._used(operand)
                    self.steps[self._traffic.backward_time(first)].flushes.append((operand, parts))
                continue
            for life in lives:
                if not any(life.birth <= time <= life.death for time in self._brought.get(operand, ())):
                    self.steps[life.birth].filled.append((operand, parts))
            if operand.kind == "q":
                _, last = self._used(operand)
                self.steps[last].flushes.append((operand, parts))

    def _used(self, operand: Operand) -> tuple[int, int]:
        """The first and the last step that use an operand, or that whose gradient it is."""
        steps = self._use[operand.payload.side, operand.group, operand.bundle]
        return steps[0], steps[-1]

    def _own_parts(self, operand: Operand) -> list[OwnPart]:
        """The parts of an operand that are this rank's own."""
        parts, offset, side = [], 0, operand.payload.side
        begins = self.begin[side]
        for shard in operand.bundle:
            size = self._sizes[side][shard]
            if shard in begins and size:
                parts.append(OwnPart(begins[shard], begins[shard] + size, offset, offset + size))
            offset += size
        return parts

    def _buffers(self) -> list[Buffer]:
        """Every buffer: of operands, of messages, and of collectives."""
        staged = [m.staging for step in self.steps for m in (*step.sends, *step.receives) if m.staging]
        ends = [end for step in self.steps for exchange in step.exchanges for end, _ in (exchange.source, exchange.target)]
        staged += [end for end in ends if isinstance(end, Buffer)]
        return [buffer for lives in self._lives.values() for buffer in lives] + staged

    def _give_slots(self) -> None:
        """In the order of birth, each buffer gets the free slot that fits it best; a slot grows to its largest buffer."""
        ticks = max(step.rounds for step in self.steps)
        free_from: list[int] = []

        def begins(buffer: Buffer) -> int:  # a round leaves while the one before it is waited for
            return buffer.birth * ticks + max((buffer.round or 0) - 1, 0)

        for buffer in sorted(self._buffers(), key=lambda b: (begins(b), -b.bytes)):
            birth = begins(buffer)
            buffer.bytes = -(-buffer.bytes // ALIGNMENT) * ALIGNMENT
            free = [i for i, time in enumerate(free_from) if time <= birth]
            if not free:
                free = [len(self.slots)]
                self.slots.append(0)
                free_from.append(0)
            buffer.slot = min(free, key=lambda i: (abs(self.slots[i] - buffer.bytes), i))
            self.slots[buffer.slot] = max(self.slots[buffer.slot], buffer.bytes)
            until = (buffer.death + 1) * ticks if buffer.round is None else buffer.birth * ticks + buffer.round + 1
            free_from[buffer.slot] = until

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(self.slots)

    @property
    def silent(self) -> bool:
        """Whether this rank neither sends nor receives anything."""
        return not any(step.sends or step.receives or step.exchanges for step in self.steps)

    @property
    def all_final(self) -> bool:
        """Whether nothing is ever merged in this rank's own results, each of which one rank computes at once; what is merged by
        tiles of all of them takes no part."""
        often = ((group, bundle) for (side, group, bundle), steps in self._use.items() if side == "q" and len(steps) > 1)
        some = ((group, bundle) for group, bundle in often if len(self._schedule.heads[group]) < self._problem.heads.q)
        if any(self.local(Operand("q", *each)) is not None for each in some):
            return False
        return bool((self._traffic.queries.computing[list(self.begin["q"])] <= 1).all())


def rounds_of(transfer: Transfer, schedule: Schedule, rows: Ints) -> Ints:
    """The round of each of some rows of a transfer, (n,), the same at both ends.

    Sums go by how far their ranks are apart, the distances that there are numbered one after the other: a ring has one and needs
    no second round, which would wait for the tiles.
    """
    if transfer.begin != transfer.end or transfer.payload.combine != "add":
        return np.zeros(len(rows), dtype=np.int64)
    ranks = schedule.world_size
    every, own = ((each[:, MoveColumn.TARGET] - each[:, MoveColumn.SOURCE]) % ranks for each in (transfer.rows, rows))
    found: Ints = np.searchsorted(distinct(every), own) // (ROUND * len(schedule.heads))
    return found


def _part(message: Message, first: int, last: int, turn: int) -> Message:
    """Some tokens of a message, in a round of its own."""
    pieces, passed = [], 0
    for piece in message.pieces:
        size = piece.end - piece.begin
        begin, end = max(first - passed, 0), min(last - passed, size)
        if begin < end:
            pieces.append(piece._replace(begin=piece.begin + begin, end=piece.begin + end))
        passed += size
    return replace(message, pieces=pieces, tokens=last - first, round=turn)
