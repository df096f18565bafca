"""Runs a schedule of linear attention on one rank: what moves by the table of payloads, stretches of tokens by a kernel.

It is beside ``execute``, whose results are merged and whose memory grows with what ranks hold of one another: here a result is
whole, and what stays of other ranks' tokens is a state. Nothing is placed in memory ahead; what comes lies in a tensor of its own.

A rank works out the summary of its own tokens first where others wait for something with it in it. If it then has nothing to send
on in forward before its tokens are due (the last of a chain, all of an all-gather), it computes what of them needs no state, while
the state is on its way. One stream computes: earlier, that would hold up what others of a chain wait for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from lcbench.kernels.base import accumulation_dtype
from lcbench.kernels.linear import LinearKernel, PreparedScan, Summary, Tokens
from lcbench.masks.band import Ints
from lcbench.problem import Problem
from lcbench.schedule.adjoint import Transfer, traffic
from lcbench.schedule.execute import Counters, Mark, now, seconds_between
from lcbench.schedule.groups import Groups
from lcbench.schedule.held import Held, Part
from lcbench.schedule.lowering import Collective, Lowering, collectives, operations_of, sets_of
from lcbench.schedule.messages import Sending, Waits, all_gather, all_to_all, wait_all
from lcbench.schedule.payload import PAYLOADS, Precision
from lcbench.schedule.schedule import HeadGroup, MoveColumn, Schedule, TileColumn
from lcbench.schedule.states import PASSES, Arrivals, backward_times, received_bytes, summarised

Item = tuple[str, int, int]  # kind, shard, head group
Stretch = tuple[int, int]  # head group, bundle
GRADIENTS = {"final_dq": "dq", "final_dkv": "dkv", "final_dgates": "dgates"}  # a kind by the sum that it is all of


@dataclass(frozen=True)
class Post:
    """What a rank has to do with a transfer: the items that it sends to each peer, and those that it gets, in one order at both
    ends."""

    transfer: Transfer
    collective: Collective | None
    sends: dict[int, list[Item]]
    receives: dict[int, list[Item]]


@dataclass
class Kept:
    """What backward needs: the tokens, and what the kernel has saved of each stretch. Messages of forward are in neither."""

    x: Tokens
    saved: dict[Stretch, Any] = field(default_factory=dict)


@dataclass
class _Pass:
    """A pass under way.

    Attributes:
        items: what others have sent, and what is to be sent to them, as flat tensors.
        own: the summary of this rank's tokens, of all heads or by head group.
        local: what was computed of a stretch without a state.
    """

    backward: bool
    kept: Kept
    dout: torch.Tensor | None = None
    items: dict[Item, torch.Tensor] = field(default_factory=dict)
    own: dict[int, Summary] = field(default_factory=dict)
    local: dict[Stretch, Any] = field(default_factory=dict)
    works: dict[int, list[Waits]] = field(default_factory=lambda: defaultdict(list))
    landing: dict[int, list[tuple[list[Item], torch.Tensor]]] = field(default_factory=lambda: defaultdict(list))


class ScanRun:
    """One rank's run of a schedule of linear attention.

    Attributes:
        held: its tokens, see ``RankRun``.
        sums_are_wide: whether gradients of key/value heads that several ranks have are added up in the type of sums.
        bytes_sent, buffer_bytes, calls, pairs, collectives: see ``Counters``; ``pairs`` are tokens, over its query heads.
    """

    def __init__(
        self,
        schedule: Schedule,
        kernel: LinearKernel,
        problem: Problem,
        *,
        rank: int,
        device: torch.device,
        groups: Groups,
        lowering: Lowering = "auto",
    ) -> None:
        """Collective.

        Raises:
            Unsupported: the kernel cannot run these heads.
        """
        assert problem.rule is not None
        self.schedule, self.problem, self.rank, self.device = schedule, problem, rank, device
        tokens = Part(schedule.k.tokens(rank))
        self.held = Held(tokens, tokens, tokens)
        self.sums_are_wide = problem.reduce_dtype != "input"
        moves = traffic(schedule, backward=problem.backward, gates=True)
        self._steps = moves.steps
        operations = operations_of(lowering, dist.get_backend()) if moves.transfers else ()
        found = collectives(schedule, moves, problem, operations)
        self.collectives: Sequence[str] = sorted({each.operation for each in found if each is not None})
        self._posts: dict[int, list[Post]] = defaultdict(list)
        for transfer, collective in zip(moves.transfers, found, strict=True):
            if (post := self._of_rank(transfer, collective)) is not None:
                self._posts[transfer.begin].append(post)
        channels = [transfer.channel for transfer, each in zip(moves.transfers, found, strict=True) if each is None]
        self._join(groups, channels, sets_of(moves, found))
        self.buffer_bytes = received_bytes(schedule, moves, problem, rank)
        input_dtype: torch.dtype = getattr(torch, problem.dtype)
        sums = accumulation_dtype(input_dtype)
        reduced = input_dtype if problem.reduce_dtype == "input" else sums
        self._dtypes: dict[Precision, torch.dtype] = {"input": input_dtype, "sum": sums, "reduce": reduced}
        self._rows, at = {}, 0
        for shard in schedule.k.own(rank):
            self._rows[shard] = slice(at, at + int(schedule.k.sizes[shard]))
            at = self._rows[shard].stop
        self._prepare(kernel, times=backward_times(schedule, moves) if problem.backward else None)
        self._arrivals = {backward: Arrivals(schedule, moves, backward=backward) for backward in (False, True)}
        self._sums_up = {backward: rank in summarised(schedule, moves, backward=backward) for backward in (False, True)}
        sent = [t.begin for t in self._arrivals[False].transfers if (t.rows[:, MoveColumn.SOURCE] == rank).any()]
        self._last_sent = max(sent, default=0)
        self._compute = self._communicate = True
        self._marks: list[tuple[int, list[Mark]]] | None = None

    def _of_rank(self, transfer: Transfer, collective: Collective | None) -> Post | None:
        sends: dict[int, list[Item]] = {}
        receives: dict[int, list[Item]] = {}
        mine = (transfer.rows[:, : MoveColumn.SHARD] == self.rank).any(axis=1)
        for source, to, shard, group in transfer.rows[mine].tolist():
            if self._elements(item := (transfer.kind, shard, group)):
                of, peer = (sends, to) if source == self.rank else (receives, source)
                of.setdefault(peer, []).append(item)
        takes_part = collective is not None and collective.of(self.rank) is not None
        return Post(transfer, collective, sends, receives) if sends or receives or takes_part else None

    def _elements(self, item: Item) -> int:
        kind, shard, group = item
        payload, heads = PAYLOADS[kind], self.schedule.heads[group]
        each = payload.elements(self.problem.heads, self.problem.rule) * heads.count(payload.side)
        return each * (int(self.schedule.k.sizes[shard]) if payload.per_token else 1)

    def _join(self, groups: Groups, channels: Sequence[str], sets: list[tuple[str, tuple[int, ...]]]) -> None:
        """The communicators that this rank needs. Every rank makes every group, in the same order."""
        every = tuple(range(self.schedule.world_size))
        self.communicators = list(dict.fromkeys([*((channel, every) for channel in channels), *sets]))
        groups.prepare(self.communicators)
        self._groups = {(channel, ranks): groups.among(ranks, channel) for channel, ranks in self.communicators}
        through_host = bool(self.communicators) and groups.goes_through_host(self.device)
        self._sending = Sending(self.rank, self.problem.scale.gpus_per_node, self.device, through_host=through_host)

    def _prepare(self, kernel: LinearKernel, times: Ints | None) -> None:
        """The kernel for all heads, whose summaries leave, and for each head group; and when which stretch is computed."""
        schedule, problem, rule = self.schedule, self.problem, self.problem.rule
        assert rule is not None
        made: dict[tuple[int, int], PreparedScan] = {}

        def scan(q: int, kv: int) -> PreparedScan:
            if (q, kv) not in made:
                heads, scale = problem.heads.of(q, kv), problem.softmax_scale
                made[q, kv] = kernel.scan(rule, heads, self._dtypes["input"], self.device, scale=scale)
            return made[q, kv]

        self._whole = scan(problem.heads.q, problem.heads.kv)
        self._scans: dict[int, PreparedScan] = {}
        self._tiles: dict[int, list[Stretch]] = defaultdict(list)
        self._of_backward: dict[int, list[Stretch]] = defaultdict(list)
        self.pairs, number = 0, 0
        self._computed = {group for step in schedule.steps for group in step.tiles[:, TileColumn.GROUP].tolist()}
        for time, step in enumerate(schedule.steps):
            for rank, group, _, bundle in step.tiles.tolist():
                if rank == self.rank:
                    heads = schedule.heads[group]
                    self._scans[group] = scan(len(heads), len(heads.kv))
                    self._tiles[time].append((group, bundle))
                    self.pairs += len(heads) * int(schedule.k.sizes[schedule.k.members(bundle)].sum())
                    if times is not None:
                        self._of_backward[int(times[number])].append((group, bundle))
                number += 1
        self.calls = sum(map(len, self._tiles.values()))
        every = [head for group in self._computed for head in schedule.heads[group].kv]
        self._replicated = len(set(every)) < len(every)

    # -- passes ----------------------------------------------------------------------------------------------------

    @property
    def bytes_sent(self) -> int:
        return self._sending.bytes_sent

    def counters(self) -> Counters:
        sent = self._sending
        return Counters(
            sent.bytes_sent, sent.bytes_between_nodes, self.buffer_bytes, self.calls, self.pairs, self.collectives
        )  # fmt: skip

    def forward(self, x: Tokens, *, compute: bool = True, communicate: bool = True) -> tuple[torch.Tensor, Kept]:
        """out (T, Hq, Dv) of this rank's tokens, and what backward needs. Collective.

        Without ``compute`` or without ``communicate`` everything else is done as usual, and the results mean nothing.
        """
        self._begin(compute=compute, communicate=communicate)
        kept = Kept(x)
        now_on = _Pass(False, kept)
        out = x.v.new_empty(len(x.q), self.problem.heads.q, self.problem.heads.v)
        for time in range(self._steps):
            with self._marked(time) as mark:
                if time == 0 and self._sums_up[False]:
                    self._sum_up(now_on)
                self._post(now_on, time)
                mark()
                if time == self._last_sent:
                    self._computed_ahead(now_on, time)
                for stretch in self._tiles.get(time, ()):
                    self._tile(now_on, stretch, time, out)
                mark()
                self._wait(now_on, time)
                for item in [item for item in now_on.items if item[0] == "final" and item[1] in self._rows]:
                    self._put(out, item, now_on.items.pop(item))
        return out, kept

    def backward(self, dout: torch.Tensor, kept: Kept, *, compute: bool = True, communicate: bool = True) -> Tokens:
        """Gradients of this rank's tokens, each in the type of what it is of. Collective."""
        self._begin(compute=compute, communicate=communicate)
        x, now_on = kept.x, _Pass(True, kept, dout)
        sums = self._dtypes["sum"]
        like = (lambda part: torch.zeros_like(part, dtype=sums)) if self._replicated else torch.empty_like
        grads = Tokens(torch.empty_like(x.q), like(x.k), like(x.v), like(x.decay), None if x.beta is None else like(x.beta))
        for time in range(self._steps, 2 * self._steps + 1):
            with self._marked(time) as mark:
                if time == self._steps and self._sums_up[True]:
                    self._sum_up_backward(now_on)
                self._post(now_on, time)
                mark()
                for stretch in self._of_backward.get(time, ()):
                    self._tile_backward(now_on, stretch, grads)
                mark()
                self._wait(now_on, time)
                for item in [item for item in now_on.items if item[0] in ("dq", "dkv", "dgates") and item[1] in self._rows]:
                    self._add(grads, item, now_on.items.pop(item))
        return Tokens(*(None if part is None else part.to(of.dtype) for part, of in zip(grads, x, strict=True)))  # type: ignore[arg-type, union-attr]

    def replay(self, *, compute: bool, communicate: bool) -> Replayed | None:
        """The same passes without kernels or without messages, whose results mean nothing; None: there are no messages."""
        return Replayed(self, compute, communicate) if any(self._posts.values()) or self.schedule.world_size > 1 else None

    def timeline(self, x: Tokens, dout: torch.Tensor | None) -> list[list[float]]:
        """One iteration: (time, begin, messages sent, tiles computed, messages there) of each time, in seconds. Collective.

        On CUDA these are times of the stream that computes: "sent" is when messages were allowed to leave.
        """
        self._marks = []
        _, kept = self.forward(x)
        if dout is not None:
            self.backward(dout, kept)
        rows, self._marks = self._marks, None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        first = rows[0][1][0]
        return [[float(number), *(seconds_between(first, mark) for mark in marks)] for number, marks in rows]

    def _begin(self, *, compute: bool, communicate: bool) -> None:
        self._sending.begin()
        self._compute, self._communicate = compute, communicate

    def _marked(self, time: int) -> _Marked:
        return _Marked(self._marks, time, self.device)

    # -- stretches -------------------------------------------------------------------------------------------------

    def _sum_up(self, on: _Pass) -> None:
        """The summary of this rank's tokens, of all heads in one call."""
        heads, x = self.problem.heads, on.kept.x
        if self._compute:
            whole = self._whole.summary(x)
        else:
            state = x.v.new_zeros(heads.kv, heads.dim, heads.v, dtype=self._dtypes["sum"])
            matrix = (heads.dim,) if self.problem.rule == "gated_delta_rule" else ()
            whole = Summary(state, state.new_zeros(heads.kv, heads.dim, *matrix))
        for number, group in enumerate(self.schedule.heads):
            on.own[number] = Summary(whole.state[group.kv_heads], whole.transition[group.kv_heads])

    def _sum_up_backward(self, on: _Pass) -> None:
        assert on.dout is not None
        for stretches in self._of_backward.values():
            for group, bundle in stretches:
                heads = self.schedule.heads[group]
                if not self._compute:
                    self._sum_up(on)
                    continue
                whole = self._scans[group].summary_backward(on.dout[:, heads.q_heads], on.kept.saved[group, bundle])
                for part in self._arrivals[True].parts(group):
                    kv = self.schedule.heads[part].kv
                    mine = slice(heads.kv.index(kv[0]), heads.kv.index(kv[-1]) + 1)
                    on.own[part] = Summary(whole.state[mine], whole.transition[mine])

    def _computed_ahead(self, on: _Pass, time: int) -> None:
        """What of later stretches of own tokens needs no state."""
        if not self._compute:
            return
        for stretch in [each for later, tiles in self._tiles.items() if later > time for each in tiles]:
            group, bundle = stretch
            if all(int(shard) in self._rows for shard in self.schedule.k.members(bundle)):
                on.local[stretch] = self._scans[group].local(self._tokens(on, stretch))

    def _tile(self, on: _Pass, stretch: Stretch, time: int, out: torch.Tensor) -> None:
        group, bundle = stretch
        members = self.schedule.k.members(bundle).tolist()
        if not self._compute:
            for shard in set(members) - set(self._rows):
                on.items["final", shard, group] = out.new_empty(self._elements(("final", shard, group)))
            return
        state = self._before(on, group, members[0], time)
        found, _, on.kept.saved[stretch] = self._scans[group].forward(self._tokens(on, stretch), state, on.local.pop(stretch, None))
        for shard, part in zip(members, found.split(self._sizes(members)), strict=True):
            if shard in self._rows:
                self._put(out, ("final", shard, group), part)
            else:
                on.items["final", shard, group] = part.reshape(-1)

    def _tile_backward(self, on: _Pass, stretch: Stretch, grads: Tokens) -> None:
        group, bundle = stretch
        members, heads = self.schedule.k.members(bundle).tolist(), self.schedule.heads[group]
        kinds = ("dq", "dkv", "dgates")
        if not self._compute:
            for shard in set(members) - set(self._rows):
                for kind in kinds:
                    size, dtype = self._elements((kind, shard, group)), self._dtypes["sum" if kind == "dgates" else "input"]
                    on.items[kind, shard, group] = torch.empty(size, dtype=dtype, device=self.device)
            return
        assert on.dout is not None
        dout = self._joined([
            on.dout[self._rows[shard], heads.q_heads] if shard in self._rows
            else on.items.pop(("dout", shard, group)).view(-1, len(heads), self.problem.heads.v)
            for shard in members
        ])  # fmt: skip
        dstate = self._before(on, group, len(self.schedule.k) - 1 - members[-1], None)
        found, _ = self._scans[group].backward(dout, on.kept.saved[stretch], dstate)
        at = 0
        for shard, size in zip(members, self._sizes(members), strict=True):
            part = Tokens(*(None if x is None else x[at : at + size] for x in found))  # type: ignore[arg-type]
            at += size
            for kind in kinds:
                flat = self._flat(part, kind)
                if shard in self._rows:
                    self._add(grads, (kind, shard, group), flat)
                else:
                    on.items[kind, shard, group] = flat

    def _tokens(self, on: _Pass, stretch: Stretch) -> Tokens:
        """The tokens of a stretch for its head group: own ones, and those that have come."""
        group, bundle = stretch
        parts = [self._tokens_of(on, int(shard), group) for shard in self.schedule.k.members(bundle)]
        return Tokens(*(None if each[0] is None else self._joined(each) for each in zip(*parts, strict=True)))  # type: ignore[arg-type, type-var]

    def _tokens_of(self, on: _Pass, shard: int, group: int) -> Tokens:
        heads, own = self.schedule.heads[group], self.problem.heads
        if shard in self._rows:
            return self._own_tokens(on.kept.x, shard, heads)
        q = self._come(on, "q", shard, group).view(-1, len(heads), own.dim)
        k, v = self._split(self._come(on, "kv", shard, group), (own.dim, own.v), len(heads.kv))
        gates = self._come(on, "gates", shard, group)
        if on.kept.x.beta is None:
            return Tokens(q, k, v, gates.view(-1, len(heads.kv), own.dim))
        decay, beta = self._split(gates, (1, 1), len(heads.kv))
        return Tokens(q, k, v, decay[..., 0], beta[..., 0])

    def _own_tokens(self, x: Tokens, shard: int, heads: HeadGroup) -> Tokens:
        rows = self._rows[shard]
        if len(heads) == self.problem.heads.q and len(heads.kv) == self.problem.heads.kv:
            return Tokens(*(None if part is None else part[rows] for part in x))  # type: ignore[arg-type]
        kv = (None if part is None else part[rows][:, heads.kv_heads] for part in x[1:])
        return Tokens(x.q[rows, heads.q_heads], *kv)  # type: ignore[arg-type]

    @staticmethod
    def _split(flat: torch.Tensor, widths: tuple[int, int], heads: int) -> Iterator[torch.Tensor]:
        """Two tensors (T, heads, width) that lie behind one another."""
        tokens = flat.numel() // (heads * sum(widths))
        return (x.view(tokens, heads, w) for x, w in zip(flat.split([tokens * heads * w for w in widths]), widths, strict=True))

    def _flat(self, x: Tokens, kind: str) -> torch.Tensor:
        """What a message of a kind holds of tokens, or of their gradients."""
        if PAYLOADS[kind].side == "q":
            return x.q.reshape(-1)
        parts = (x.k, x.v) if PAYLOADS[kind].width == "key and value" else (x.decay, x.beta)
        return self._joined([part.reshape(-1) for part in parts if part is not None])

    @staticmethod
    def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def _sizes(self, shards: Sequence[int]) -> list[int]:
        sizes: list[int] = self.schedule.k.sizes[list(shards)].tolist()
        return sizes

    def _put(self, out: torch.Tensor, item: Item, part: torch.Tensor) -> None:
        _, shard, group = item
        heads = self.schedule.heads[group]
        rows = out[self._rows[shard], heads.q_heads]
        rows.copy_(part.view(rows.shape))

    def _add(self, grads: Tokens, item: Item, flat: torch.Tensor) -> None:
        """A gradient of own tokens, where it belongs; where key/value heads are on several ranks, to what is there."""
        kind, shard, group = item
        heads, rows, own = self.schedule.heads[group], self._rows[shard], self.problem.heads
        if kind == "dq":
            into = grads.q[rows, heads.q_heads]
            into.copy_(flat.view(into.shape))
            return
        if kind == "dkv":
            parts = list(zip((grads.k, grads.v), self._split(flat, (own.dim, own.v), len(heads.kv)), strict=True))
        elif grads.beta is None:
            parts = [(grads.decay, flat.view(-1, len(heads.kv), own.dim))]
        else:
            parts = [(whole[..., None], x) for whole, x in zip(grads[3:], self._split(flat, (1, 1), len(heads.kv)), strict=True)]  # type: ignore[index]
        for whole, part in parts:
            if not self._replicated:
                whole[rows, heads.kv_heads] = part
                continue
            for number, head in enumerate(heads.kv):
                whole[rows, head] += part[:, number]

    # -- states ----------------------------------------------------------------------------------------------------

    def _before(self, on: _Pass, group: int, place: int, time: int | None) -> torch.Tensor | None:
        """The state before a place of the pass, (heads, Dk, Dv), from what is there; None: there is nothing before it."""
        parts = [self._part_before(on, part, place, time) for part in self._arrivals[on.backward].parts(group)]
        return None if parts[0] is None else self._joined([part for part in parts if part is not None])

    def _part_before(self, on: _Pass, group: int, place: int, time: int | None) -> torch.Tensor | None:
        """The same of a head group whose states move."""
        arrivals = self._arrivals[on.backward]
        found = arrivals.before(self.rank, group, place, time)
        assert found is not None, f"rank {self.rank} lacks the state before place {place}"
        kind, summary = PASSES[on.backward]
        state = None
        if found.state is not None:
            state = self._state_of(on.items[kind, arrivals.shard(kind, found.state), group], group).state
        for at in found.summaries:
            shard = arrivals.shard(summary, at)
            one = on.own[group] if shard in self._rows else self._state_of(on.items[summary, shard, group], group)
            state = one.state if state is None else applied(one, state)
        return state

    def _state_of(self, flat: torch.Tensor, group: int) -> Summary:
        """A state, or a summary, from a message; a state's transition is empty."""
        heads, own = len(self.schedule.heads[group].kv), self.problem.heads
        state, transition = flat.split([heads * own.dim * own.v, flat.numel() - heads * own.dim * own.v])
        matrix = (own.dim,) if self.problem.rule == "gated_delta_rule" else ()
        return Summary(state.view(heads, own.dim, own.v), transition.view(-1, own.dim, *matrix))

    # -- messages --------------------------------------------------------------------------------------------------

    def _item(self, on: _Pass, item: Item, time: int) -> torch.Tensor:
        """What is sent of an item, flat, in the type in which it travels."""
        kind, shard, group = item
        precision = self._dtypes[PAYLOADS[kind].precision]
        arrivals = self._arrivals[on.backward]
        if kind in PASSES[on.backward]:
            state, _ = PASSES[on.backward]
            if kind != state:
                return torch.cat([part.reshape(-1) for part in on.own[group]])
            found = self._part_before(on, group, arrivals.place(state, shard) + 1, time)
            assert found is not None
            return found.reshape(-1)
        if kind == "dout":
            assert on.dout is not None
            heads = self.schedule.heads[group]
            return on.dout[self._rows[shard], heads.q_heads].reshape(-1)
        if kind == "final" or on.backward:
            return on.items.pop((GRADIENTS.get(kind, kind), shard, group)).to(precision)
        return self._flat(self._own_tokens(on.kept.x, shard, self.schedule.heads[group]), kind)

    @staticmethod
    def _come(on: _Pass, kind: str, shard: int, group: int) -> torch.Tensor:
        return on.items[kind, shard, group]

    def _post(self, on: _Pass, time: int) -> None:
        """Begin the messages of a time: its collectives, and the others in one batch per channel and end."""
        batches: dict[tuple[str, int], tuple[list[tuple[torch.Tensor, int]], list[tuple[torch.Tensor, int]]]] = {}
        for post in self._posts.get(time, ()):
            transfer = post.transfer
            dtype = self._dtypes[transfer.payload.precision]
            sends = {peer: self._joined([self._item(on, i, time) for i in items]) for peer, items in post.sends.items()}
            for peer, x in sends.items():
                if self._communicate:
                    self._sending.count(x.numel() * x.element_size(), peer)
            if post.collective is not None:
                self._exchange(on, post, sends, dtype)
                continue
            outgoing, incoming = batches.setdefault((transfer.channel, transfer.end), ([], []))
            outgoing += [(x, peer) for peer, x in sends.items()]
            for peer, items in post.receives.items():
                x = torch.empty(sum(map(self._elements, items)), dtype=dtype, device=self.device)
                on.landing[transfer.end].append((items, x))
                incoming.append((x, peer))
        every = tuple(range(self.schedule.world_size))
        for (channel, end), (outgoing, incoming) in sorted(batches.items()):
            if self._communicate:
                on.works[end] += self._messages(outgoing, incoming, self._groups[channel, every])

    def _messages(
        self, outgoing: list[tuple[torch.Tensor, int]], incoming: list[tuple[torch.Tensor, int]], group: Any
    ) -> list[Waits]:
        sent, landing, copies = self._sending.ends([x.contiguous() for x, _ in outgoing], [x for x, _ in incoming])
        ops = [dist.P2POp(dist.isend, x, group=group, group_peer=peer) for x, (_, peer) in zip(sent, outgoing, strict=True)]
        ops += [dist.P2POp(dist.irecv, x, group=group, group_peer=peer) for x, (_, peer) in zip(landing, incoming, strict=True)]
        return [*dist.batch_isend_irecv(ops), *copies] if ops else []

    def _exchange(self, on: _Pass, post: Post, sends: dict[int, torch.Tensor], dtype: torch.dtype) -> None:
        """Begin a collective of this rank's set."""
        assert post.collective is not None
        members = post.collective.of(self.rank)
        assert members is not None
        end, empty = post.transfer.end, torch.empty(0, dtype=dtype, device=self.device)
        sizes = [sum(map(self._elements, post.receives.get(peer, ()))) for peer in members]
        if post.collective.operation == "all_gather":
            source = next(iter(sends.values())).contiguous()
            sizes = [source.numel()] * len(members)
        else:
            source = torch.cat([sends.get(peer, empty) for peer in members])
        target = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        for peer, x in zip(members, target.split(sizes), strict=True):
            if peer != self.rank and peer in post.receives:
                on.landing[end].append((post.receives[peer], x))
        if not self._communicate:
            return
        group = self._groups[post.transfer.channel, members]
        (outgoing,), (incoming,), copies = self._sending.ends([source], [target])
        if post.collective.operation == "all_gather":
            work = all_gather(incoming, outgoing, group)  # type: ignore[arg-type]
        else:
            work = all_to_all(incoming, outgoing, group, [sends.get(peer, empty).numel() for peer in members], sizes)  # type: ignore[arg-type]
        on.works[end] += [work, *copies]

    def _wait(self, on: _Pass, time: int) -> None:
        """Wait for what must be there by the end of a time, and take it."""
        wait_all(on.works.pop(time, []))
        for items, x in on.landing.pop(time, []):
            for (kind, shard, group), part in zip(items, x.split([self._elements(item) for item in items]), strict=True):
                on.items[GRADIENTS.get(kind, kind), shard, group] = part


