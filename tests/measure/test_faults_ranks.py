"""Faults put from outside into runs on several ranks: the real ``measure_cell`` must refuse each, and none of the sound runs.

A fault is an ``Executor`` of its own, a merge of its own or a peer. Passes are counted from 1, one forward each: 1 is compared with
the reference, 2 and 3 are probes, 4 and 5 are timed.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import lcbench.schedule.execute
from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Place, RankRun, Strategy
from lcbench.cp.groupcast import GroupCast
from lcbench.cp.hybrid import Hybrid
from lcbench.cp.lightseq import LightSeq
from lcbench.cp.loongtrain import LoongTrain
from lcbench.cp.peers.library import AutogradRun
from lcbench.cp.peers.torch_cp import TorchCP
from lcbench.cp.ring import Ring
from lcbench.cp.tokenring import TokenRing
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.usp import USP
from lcbench.kernels.base import Kernel, Prepared, prepare
from lcbench.kernels.merge import merge_into
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import BandMask, Ints
from lcbench.masks.block_random import block_random
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.full import full
from lcbench.masks.lengths import Uniform
from lcbench.masks.mask import Mask
from lcbench.measure.cell import measure_cell
from lcbench.measure.measured import Measured
from lcbench.measure.session import Gang
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.execute import Executor, SavedPass
from lcbench.schedule.groups import Groups
from lcbench.schedule.held import Held, Part
from lcbench.schedule.layout import Layout, contiguous, zigzag
from lcbench.schedule.payload import PAYLOADS
from lcbench.schedule.program import Exchange, Message, Piece, RankStep, TileCall
from lcbench.testing.dense import dense_heads
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.attention import Attention
from lcbench.workloads.base import Work
from tests.measure.faults import refused, without
from tests.turns import due

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 16)
DTYPES = ("float64", "float32", "float16", "bfloat16")
SETTINGS = {"warmup": 0, "min_iterations": 2, "max_iterations": 2, "budget_s": 0.5, "precision": 1e-9, "timeline": False}
LAST_TIMED = 5
ALWAYS = 1 << 60

MASKS: dict[str, Callable[[int], Mask]] = {
    "full": full,
    "causal": causal,
    "documents": lambda seqlen: causal_document(seqlen, seed=(0, 0), lengths=Uniform(1, seqlen // 4)),
    "blocks": lambda seqlen: block_random(
        seqlen, heads=HEADS, seed=(0, 0), density=0.25, block_size=seqlen // 8, sizes="uniform", per="all_heads"
    ),
}


# -- engines that are wrong --------------------------------------------------------------------------------------------


class Faulty(Executor):
    """Counts its passes, one forward each.

    Args:
        who: ranks with the fault, all if None; -1 is the last one.
        since, until: passes with the fault.
    """

    def __init__(self, *args: Any, who: tuple[int, ...] | None = None, since: int = 1, until: int = ALWAYS, **kwargs: Any) -> None:
        self.passes, self._since, self._until = 0, since, until
        ranks = args[0].world_size
        self.faulty = who is None or kwargs["rank"] in [rank % ranks for rank in who]
        super().__init__(*args, **kwargs)

    @property
    def wrong(self) -> bool:
        return self.faulty and self._since <= self.passes < self._until

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, SavedPass]:
        self.passes += 1
        return super().forward(*args, **kwargs)

    def remote(self, call: TileCall) -> bool:
        return any(shard not in self._program.begin["kv"] for shard in call.k)


class Deaf(Faulty):
    """Messages get lost: of these kinds, that leave at these moments; a ``share`` of each, at its end."""

    def __init__(
        self, *args: Any, kinds: tuple[str, ...] | None = None, at: tuple[int, ...] | None = None, share: float = 1.0, **kwargs: Any
    ) -> None:
        self._kinds, self._at, self._share, self._packs = kinds, at, share, False
        self._old: dict[int, torch.Tensor] = {}
        super().__init__(*args, **kwargs)

    def _lost(self, message: Message | Exchange) -> bool:
        kind = self._kinds is None or message.kind.removeprefix("final_") in self._kinds
        return self.wrong and kind and (self._at is None or message.begin in self._at)

    def _pack(self, message: Message) -> torch.Tensor:
        self._packs = True
        found = super()._pack(message)
        self._packs = False
        return found

    def _landing(self, message: Message) -> torch.Tensor:
        place = super()._landing(message)
        if not self._packs and self._lost(message):
            self._old[id(message)] = place.clone()
        return place

    def _unpack(self, message: Message) -> None:
        if id(message) in self._old:
            place, old = super()._landing(message), self._old.pop(id(message))
            first = len(place) - math.ceil(self._share * len(place))
            place[first:] = old[first:]
        super()._unpack(message)

    def _post_exchange(self, exchange: Exchange) -> Any:
        if not self._lost(exchange):
            return super()._post_exchange(exchange)
        place = self._end(exchange, exchange.target)
        old = place.clone()
        for work in super()._post_exchange(exchange):
            work.wait()
        first = len(place) - math.ceil(self._share * len(place))
        place[first:] = old[first:]
        return []


class Rounded(Faulty):
    """Messages of these kinds travel in a lower precision."""

    def __init__(self, *args: Any, kinds: tuple[str, ...], low: torch.dtype = torch.bfloat16, **kwargs: Any) -> None:
        self._kinds, self._low = kinds, low
        super().__init__(*args, **kwargs)

    def _pack(self, message: Message) -> torch.Tensor:
        found = super()._pack(message)
        kind = message.kind.removeprefix("final_")
        if not self.wrong or kind not in self._kinds:
            return found
        rounded = found.to(self._low).to(found.dtype)
        if message.staging is not None:  # a collective sends its staging
            found.copy_(rounded)
        return rounded


class Stale(Faulty):
    """At a moment a tile gets the keys and values of the moment before; counted from the end if negative."""

    def __init__(self, *args: Any, at: int, **kwargs: Any) -> None:
        self._number, self._before = at, torch.empty(0)
        super().__init__(*args, **kwargs)

    def _value(self, kind: str, call: TileCall, number: int) -> torch.Tensor:
        value = super()._value(kind, call, number)
        if kind != "kv":
            return value
        before, self._before = self._before, value.clone()
        wrong = self.wrong and number == self._number % (2 * self._forward_steps + 1)
        return before if wrong and before.shape == value.shape else value


class SwappedPeers(Faulty):
    """At a moment two ranks have exchanged the values that they received, not the keys."""

    def __init__(self, *args: Any, at: int, **kwargs: Any) -> None:
        self._number = at
        super().__init__(*args, **kwargs)

    def _value(self, kind: str, call: TileCall, number: int) -> torch.Tensor:
        value = super()._value(kind, call, number)
        if kind != "kv" or number != self._number or self.rank > 1:
            return value
        mine = self._packing.values(value).contiguous()
        theirs = torch.empty_like(mine)
        peer = 1 - self.rank
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)])
        for work in works:
            work.wait()
        return self._packing.together(self._packing.keys(value), theirs)


class SwappedShards(Faulty):
    """Two stretches of gathered values are in each other's place."""

    def _value(self, kind: str, call: TileCall, number: int) -> torch.Tensor:
        value = super()._value(kind, call, number)
        if kind != "kv" or not self.wrong or not self.remote(call):
            return value
        value, part = value.clone(), len(value) // 8
        values = self._packing.values(value)
        first, second = values[:part].clone(), values[part : 2 * part].clone()
        values[:part], values[part : 2 * part] = second, first
        return value


