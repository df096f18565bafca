"""One rank's part of a schedule: its operands, messages and buffers, worked out before anything runs. No tensors here.

Buffers are given memory by how long they live: one whose last use is over leaves its slot to the next. A ring thus runs on two
buffers for keys and values, however many ranks it has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lcbench.masks.band import Ints
from lcbench.problem import Problem
from lcbench.schedule.adjoint import CARGO, Traffic, Transfer, element_bytes, held_precision, token_bytes
from lcbench.schedule.lowering import VALUES, Collective, Operation, collectives
from lcbench.schedule.schedule import Schedule

ROUND = 4  # sums of one head group that a rank receives in one round; two rounds are under way at once
MOST_STRETCHES = 3  # as many messages of one kind to one rank at once, or more, are copied together and sent as one
ALIGNMENT = 256  # bytes; what tensors of any type and a GPU's loads want


class Operand(NamedTuple):
    """One side of tiles: what of (``q``, ``kv``, ``dout``, ``stats``, ``dq``, ``dkv``), for which heads, which shards in a row."""

    kind: str
    group: int
    bundle: tuple[int, ...]


class Piece(NamedTuple):
    """Rows ``begin:end`` of a buffer, or, where ``buffer`` is None, of this rank's own tensor, for the heads of a group."""

    buffer: Operand | None
    group: int
    begin: int
    end: int


@dataclass
class Buffer:
    """Memory with a life on the line of time, ends included; ``slot`` is shared with others that live at other times."""

    bytes: int
    birth: int
    death: int
    round: int | None = None  # lives in one round of a moment only
    slot: int = -1

    def lives(self, birth: int, death: int) -> None:
        self.birth, self.death = min(self.birth, birth), max(self.death, death)


@dataclass
class Message:
    """What goes to, or comes from, one rank at once.

    Attributes:
        round: messages of one moment go in rounds, so that sums from many ranks do not all need room at the same time.
        staging: room for it where it is not one stretch of memory, or is to be added to something.
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


@dataclass
class Exchange:
    """A collective as one rank of its set sees it: a block for, or from, each rank of the set, in their order.

    Attributes:
        ranks: the set, ascending.
        block: bytes.
        own: whether this rank's own block is among them.
        packed: what is copied into the source before it leaves; nothing where the source is a buffer as it is.
        source, target: staging, an operand's buffer, or a piece of this rank's own tensor, with bytes.
    """

    operation: Operation
    kind: str
    ranks: tuple[int, ...]
    begin: int
    end: int
    channel: str
    round: int
    block: int
    own: bool
    packed: list[Message]
    source: tuple[Buffer | Operand | Piece, int]
    target: tuple[Buffer | Operand, int]


@dataclass(frozen=True)
class TileCall:
    """A tile of this rank, with its place in memory: own tensors where the operand says None."""

    group: int
    q: tuple[int, ...]
    k: tuple[int, ...]


@dataclass
class RankStep:
    """What happens at one time: buffers begin, messages leave and arrive, tiles are computed, sums go to the rank's own."""

    filled: list[tuple[Operand, list[tuple[int, int, int, int]]]] = field(default_factory=list)  # (own begin, end, begin, end)
    zeroed: list[Operand] = field(default_factory=list)
    sends: list[Message] = field(default_factory=list)
    receives: list[Message] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    exchanged: list[Message] = field(default_factory=list)  # what the exchanges bring into staging
    tiles: list[TileCall] = field(default_factory=list)
    arrivals: list[Message] = field(default_factory=list)
    flushes: list[tuple[Operand, list[tuple[int, int, int, int]]]] = field(default_factory=list)
    rounds: int = 1