def applied(summary: Summary, state: torch.Tensor) -> torch.Tensor:
    """What a stretch makes of a state, (heads, Dk, Dv)."""
    if summary.transition.dim() == 2:
        return torch.addcmul(summary.state, summary.transition[..., None], state)
    return torch.baddbmm(summary.state, summary.transition, state)


@dataclass(frozen=True)
class Replayed:
    """The passes of a run without kernels or without messages."""

    run: ScanRun
    compute: bool
    communicate: bool

    def forward(self, x: Tokens) -> tuple[torch.Tensor, Kept]:
        return self.run.forward(x, compute=self.compute, communicate=self.communicate)

    def backward(self, dout: torch.Tensor, kept: Kept) -> Tokens:
        return self.run.backward(dout, kept, compute=self.compute, communicate=self.communicate)


class _Marked:
    """Notes four moments of a time, where somebody asks for them."""

    def __init__(self, marks: list[tuple[int, list[Mark]]] | None, time: int, device: torch.device) -> None:
        self._marks, self._time, self._device = marks, time, device
        self._own: list[Mark] = []

    def __enter__(self) -> _Marked:
        self()
        return self

    def __call__(self) -> None:
        if self._marks is not None:
            self._own.append(now(self._device))

    def __exit__(self, *error: object) -> None:
        self()
        if self._marks is not None:
            self._marks.append((self._time, self._own))
