"""Run a schedule with torch.distributed: the one engine behind every strategy, forward and backward.

A ``Program`` says what a rank does at each time; this file does it with tensors. At each time messages leave in one batch per
channel, tiles are computed while these are under way, then what has arrived is merged or added. Buffers that live at different
times share memory, which is taken once. On CUDA the host waits for nothing in here: messages wait on the device for what was
computed before them, and what is computed next waits there for messages.

Tensors are packed: q (Tq, Hq, D), out (Tq, Hq, Dv), keys and values together (Tk, Hk, W) as ``packing`` has them, so any stretch of
tokens is one stretch of memory. Out, LSE and gradients are summed in float32 (float64 for float64 inputs).

A learned sink takes part in a row's softmax once, when all of its keys are merged: where the row is owned, or where one rank alone
has computed it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from lcbench.kernels.base import Kernel, Platform, Prepared, Saved, accumulation_dtype, prepare, softmax_arguments
from lcbench.kernels.cache import Cache, CacheKind, PreparedForCache, unread
from lcbench.kernels.merge import merge_into
from lcbench.kernels.sink import sink_gradient, with_sink
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem
from lcbench.schedule.adjoint import SIDES, Traffic, traffic
from lcbench.schedule.groups import MAIN, Groups
from lcbench.schedule.lowering import Lowering, operations_of, sets_of
from lcbench.schedule.messages import Sending, Waits, all_gather, all_to_all, reduce_scatter, wait_all
from lcbench.schedule.packing import Packing, Plane
from lcbench.schedule.payload import PAYLOADS, Precision, gradients_of, token_bytes
from lcbench.schedule.program import (
    MOST_STRETCHES,
    Buffer,
    End,
    Exchange,
    Message,
    Operand,
    OwnPart,
    Piece,
    Program,
    RankStep,
    TileCall,
)
from lcbench.schedule.replay import Replay
from lcbench.schedule.schedule import HeadGroup, Kind, Schedule

HeadIndex = slice | torch.Tensor
Partial = tuple[torch.Tensor, torch.Tensor]  # out, lse
Mark = float | torch.cuda.Event
TileRun = Callable[[TileCall, Prepared, int], None]


@dataclass(frozen=True)
class SavedPass:
    """What backward needs of forward besides kept buffers, which the next forward overwrites.

    ``out`` (Tq, Hq, Dv) and ``lse`` (Tq, Hq) are of this rank's own tokens (LSE is NaN where another rank alone computed them);
    ``finals`` of the operands whose every key this rank computed. ``kv`` are keys and values together; apart where nothing moves.
    ``slots`` hold the kept buffers, by slot, where ``Executor.hold`` took them out of the next pass's way. ``sink``: (Hq,) or None.
    """

    q: torch.Tensor
    kv: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    out: torch.Tensor
    lse: torch.Tensor
    finals: dict[tuple[int, tuple[int, ...]], Partial]
    slots: dict[int, torch.Tensor] = field(default_factory=dict)
    sink: torch.Tensor | None = None


@dataclass(frozen=True)
class Counters:
    """What one rank's run of a schedule is made of.

    Attributes:
        bytes_sent: in the last pass, counted where it is sent. A collective counts as a message to each other rank of its set.
        bytes_between_nodes: those of them that go to ranks on other nodes.
        buffer_bytes: memory that is held for buffers as long as the run lives.
        calls: native kernel calls of a forward pass.
        pairs: unmasked pairs that the rank computes, over the query heads that it computes them for.
        collectives: the operations that go by collectives, by name.
    """

    bytes_sent: int
    bytes_between_nodes: int
    buffer_bytes: int
    calls: int
    pairs: int
    collectives: Sequence[str]


class Executor:
    """One rank's run of a schedule. What depends on the mask alone is prepared here, outside of any timing.

    Attributes:
        tokens: indices of this rank's queries among all, in the order of its tensors.
        held: its queries and its keys, see ``RankRun``.
        own_lse, negates: True, see ``RankRun``: ``lse`` gives what ``forward`` found.
        resumes: True, see ``RankRun``.
        gives: whether inputs may come one by one, and gradients be waited for one by one, see ``RankRun``.
        sums_are_wide: whether gradients are added up in the type of sums on their way between ranks.
        communicators: that all ranks need, as ``Groups.among`` takes them: (channel, ranks).
        bytes_sent, buffer_bytes, calls, pairs, collectives: see ``Counters``; bytes since a pass last began.
    """

    def __init__(
        self,
        schedule: Schedule,
        mask: Mask,
        kernel: Kernel,
        problem: Problem,
        *,
        rank: int,
        device: torch.device,
        groups: Groups,
        lowering: Lowering = "auto",
        apart: bool = False,
    ) -> None:
        """
        Args:
            apart: whether keys and values travel in messages of their own, as they come.
        """
        self.schedule, self.problem, self.rank, self.device = schedule, problem, rank, device
        self.held = schedule.held(rank)
        self.tokens = self.held.q.tokens
        self.own_lse = self.resumes = self.negates = True
        self.sums_are_wide = problem.reduce_dtype != "input"
        self._marks: list[tuple[int, list[Mark]]] | None = None
        self._apart: dict[tuple[int, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}
        self._views: dict[int, dict[tuple[int, int], torch.Tensor]] = {}  # by slot
        self._rows: dict[int, torch.Tensor] = {}  # of messages of many pieces
        self._compute = self._communicate = self._returns = True
        self._kernel, self._cache = kernel, cast("Cache | None", None)
        self._sink: torch.Tensor | None = None
        self._sunk: set[tuple[int, tuple[int, ...]]] = set()  # results of queries in buffers that have had to do with the sink
        moves = traffic(schedule, backward=problem.backward)
        self.gives = apart and schedule.world_size > 1
        self._given: list[str] = []
        if self.gives:
            moves = moves.apart()
        self._forward_steps = moves.steps
        self._keys_move = any(transfer.payload.side == "kv" for transfer in moves.transfers)
        operations = operations_of(lowering, dist.get_backend()) if moves.transfers else ()
        self._contiguous = kernel.contiguous_kv
        self._packing = Packing.of(problem.heads, contiguous=kernel.contiguous_kv)
        self._softmax = softmax_arguments(problem)
        self._program = Program(schedule, moves, problem, rank, operations, planes=self._packing.planes)
        self._join(groups, moves)
        self.buffer_bytes = self._program.buffer_bytes
        self.collectives = sorted({each.operation for each in self._program.lowered if each is not None})
        self._kept_slots = sorted(self._program.kept_slots) if problem.backward else []
        self._slots = [torch.zeros(size, dtype=torch.uint8, device=device) for size in self._program.slots]
        self._q_heads, self._kv_heads = (
            [self._index(heads) for heads in of] for of in zip(*((g.q_heads, g.kv_heads) for g in schedule.heads), strict=True)
        )
        input_dtype: torch.dtype = getattr(torch, problem.dtype)
        sums = accumulation_dtype(input_dtype)
        reduced = input_dtype if problem.reduce_dtype == "input" else sums
        self._dtypes: dict[Precision, torch.dtype] = {"input": input_dtype, "sum": sums, "reduce": reduced}
        self._tiles, self.pairs, self.calls = self._prepare(mask, kernel, input_dtype)
        self._alone = self._only_kernel()

    def _join(self, groups: Groups, moves: Traffic) -> None:
        """The communicators that this rank needs. Every rank makes every group, in the same order."""
        through_host = bool(moves.transfers) and groups.goes_through_host(self.device)
        self._sending = Sending(self.rank, self.problem.scale.gpus_per_node, self.device, through_host=through_host)
        every, sets = tuple(range(self.schedule.world_size)), sets_of(moves, self._program.lowered)
        channels = sorted({MAIN, *(t.channel for t in moves.transfers)} if moves.transfers else set())
        self.communicators = [*((channel, every) for channel in channels), *sets]
        groups.prepare(self.communicators)
        self._groups = {channel: groups.of(channel) for channel in channels}
        self._sets: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}
        for channel, members in sets:
            if (made := groups.among(members, channel)) is not None:
                self._sets[channel, members] = made

    def _index(self, heads: slice | list[int]) -> HeadIndex:
        """Heads as an index of a tensor on this device."""
        return heads if isinstance(heads, slice) else torch.tensor(heads, device=self.device)

    def _prepare(self, mask: Mask, kernel: Kernel, dtype: torch.dtype) -> tuple[dict[TileCall, Prepared | None], int, int]:
        """The kernel of every tile (None for one without pairs), and their pairs and calls. Equal tiles share one."""
        total = self.problem.heads.q
        made: dict[tuple[int, Heads, tuple[int, ...], tuple[int, ...]], tuple[Mask, Prepared | None]] = {}
        masks = [group.part(mask, total) for group in self.schedule.heads]
        found: dict[TileCall, Prepared | None] = {}
        pairs = calls = 0
        for step in self._program.steps[: self._forward_steps]:
            for call in step.tiles:
                group = self.schedule.heads[call.group]
                heads = self.problem.heads.of(len(group), len(group.kv))
                key = (id(masks[call.group]), heads, call.q, call.k)
                if key not in made:
                    runs = self.schedule.q.runs(call.q), self.schedule.k.runs(call.k)
                    tile = masks[call.group].tile(*runs).merged()
                    made[key] = tile, prepare(kernel, tile, heads, dtype, self.device) if len(tile) else None
                tile, found[call] = made[key]
                pairs += tile.pairs(len(group))
                ready = found[call]
                calls += ready.calls if ready else 0
        return found, pairs, calls

    @property
    def bytes_sent(self) -> int:
        return self._sending.bytes_sent

    def counters(self) -> Counters:
        sent = self._sending
        return Counters(sent.bytes_sent, sent.bytes_between_nodes, self.buffer_bytes, self.calls, self.pairs, self.collectives)

    def replay(self, *, compute: bool, communicate: bool) -> Replay | None:
        """The same passes without kernels or without messages; None on a single rank, which sends nothing."""
        return Replay(self, compute, communicate) if self.schedule.world_size > 1 else None

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None, *, compute: bool = True,
        communicate: bool = True,
    ) -> tuple[torch.Tensor, SavedPass]:  # fmt: skip
        """out (Tq, Hq, Dv) of this rank's queries from its q (Tq, Hq, D), k (Tk, Hk, D) and v (Tk, Hk, Dv), and what is kept.

        Without ``compute`` or without ``communicate`` everything else is done as usual, and the results mean nothing.
        """
        begun = self._taken_over(compute, communicate)
        if compute and self._alone is not None and self._marks is None:
            part = self._typed(self._of_cache(self._alone, q) or self._alone.forward(q, k, v, **self._softmax))
            out, lse = part if sink is None else with_sink(*part, sink)
            saved = SavedPass(q, (k, v), out.to(q.dtype), lse, {}, sink=sink)
            return saved.out, saved
        if not begun:
            self._own: dict[str, torch.Tensor] = {"q": q, "kv": k if self._cache else self._packing.together(k, v)}
        self._parts: dict[tuple[int, tuple[int, ...]], Partial] = {}
        self._total: Partial | None = None
        self._sink = sink
        self._sunk = set()
        for number in range(self._forward_steps):
            self._run_step(number, self._forward_tile, posted=begun and number == 0)
        out, lse = self._total or self._empty()
        if sink is not None:
            here, sunk = self._sunk_here, with_sink(out, lse, sink)
            out, lse = torch.where(here[..., None], sunk[0], out), torch.where(here, sunk[1], lse)
        finals = {key: (part[0].to(q.dtype), part[1]) for key, part in self._parts.items() if key in self._program.finals}
        saved = SavedPass(q, self._own["kv"], out.to(q.dtype), lse, finals, sink=sink)
        self._own, self._parts, self._total, self._apart = {}, {}, None, {}
        return saved.out, saved

    @cached_property
    def _sunk_here(self) -> torch.Tensor:
        """(Tq, Hq): which of this rank's own results get the sink when all of them are there: not those that some rank alone
        computed in a buffer, which put it in there."""
        here = torch.ones((self._program.tokens["q"], self.problem.heads.q), dtype=torch.bool, device=self.device)
        for step in self._program.steps[: self._forward_steps]:
            for operand, parts in step.flushes:
                if (operand.group, operand.bundle) in self._program.finals:
                    for part in parts:
                        here[part.begin : part.end, self._heads("q", operand.group)] = False
            for message in step.arrivals:
                for piece in message.pieces if message.kind == "final" else ():
                    here[piece.begin : piece.end, self._heads("q", message.group)] = False
        return here

    def reads(self, kind: CacheKind) -> str | None:
        """Why this rank's tiles do not read such a cache where it lies; None: they do."""
        return self._keys_in_parts or unread(self._kernel, kind, self.problem, Platform.of(self.device))

    @cached_property
    def _keys_in_parts(self) -> str | None:
        """Why no kernel call takes all of this rank's keys and values, and no others; None: each does."""
        if self._keys_move:
            return "keys and values move between ranks"
        own = 0, self._program.tokens["kv"]
        for call in self._tiles:
            every = self.schedule.heads[call.group].kv_heads == slice(0, self.problem.heads.kv)
            if self._program.local(call.operand("kv")) != own or not every:
                return "a kernel call takes a part of this rank's keys and values"
        return None

    def forward_cache(
        self, q: torch.Tensor, cache: Cache, sink: torch.Tensor | None = None, *, compute: bool = True, communicate: bool = True
    ) -> tuple[torch.Tensor, SavedPass]:
        """``forward`` over what a cache holds, in the order of this rank's keys: read where it lies if ``reads`` says so. What it
        saves is for ``lse`` only."""
        if self.reads(cache.kind) is not None:
            return self.forward(q, *cache.read(), sink, compute=compute, communicate=communicate)
        self._cache = cache
        try:
            return self.forward(q, cache.k, cache.v, sink, compute=compute, communicate=communicate)
        finally:
            self._cache = None

    def _only_kernel(self) -> Prepared | None:
        """The kernel of the only tile, if that is all tokens and heads of a rank that shares nothing with others, else None.

        Nothing is packed or summed then, and the time of a cell without context parallelism is its kernel's.
        """
        if len(self._tiles) != 1 or not self._program.silent:
            return None
        ((call, kernel),) = self._tiles.items()
        sides: tuple[Kind, ...] = ("q", "kv")
        whole = all(self._program.local(call.operand(kind)) == (0, self._program.tokens[kind]) for kind in sides)
        group, heads = self.schedule.heads[call.group], self.problem.heads
        every = (len(group), group.kv_heads) == (heads.q, slice(0, heads.kv))
        return kernel if whole and every else None

    def _keys_and_values(self, call: TileCall, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k (T, Hk, D) and v (T, Hk, Dv) of a tile as its kernel wants them. This rank's own are copied once in a pass at most."""
        both = self._value("kv", call, number)
        k, v = self._packing.keys(both), self._packing.values(both)
        if not self._contiguous or (k.is_contiguous() and v.is_contiguous()):
            return k, v
        key = (call.group, call.k)
        if self._program.local(call.operand("kv")) is None:
            return k.contiguous(), v.contiguous()
        if key not in self._apart:
            self._apart[key] = k.contiguous(), v.contiguous()
        return self._apart[key]

    def _typed(self, part: Partial) -> Partial:
        """A kernel's result in the engine's types: LSE in the type of sums, out in that or in the inputs' type.

        Both ends of a message take its size from these types.
        """
        out, lse = part
        sums = self._dtypes["sum"]
        return out if out.dtype in (self._dtypes["input"], sums) else out.to(sums), lse.to(sums)

    def _forward_tile(self, call: TileCall, kernel: Prepared, number: int) -> None:
        q = self._value("q", call, number)
        found = self._of_cache(kernel, q)
        if found is None:
            k, v = self._keys_and_values(call, number)
            found = kernel.forward(q, k, v, **self._softmax)
        part = self._typed(found)
        rows = self._program.local(call.operand("q"))
        if rows is not None:
            self._absorb(rows, call.group, part)
            return
        key = (call.group, call.q)
        self._parts[key] = _merged(self._parts[key], part) if key in self._parts else part

    def _of_cache(self, kernel: Prepared, q: torch.Tensor) -> Partial | None:
        """A kernel's result over the cache that it reads where it lies; None where there is none."""
        if self._cache is None:
            return None
        return cast(PreparedForCache, kernel).forward_cache(q, self._cache, **self._softmax)

    def _absorb(self, rows: tuple[int, int], group: int, part: Partial) -> None:
        """Merge a partial result into this rank's own rows."""
        heads = self._heads("q", group)
        begin, end = rows
        if (begin, end) == (0, self._program.tokens["q"]) and len(self.schedule.heads[group]) == self.problem.heads.q:
            self._total = part if self._total is None else _merged(self._total, part)
            return
        out, lse = self._own_total()
        if self._program.all_final:
            out[begin:end, heads], lse[begin:end, heads] = part[0].to(out.dtype), part[1]
        elif isinstance(heads, slice):
            merge_into(out[begin:end, heads], lse[begin:end, heads], *part)
        else:  # an index of scattered heads copies them
            merged = out[begin:end, heads], lse[begin:end, heads]
            merge_into(*merged, *part)
            out[begin:end, heads], lse[begin:end, heads] = merged

    def _own_total(self) -> Partial:
        """This rank's own result to write into, in the type that merging needs."""
        out, lse = self._total or self._empty()
        if not self._program.all_final and out.dtype != self._dtypes["sum"]:
            out = out.to(self._dtypes["sum"])
        self._total = out, lse
        return self._total

    def _empty(self) -> Partial:
        """The result over no keys: zeros and -inf."""
        shape = (self._program.tokens["q"], self.problem.heads.q, self.problem.heads.v)
        dtype = self._dtypes["input" if self._program.all_final else "sum"]
        out = torch.zeros(shape, dtype=dtype, device=self.device)
        return out, torch.full(shape[:2], -torch.inf, dtype=self._dtypes["sum"], device=self.device)

    def _part(self, piece: Piece) -> Partial:
        """This rank's result of queries in a buffer, which is about to leave it; zeros and -inf where their tiles hold no pair."""
        assert piece.buffer is not None
        key = (piece.buffer.group, piece.buffer.bundle)
        if key not in self._parts:
            heads = len(self.schedule.heads[piece.group])
            tokens = self._program.operand_tokens(piece.buffer)
            out = torch.zeros((tokens, heads, self.problem.heads.v), dtype=self._dtypes["sum"], device=self.device)
            self._parts[key] = out, torch.full(out.shape[:2], -torch.inf, dtype=self._dtypes["sum"], device=self.device)
        if self._sink is not None and key in self._program.finals and key not in self._sunk:
            self._parts[key] = with_sink(*self._parts[key], self._sink[self._heads("q", piece.group)])
            self._sunk.add(key)
        return self._parts[key]

    def lse(self, saved: SavedPass) -> torch.Tensor:
        """LSE (T, Hq) of this rank's own tokens. Collective; apart from ``forward``, since only the check needs it."""
        lse = saved.lse.clone()
        for step in self._program.steps[: self._forward_steps]:
            packed = [m for exchange in step.exchanges for m in exchange.packed]
            sends = [m for m in (*step.sends, *packed) if m.kind == "final"]
            receives = [m for m in (*step.receives, *step.exchanged) if m.kind == "final"]
            outgoing = [(_final_lse(message, saved), message.peer) for message in sends]
            arrived = [
                torch.empty((m.tokens, len(self.schedule.heads[m.group])), dtype=lse.dtype, device=self.device) for m in receives
            ]
            if outgoing or arrived:
                incoming = [(x, m.peer) for m, x in zip(receives, arrived, strict=True)]
                wait_all(self._messages(outgoing, incoming, self._groups[MAIN]))
            for message, x in zip(receives, arrived, strict=True):
                for piece, part in _cut(message.pieces, x):
                    lse[piece.begin : piece.end, self._heads("q", message.group)] = part
        return lse

    # -- several passes under way --------------------------------------------------------------------------------

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The memory of all buffers, bytes."""
        return self._slots

    def share(self, other: object) -> None:
        """Put buffers where those of another executor are, as far as these are large enough, see ``RankRun``."""
        assert isinstance(other, Executor)
        self.share_memory(other.buffers)

    def share_memory(self, buffers: Sequence[torch.Tensor]) -> None:
        """Put buffers where these are, as far as they are large enough."""
        for slot, (own, memory) in enumerate(zip(self._slots, buffers, strict=False)):
            if len(own) <= len(memory):
                self._put(slot, memory[: len(own)])

    def for_lse(self, saved: SavedPass) -> SavedPass:
        """Without the inputs, see ``RankRun``."""
        return replace(saved, q=saved.q[:0], kv=saved.q[:0], slots={})

    def hold(self, saved: SavedPass) -> SavedPass:
        """What ``forward`` has just saved, with all that backward needs of it: the next forward overwrites nothing of it."""
        taken = {slot: self._slots[slot] for slot in self._kept_slots}
        for slot, memory in taken.items():
            self._put(slot, torch.zeros_like(memory))
        return replace(saved, slots=taken)

    def copied(self, saved: SavedPass) -> SavedPass:
        """Like ``hold``, with copies: the buffers stay where they are, for others that share them."""
        return replace(saved, slots={slot: self._slots[slot].clone() for slot in self._kept_slots})

    def _put(self, slot: int, memory: torch.Tensor) -> None:
        self._slots[slot] = memory
        self._views.pop(slot, None)

    def resume(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, results: Sequence[torch.Tensor]) -> SavedPass:
        """What ``forward`` saves for these inputs, without a sink, from the results of a pass before: no tile is computed, and only
        what backward needs in kept buffers is moved again. Collective."""
        out, lse, *finals = results
        keys = sorted(self._program.finals)
        known = dict(zip(keys, zip(finals[::2], finals[1::2], strict=True), strict=True))
        if self._alone is not None:
            return SavedPass(q, (k, v), out, lse, {})
        begun = self._taken_over(compute=False, communicate=True, returns=False)
        if not begun:
            self._own = {"q": q, "kv": self._packing.together(k, v)}
        saved = SavedPass(q, self._own["kv"], out, lse, known)
        if self._kept_slots:
            self._parts, self._total, self._sink = {}, None, None
            for number in range(self._forward_steps):
                self._run_step(number, self._forward_tile, posted=begun and number == 0)
        self._own, self._parts, self._total, self._apart = {}, {}, None, {}
        return saved

    def results(self, saved: SavedPass) -> list[torch.Tensor]:
        """What ``resume`` takes: out (T, Hq, D), LSE (T, Hq), and those of other ranks' queries that this rank alone computed."""
        return [saved.out, saved.lse, *(x for key in sorted(saved.finals) for x in saved.finals[key])]

    def inputs(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """How ``apart`` begins where these are the inputs, or the same rows of all of it where they are rows of the inputs."""
        return [q, self._packing.together(k, v)] if self._alone is None else [q, k, v]

    def keeps(self) -> tuple[list[int], list[tuple[int, int]]]:
        """See ``RankRun``."""
        finals = [
            (group, self._program.operand_tokens(Operand("q", group, bundle))) for group, bundle in sorted(self._program.finals)
        ]
        return [len(self._slots[slot]) for slot in self._kept_slots], [(n, len(self.schedule.heads[group])) for group, n in finals]

    def apart(self, saved: SavedPass) -> tuple[list[torch.Tensor], Callable[[Sequence[torch.Tensor]], SavedPass]]:
        """All tensors that backward needs: q, keys and values, ``results``, kept buffers; and how to put such together again."""
        kv = list(saved.kv) if isinstance(saved.kv, tuple) else [saved.kv]
        results, slots, keys = self.results(saved), sorted(saved.slots), sorted(saved.finals)
        counts = (1, len(kv), 2, 2 * len(keys), len(slots))

        def together(tensors: Sequence[torch.Tensor]) -> SavedPass:
            every = iter(tensors)
            (q,), kv, (out, lse), finals, held = ([next(every) for _ in range(count)] for count in counts)
            pairs = zip(finals[::2], finals[1::2], strict=True)
            whole = kv[0] if len(kv) == 1 else (kv[0], kv[1])
            return SavedPass(q, whole, out, lse, dict(zip(keys, pairs, strict=True)), dict(zip(slots, held, strict=True)))

        return [saved.q, *kv, *results, *(saved.slots[slot] for slot in slots)], together

    # -- backward --------------------------------------------------------------------------------------------------

    def backward(
        self, dout: torch.Tensor, saved: SavedPass, *, compute: bool = True, communicate: bool = True
    ) -> tuple[torch.Tensor, ...]:
        """(dq, dk, dv) of this rank's tokens from its dout (Tq, Hq, Dv), in the inputs' type, and a sink's gradient, as ``Passes``
        has them."""
        self._begin(compute, communicate)
        if isinstance(saved.kv, tuple):
            assert self._alone is not None
            whole = Saved(saved.q, *saved.kv, saved.out, saved.lse)
            dq, dk, dv = self._alone.backward(dout, whole, **self._softmax)
            if self.problem.heads.latent:
                dk = dk.to(self._dtypes["sum"])
                self._packing.values(dk).add_(dv)
            of_keys = (dk,) if self.problem.heads.latent else (dk, dv)
            return *(grad.to(dout.dtype) for grad in (dq, *of_keys)), *self._sink_gradient(dout, saved)
        self._go_back(dout, saved, saved.kv)
        for number in range(self._forward_steps, 2 * self._forward_steps + 1):
            self._run_step(number, self._backward_tile)
        dq, dkv = self._own["dq"].to(dout.dtype), self._own["dkv"].to(dout.dtype)
        of_sink = () if saved.sink is None else (self._dsink,)
        self._own, self._apart = {}, {}
        del self._saved
        return dq, *self._packing.gradients(dkv), *of_sink

    def _sink_gradient(self, dout: torch.Tensor, saved: SavedPass) -> tuple[torch.Tensor, ...]:
        """That of this rank's own rows, (Hq,); none where there is no sink."""
        if saved.sink is None:
            return ()
        return (sink_gradient(dout, saved.out, saved.lse, saved.sink),)

    # -- inputs and gradients one by one -----------------------------------------------------------------------------

    def give(self, kind: str, x: torch.Tensor) -> None:
        """Begin the messages of an input of the next ``forward`` or ``resume``: ``q``, then ``k``, then ``v``. Collective."""
        assert kind == "qkv"[len(self._given)], f"{kind} is given after {self._given}"
        if not self._given:
            self._begin(compute=True, communicate=True)
            self._own = {"q": x}
        elif kind == "k":
            self._own["kv"] = self._packing.empty(x)
            self._packing.keys(self._own["kv"]).copy_(x)
        else:
            self._packing.values(self._own["kv"]).copy_(x)
        self._given.append(kind)
        self._post(self._program.steps[0], 0, (kind,))

    def _taken_over(self, compute: bool, communicate: bool, returns: bool = True) -> bool:
        """Whether the inputs of the pass that begins were given; without, nothing is under way yet."""
        if not self._given:
            self._begin(compute, communicate, returns)
            return False
        assert self._given == ["q", "k", "v"]
        self._given = []
        self._compute, self._communicate, self._returns = compute, communicate, returns
        return True

    def begin_backward(self, dout: torch.Tensor, saved: SavedPass) -> None:
        """``backward`` up to where its gradients are on their way home: first those of v, then of k, then of q. Collective."""
        self._begin(compute=True, communicate=True)
        assert not isinstance(saved.kv, tuple)
        self._go_back(dout, saved, saved.kv)
        last = 2 * self._forward_steps
        for number in range(self._forward_steps, last):
            self._run_step(number, self._backward_tile)
        step = self._program.steps[last]
        assert step.rounds == 1
        assert not [*step.tiles, *step.flushes, *step.filled], "something is computed after gradients have left"
        self._home: dict[str, list[Waits]] = {}
        for kind in "vkq":
            self._post(step, 0, gradients_of(kind))
            self._home[kind] = self._works.pop((last, 0), [])
        del self._saved

    def gradient(self, kind: str) -> torch.Tensor:
        """The gradient of ``v``, ``k`` or ``q`` of this rank's tokens, in the inputs' type, once it is there. Collective."""
        wait_all(self._home.pop(kind))
        for message in self._program.steps[2 * self._forward_steps].arrivals:
            if message.kind in gradients_of(kind):
                self._unpack(message)
        own = self._own["dq"] if kind == "q" else self._packing.plane(self._own["dkv"], 0 if kind == "k" else 1)
        found = own.to(self._dtypes["input"])
        if not self._home:
            self._own, self._apart = {}, {}
        return found

    def _go_back(self, dout: torch.Tensor, saved: SavedPass, kv: torch.Tensor) -> None:
        """Have what a pass has saved where backward looks for it."""
        for slot, memory in saved.slots.items():
            self._put(slot, memory)
        self._own, self._saved = self._backward_own(dout, kv, saved), saved
        if saved.sink is not None:
            self._dsink = sink_gradient(dout, saved.out, saved.lse, saved.sink, self._sunk_here)
            self._sunk = set()

    def _backward_own(self, dout: torch.Tensor, kv: torch.Tensor, saved: SavedPass) -> dict[str, torch.Tensor]:
        """This rank's own tensors in backward, by kind of operand; gradients are zeros at first."""
        sums = self._dtypes["sum"]
        own = {"q": saved.q, "kv": kv, "dout": dout}
        own |= {PAYLOADS[kind].gradient: torch.zeros(own[kind].shape, dtype=sums, device=self.device) for kind in SIDES}
        if self._program.sends_stats:
            delta = (dout.to(sums) * saved.out).sum(-1)
            own["stats"] = torch.stack([saved.lse, delta], dim=2)
        return own

    def _backward_tile(self, call: TileCall, kernel: Prepared, number: int) -> None:
        q, dout = (self._value(kind, call, number) for kind in ("q", "dout"))
        k, v = self._keys_and_values(call, number)
        out, lse = self._whole_rows(call, dout, number)
        tile = Saved(q, k, v, out, lse.contiguous())
        dq, dk, dv = kernel.backward(dout, tile, **self._softmax)
        self._add("dq", call, number, [dq])
        self._add("dkv", call, number, [dk, dv])

    def _whole_rows(self, call: TileCall, dout: torch.Tensor, number: int) -> Partial:
        """out and LSE over all keys of a tile's queries: this rank's own, its final ones, or an out that stands for delta."""
        rows = self._program.local(call.operand("q"))
        if rows is not None:
            own = slice(*rows), self._heads("q", call.group)
            return self._saved.out[own], self._saved.lse[own]
        key = call.group, call.q
        if key in self._program.finals:
            out, lse = self._saved.finals[key]
            if self._saved.sink is not None and key not in self._sunk:
                heads = self._heads("q", call.group)
                self._dsink[heads] += sink_gradient(dout, out, lse, self._saved.sink[heads])
                self._sunk.add(key)
            return out, lse
        lse, delta = self._value("stats", call, number).unbind(-1)
        return _out_with(delta, dout), lse

    def _add(self, kind: str, call: TileCall, number: int, grads: Sequence[torch.Tensor]) -> None:
        """Add a tile's gradients, dkv as dk and dv, where they are summed."""
        operand = call.operand(kind)
        rows = self._program.local(operand)
        total = self._buffer(operand, number) if rows is None else self._own_rows(kind, call.group, *rows)
        places = [total] if kind == "dq" else [self._packing.keys(total), self._packing.values(total)]
        for own, grad in zip(places, grads, strict=True):
            own += grad

    def _add_own(self, kind: str, group: int, rows: tuple[int, int], grad: torch.Tensor, plane: Plane | None = None) -> None:
        """Add a gradient to rows of this rank's own; ``plane``: of keys alone, or of values."""
        own, heads = self._own[kind][slice(*rows)], self._heads(PAYLOADS[kind].side, group)
        own = own if plane is None else self._packing.plane(own, plane)
        if isinstance(heads, slice):
            own[:, heads] += grad
        else:  # a head that is held several times gets all of its gradients
            own.index_add_(1, heads, grad.to(own.dtype))

    # -- steps -----------------------------------------------------------------------------------------------------

    def _begin(self, compute: bool, communicate: bool, returns: bool = True) -> None:
        self._sending.begin()
        self._compute, self._communicate, self._returns = compute, communicate, returns
        self._works: dict[tuple[int, int], list[Waits]] = {}  # by when they end, and round
        self._apart = {}
        self._waiting: dict[tuple[int, int, tuple[int, int]], torch.Tensor] = {}

    def _run_step(self, number: int, run_tile: TileRun, *, posted: bool = False) -> None:
        """Everything of one time: begin messages, unless they are ``posted``, compute tiles, wait for messages, take them."""
        step = self._program.steps[number]
        marks = [self._mark()]
        self._fill(step, number)
        rounds = step.rounds if self._communicate else 0
        for turn in range(0 if posted else min(rounds, 2)):
            self._post(step, turn)
        marks.append(self._mark())
        for call in step.tiles if self._compute else ():
            kernel = self._tiles[call]
            if kernel is not None:
                run_tile(call, kernel, number)
        marks.append(self._mark())
        for turn in range(rounds):
            self._receive(step, number, turn)
        for operand, parts in step.flushes if self._compute else ():
            self._flush(operand, parts, number)
        marks.append(self._mark())
        if self._marks is not None:
            self._marks.append((number, marks))

    def _fill(self, step: RankStep, number: int) -> None:
        """Copy own parts into buffers that begin to live, and clear those for gradients."""
        for operand, parts in step.filled:
            buffer = self._buffer(operand, number)
            for part in parts:
                buffer[part.at : part.until] = self._own_rows(operand.kind, operand.group, part.begin, part.end)
        for operand in step.zeroed:
            self._buffer(operand, number).zero_()

    def _goes(self, moved: Message | Exchange) -> bool:
        """Whether it moves in this pass: results do not where they are known already."""
        return self._returns or moved.payload.combine != "merge"

    def _receive(self, step: RankStep, number: int, turn: int) -> None:
        """Wait for a round and take what it brought; the next but one is posted then, while the next one arrives."""
        wait_all(self._works.pop((number, turn), []))
        for message in step.arrivals:
            if message.round == turn and self._goes(message):
                self._unpack(message)
        if turn + 2 < step.rounds:
            self._post(step, turn + 2)

    def _mark(self) -> Mark:
        """Now; where nobody asked, the host's time, which costs nothing."""
        return time.perf_counter() if self._marks is None else now(self.device)

    def chosen(self, saved: SavedPass) -> None:
        """See ``RankRun``: a schedule computes the mask that it is given."""

    def timeline(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor | None, sink: torch.Tensor | None = None
    ) -> list[list[float]]:
        """One iteration: (number of the rank step, begin, messages sent, tiles computed, messages there) of each, in seconds.

        On CUDA these are times of the stream that computes: "sent" is when messages were allowed to leave.
        """
        self._marks = []
        _, saved = self.forward(q, k, v, sink)
        if dout is not None:
            self.backward(dout, saved)
        rows, self._marks = self._marks, None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        first = rows[0][1][0]
        return [[float(number), *(seconds_between(first, mark) for mark in marks)] for number, marks in rows]

    def _post(self, step: RankStep, turn: int, kinds: Collection[str] = PAYLOADS) -> None:
        """Begin all messages of a round, or those of some kinds: its collectives, and the others in one batch per channel and end.

        A batch has both directions, so no rank waits for its turn.
        """
        for exchange in [e for e in step.exchanges if e.round == turn and e.kind in kinds and self._goes(e)]:
            self._works.setdefault((exchange.end, turn), []).extend(self._post_exchange(exchange))
        sends = [m for m in step.sends if m.round == turn and m.kind in kinds and self._goes(m)]
        receives = [m for m in step.receives if m.round == turn and m.kind in kinds and self._goes(m)]
        for channel, end in sorted({(m.channel, m.end) for m in (*sends, *receives)}):
            group = self._groups[channel]
            outgoing = [(m, self._pack(m)) for m in sends if (m.channel, m.end) == (channel, end)]
            for message, x in outgoing:
                self._sending.count(x.numel() * x.element_size(), message.peer)
            incoming = [(_stretch(self._landing(m)), m.peer) for m in receives if (m.channel, m.end) == (channel, end)]
            works = self._messages([(_stretch(x), m.peer) for m, x in outgoing], incoming, group)
            self._works.setdefault((end, turn), []).extend(works)

    def _messages(
        self, outgoing: list[tuple[torch.Tensor, int]], incoming: list[tuple[torch.Tensor, int]], group: dist.ProcessGroup
    ) -> list[Waits]:
        """Send to peers and receive from peers, in one batch; peers by their numbers within the group."""
        sent, landing, copies = self._sending.ends([x for x, _ in outgoing], [x for x, _ in incoming])
        ops = [dist.P2POp(dist.isend, x, group=group, group_peer=peer) for x, (_, peer) in zip(sent, outgoing, strict=True)]
        ops += [dist.P2POp(dist.irecv, x, group=group, group_peer=peer) for x, (_, peer) in zip(landing, incoming, strict=True)]
        return [*dist.batch_isend_irecv(ops), *copies] if ops else []

    def _post_exchange(self, exchange: Exchange) -> list[Waits]:
        """Begin a collective of this rank's set. What goes to each other rank of it is counted."""
        for message in exchange.packed:
            self._pack(message)
        source, target = self._end(exchange, exchange.source), self._end(exchange, exchange.target)
        group = self._sets[exchange.channel, exchange.ranks]
        (source,), (target,), copies = self._sending.ends([source], [target])
        for rank, size in zip(exchange.ranks, exchange.sent, strict=True):
            if rank != self.rank:
                self._sending.count(size, rank)
        if exchange.operation == "all_gather":
            return [all_gather(target, source, group), *copies]
        if exchange.operation == "reduce_scatter":
            return [reduce_scatter(target, source, group), *copies]
        if exchange.even and all(exchange.sent):
            return [all_to_all(target, source, group), *copies]
        sent, received = (
            [size // x.element_size() for size in of] for of, x in ((exchange.sent, source), (exchange.received, target))
        )
        return [all_to_all(target, source, group, sent, received), *copies]

    def _end(self, exchange: Exchange, end: End) -> torch.Tensor:
        """One end of a collective as a stretch of memory."""
        place, size = end
        if isinstance(place, Buffer):
            flat = self._slots[place.slot][:size].view(self._dtypes[exchange.payload.precision])
        elif isinstance(place, Operand):
            flat = _stretch(self._buffer(place, exchange.begin)).view(-1)
        else:
            flat = _stretch(self._piece(exchange.kind, place, exchange.begin)).view(-1)
        assert flat.numel() * flat.element_size() == size
        return flat

    def _pack(self, message: Message) -> torch.Tensor:
        """What a message sends, as one stretch of memory: where it lies if it is one, else a copy in its staging."""
        if message.staging is None:
            return self._landing(message)
        staged = self._staging(message)
        result = message.payload.combine == "merge"
        if result and not self._compute:
            return staged  # there is no result to send
        if not result and (rows := self._scattered(message)) is not None:
            own, heads = self._own[message.payload.operand], self._heads(message.payload.side, message.group)
            own = own[:, heads][rows] if isinstance(heads, slice) else own[rows[:, None], heads]
            return staged.copy_(own if message.payload.plane is None else self._packing.plane(own, message.payload.plane))
        for piece, part in _cut(message.pieces, staged):
            if result:
                out, lse = self._part(piece)
                part.copy_((lse[:, :, None] if message.kind == "lse" else out)[piece.begin : piece.end])
            else:
                part.copy_(self._rows_of(message, piece, message.begin))
        return staged

    def _scattered(self, message: Message) -> torch.Tensor | None:
        """The rows of a message of many pieces of this rank's own tensor, which are copied or added at once; None for any other."""
        if len(message.pieces) < MOST_STRETCHES or any(piece.buffer is not None for piece in message.pieces):
            return None
        if id(message) not in self._rows:
            rows = np.concatenate([np.arange(piece.begin, piece.end) for piece in message.pieces])
            self._rows[id(message)] = torch.from_numpy(rows).to(self.device)
        return self._rows[id(message)]

    def _landing(self, message: Message) -> torch.Tensor:
        """Where a message arrives, or lies before it leaves: its staging, or the one piece of memory that it is."""
        if message.staging is not None:
            return self._staging(message)
        (piece,) = message.pieces
        return self._piece(message.payload.operand, piece, message.begin)

    def _unpack(self, message: Message) -> None:
        """Take what has arrived from a message's staging, as its payload is combined."""
        if message.staging is None:
            return
        if message.payload.combine == "add" and (rows := self._scattered(message)) is not None:
            heads = self._heads(message.payload.side, message.group)
            if isinstance(heads, slice):  # else a head that is held several times gets all of its gradients, piece by piece
                own, plane = self._own[message.payload.operand], message.payload.plane
                own = own if plane is None else self._packing.plane(own, plane)
                own[:, heads].index_add_(0, rows, self._staging(message).to(own.dtype))
                return
        take = {"replace": self._take_values, "merge": self._take_result, "add": self._take_gradient}[message.payload.combine]
        for piece, part in _cut(message.pieces, self._staging(message)):
            take(message, piece, part)

    def _take_values(self, message: Message, piece: Piece, part: torch.Tensor) -> None:
        self._rows_of(message, piece, message.end).copy_(part)

    def _take_gradient(self, message: Message, piece: Piece, part: torch.Tensor) -> None:
        kind = message.payload.operand
        if piece.buffer is None:
            self._add_own(kind, message.group, (piece.begin, piece.end), part, message.payload.plane)
        else:
            self._rows_of(message, piece, message.end).add_(part)

    def _take_result(self, message: Message, piece: Piece, part: torch.Tensor) -> None:
        """A final out goes to its rows. A partial one waits for its LSE, which comes after it, and is merged."""
        rows = (piece.begin, piece.end)
        waiting = (message.peer, message.group, rows)
        if message.kind == "final":
            out, lse = self._own_total()
            own = slice(*rows), self._heads("q", message.group)
            out[own] = part.to(out.dtype)
            lse[own] = torch.nan
        elif message.kind == "out":
            self._waiting[waiting] = part
        else:
            out = self._waiting.pop(waiting)
            if self._compute:
                self._own_total()  # what arrives lies in memory that others will use, so it is merged, never taken over
                self._absorb(rows, message.group, (out, part[:, :, 0]))

    def _flush(self, operand: Operand, parts: Sequence[OwnPart], number: int) -> None:
        """Merge or add this rank's own part of a mixed bundle to its own rows."""
        for begin, end, at, until in parts:
            if operand.payload.combine == "add":
                self._add_own(operand.kind, operand.group, (begin, end), self._buffer(operand, number)[at:until])
            else:
                out, lse = self._part(Piece(operand, operand.group, at, until))
                self._absorb((begin, end), operand.group, (out[at:until], lse[at:until]))

    # -- memory ----------------------------------------------------------------------------------------------------

    def _value(self, kind: str, call: TileCall, number: int) -> torch.Tensor:
        """An operand of a tile: a view of this rank's own tensor, or its buffer."""
        operand = call.operand(kind)
        rows = self._program.local(operand)
        if rows is None:
            return self._buffer(operand, number)
        return self._own_rows(kind, call.group, *rows)

    def _own_rows(self, kind: str, group: int, begin: int, end: int) -> torch.Tensor:
        """Rows of this rank's own tensor of a kind of operand, for the heads of a group."""
        return self._own[kind][begin:end, self._heads(PAYLOADS[kind].side, group)]

    def _heads(self, side: Kind, group: int) -> HeadIndex:
        """The heads of a group as an index of tensors with all heads."""
        return self._q_heads[group] if side == "q" else self._kv_heads[group]

    def _piece(self, kind: str, piece: Piece, number: int) -> torch.Tensor:
        """Rows of an operand of a kind, in its buffer or in this rank's own tensor."""
        if piece.buffer is None:
            return self._own_rows(kind, piece.group, piece.begin, piece.end)
        return self._buffer(piece.buffer, number)[piece.begin : piece.end]

    def _rows_of(self, message: Message, piece: Piece, number: int) -> torch.Tensor:
        """Rows of the operand that a message is about, of keys or values alone where it has only these."""
        rows = self._piece(message.payload.operand, piece, number)
        return rows if message.payload.plane is None else self._packing.plane(rows, message.payload.plane)

    def _buffer(self, operand: Operand, number: int) -> torch.Tensor:
        memory = self._program.buffer(operand, number)
        tokens = self._program.operand_tokens(operand)
        return self._view(memory, operand.kind, self.schedule.heads[operand.group], tokens, operand.payload.held)

    def _staging(self, message: Message) -> torch.Tensor:
        assert message.staging is not None
        group = self.schedule.heads[message.group]
        return self._view(message.staging, message.kind, group, message.tokens, message.payload.precision, message.offset)

    def _view(
        self, memory: Buffer, kind: str, group: HeadGroup, tokens: int, precision: Precision, offset: int = 0
    ) -> torch.Tensor:
        """(tokens, heads of the group, ...) in a slot, ``offset`` bytes after its begin; made once."""
        views = self._views.setdefault(memory.slot, {})
        found = views.get((id(memory), offset))
        if found is None:
            payload = PAYLOADS[kind]
            heads = group.count(payload.side)
            size = tokens * token_bytes(kind, group, self.problem, precision)
            flat = self._slots[memory.slot][offset : offset + size].view(self._dtypes[precision])
            if payload.width == "key and value":
                found = self._packing.view(flat, tokens, heads, gradients=payload.combine == "add")
            else:
                found = flat.view(tokens, heads, payload.elements(self.problem.heads))
            views[id(memory), offset] = found
        return found


def _stretch(x: torch.Tensor) -> torch.Tensor:
    """A tensor as the stretch of memory that it is: keys and values that lie apart, (T, Hk, 2, D), as (2, T, Hk, D)."""
    return x if x.is_contiguous() else x.permute(2, 0, 1, 3)


def now(device: torch.device) -> Mark:
    """The host's time, or an event in the device's stream, for which nothing waits."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Mark, mark: Mark) -> float:
    """What passes from one to the other; both events have happened."""
    if isinstance(first, float) or isinstance(mark, float):
        assert isinstance(first, float)
        assert isinstance(mark, float)
        return mark - first
    return float(first.elapsed_time(mark)) / 1e3


def _merged(one: Partial, other: Partial) -> Partial:
    """Both merged, in the memory of the first if that has the type of sums."""
    out, lse = one[0].to(other[1].dtype), one[1]
    merge_into(out, lse, *other)
    return out, lse


def _final_lse(message: Message, saved: SavedPass) -> torch.Tensor:
    """The LSE (tokens, heads of the group) of the rows of a message, of results that this rank alone computed."""
    parts = [saved.finals[p.buffer.group, p.buffer.bundle][1][p.begin : p.end] for p in message.pieces if p.buffer]
    return torch.cat(parts).contiguous()


def _cut(pieces: list[Piece], x: torch.Tensor) -> list[tuple[Piece, torch.Tensor]]:
    """Each piece with its rows of a message's memory."""
    return list(zip(pieces, x.split([p.end - p.begin for p in pieces]), strict=True))


def _out_with(delta: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """An ``out`` (T, H, D) whose product with dout sums to ``delta`` (T, H): a kernel's backward uses out for nothing else."""
    square = dout.to(delta.dtype).square().sum(-1)
    return (dout * (delta / torch.where(square == 0, 1.0, square))[..., None]).to(dout.dtype)