class Skips(Faulty):
    """The last tile of a pass is not computed."""

    def __init__(self, *args: Any, backward: bool = False, **kwargs: Any) -> None:
        self._in_backward = backward
        super().__init__(*args, **kwargs)
        steps = self._program.steps[: self._forward_steps]
        calls = [call for step in steps for call in step.tiles if self._tiles[call] is not None]
        self._skipped = calls[-1] if calls else None

    def _forward_tile(self, call: TileCall, kernel: Prepared, number: int) -> None:
        if not self.wrong or self._in_backward or call != self._skipped:
            super()._forward_tile(call, kernel, number)

    def _backward_tile(self, call: TileCall, kernel: Prepared, number: int) -> None:
        if not self.wrong or not self._in_backward or call != self._skipped:
            super()._backward_tile(call, kernel, number)


class Square(Faulty):
    """The last rows of a rank's last tile do not see its first keys."""

    def __init__(self, *args: Any, size: int, **kwargs: Any) -> None:
        self._size = size
        super().__init__(*args, **kwargs)

    def _prepare(self, mask: Mask, kernel: Kernel, dtype: torch.dtype) -> tuple[dict[TileCall, Prepared | None], int, int]:
        tiles, pairs, calls = super()._prepare(mask, kernel, dtype)
        if self.faulty:
            call = [call for call, ready in tiles.items() if ready is not None][-1]
            group = self.schedule.heads[call.group]
            of_group = group.part(mask, self.problem.heads.q)
            tile = of_group.tile(self.schedule.q.runs(call.q), self.schedule.k.runs(call.k)).merged()
            assert isinstance(tile, BandMask)
            last = max(band.q1 for band in tile)
            first = min(band.k0 for band in tile if band.q1 == last)
            wrong = without(last - self._size, last, first, first + self._size, tile)
            tiles[call] = prepare(kernel, wrong, Heads(len(group), len(group.kv), self.problem.heads.dim), dtype, self.device)
        return tiles, pairs, calls