class Program:
    """A rank's moments, from 0 to N - 1 forward and, with backward, from N to 2N.

    Attributes:
        slots: bytes of each piece of memory that buffers share.
        buffer_bytes: their sum.
        finals: operands (group, bundle) of queries that are not this rank's own but whose every key it computes.
        sends_stats: whether LSE and delta of this rank's own queries are wanted elsewhere or in a buffer.
        lowered: how each transfer is done together; None from point to point.

    Args:
        operations: what may go by a collective.
        planes: keys and values of an operand lie apart, (2, T, Hk, D), for a kernel that wants each contiguous; without,
            any stretch of tokens is one stretch of memory, (T, Hk, 2, D).
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
        # Operands whose own part a collective brings, with when, and gradients whose own part it takes home.
        self._brought: dict[Operand, list[int]] = defaultdict(list)
        self._taken: set[Operand] = set()
        self.own = schedule.own(rank)
        begins = np.cumsum([0, *(schedule.sizes[s] for s in self.own)])
        self.begin = {shard: int(a) for shard, a in zip(self.own, begins, strict=False)}
        self.tokens = int(begins[-1])
        self._sizes: list[int] = schedule.sizes.tolist()
        self.moments = [RankStep() for _ in range(2 * moves.steps + 1 if problem.backward else moves.steps)]
        self._home: dict[tuple[str, int, int], tuple[tuple[int, ...], int]] = {}
        self._use: dict[tuple[str, int, tuple[int, ...]], list[int]] = defaultdict(list)
        # Buffers by operand; one that lives in forward and, fetched again, in backward, has two lives.
        self._lives: dict[Operand, list[Buffer]] = defaultdict(list)
        self.finals: set[tuple[int, tuple[int, ...]]] = set()
        self._place_tiles()
        self._place_messages()
        self._place_sums()
        self._place_fills()
        self.slots: list[int] = []
        self._give_slots()
        self.sends_stats = any(
            "stats" in {m.kind for m in moment.sends} | {e.kind for e in moment.exchanges} | {o.kind for o, _ in moment.filled}
            for moment in self.moments
        )

    # -- operands --------------------------------------------------------------------------------------------------

    def local(self, operand: Operand) -> tuple[int, int] | None:
        """Rows of this rank's own tensor that are the operand as it is, or None where it needs a buffer."""
        in_order = CARGO[operand.kind].side == "q" or isinstance(self._schedule.heads[operand.group].kv_heads, slice)
        if not in_order or any(shard not in self.begin for shard in operand.bundle):
            return None
        begin = end = self.begin[operand.bundle[0]]
        for shard in operand.bundle:
            if self.begin[shard] != end:
                return None
            end += self._sizes[shard]
        return begin, end

    def buffer(self, operand: Operand, time: int) -> Buffer:
        """The memory of an operand at a time."""
        return next(b for b in self._lives[operand] if b.birth <= time <= b.death)

    def operand_tokens(self, operand: Operand) -> int:
        return sum(self._sizes[shard] for shard in operand.bundle)

    def _place_tiles(self) -> None:
        bundles = self._schedule.bundles
        for number, step in enumerate(self._schedule.steps):
            for _, group, q, k in step.tiles[step.tiles[:, 0] == self._rank].tolist():
                call = TileCall(group, bundles[q], bundles[k])
                self.moments[number].tiles.append(call)
                if self._problem.backward:
                    self.moments[self._traffic.backward_time(number)].tiles.insert(0, call)
                self._use["q", group, call.q].append(number)
                self._use["kv", group, call.k].append(number)
        for kind, group, bundle in self._use:
            offset = 0
            for shard in bundle:
                known = self._home.setdefault((kind, shard, group), (bundle, offset))
                if known != (bundle, offset):
                    raise ValueError(f"rank {self._rank} uses shard {shard} in two bundles, {known[0]} and {bundle}")
                offset += self._sizes[shard]
        for (kind, group, bundle), steps in self._use.items():
            if self.local(Operand(kind, group, bundle)) is not None:
                continue
            first, last = steps[0], steps[-1]
            self._live(Operand(kind, group, bundle), first, last)
            fetched = [kind]
            if kind == "q":
                alone = {bool(self._traffic.final[shard, group]) for shard in bundle}
                if len(alone) > 1:
                    raise ValueError(f"some queries of bundle {bundle} are computed by one rank alone, others are not")
                if alone.pop():
                    self.finals.add((group, bundle))
                    fetched.append("dout")
                else:
                    fetched += ["dout", "stats"]
            for name in fetched if self._problem.backward else []:
                self._live(Operand(name, group, bundle), *map(self._traffic.backward_time, (last, first)))

    def _live(self, operand: Operand, birth: int, death: int) -> None:
        """Let an operand's buffer live at these times too: in the life of that pass, or in a new one."""
        middle = self._traffic.steps
        for buffer in self._lives[operand]:
            if (buffer.birth < middle) == (birth < middle):
                buffer.lives(birth, death)
                return
        group = self._schedule.heads[operand.group]
        per_token = token_bytes(operand.kind, group, self._problem, held_precision(operand.kind))
        size = self.operand_tokens(operand) * per_token
        self._lives[operand].append(Buffer(size, birth, death))

    # -- messages --------------------------------------------------------------------------------------------------

    def _place_messages(self) -> None:
        kept: set[Operand] = set()
        for uses, kind in ((self._traffic.queries, "q"), (self._traffic.keys, "kv")):
            mine = uses.rows[(uses.rows[:, 1] == self._rank) & uses.kept]
            kept |= {self._operand(kind, shard, group) for shard, group in mine[:, 2:].tolist()}
        for transfer, together in zip(self._traffic.transfers, self.lowered, strict=True):
            if together is not None:
                if members := together.of(self._rank):
                    self._place_exchange(transfer, together, members)
                continue
            for rows, peer_column, outgoing in (
                (transfer.rows[transfer.rows[:, 0] == self._rank], 1, True),
                (transfer.rows[transfer.rows[:, 1] == self._rank], 0, False),
            ):
                if not len(rows):
                    continue
                rows = rows[np.lexsort((rows[:, 2], rows[:, 3], rows[:, peer_column]))]
                for message in self._messages(rows, peer_column, transfer.kind, transfer.begin, transfer.end, transfer.channel):
                    moment = self.moments[message.begin]
                    if message.begin == message.end and message.kind.endswith(("dq", "dkv")):
                        distance = message.peer - self._rank if outgoing else self._rank - message.peer
                        ranks, heads = self._schedule.world_size, len(self._schedule.heads)
                        message.round = (distance % ranks - 1) // (ROUND * heads)
                        moment.rounds = max(moment.rounds, message.round + 1)
                    self._live_with(message, outgoing)
                    (moment.sends if outgoing else moment.receives).append(message)
                    if not outgoing:
                        self.moments[message.end].arrivals.append(message)
        for operand in kept:  # one life from the first use in forward to the last in backward
            lives = self._lives[operand]
            if lives:
                lives[:] = [Buffer(lives[0].bytes, min(b.birth for b in lives), max(b.death for b in lives))]

    def _place_exchange(self, transfer: Transfer, together: Collective, ranks: tuple[int, ...]) -> None:
        """Messages of a collective lie in its source and target, block behind block; both may be the buffer of its operand."""
        kind, begin, end = transfer.kind, transfer.begin, transfer.end
        name, values = kind.removeprefix("final_"), kind in VALUES
        sends, receives = ({m.peer: m for m in self._blocks(transfer, outgoing)} for outgoing in (True, False))
        group = next(iter((receives if values else sends).values())).group
        held = Operand("q" if name in ("out", "lse", "final") else name, group, self._bundle(transfer, ranks, group))
        own = [s for s in held.bundle if s in self.begin and self._sizes[s]]
        tokens = sum(self._sizes[s] for s in own)
        mine = self._pieces(kind, group, own), self._held_pieces(held, own)
        (from_pieces, to_pieces) = mine if values else mine[::-1]
        sends[self._rank] = Message(kind, self._rank, group, begin, end, transfer.channel, from_pieces, tokens)
        receives[self._rank] = Message(kind, self._rank, group, begin, end, transfer.channel, to_pieces, tokens)

        direct = self._by_rank(held.bundle, ranks) and (
            not (self._planes and name == "kv") if values else name in ("dq", "dkv") and self._travels_as_held(kind)
        )
        gather, scatter = together.operation == "all_gather", together.operation == "reduce_scatter"
        included = direct or gather or scatter
        members = [rank for rank in ranks if included or rank != self._rank]
        for rank in ranks:
            self._live_pieces(sends[rank], outgoing=True)
            self._live_pieces(receives[rank], outgoing=False)
        # Sums of many ranks that are copied before they leave go in rounds, part by part of every block.
        rounds = min(tokens, -(-len(ranks) // ROUND)) if scatter and not direct and begin == end else 1
        cuts = [tokens * turn // rounds for turn in range(rounds + 1)]
        self.moments[begin].rounds = max(self.moments[begin].rounds, rounds)
        for turn, (first, last) in enumerate(pairwise(cuts)):
            out, into = ({rank: _part(m, first, last, turn) for rank, m in each.items()} for each in (sends, receives))
            block = together.block * (last - first) // tokens
            inside = turn if begin == end else None
            source: tuple[Buffer | Operand | Piece, int]
            target: tuple[Buffer | Operand, int]
            packed = [out[self._rank]] if gather else [out[rank] for rank in members]
            if gather and self._in_one_piece(out[self._rank]):
                source, packed = (out[self._rank].pieces[0], block), []
            elif direct and not values:
                source, packed = (held, len(members) * block), []
            else:
                source = _staged(packed, block, inside)
            if direct and values:
                target = held, len(members) * block
            else:
                target = _staged([into[self._rank]] if scatter else [into[rank] for rank in members], block, inside)
            arriving = [self._rank] if scatter else [rank for rank in members if rank != self._rank or not values]
            landed = [into[rank] for rank in arriving if into[rank].staging is not None]
            self.moments[begin].exchanged += landed
            self.moments[end].arrivals += landed
            self.moments[begin].exchanges.append(
                Exchange(
                    together.operation, kind, ranks, begin, end, transfer.channel, turn, block, included, packed, source, target
                )
            )
        if direct and values:
            self._brought[held].append(begin)
        elif included and not values:
            self._taken.add(held)

    def _blocks(self, transfer: Transfer, outgoing: bool) -> Iterable[Message]:
        """One message for each other rank of a set, or from it, of all its shards in order."""
        mine, peer = (0, 1) if outgoing else (1, 0)
        rows = transfer.rows[transfer.rows[:, mine] == self._rank]
        rows = rows[np.lexsort((rows[:, 2], rows[:, peer]))]
        for part in np.split(rows, np.nonzero(np.diff(rows[:, peer]))[0] + 1):
            shards = [s for s in part[:, 2].tolist() if self._sizes[s]]
            group, tokens = int(part[0, 3]), sum(self._sizes[s] for s in shards)
            pieces = self._pieces(transfer.kind, group, shards)
            yield Message(transfer.kind, int(part[0, peer]), group, transfer.begin, transfer.end, transfer.channel, pieces, tokens)

    def _bundle(self, transfer: Transfer, ranks: tuple[int, ...], group: int) -> tuple[int, ...]:
        """The bundle that holds the shards of a set."""
        mine, other = (1, 0) if transfer.kind in VALUES else (0, 1)
        row = next(row for row in transfer.rows[transfer.rows[:, mine] == self._rank].tolist() if row[other] in ranks)
        return self._home[CARGO[transfer.kind].side, row[2], group][0]

    def _held_pieces(self, held: Operand, shards: list[int]) -> list[Piece]:
        """Where shards lie in the buffer of an operand that holds them, this rank's own too."""
        pieces, offset = [], 0
        for shard in held.bundle:
            if shard in shards:
                pieces.append(Piece(held, held.group, offset, offset + self._sizes[shard]))
            offset += self._sizes[shard]
        return pieces

    def _by_rank(self, bundle: tuple[int, ...], ranks: tuple[int, ...]) -> bool:
        """Whether a bundle is every rank's shards in order, rank behind rank."""
        shards = [s for s in bundle if self._sizes[s]]
        owners = [int(self._schedule.owner[s]) for s in shards]
        return shards == [s for _, s in sorted(zip(owners, shards, strict=True))] and set(owners) <= set(ranks)

    def _messages(self, rows: Ints, peer: int, kind: str, begin: int, end: int, channel: str) -> Iterable[Message]:
        for part in np.split(rows, np.nonzero(np.diff(rows[:, peer]) | np.diff(rows[:, 3]))[0] + 1):
            group = int(part[0, 3])
            shards = [s for s in part[:, 2].tolist() if self._sizes[s]]
            # Shards of consecutive numbers mostly lie behind one another on both sides, so a message of them needs no copy.
            breaks = [i for i in range(1, len(shards)) if shards[i] != shards[i - 1] + 1]
            if len(breaks) >= MOST_STRETCHES:
                breaks = []
            for a, b in pairwise([0, *breaks, len(shards)] if shards else []):
                tokens, pieces = sum(self._sizes[s] for s in shards[a:b]), self._pieces(kind, group, shards[a:b])
                yield Message(kind, int(part[0, peer]), group, begin, end, channel, pieces, tokens)

    def _operand(self, kind: str, shard: int, group: int) -> Operand:
        """The operand on this rank that holds an item; one that is only passed on is an operand by itself."""
        side = CARGO[kind].side
        bundle, _ = self._home.get((side, shard, group), ((shard,), 0))
        return Operand(kind, group, bundle)

    def _pieces(self, kind: str, group: int, shards: list[int]) -> list[Piece]:
        """Where the rows of a message lie; stretches that continue one another are one piece."""
        kind = kind.removeprefix("final_")
        found: list[Piece] = []
        for shard in shards:
            size = self._sizes[shard]
            if shard in self.begin:
                piece = Piece(None, group, self.begin[shard], self.begin[shard] + size)
            else:
                operand = self._operand("q" if kind in ("out", "lse", "final") else kind, shard, group)
                _, offset = self._home.get((CARGO[kind].side, shard, group), ((shard,), 0))
                piece = Piece(operand, group, offset, offset + size)
            if found and found[-1].buffer == piece.buffer and found[-1].end == piece.begin:
                piece = Piece(piece.buffer, group, found.pop().begin, piece.end)
            found.append(piece)
        return found

    def _live_with(self, message: Message, outgoing: bool) -> None:
        self._live_pieces(message, outgoing)
        values = message.kind in VALUES
        sums = message.kind in ("dq", "dkv")
        if not (self._in_one_piece(message) and (values or (outgoing and sums and self._travels_as_held(message.kind)))):
            group = self._schedule.heads[message.group]
            size = message.tokens * token_bytes(message.kind, group, self._problem)
            inside = message.round if message.begin == message.end else None
            message.staging = Buffer(size, message.begin, message.end, inside)

    def _live_pieces(self, message: Message, outgoing: bool) -> None:
        """The buffers that a message leaves or enters live as long as it is under way."""
        for piece in message.pieces:
            if piece.buffer is None:
                continue
            if message.kind in VALUES:
                self._live(piece.buffer, message.begin, message.end)
            elif message.kind.removeprefix("final_") in ("dq", "dkv"):  # begins with what arrives, ends when the sum has left
                time = message.end if not outgoing else message.begin
                self._live(piece.buffer, time, message.end)

    def _travels_as_held(self, kind: str) -> bool:
        """Whether a gradient travels in the type in which it is summed."""
        return element_bytes(CARGO[kind].precision, self._problem) == element_bytes("sum", self._problem)

    def _in_one_piece(self, message: Message) -> bool:
        (piece, *others) = message.pieces
        if others:
            return False
        if self._planes and message.kind == "kv":  # keys and values lie apart, so only all of them are one stretch
            tokens = self.tokens if piece.buffer is None else self.operand_tokens(piece.buffer)
            if (piece.begin, piece.end) != (0, tokens):
                return False
        if piece.buffer is not None:
            return True
        heads, group = self._problem.heads, self._schedule.heads[message.group]
        whole = len(group) == heads.q if CARGO[message.kind].side == "q" else group.kv == tuple(range(heads.kv))
        return whole and message.kind != "stats"

    # -- sums, own parts, memory -----------------------------------------------------------------------------------

    def _place_sums(self) -> None:
        """Buffers for gradients of operands that are not this rank's own, from the last use in forward to the first."""
        if not self._problem.backward:
            return
        for (kind, group, bundle), steps in self._use.items():
            if self.local(Operand(kind, group, bundle)) is None:
                self._live(Operand(f"d{kind}", group, bundle), *map(self._traffic.backward_time, (steps[-1], steps[0])))
        for operand, lives in self._lives.items():
            if operand.kind in ("dq", "dkv"):
                (life,) = lives
                self.moments[life.birth].zeroed.append(operand)

    def _place_fills(self) -> None:
        """A bundle of own and other shards: the own part is copied in at first, and its sums are taken out at last."""
        for operand, lives in list(self._lives.items()):
            parts = self._own_parts(operand)
            if not parts:
                continue
            if operand.kind in ("dq", "dkv"):
                if operand in self._taken:
                    continue
                steps = self._use[operand.kind[1:], operand.group, operand.bundle]
                self.moments[self._traffic.backward_time(steps[0])].flushes.append((operand, parts))
                continue
            for life in lives:
                if any(life.birth <= time <= life.death for time in self._brought.get(operand, ())):
                    continue
                self.moments[life.birth].filled.append((operand, parts))
            if operand.kind == "q":
                steps = self._use["q", operand.group, operand.bundle]
                self.moments[steps[-1]].flushes.append((operand, parts))

    def _own_parts(self, operand: Operand) -> list[tuple[int, int, int, int]]:
        parts, offset = [], 0
        for shard in operand.bundle:
            size = self._sizes[shard]
            if shard in self.begin and size:
                parts.append((self.begin[shard], self.begin[shard] + size, offset, offset + size))
            offset += size
        return parts

    def _give_slots(self) -> None:
        """First come, first served, the slot that fits best among those that are free; a slot grows to its largest buffer."""
        staged = [m.staging for moment in self.moments for m in (*moment.sends, *moment.receives) if m.staging]
        ends = [end for moment in self.moments for exchange in moment.exchanges for end, _ in (exchange.source, exchange.target)]
        staged += [end for end in ends if isinstance(end, Buffer)]
        buffers = [b for lives in self._lives.values() for b in lives] + staged
        ticks = max(moment.rounds for moment in self.moments)
        free_from: list[int] = []

        def begins(buffer: Buffer) -> int:  # a round leaves while the one before it is waited for
            return buffer.birth * ticks + max((buffer.round or 0) - 1, 0)

        for buffer in sorted(buffers, key=lambda b: (begins(b), -b.bytes)):
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
        return sum(self.slots)

    @property
    def all_final(self) -> bool:
        """Whether every query of this rank is computed by one rank alone, so that nothing is ever merged here."""
        return bool(self._traffic.final[self.own].all())


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


def _staged(messages: list[Message], block: int, inside: int | None) -> tuple[Buffer, int]:
    """Room for messages of ``block`` bytes each, one behind the other; and its bytes."""
    size = len(messages) * block
    memory = Buffer(size, messages[0].begin, messages[0].end, inside)
    for place, message in enumerate(messages):
        message.staging, message.offset = memory, place * block
    return memory, size
