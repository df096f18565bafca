"""One rank's part of a schedule: its operands, messages and buffers, worked out before anything runs. No tensors here.

Buffers are given memory by how long they live: one whose last use is over leaves its slot to the next. A ring thus runs on two
buffers for keys and values, however many ranks it has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lcbench.cp.adjoint import CARGO, Traffic, element_bytes, held_precision, token_bytes
from lcbench.cp.schedule import Schedule
from lcbench.masks.band import Ints
from lcbench.problem import Problem

ROUND = 8  # sums of one head group that a rank receives in one round
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


@dataclass(frozen=True)
class TileCall:
    """A tile of this rank, with its place in memory: own tensors where the operand says None."""

    group: int
    q: tuple[int, ...]
    k: tuple[int, ...]


@dataclass
class Moment:
    """What happens at one time: buffers begin, messages leave and arrive, tiles are computed, sums go to the rank's own."""

    filled: list[tuple[Operand, list[tuple[int, int, int, int]]]] = field(default_factory=list)  # (own begin, end, begin, end)
    zeroed: list[Operand] = field(default_factory=list)
    sends: list[Message] = field(default_factory=list)
    receives: list[Message] = field(default_factory=list)
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
    """

    def __init__(self, schedule: Schedule, moves: Traffic, problem: Problem, rank: int) -> None:
        self._schedule, self._traffic, self._problem, self._rank = schedule, moves, problem, rank
        self.own = schedule.own(rank)
        begins = np.cumsum([0, *(schedule.sizes[s] for s in self.own)])
        self.begin = {shard: int(a) for shard, a in zip(self.own, begins, strict=False)}
        self.tokens = int(begins[-1])
        self._sizes: list[int] = schedule.sizes.tolist()
        self.moments = [Moment() for _ in range(2 * moves.steps + 1 if problem.backward else moves.steps)]
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
            "stats" in {*(m.kind for m in moment.sends), *(operand.kind for operand, _ in moment.filled)} for moment in self.moments
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
        for transfer in self._traffic.transfers:
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
        values = message.kind in ("q", "kv", "dout", "stats")
        if values:
            for piece in message.pieces:
                if piece.buffer is not None:
                    self._live(piece.buffer, message.begin, message.end)
        elif message.kind.removeprefix("final_") in ("dq", "dkv"):
            for piece in message.pieces:
                if piece.buffer is not None:  # begins with what arrives, ends when the sum has left
                    time = message.end if not outgoing else message.begin
                    self._live(piece.buffer, time, message.end)
        if not (self._in_one_piece(message) and (values or (outgoing and self._sum_travels(message.kind)))):
            group = self._schedule.heads[message.group]
            size = message.tokens * token_bytes(message.kind, group, self._problem)
            inside = message.round if message.begin == message.end else None
            message.staging = Buffer(size, message.begin, message.end, inside)

    def _sum_travels(self, kind: str) -> bool:
        """Whether a gradient travels in the type in which it is summed."""
        return kind in ("dq", "dkv") and element_bytes("transit", self._problem) == element_bytes("sum", self._problem)

    def _in_one_piece(self, message: Message) -> bool:
        (piece, *others) = message.pieces
        if others:
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
                steps = self._use[operand.kind[1:], operand.group, operand.bundle]
                self.moments[self._traffic.backward_time(steps[0])].flushes.append((operand, parts))
                continue
            for life in lives:
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
        buffers = [b for lives in self._lives.values() for b in lives] + staged
        ticks = max(moment.rounds for moment in self.moments)
        free_from: list[int] = []
        for buffer in sorted(buffers, key=lambda b: (b.birth, b.round or 0, -b.bytes)):
            birth = buffer.birth * ticks + (buffer.round or 0)
            buffer.bytes = -(-buffer.bytes // ALIGNMENT) * ALIGNMENT
            free = [i for i, time in enumerate(free_from) if time <= birth]
            if not free:
                free = [len(self.slots)]
                self.slots.append(0)
                free_from.append(0)
            buffer.slot = min(free, key=lambda i: (abs(self.slots[i] - buffer.bytes), i))
            self.slots[buffer.slot] = max(self.slots[buffer.slot], buffer.bytes)
            free_from[buffer.slot] = (buffer.death + 1) * ticks if buffer.round is None else birth + 1

    @property
    def buffer_bytes(self) -> int:
        return sum(self.slots)

    @property
    def all_final(self) -> bool:
        """Whether every query of this rank is computed by one rank alone, so that nothing is ever merged here."""
        return bool(self._traffic.final[self.own].all())