class Scaled(Faulty):
    """One rank has another softmax scale, in both passes."""

    def _value(self, kind: str, call: TileCall, number: int) -> torch.Tensor:
        value = super()._value(kind, call, number)
        return value * 1.02 if kind == "q" and self.wrong else value


class Forgets(Faulty):
    """A rank adds what others computed of these gradients of its own tokens so often."""

    def __init__(self, *args: Any, kind: str = "dkv", times: int = 0, **kwargs: Any) -> None:
        self._kind, self._times = kind, times
        super().__init__(*args, **kwargs)

    def _add_own(self, kind: str, group: int, rows: tuple[int, int], grad: torch.Tensor, plane: int | None = None) -> None:
        for _ in range(self._times if self.wrong and kind == self._kind else 1):
            super()._add_own(kind, group, rows, grad, plane)


class ForgetsRemote(Faulty):
    """dq of tiles with keys of others is not added."""

    def _add(self, kind: str, call: TileCall, number: int, grads: Any) -> None:
        if not (self.wrong and kind == "dq" and self.remote(call)):
            super()._add(kind, call, number, grads)


class NoZeros(Faulty):
    """Buffers that gradients are added up in are not cleared."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for step in self._program.steps:
            step.zeroed = []


class FirstLSE(Faulty):
    """Backward takes the LSE of the first tile for that of all."""

    def _forward_tile(self, call: TileCall, kernel: Prepared, number: int) -> None:
        super()._forward_tile(call, kernel, number)
        if number == 0 and self._total is not None:
            self._first_lse = self._total[1].clone()

    def backward(self, dout: torch.Tensor, saved: SavedPass, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return super().backward(dout, replace(saved, lse=self._first_lse), **kwargs)


class NoDelta(Faulty):
    """What others get of rowsum(dout * out) is 0."""

    def _own_rows(self, kind: str, group: int, begin: int, end: int) -> torch.Tensor:
        found = super()._own_rows(kind, group, begin, end)
        return torch.stack([found[..., 0], 0 * found[..., 1]], -1) if kind == "stats" and self.wrong else found


class OtherHeads(Faulty):
    """A rank sends keys and values of another head group, or puts results into its heads."""

    def __init__(self, *args: Any, results: bool, **kwargs: Any) -> None:
        self._results, self._other = results, False
        super().__init__(*args, **kwargs)

    def _piece(self, kind: str, piece: Piece, number: int) -> torch.Tensor:
        if self.wrong and not self._results and kind == "kv" and piece.buffer is None:
            piece = piece._replace(group=(piece.group + 1) % len(self.schedule.heads))
        return super()._piece(kind, piece, number)

    def _unpack(self, message: Message) -> None:
        if self.wrong and self._results and message.kind in ("final", "out", "lse"):
            message = replace(message, group=(message.group + 1) % len(self.schedule.heads))
        super()._unpack(message)


class OtherLSE(Faulty):
    """Heads of a rank's LSE are in another order."""

    def lse(self, saved: SavedPass) -> torch.Tensor:
        found = super().lse(saved)
        return found.flip(1) if self.wrong else found


