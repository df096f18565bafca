"""Run a schedule with torch.distributed: the one engine behind every strategy, forward and backward.

What happens when is a ``Program``; here it meets tensors. At every moment messages leave in one batch per channel, tiles are
computed while they are under way, then what has arrived is merged or added. Memory of buffers is taken once and shared by those
that live at different times. On CUDA nothing in here waits on the host: messages wait for what was computed before them, and
what is computed next waits for messages, on the device.

Tensors are packed: q, out (T, Hq, D), keys and values together (T, Hk, 2, D): any stretch of tokens is one stretch of memory. For a
kernel that wants each contiguous they lie in memory as (2, T, Hk, D), and are looked at as the same. Out, LSE and gradients are
summed in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lcbench.kernels.base import Kernel, Prepared, accumulation_dtype, prepare
from lcbench.kernels.base import Saved as Attended
from lcbench.kernels.merge import merge_into
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem
from lcbench.schedule.adjoint import CARGO, held_precision, token_bytes, traffic
from lcbench.schedule.lowering import Lowering, operations_of, sets_of
from lcbench.schedule.program import Buffer, Exchange, Message, Operand, Piece, Program, RankStep, TileCall
from lcbench.schedule.schedule import HeadGroup, Schedule

HeadIndex = slice | torch.Tensor
Part = tuple[torch.Tensor, torch.Tensor]  # out, lse
Mark = float | torch.cuda.Event
TileRun = Callable[[TileCall, Prepared, int], None]


class Groups:
    """Process groups by channel and set of ranks, made once and kept until the process group of all ranks is destroyed.

    Making one is slow, takes device memory, and is collective: all ranks ask for the same groups in the same order, those too
    that are not in them.
    """

    def __init__(self, *, timeout: timedelta | None = None, through_host: bool | None = None) -> None:
        """
        Args:
            timeout: of operations; None: the backend's own.
            through_host: see ``goes_through_host``; None: as the backend needs it.
        """
        self._timeout, self._through_host = timeout, through_host
        self._groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup | None] = {}

    def of(self, channel: str) -> dist.ProcessGroup:
        """The communicator of a channel, over all ranks. Collective on first use."""
        group = self.among(tuple(range(dist.get_world_size())), channel)
        assert group is not None
        return group

    def among(self, ranks: tuple[int, ...], channel: str = "main") -> dist.ProcessGroup | None:
        """The communicator of some ranks on a channel, None on the others. Collective over all ranks on first use.

        The ranks are in ascending order within the group, however they are given. On ``main`` that of all ranks is the default one.
        """
        members = tuple(sorted(set(ranks)))
        key = channel, members
        if key not in self._groups:
            if key == ("main", tuple(range(dist.get_world_size()))):
                self._groups[key] = dist.group.WORLD
            else:
                made = dist.new_group(list(members), self._timeout, pg_options=group_options(dist.get_backend()))
                self._groups[key] = made if dist.get_rank() in members else None
        return self._groups[key]

    def goes_through_host(self, device: torch.device) -> bool:
        """Whether messages of this device's tensors are copied to the host's memory and back: gloo sends no others.

        (It has collectives that do so by themselves, and no point-to-point.)
        """
        if self._through_host is not None:
            return self._through_host
        return device.type == "cuda" and dist.get_backend() == "gloo"


class Waits(Protocol):
    """Something that is under way."""

    def wait(self) -> Any: ...


def group_options(backend: str) -> Any:
    """How a process group is made: NCCL's copies go ahead of kernels that wait for a multiprocessor.

    An attention kernel that fills the device would hold them back until its thread blocks end. Other backends: None.
    """
    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True) if backend == "nccl" else None


@dataclass(frozen=True)
class Saved:
    """What backward needs of forward besides kept buffers, which the next forward overwrites.

    ``out`` (T, Hq, D) and ``lse`` (T, Hq) are of this rank's own tokens (LSE is NaN where another rank alone computed them);
    ``finals`` of the operands whose every key this rank computed. ``kv`` are keys and values together; apart where nothing moves.
    """

    q: torch.Tensor
    kv: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    out: torch.Tensor
    lse: torch.Tensor
    finals: dict[tuple[int, tuple[int, ...]], Part]


class Executor:
    """One rank's run of a schedule. What depends on the mask alone is prepared here, outside of any timing.

    Attributes:
        bytes_sent: counted where it is sent, since ``forward`` or ``backward`` last began.
        buffer_bytes: memory that is held for buffers as long as this object lives.
        calls: native kernel calls of this rank's forward pass.
        pairs: unmasked pairs that this rank computes, over the query heads that it computes them for.
        collectives: the operations that go by collectives, by name.
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
    ) -> None:
        self.schedule, self.problem, self.rank, self.device = schedule, problem, rank, device
        self.bytes_sent = 0
        self._marks: list[tuple[int, list[Mark]]] | None = None
        self._apart: dict[tuple[int, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}
        self._sets: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}
        moves = traffic(schedule, backward=problem.backward)
        self._forward_moments = moves.steps
        operations = operations_of(lowering, dist.get_backend()) if moves.transfers else ()
        self._planes = kernel.contiguous_kv
        self._program = Program(schedule, moves, problem, rank, operations, planes=self._planes)
        self._through_host = bool(moves.transfers) and groups.goes_through_host(device)
        # Every rank makes every group, in the same order.
        self._groups = {channel: groups.of(channel) for channel in sorted({t.channel for t in moves.transfers})}
        for channel, members in sets_of(moves, self._program.lowered):
            if (made := groups.among(members, channel)) is not None:
                self._sets[channel, members] = made
        self.buffer_bytes = self._program.buffer_bytes
        self.collectives = sorted({each.operation for each in self._program.lowered if each is not None})
        self._slots = [torch.zeros(size, dtype=torch.uint8, device=device) for size in self._program.slots]
        indices = [group.kv_heads for group in schedule.heads]
        self._kv_heads: list[HeadIndex] = [
            heads if isinstance(heads, slice) else torch.tensor(heads, device=device) for heads in indices
        ]
        input_dtype = getattr(torch, problem.dtype)
        self._tiles, self.pairs, self.calls = self._prepare(mask, kernel, input_dtype)
        self._alone = self._only_kernel()
        sums = accumulation_dtype(input_dtype)
        self._dtypes = {"input": input_dtype, "sum": sums, "transit": input_dtype if problem.transit == "input" else sums}
        self._views: dict[tuple[int, int], torch.Tensor] = {}
        self._compute = self._communicate = True

    def _prepare(self, mask: Mask, kernel: Kernel, dtype: torch.dtype) -> tuple[dict[TileCall, Prepared | None], int, int]:
        """Every tile's kernel, its pairs and its calls; tiles of one mask at one place share what was prepared."""
        total = self.problem.heads.q
        made: dict[tuple[int, Heads, tuple[int, ...], tuple[int, ...]], tuple[Mask, Prepared | None]] = {}
        masks = [mask.of_heads(group.begin, len(group), total) for group in self.schedule.heads]
        found: dict[TileCall, Prepared | None] = {}
        pairs = calls = 0
        for moment in self._program.moments[: self._forward_moments]:
            for call in moment.tiles:
                group = self.schedule.heads[call.group]
                heads = Heads(len(group), len(group.kv), self.problem.heads.dim)
                key = (id(masks[call.group]), heads, call.q, call.k)
                if key not in made:
                    runs = self.schedule.runs(call.q), self.schedule.runs(call.k)
                    tile = masks[call.group].tile(*runs).merged()
                    made[key] = tile, prepare(kernel, tile, heads, dtype, self.device) if len(tile) else None
                tile, found[call] = made[key]
                pairs += tile.pairs(len(group))
                ready = found[call]
                calls += ready.calls if ready else 0
        return found, pairs, calls

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, compute: bool = True, communicate: bool = True
    ) -> tuple[torch.Tensor, Saved]:
        """out (T, Hq, D) of this rank's tokens from its q (T, Hq, D) and k, v (T, Hk, D), and what backward needs.

        Without ``compute`` or without ``communicate`` the rest goes through the same motions, and results mean nothing.
        """
        self._begin(compute, communicate)
        if compute and self._alone is not None and self._marks is None:
            out, lse = self._typed(self._alone.forward(q, k, v, softmax_scale=self.problem.softmax_scale))
            saved = Saved(q, (k, v), out.to(q.dtype), lse, {})
            return saved.out, saved
        self._own: dict[str, torch.Tensor] = {"q": q, "kv": self._packed(k, v)}
        self._parts: dict[tuple[int, tuple[int, ...]], Part] = {}
        self._total: Part | None = None
        for number in range(self._forward_moments):
            self._moment(number, self._forward_tile)
        out, lse = self._total or self._empty()
        finals = {key: (part[0].to(q.dtype), part[1]) for key, part in self._parts.items() if key in self._program.finals}
        saved = Saved(q, self._own["kv"], out.to(q.dtype), lse, finals)
        self._own, self._parts, self._total, self._apart = {}, {}, None, {}
        return saved.out, saved

    def _only_kernel(self) -> Prepared | None:
        """The kernel of the only tile, if that is all tokens and heads of a single rank: nothing is then packed or summed,
        and the time of a cell without context parallelism is its kernel's."""
        if self.schedule.world_size > 1 or len(self._tiles) != 1:
            return None
        ((call, kernel),) = self._tiles.items()
        tokens = (0, self._program.tokens)
        operands = Operand("q", call.group, call.q), Operand("kv", call.group, call.k)
        whole = all(self._program.local(operand) == tokens for operand in operands)
        group, heads = self.schedule.heads[call.group], self.problem.heads
        every = (len(group), group.kv_heads) == (heads.q, slice(0, heads.kv))
        return kernel if whole and every else None

    def _packed(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Keys and values together, (T, Hk, 2, D) to look at."""
        return torch.stack([k, v]).permute(1, 2, 0, 3) if self._planes else torch.stack([k, v], dim=2)

    def _keys_and_values(self, call: TileCall, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v (T, Hk, D) of a tile, as its kernel wants them: some heads of this rank's own are copied once in a pass."""
        k, v = self._value("kv", call, number).unbind(2)
        if not self._planes or (k.is_contiguous() and v.is_contiguous()):
            return k, v
        key = (call.group, call.k)
        if key not in self._apart:
            self._apart[key] = k.contiguous(), v.contiguous()
        return self._apart[key]

    def _typed(self, part: Part) -> Part:
        """A kernel's result in the engine's types, since both ends of a message take its size from them: LSE in the type of sums,
        out in it or in the inputs'."""
        out, lse = part
        sums = self._dtypes["sum"]
        return out if out.dtype in (self._dtypes["input"], sums) else out.to(sums), lse.to(sums)

    def _forward_tile(self, call: TileCall, kernel: Prepared, number: int) -> None:
        q, (k, v) = self._value("q", call, number), self._keys_and_values(call, number)
        part = self._typed(kernel.forward(q, k, v, softmax_scale=self.problem.softmax_scale))
        rows = self._program.local(Operand("q", call.group, call.q))
        if rows is not None:
            self._absorb(rows, call.group, part)
            return
        key = (call.group, call.q)
        self._parts[key] = _merged(self._parts[key], part) if key in self._parts else part

    def _absorb(self, rows: tuple[int, int], group: int, part: Part) -> None:
        """Merge a partial result into this rank's own rows."""
        heads = self._heads("q", group)
        begin, end = rows
        whole = (begin, end) == (0, self._program.tokens) and heads == slice(0, self.problem.heads.q)
        if whole:
            self._total = part if self._total is None else _merged(self._total, part)
            return
        out, lse = self._own_total()
        if self._program.all_final:
            out[begin:end, heads], lse[begin:end, heads] = part[0].to(out.dtype), part[1]
        else:
            merge_into(out[begin:end, heads], lse[begin:end, heads], *part)

    def _own_total(self) -> Part:
        """This rank's own result to write into, in the type that merging needs."""
        out, lse = self._total or self._empty()
        if not self._program.all_final and out.dtype != self._dtypes["sum"]:
            out = out.to(self._dtypes["sum"])
        self._total = out, lse
        return self._total

    def _empty(self) -> Part:
        """No key yet: zeros and -inf."""
        shape = (self._program.tokens, self.problem.heads.q, self.problem.heads.dim)
        dtype = self._dtypes["input" if self._program.all_final else "sum"]
        out = torch.zeros(shape, dtype=dtype, device=self.device)
        return out, torch.full(shape[:2], -torch.inf, dtype=self._dtypes["sum"], device=self.device)

    def _part(self, piece: Piece) -> Part:
        """This rank's partial result of queries that it does not own; zeros and -inf where their tiles hold no pair."""
        assert piece.buffer is not None
        key = (piece.buffer.group, piece.buffer.bundle)
        if key not in self._parts:
            heads = len(self.schedule.heads[piece.group])
            tokens = self._program.operand_tokens(piece.buffer)
            out = torch.zeros((tokens, heads, self.problem.heads.dim), dtype=self._dtypes["sum"], device=self.device)
            self._parts[key] = out, torch.full(out.shape[:2], -torch.inf, dtype=self._dtypes["sum"], device=self.device)
        return self._parts[key]

    def lse(self, saved: Saved) -> torch.Tensor:
        """LSE (T, Hq) of this rank's own tokens. Collective; apart from ``forward``, since only the check needs it."""
        lse = saved.lse.clone()
        for moment in self._program.moments[: self._forward_moments]:
            sends = [m for m in moment.sends if m.kind == "final"]
            sends += [m for exchange in moment.exchanges if exchange.kind == "final" for m in exchange.packed]
            receives = [m for m in (*moment.receives, *moment.exchanged) if m.kind == "final"]
            packed = []
            for message in sends:
                parts = [saved.finals[p.buffer.group, p.buffer.bundle][1][p.begin : p.end] for p in message.pieces if p.buffer]
                packed.append(torch.cat(parts).contiguous())
            arrived = [
                torch.empty((m.tokens, len(self.schedule.heads[m.group])), dtype=lse.dtype, device=self.device) for m in receives
            ]
            outgoing = [(x, m.peer) for m, x in zip(sends, packed, strict=True)]
            _wait(self._messages(outgoing, [(x, m.peer) for m, x in zip(receives, arrived, strict=True)], None))
            for message, x in zip(receives, arrived, strict=True):
                for piece, part in _cut(message.pieces, x):
                    lse[piece.begin : piece.end, self._heads("q", message.group)] = part
        return lse

    # -- backward --------------------------------------------------------------------------------------------------

    def backward(
        self, dout: torch.Tensor, saved: Saved, *, compute: bool = True, communicate: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of this rank's tokens from its dout (T, Hq, D), in the inputs' type."""
        self._begin(compute, communicate)
        if isinstance(saved.kv, tuple):
            assert self._alone is not None
            whole = Attended(saved.q, *saved.kv, saved.out, saved.lse)
            grads = self._alone.backward(dout, whole, softmax_scale=self.problem.softmax_scale)
            dq, dk, dv = (grad.to(dout.dtype) for grad in grads)
            return dq, dk, dv
        sums = self._dtypes["sum"]
        self._own = {
            "q": saved.q, "kv": saved.kv, "dout": dout,
            "dq": torch.zeros(saved.q.shape, dtype=sums, device=self.device),
            "dkv": torch.zeros(saved.kv.shape, dtype=sums, device=self.device),
        }  # fmt: skip
        if self._program.sends_stats:
            delta = (dout.to(sums) * saved.out).sum(-1)
            self._own["stats"] = torch.stack([saved.lse, delta], dim=2)
        self._saved = saved
        for number in range(self._forward_moments, 2 * self._forward_moments + 1):
            self._moment(number, self._backward_tile)
        dq, dkv = self._own["dq"].to(dout.dtype), self._own["dkv"].to(dout.dtype)
        self._own, self._apart = {}, {}
        del self._saved
        return dq, dkv[:, :, 0], dkv[:, :, 1]

    def _backward_tile(self, call: TileCall, kernel: Prepared, number: int) -> None:
        q, dout = (self._value(kind, call, number) for kind in ("q", "dout"))
        k, v = self._keys_and_values(call, number)
        operand = Operand("q", call.group, call.q)
        rows = self._program.local(operand)
        if rows is not None:
            own = slice(*rows), self._heads("q", call.group)
            out, lse = self._saved.out[own], self._saved.lse[own]
        elif (call.group, call.q) in self._program.finals:
            out, lse = self._saved.finals[call.group, call.q]
        else:
            lse, delta = self._value("stats", call, number).unbind(-1)
            out = _out_with(delta, dout)
        tile = Attended(q, k, v, out, lse.contiguous())
        dq, dk, dv = kernel.backward(dout, tile, softmax_scale=self.problem.softmax_scale)
        self._add("dq", call, number, [dq])
        self._add("dkv", call, number, [dk, dv])

    def _add(self, kind: str, call: TileCall, number: int, grads: Sequence[torch.Tensor]) -> None:
        """Add a tile's gradients, dkv as dk and dv, to where they are summed."""
        operand = Operand(kind, call.group, call.q if kind == "dq" else call.k)
        rows = self._program.local(operand)
        total = self._buffer(operand, number) if rows is None else self._own_rows(kind, call.group, *rows)
        for own, grad in zip(total.unbind(2) if kind == "dkv" else [total], grads, strict=True):
            own += grad

    def _add_own(self, kind: str, group: int, rows: tuple[int, int], grad: torch.Tensor) -> None:
        own, heads = self._own[kind][slice(*rows)], self._heads(CARGO[kind].side, group)
        if isinstance(heads, slice):
            own[:, heads] += grad
        else:  # a head that is held several times gets all of its gradients
            own.index_add_(1, heads, grad.to(own.dtype))

    # -- moments ---------------------------------------------------------------------------------------------------

    def _begin(self, compute: bool, communicate: bool) -> None:
        self.bytes_sent = 0
        self._compute, self._communicate = compute, communicate
        self._works: dict[tuple[int, int], list[Waits]] = {}  # by when they end, and round
        self._apart = {}
        self._waiting: dict[tuple[int, int, tuple[int, int]], torch.Tensor] = {}

    def _moment(self, number: int, run_tile: TileRun) -> None:
        moment = self._program.moments[number]
        marks = [self._mark()]
        for operand, parts in moment.filled:
            buffer = self._buffer(operand, number)
            for begin, end, to, until in parts:
                buffer[to:until] = self._own_rows(operand.kind, operand.group, begin, end)
        for operand in moment.zeroed:
            self._buffer(operand, number).zero_()
        rounds = moment.rounds if self._communicate else 0
        for turn in range(min(rounds, 2)):
            self._post(moment, turn)
        marks.append(self._mark())
        if self._compute:
            for call in moment.tiles:
                kernel = self._tiles[call]
                if kernel is not None:
                    run_tile(call, kernel, number)
        marks.append(self._mark())
        for turn in range(rounds):
            _wait(self._works.pop((number, turn), []))
            for message in moment.arrivals:
                if message.round == turn:
                    self._unpack(message)
            if turn + 2 < rounds:  # while the next one arrives
                self._post(moment, turn + 2)
        if self._compute:
            for operand, parts in moment.flushes:
                self._flush(operand, parts, number)
        marks.append(self._mark())
        if self._marks is not None:
            self._marks.append((number, marks))

    def _mark(self) -> Mark:
        """Now, on the host, or on the device in what it has to do: without waiting for it."""
        if self._marks is None or self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timeline(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor | None) -> list[list[float]]:
        """One iteration: (moment, begin, messages sent, tiles computed, messages there) of each moment, in seconds.

        On CUDA these are times of the stream that computes: "sent" is when messages were allowed to leave.
        """
        self._marks = []
        _, saved = self.forward(q, k, v)
        if dout is not None:
            self.backward(dout, saved)
        rows, self._marks = self._marks, None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        first = rows[0][1][0]
        return [[float(number), *(_seconds(first, mark) for mark in marks)] for number, marks in rows]

    def _post(self, moment: RankStep, turn: int) -> None:
        """All messages of a round: its collectives, and the others in one batch per channel and end: both directions at once, so
        that nobody waits for a turn."""
        for exchange in [e for e in moment.exchanges if e.round == turn]:
            self._works.setdefault((exchange.end, turn), []).extend(self._post_exchange(exchange))
        sends = [m for m in moment.sends if m.round == turn]
        receives = [m for m in moment.receives if m.round == turn]
        for channel, end in sorted({(m.channel, m.end) for m in (*sends, *receives)}):
            group = self._groups[channel]
            outgoing = [(m, self._pack(m)) for m in sends if (m.channel, m.end) == (channel, end)]
            self.bytes_sent += sum(x.numel() * x.element_size() for _, x in outgoing)
            incoming = [(_stretch(self._landing(m)), m.peer) for m in receives if (m.channel, m.end) == (channel, end)]
            works = self._messages([(_stretch(x), m.peer) for m, x in outgoing], incoming, group)
            self._works.setdefault((end, turn), []).extend(works)

    def _messages(
        self, outgoing: list[tuple[torch.Tensor, int]], incoming: list[tuple[torch.Tensor, int]], group: dist.ProcessGroup | None
    ) -> list[Waits]:
        """Send to peers and receive from peers, in one batch."""
        sent, landing, copies = self._ends([x for x, _ in outgoing], [x for x, _ in incoming])
        ops = [dist.P2POp(dist.isend, x, peer, group) for x, (_, peer) in zip(sent, outgoing, strict=True)]
        ops += [dist.P2POp(dist.irecv, x, peer, group) for x, (_, peer) in zip(landing, incoming, strict=True)]
        return [*dist.batch_isend_irecv(ops), *copies] if ops else []

    def _ends(
        self, outgoing: list[torch.Tensor], incoming: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[Waits]]:
        """What the backend is given to send and to receive into, and what is to be waited for after it.

        Where messages go through the host's memory, the host waits here for what is sent to be computed and copied.
        """
        if not self._through_host:
            return outgoing, incoming, []
        sent, landing = ([self._on_host(x) for x in each] for each in (outgoing, incoming))
        for host, x in zip(sent, outgoing, strict=True):
            host.copy_(x, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return sent, landing, [FromHost(list(zip(landing, incoming, strict=True)))]

    def _on_host(self, x: torch.Tensor) -> torch.Tensor:
        # torch hands pinned memory out again only when copies from it are done.
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=self.device.type == "cuda")

    def _post_exchange(self, exchange: Exchange) -> list[Waits]:
        """A collective of this rank's set. Counted is what goes to the others of it."""
        for message in exchange.packed:
            self._pack(message)
        (source, size), others = self._end(exchange, exchange.source), len(exchange.ranks) - 1
        target, _ = self._end(exchange, exchange.target)
        group = self._sets[exchange.channel, exchange.ranks]
        (source,), (target,), copies = self._ends([source], [target])
        gathers = exchange.operation == "all_gather"
        self.bytes_sent += size * others if gathers else size // (others + exchange.own) * others
        if gathers:
            return [_all_gather(target, source, group), *copies]
        if exchange.operation == "reduce_scatter":
            return [_reduce_scatter(target, source, group), *copies]
        block = source.numel() // (others + exchange.own)
        splits = None if exchange.own else [0 if rank == self.rank else block for rank in exchange.ranks]
        return [dist.all_to_all_single(target, source, splits, splits, group=group, async_op=True), *copies]

    def _end(self, exchange: Exchange, end: tuple[Buffer | Operand | Piece, int]) -> tuple[torch.Tensor, int]:
        """One end of a collective as a stretch of memory, and its bytes."""
        place, size = end
        if isinstance(place, Buffer):
            flat = self._slots[place.slot][:size].view(self._dtypes[CARGO[exchange.kind].precision])
        elif isinstance(place, Operand):
            flat = _stretch(self._buffer(place, exchange.begin)).view(-1)
        else:
            flat = _stretch(self._piece(exchange.kind, place, exchange.begin)).view(-1)
        assert flat.numel() * flat.element_size() == size
        return flat, size

    def _pack(self, message: Message) -> torch.Tensor:
        """What a message sends, as one stretch of memory: where it lies if it is one, else copied into its staging."""
        if message.staging is None:
            return self._landing(message)
        staged = self._staging(message)
        if message.kind in ("out", "lse", "final") and not self._compute:
            return staged  # there is no result to send
        for piece, part in _cut(message.pieces, staged):
            if message.kind in ("out", "lse", "final"):
                out, lse = self._part(piece)
                part.copy_((lse[:, :, None] if message.kind == "lse" else out)[piece.begin : piece.end])
            else:
                part.copy_(self._piece(message.kind, piece, message.begin))
        return staged

    def _landing(self, message: Message) -> torch.Tensor:
        """Where a message arrives, or lies before it leaves: its staging, or the one piece of memory that it is."""
        if message.staging is not None:
            return self._staging(message)
        (piece,) = message.pieces
        return self._piece(message.kind, piece, message.begin)

    def _unpack(self, message: Message) -> None:
        if message.staging is None:
            return
        kind = message.kind.removeprefix("final_")
        for piece, part in _cut(message.pieces, self._staging(message)):
            rows = (piece.begin, piece.end)
            if kind == "out":  # waits for its LSE, which comes behind it
                self._waiting[message.peer, message.group, rows] = part
            elif kind == "lse":
                out = self._waiting.pop((message.peer, message.group, rows))
                if self._compute:
                    self._own_total()  # what arrives lies in memory that others will use, so it is merged, never taken over
                    self._absorb(rows, message.group, (out, part[:, :, 0]))
            elif kind == "final":
                out, lse = self._own_total()
                own = slice(*rows), self._heads("q", message.group)
                out[own] = part.to(out.dtype)
                lse[own] = torch.nan
            elif kind in ("dq", "dkv"):
                if piece.buffer is None:
                    self._add_own(kind, message.group, rows, part)
                else:
                    self._piece(kind, piece, message.end).add_(part)
            else:
                self._piece(kind, piece, message.end).copy_(part)

    def _flush(self, operand: Operand, parts: Sequence[tuple[int, int, int, int]], number: int) -> None:
        """The own part of a bundle that is mixed with others': its sums join this rank's own."""
        for begin, end, at, until in parts:
            if operand.kind == "q":
                piece = Piece(operand, operand.group, at, until)
                out, lse = self._part(piece)
                self._absorb((begin, end), operand.group, (out[at:until], lse[at:until]))
            else:
                self._add_own(operand.kind, operand.group, (begin, end), self._buffer(operand, number)[at:until])

    # -- memory ----------------------------------------------------------------------------------------------------

    def _value(self, kind: str, call: TileCall, number: int) -> torch.Tensor:
        """An operand of a tile: a view of this rank's own tensor, or its buffer."""
        side = CARGO[kind].side
        operand = Operand(kind, call.group, call.q if side == "q" else call.k)
        rows = self._program.local(operand)
        if rows is None:
            return self._buffer(operand, number)
        return self._own_rows(kind, call.group, *rows)

    def _own_rows(self, kind: str, group: int, begin: int, end: int) -> torch.Tensor:
        return self._own[kind][begin:end, self._heads(CARGO[kind].side, group)]

    def _heads(self, side: str, group: int) -> HeadIndex:
        """The heads of a group in tensors that have all of them."""
        members = self.schedule.heads[group]
        return slice(members.begin, members.end) if side == "q" else self._kv_heads[group]

    def _piece(self, kind: str, piece: Piece, number: int) -> torch.Tensor:
        kind = kind.removeprefix("final_")
        if piece.buffer is None:
            return self._own_rows(kind, piece.group, piece.begin, piece.end)
        return self._buffer(piece.buffer, number)[piece.begin : piece.end]

    def _buffer(self, operand: Operand, number: int) -> torch.Tensor:
        memory = self._program.buffer(operand, number)
        tokens = self._program.operand_tokens(operand)
        return self._view(memory, operand.kind, self.schedule.heads[operand.group], tokens, held_precision(operand.kind))

    def _staging(self, message: Message) -> torch.Tensor:
        assert message.staging is not None
        group = self.schedule.heads[message.group]
        return self._view(message.staging, message.kind, group, message.tokens, CARGO[message.kind].precision, message.offset)

    def _view(self, memory: Buffer, kind: str, group: HeadGroup, tokens: int, precision: str, offset: int = 0) -> torch.Tensor:
        """(tokens, heads of the group, ...) in a slot, ``offset`` bytes after its begin; made once."""
        found = self._views.get((id(memory), offset))
        if found is None:
            cargo, dim = CARGO[kind], self.problem.heads.dim
            heads = len(group) if cargo.side == "q" else len(group.kv)
            shape = {0: (tokens, heads, cargo.extra), 1: (tokens, heads, dim), 2: (tokens, heads, 2, dim)}[cargo.dims]
            size = tokens * token_bytes(kind, group, self.problem, precision)
            found = self._slots[memory.slot][offset : offset + size].view(self._dtypes[precision])
            apart = kind == "kv" and self._planes
            found = found.view(2, tokens, heads, dim).permute(1, 2, 0, 3) if apart else found.view(shape)
            self._views[id(memory), offset] = found
        return found


@dataclass(frozen=True)
class FromHost:
    """Copies of what has arrived in the host's memory, (host, where it belongs), in the order of the stream of computation."""

    pairs: list[tuple[torch.Tensor, torch.Tensor]]

    def wait(self) -> None:
        for host, x in self.pairs:
            x.copy_(host, non_blocking=True)


def _wait(works: list[Waits]) -> None:
    """A function of its own: by its name a hang is told that waits for other ranks (``runs/failure.py``)."""
    for work in works:
        work.wait()


def _all_gather(target: torch.Tensor, source: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Under its name of torch 2.13 or of before."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(target, source, group=group, async_op=True)


def _reduce_scatter(target: torch.Tensor, source: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(target, source, group=group, async_op=True)


def _stretch(x: torch.Tensor) -> torch.Tensor:
    """Keys and values that lie apart, (T, Hk, 2, D) to look at, as the stretch of memory (2, T, Hk, D) that they are."""
    return x if x.is_contiguous() else x.permute(2, 0, 1, 3)


def _seconds(first: Mark, mark: Mark) -> float:
    if isinstance(first, float) or isinstance(mark, float):
        assert isinstance(first, float)
        assert isinstance(mark, float)
        return mark - first
    return float(first.elapsed_time(mark)) / 1e3


def _merged(one: Part, other: Part) -> Part:
    """The two together, in the memory of the first if that has the type of sums."""
    out, lse = one[0].to(other[1].dtype), one[1]
    merge_into(out, lse, *other)
    return out, lse


def _cut(pieces: list[Piece], x: torch.Tensor) -> list[tuple[Piece, torch.Tensor]]:
    """The parts of a message's memory that belong to its pieces."""
    return list(zip(pieces, x.split([p.end - p.begin for p in pieces]), strict=True))


def _out_with(delta: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """An ``out`` (T, H, D) whose product with dout sums to ``delta`` (T, H): all that a kernel's backward takes out for."""
    square = dout.to(delta.dtype).square().sum(-1)
    return (dout * (delta / torch.where(square == 0, 1.0, square))[..., None]).to(dout.dtype)