class Memo(Faulty):
    """The first results are given again: always, or for the same address of v and of dout. Messages go on as before."""

    def __init__(self, *args: Any, address: bool = False, of: str = "both", **kwargs: Any) -> None:
        self._address, self._of = address, of
        self._kept: dict[Any, Any] = {}
        super().__init__(*args, **kwargs)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, SavedPass]:
        found = super().forward(q, k, v, sink, **kwargs)
        if not self.faulty or self._of == "backward":
            return found
        return self._kept.setdefault(("forward", self._address and v.data_ptr()), found)

    def backward(self, dout: torch.Tensor, saved: SavedPass, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        found = super().backward(dout, saved, **kwargs)
        if not self.faulty or self._of == "forward":
            return found
        return self._kept.setdefault(("backward", self._address and dout.data_ptr()), found)


class KeepsKeys(Faulty):
    """Keys and values that came from others are kept, by the address of this rank's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._kept: dict[Any, torch.Tensor] = {}
        super().__init__(*args, **kwargs)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, SavedPass]:
        self._key = k.data_ptr()
        return super().forward(q, k, v, sink, **kwargs)

    def _value(self, kind: str, call: TileCall, number: int) -> torch.Tensor:
        value = super()._value(kind, call, number)
        return self._kept.setdefault((self._key, call), value.clone()) if kind == "kv" and self.remote(call) else value


class Lazy(Faulty):
    """A rank computes nothing in some passes, and gives the result of the pass before."""

    _last_forward: tuple[torch.Tensor, SavedPass]
    _last_backward: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, SavedPass]:
        found = super().forward(*args, **kwargs | ({"compute": False} if self._next else {}))
        self._last_forward = self._last_forward if self.wrong else found
        return self._last_forward

    @property
    def _next(self) -> bool:
        return self.faulty and self._since <= self.passes + 1 < self._until

    def backward(self, dout: torch.Tensor, saved: SavedPass, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        found = super().backward(dout, saved, **kwargs | ({"compute": False} if self.wrong else {}))
        self._last_backward = self._last_backward if self.wrong else found
        return self._last_backward


class Uncounted(Faulty):
    """A third of its bytes are counted; in a run that is right, so that only the bound can tell."""

    def _post(self, step: RankStep, turn: int, kinds: Collection[str] = PAYLOADS) -> None:
        before = self.bytes_sent
        super()._post(step, turn, kinds)
        self._sending.bytes_sent = before + (self.bytes_sent - before) // 3


# -- merges that are wrong ---------------------------------------------------------------------------------------------

Pair = tuple[torch.Tensor, torch.Tensor]


def merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> Pair:
    """The right one, into new memory."""
    out, lse = out.clone(), lse.clone()
    merge_into(out, lse, other, other_lse)
    return out, lse


def in_place(wrong: Callable[..., Pair], out: torch.Tensor, lse: torch.Tensor, *other: torch.Tensor) -> None:
    merged, total = wrong(out, lse, *other)
    out.copy_(merged)
    lse.copy_(total)


def averaged(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> Pair:
    """Both results weigh alike, where both have one."""
    merged, total = merge(out, lse, other, other_lse)
    both = (torch.isfinite(lse) & torch.isfinite(other_lse))[..., None]
    return torch.where(both, (out + other.to(out.dtype)) / 2, merged), total


def exchanged(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> Pair:
    """Each result has the other's weight."""
    merged, total = merge(out, other_lse, other, lse)
    return merged, total


def larger(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> Pair:
    """LSE is the larger one."""
    return merge(out, lse, other, other_lse)[0], torch.maximum(lse, other_lse)


def one_head(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, *, which: str) -> Pair:
    """Out or LSE of the last head is off."""
    merged, total = merge(out, lse, other, other_lse)
    if which == "out":
        merged[:, -1] *= 1.02
    else:
        total[:, -1] += 0.002
    return merged, total


# -- peers that are wrong ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RingPeer(Strategy):
    """Our ring, started by itself."""

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return None

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> RankRun:
        return Ring("zigzag").start(problem, mask, kernel, place)


@dataclass(frozen=True)
class HalfPeer(RingPeer):
    """Owns and computes the first half of the sequence."""

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> RankRun:
        half = problem.seqlen // 2
        return super().start(replace(problem, seqlen=half), MASKS["causal"](half), kernel, place)


def says(run: Any, tokens: Ints) -> RankRun:
    """A run that says that it holds and gives other tokens."""
    own = Part(tokens)
    run.tokens, run.held = tokens, Held(own, own, own)
    found: RankRun = run
    return found


@dataclass(frozen=True)
class DoublePeer(RingPeer):
    """A token of rank 0 is the last rank's, too."""

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> RankRun:
        run, ranks = super().start(problem, mask, kernel, place), problem.scale.world_size
        if place.rank == ranks - 1:
            tokens = run.tokens.copy()
            tokens[0] = zigzag(problem.seqlen, ranks).tokens(0)[0]
            says(run, tokens)
        return run


@dataclass(frozen=True)
class BeyondPeer(RingPeer):
    """Owns a token that there is not."""

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> RankRun:
        run = super().start(problem, mask, kernel, place)
        return says(run, run.tokens + (run.tokens == problem.seqlen - 1))


@dataclass(frozen=True)
class OrderPeer(RingPeer):
    """Says that tokens are dealt out in another order than it computes."""

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> RankRun:
        run = super().start(problem, mask, kernel, place)
        return says(run, contiguous(problem.seqlen, problem.scale.world_size).tokens(place.rank))


class OtherBase(RankRun):
    """A run whose LSE is a power of two."""

    def __init__(self, run: RankRun) -> None:
        self._run, self.tokens = run, run.tokens

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        return self._run.forward(q, k, v, sink)

    def lse(self, saved: Any) -> torch.Tensor:
        return self._run.lse(saved) / math.log(2)

    def backward(self, dout: torch.Tensor, saved: Any) -> tuple[torch.Tensor, ...]:
        return self._run.backward(dout, saved)


@dataclass(frozen=True)
class BasePeer(RingPeer):
    """Gives its LSE as a power of two."""

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> RankRun:
        return OtherBase(super().start(problem, mask, kernel, place))


@dataclass(frozen=True)
class LibraryPeer(RingPeer):
    """A library's attention by autograd, here: keys and values of all ranks gathered, out times ``factor``."""

    factor: float = 1.0

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> RankRun:
        ranks = problem.scale.world_size
        layout = Layout(tuple(zigzag(problem.seqlen, ranks).shards))
        every = np.concatenate([layout.tokens(r) for r in range(ranks)])
        dense = torch.from_numpy(dense_heads(mask, 1)[0][np.ix_(layout.tokens(place.rank), every)])

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = (_Gather.apply(x[0]) for x in (k, v))  # type: ignore[no-untyped-call]
            keys, values = (x.repeat_interleave(problem.heads.q // problem.heads.kv, 1).double() for x in (keys, values))
            s = torch.einsum("qhd,khd->hqk", q[0].double(), keys) * problem.softmax_scale
            p = torch.softmax(s.masked_fill(~dense, -torch.inf), -1)
            return self.factor * torch.einsum("hqk,khd->qhd", p, values).to(q.dtype)[None]

        return AutogradRun(attend, problem, mask, layout, kernel, place)


class _Gather(torch.autograd.Function):
    """Rows of every rank; gradients summed at their owner."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        ctx.rows = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        total = grad.to(torch.float64)
        dist.all_reduce(total)
        return total[ctx.rows * dist.get_rank() :][: ctx.rows].to(grad.dtype)


# -- which fault where -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A sound cell."""

    ranks: int
    strategy: Any
    mask: str = "causal"
    seqlen: int = 256
    direction: str = "forward_backward"

    def __str__(self) -> str:
        what = f"P={self.ranks} {self.strategy} {self.mask} {self.seqlen}"
        return what if self.direction == "forward_backward" else f"{what} {self.direction}"


@dataclass(frozen=True)
class Fault:
    """One kind, and cells that it is put into. ``least``: the lowest precision in which it is a fault and not a rounding."""

    name: str
    cells: tuple[Cell, ...]
    executor: Callable[..., Executor] = Executor
    merge: Callable[..., Pair] = merge
    least: str = "bfloat16"

    @property
    def dtypes(self) -> tuple[str, ...]:
        return DTYPES[: DTYPES.index(self.least) + 1]


def cells(ranks: int, *strategies: Any, masks: tuple[str, ...] = ("causal",), **options: Any) -> tuple[Cell, ...]:
    return tuple(Cell(ranks, strategy, mask, **options) for strategy in strategies for mask in masks)


FORWARD = "forward"
ZIGZAG, STRIPED, PLAIN = Ring("zigzag"), Ring("striped"), Ring("contiguous")
RINGS = (ZIGZAG, STRIPED, PLAIN)
FAULTS = (
    # messages
    Fault("nothing received from pass 2 on", cells(2, ZIGZAG, AllGather()) + cells(4, PLAIN), partial(Deaf, since=2)),
    Fault("nothing received from pass 4 on", cells(4, USP(2), GroupCast(), TokenRing()), partial(Deaf, since=4)),
    Fault(
        "nothing received from pass 5 on", cells(2, ZIGZAG, Ulysses()) + cells(4, STRIPED, masks=("full",)), partial(Deaf, since=5)
    ),
    Fault("nothing received from pass 5 on, forward", cells(2, ZIGZAG, direction=FORWARD), partial(Deaf, since=5)),
    Fault("nothing received in the last timed pass", cells(2, PLAIN), partial(Deaf, since=LAST_TIMED, until=LAST_TIMED + 1)),
    Fault("nothing received by one rank", cells(4, ZIGZAG, USP(2)), partial(Deaf, who=(2,), since=5)),
    Fault("nothing received in one hop", cells(4, ZIGZAG, masks=("causal", "documents")), partial(Deaf, at=(1,))),
    Fault("nothing received in one hop of backward", cells(4, ZIGZAG, TokenRing()), partial(Deaf, at=(6,))),
    Fault("one rank's gradients of keys get lost from pass 5 on", cells(2, PLAIN), partial(Deaf, kinds=("dkv",), since=5)),
    Fault("the last eighth of messages comes too late", cells(2, ZIGZAG, AllGather()), partial(Deaf, who=(1,), share=0.125)),
    Fault("a block of keys used twice", cells(4, ZIGZAG, masks=("causal", "full")), partial(Stale, at=2)),
    Fault("a block of keys used twice in backward", cells(4, STRIPED), partial(Stale, at=-3)),
    Fault("values of two peers exchanged", cells(2, ZIGZAG) + cells(4, STRIPED, masks=("full",)), partial(SwappedPeers, at=1)),
    Fault("values of two shards exchanged", cells(2, AllGather(), masks=("causal", "full")), partial(SwappedShards, who=(-1,))),
    Fault("gradients travel in bfloat16", cells(4, ZIGZAG, USP(2)), partial(Rounded, kinds=("dkv",)), least="float32"),
    Fault("gradients travel in float16", cells(2, STRIPED), partial(Rounded, kinds=("dkv",), low=torch.float16), least="float32"),
    Fault("gradients travel in float32", cells(2, STRIPED), partial(Rounded, kinds=("dkv",), low=torch.float32), least="float64"),
    Fault("dq travels in bfloat16", cells(4, TokenRing()), partial(Rounded, kinds=("dq",)), least="float32"),
    Fault("partial results travel in bfloat16", cells(4, TokenRing()), partial(Rounded, kinds=("out",)), least="float32"),
    Fault("keys travel in bfloat16", cells(2, ZIGZAG), partial(Rounded, kinds=("kv",)), least="float32"),
    # tiles
    Fault(
        "tile skipped on one rank",
        cells(2, *RINGS, TokenRing(), GroupCast())
        + cells(4, USP(2), LightSeq(), LoongTrain(2), TokenRing(), ZIGZAG)
        + cells(4, Hybrid((2, 2)), GroupCast(), masks=("documents",))
        + cells(2, ZIGZAG, masks=("blocks",)),
        partial(Skips, who=(-1,)),
    ),
    Fault("tile skipped on one rank, forward", cells(2, ZIGZAG, direction=FORWARD), partial(Skips, who=(-1,))),
    Fault("tile skipped on one rank at 4k", cells(2, STRIPED, seqlen=4096), partial(Skips, who=(-1,))),
    Fault(
        "tile skipped on one rank in backward",
        cells(2, *RINGS, TokenRing()) + cells(4, USP(2), GroupCast()),
        partial(Skips, who=(-1,), backward=True),
    ),
    Fault("tile skipped in the last timed pass", cells(2, PLAIN), partial(Skips, who=(-1,), since=5, until=6)),
    Fault("32 x 32 pairs left out on one rank", cells(2, Ulysses(), AllGather(), ZIGZAG), partial(Square, who=(-1,), size=32)),
    Fault(
        "one pair left out on one rank",
        cells(2, Ulysses(), AllGather(), seqlen=1024) + cells(2, PLAIN, seqlen=2048),
        partial(Square, who=(-1,), size=1),
    ),
    Fault("one rank's softmax scale x1.02", cells(2, ZIGZAG, masks=("full", "causal")), partial(Scaled, who=(-1,))),
    # merging
    Fault(
        "merged by plain averages", cells(2, ZIGZAG, GroupCast()) + cells(4, USP(2), TokenRing(), masks=("full",)), merge=averaged
    ),
    Fault("merged by each other's weights", cells(2, STRIPED), merge=exchanged),
    Fault("merged LSE is the larger one", cells(2, ZIGZAG, TokenRing()), merge=larger),
    Fault("merged LSE of one head + 0.002", cells(2, ZIGZAG) + cells(4, GroupCast()), merge=partial(one_head, which="lse")),
    Fault("merged out of one head x1.02", cells(2, ZIGZAG, TokenRing()), merge=partial(one_head, which="out")),
    # gradients
    Fault("a rank forgets others' dkv", cells(2, ZIGZAG, AllGather()) + cells(4, USP(2), GroupCast()), partial(Forgets, who=(0,))),
    Fault("a rank adds others' dkv twice", cells(2, ZIGZAG) + cells(4, AllGather()), partial(Forgets, who=(0,), times=2)),
    Fault("a rank forgets others' dq", cells(2, TokenRing()) + cells(4, TokenRing()), partial(Forgets, who=(1,), kind="dq")),
    Fault("dq of remote tiles forgotten", cells(2, *RINGS, GroupCast()), partial(ForgetsRemote, who=(-1,))),
    Fault("sums of gradients are not cleared", cells(4, ZIGZAG), NoZeros),
    Fault("backward takes the first tile's LSE", cells(2, ZIGZAG), FirstLSE),
    Fault("delta is not sent", cells(2, TokenRing()), partial(NoDelta, who=(0,))),
    # heads
    Fault("keys of another head group sent", cells(2, Ulysses()), partial(OtherHeads, who=(1,), results=False)),
    Fault("results put into another head group", cells(2, Ulysses()), partial(OtherHeads, who=(1,), results=True)),
    Fault("LSE's heads in another order", cells(2, Ulysses(), ZIGZAG), partial(OtherLSE, who=(1,))),
    # from pass to pass
    Fault("first results given again", cells(2, ZIGZAG, Ulysses()), Memo),
    Fault("first results given again by address", cells(2, ZIGZAG) + cells(4, USP(2)), partial(Memo, address=True)),
    Fault("first results given again by address, forward", cells(2, ZIGZAG, direction=FORWARD), partial(Memo, address=True)),
    Fault("gradients given again by address", cells(2, STRIPED), partial(Memo, address=True, of="backward")),
    Fault("one rank's results given again by address", cells(2, ZIGZAG), partial(Memo, address=True, who=(1,))),
    Fault("received keys kept by address", cells(2, ZIGZAG) + cells(4, GroupCast()), KeepsKeys),
    Fault("one rank skips timed passes", cells(2, ZIGZAG) + cells(4, STRIPED), partial(Lazy, who=(1,), since=4)),
    Fault("one rank skips the last timed pass", cells(2, Ulysses(), PLAIN), partial(Lazy, who=(1,), since=5, until=6)),
    # bytes
    Fault("fewer bytes than the mask needs", cells(2, ZIGZAG, AllGather(), masks=("full",)), Uncounted),
    # peers
    Fault("a peer owns half of the tokens", cells(2, HalfPeer())),
    Fault("a peer owns a token twice", cells(2, DoublePeer())),
    Fault("a peer owns a token beyond the end", cells(2, BeyondPeer())),
    Fault("a peer computes tokens in another order", cells(2, OrderPeer())),
    Fault("a peer gives its LSE in another base", cells(2, BasePeer()), least="bfloat16"),
    Fault("a library's out x1.02", cells(2, LibraryPeer(1.02))),
)
SOUND = (
    *dict.fromkeys(cell for fault in FAULTS for cell in fault.cells if not isinstance(cell.strategy, RingPeer)),
    Cell(2, RingPeer()),
    *cells(2, LibraryPeer(), TorchCP(), masks=("full", "causal")),
)


def measured(cell: Cell, dtype: str, gang: Gang, fault: Fault | None = None) -> Measured:
    problem = Problem(cell.seqlen, HEADS, Scale(1, cell.ranks), dtype, cell.direction)
    mask = MASKS[cell.mask](cell.seqlen)
    assert cell.strategy.unsupported(problem, mask) is None, str(cell)
    work = Work(Attention(), problem, lambda draw: mask, SDPAFlash(), cell.strategy, SETTINGS, 0)
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            patch.setattr(lcbench.schedule.execute, "Executor", fault.executor)
            patch.setattr(lcbench.schedule.execute, "merge_into", partial(in_place, fault.merge))
        return measure_cell(work, gang, lambda _: None)


def told(rank: int, ranks: int, path: Path, kind: str) -> None:
    """Every faulty or every sound cell on so many ranks: [name, cell, type, why refused, share of the bound, unchecked]."""
    gc.collect()
    gc.freeze()  # measuring memory collects garbage, and looks through all of torch each time otherwise
    gang = Gang(rank, ranks, CPU, Groups(), [])
    cases: list[tuple[Fault | None, Cell, str]] = []
    if kind == "faults":
        for each in FAULTS:
            # The roughest type first, where most is forgiven; cells take turns at the others.
            cases += [(each, cell, each.dtypes[-1 - i % len(each.dtypes)]) for i, cell in enumerate(each.cells)]
    else:
        cases += [(None, cell, DTYPES[i % len(DTYPES)]) for i, cell in enumerate(SOUND)]
    found = []
    for fault, cell, dtype in due(case for case in cases if case[1].ranks == ranks):
        result = measured(cell, dtype, gang, fault)
        check = result.check
        assert check is not None
        found.append([fault and fault.name, str(cell), dtype, refused(result), check.of_bound, check.unchecked])
    if rank == 0:
        path.write_text(json.dumps(found))


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_fault_is_refused(ranks: int, tmp_path: Path) -> None:
    run_ranks(ranks, told, ranks, tmp_path / "told", "faults")
    found = json.loads((tmp_path / "told").read_text())
    assert [case[:3] for case in found if not case[3]] == []


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_no_sound_run_is_refused(ranks: int, tmp_path: Path) -> None:
    run_ranks(ranks, told, ranks, tmp_path / "told", "sound")
    found = json.loads((tmp_path / "told").read_text())
    assert [(cell, dtype, why, of_bound) for _, cell, dtype, why, of_bound, _ in found if why or not of_bound < 1] == []
    for _, cell, _, _, _, unchecked in found:
        assert unchecked.keys() == ({"lse"} if "LibraryPeer" in cell else set()), cell
