"""One rank's run of a strategy that splits keys and values: gather queries, compute them on own keys, merge partial results.

Tensors are packed (T, H, D). Partial results travel in float32 (float64 for float64 inputs), or as ``reduce_dtype`` says, and LSE
in the type of sums. What is sent for a new token does not depend on how many there are before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch

from lcbench.cp.base import Place, RankRun
from lcbench.cp.exchange import Exchange
from lcbench.cp.split_cache import Merge, Split
from lcbench.kernels.base import Kernel, OutLse, Platform, Prepared, Unsupported, accumulation_dtype, prepare, softmax_arguments
from lcbench.kernels.cache import Cache, CacheKind, PreparedForCache, unread
from lcbench.kernels.merge import merge_into
from lcbench.kernels.sink import with_sink
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.execute import Counters
from lcbench.schedule.held import Held
from lcbench.schedule.layout import Layout
from lcbench.schedule.messages import wait_all


class Merging(ABC):
    """How the ranks of a row merge their partial results, each for its own heads.

    Args:
        row: the ranks.
        heads: of each rank, ``value_dim`` wide.
        tokens: queries.
        reduced, sums: the types that partial results and LSE travel in.

    Attributes:
        collectives: the operations that it takes, sorted.
        memory: its buffers.
    """

    collectives: ClassVar[tuple[str, ...]]

    def __init__(
        self, row: Exchange, tokens: int, heads: int, value_dim: int, reduced: torch.dtype, sums: torch.dtype, device: torch.device
    ) -> None:
        self._row, self._heads, self._sums, self._device = row, heads, sums, device
        self._parts = self._buffer((row.size, tokens, heads, value_dim), reduced)

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    @property
    def memory(self) -> list[torch.Tensor]:
        return [x for x in vars(self).values() if isinstance(x, torch.Tensor)]

    def _by_rank(self, x: torch.Tensor) -> torch.Tensor:
        """(T, H, ...) of the row's heads as (D, T, H/D, ...)."""
        return x.unflatten(1, (self._row.size, self._heads)).transpose(0, 1)

    @abstractmethod
    def merged(self, out: torch.Tensor, lse: torch.Tensor, compute: bool) -> OutLse:
        """out (T, H/D, Dv) and LSE (T, H/D) over all keys from those over the keys of each rank, (T, H, Dv) and (T, H), in the type
        of sums and in memory of their own. Without ``compute`` there is only what is sent."""


class Exchanged(Merging):
    """By an all-to-all of partial results and one of their LSE, both under way at once."""

    collectives = ("all_to_all",)

    def __init__(self, row: Exchange, tokens: int, *rest: Any) -> None:
        super().__init__(row, tokens, *rest)
        self._arrived = torch.zeros_like(self._parts)
        self._lse, self._lses = (self._buffer((row.size, tokens, self._heads), self._sums) for _ in range(2))

    def merged(self, out: torch.Tensor, lse: torch.Tensor, compute: bool) -> OutLse:
        if compute:
            self._parts.copy_(self._by_rank(out))
            self._lse.copy_(self._by_rank(lse))
        wait_all([*self._row.to_all(self._arrived, self._parts), *self._row.to_all(self._lses, self._lse)])
        total = self._arrived[0].to(self._sums, copy=True), self._lses[0].clone()
        for part in zip(self._arrived[1:], self._lses[1:], strict=True) if compute else ():
            merge_into(*total, *part)
        return total


class Summed(Merging):
    """By an all-gather of the LSE and a reduce-scatter of partial results that are scaled to their share of the whole."""

    collectives = ("all_gather", "reduce_scatter")

    def __init__(self, row: Exchange, tokens: int, *rest: Any) -> None:
        super().__init__(row, tokens, *rest)
        self._lses = self._buffer((row.size, tokens, row.size * self._heads), self._sums)
        self._total = torch.zeros_like(self._parts[0])

    def merged(self, out: torch.Tensor, lse: torch.Tensor, compute: bool) -> OutLse:
        wait_all(self._row.gather(self._lses, lse))
        whole = self._lses.logsumexp(0)
        if compute:
            share = torch.exp(lse - whole).nan_to_num_(nan=0.0)  # a row that sees no key at all has no share
            self._parts.copy_(self._by_rank(out * share[:, :, None]))
        wait_all(self._row.sum_scattered(self._total, self._parts))
        first = self._row.place * self._heads
        return self._total.to(self._sums, copy=True), whole[:, first : first + self._heads].contiguous()


MERGINGS: dict[Merge, type[Merging]] = {"reduce_scatter": Summed, "all_to_all": Exchanged}


class Gathering:
    """The queries of all heads of a row from those of each rank, in the order in which a kernel takes them."""

    collectives = ("all_gather",)

    def __init__(self, row: Exchange, tokens: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._row = row
        self._arrived = torch.zeros((row.size, tokens, heads, dim), dtype=dtype, device=device)
        self._queries = torch.zeros((tokens, row.size * heads, dim), dtype=dtype, device=device)

    @property
    def memory(self) -> list[torch.Tensor]:
        return [self._arrived, self._queries]

    def gathered(self, q: torch.Tensor) -> torch.Tensor:
        """(T, H, D) from (T, H/D, D) of each rank."""
        wait_all(self._row.gather(self._arrived, q.contiguous()))
        self._queries.unflatten(1, (self._row.size, -1)).copy_(self._arrived.transpose(0, 1))
        return self._queries


class SplitRun(RankRun):
    """A rank at work. What depends on the mask alone is prepared here, outside of any timing.

    Attributes:
        tokens, held: see ``RankRun``.
    """

    def __init__(self, split: Split, problem: Problem, mask: Mask, kernel: Kernel, place: Place, merge: Merge) -> None:
        self.tokens = split.held.out.tokens
        self._split, self._problem, self._device = split, problem, place.device
        self._input: torch.dtype = getattr(torch, problem.dtype)
        self._sums, self._softmax = accumulation_dtype(self._input), softmax_arguments(problem)
        self._row = Exchange(problem, place, split.rows)
        self._gathering = self._merging = None
        if self._row.size > 1:
            own, tokens = split.heads.q // self._row.size, problem.queries
            reduced = self._input if problem.reduce_dtype == "input" else self._sums
            if split.gathers:
                self._gathering = Gathering(self._row, tokens, own, split.heads.dim, self._input, self._device)
            self._merging = MERGINGS[merge](self._row, tokens, own, split.heads.v, reduced, self._sums, self._device)
        self._prepare(mask, kernel)

    @property
    def held(self) -> Held:
        return self._split.held

    def _prepare(self, mask: Mask, kernel: Kernel) -> None:
        """Its kernel, None where it has no pair, and the order in which this takes queries."""
        split = self._split
        tile = mask.of_heads(split.first, split.heads.q, self._problem.heads.q).tile(split.q_runs, split.k_runs).merged()
        self._kernel = prepare(kernel, tile, split.heads, self._input, self._device) if len(tile) else None
        self._asked, self._contiguous = kernel, kernel.contiguous_kv
        self._pairs = tile.pairs(split.heads.q)
        taken = Layout((split.q_runs,)).tokens(0)
        self._order = self._place = None
        if (np.diff(taken) != 1).any():
            self._order, self._place = (torch.from_numpy(x).to(self._device) for x in (taken, np.argsort(taken)))

    # -- passes --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sink: torch.Tensor | None = None,
        *,
        compute: bool = True,
        communicate: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out (Tq, Hq/P, Dv) of this rank's heads, and their LSE (Tq, Hq/P), from its q (Tq, H, D) and its k and v (Tk, Hk, .).

        Without ``compute`` or without ``communicate`` everything else is done as usual, and the results mean nothing.
        """
        if self._contiguous:
            k, v = k.contiguous(), v.contiguous()
        return self._pass(q, lambda kernel, queries: kernel.forward(queries, k, v, **self._softmax), sink, compute, communicate)

    def reads(self, kind: CacheKind) -> str | None:
        of_row = replace(self._problem, heads=self._split.heads)
        return unread(self._asked, kind, of_row, Platform.of(self._device))

    def forward_cache(
        self,
        q: torch.Tensor,
        cache: Cache,
        sink: torch.Tensor | None = None,
        *,
        compute: bool = True,
        communicate: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.reads(cache.kind) is not None:
            return self.forward(q, *cache.read(), sink, compute=compute, communicate=communicate)

        def attend(kernel: Prepared, queries: torch.Tensor) -> OutLse:
            return cast(PreparedForCache, kernel).forward_cache(queries, cache, **self._softmax)

        return self._pass(q, attend, sink, compute, communicate)

    def _pass(
        self,
        q: torch.Tensor,
        attend: Callable[[Prepared, torch.Tensor], OutLse],
        sink: torch.Tensor | None,
        compute: bool,
        communicate: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Results of this rank's heads; ``attend``: partial ones of the row's, over this rank's own keys."""
        self._row.begin(communicate=communicate)
        queries = self._gathering.gathered(q) if self._gathering else q
        out, lse = self._partial(queries, attend) if compute and self._kernel else self._nothing()
        if self._merging:
            out, lse = self._merging.merged(out, lse, compute)
        if sink is not None:
            own = self._split.held.out.heads
            assert own is not None
            out, lse = with_sink(out, lse, sink[own.start : own.stop])
        return out.to(self._input), lse

    def _partial(self, q: torch.Tensor, attend: Callable[[Prepared, torch.Tensor], OutLse]) -> OutLse:
        """Results over this rank's own keys, of queries in the order in which they come."""
        assert self._kernel is not None
        out, lse = attend(self._kernel, q if self._order is None else q.index_select(0, self._order))
        if self._place is not None:
            out, lse = out.index_select(0, self._place), lse.index_select(0, self._place)
        return out, lse.to(self._sums).contiguous()

    def _nothing(self) -> OutLse:
        """The result over no keys."""
        heads, tokens = self._split.heads, self._problem.queries
        out = torch.zeros((tokens, heads.q, heads.v), dtype=self._sums, device=self._device)
        return out, torch.full(out.shape[:2], -torch.inf, dtype=self._sums, device=self._device)

    def lse(self, saved: torch.Tensor) -> torch.Tensor:
        return saved

    def backward(self, dout: torch.Tensor, saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise Unsupported("a split cache is for serving, and has no backward")

    def counters(self) -> Counters:
        parts = [part for part in (self._gathering, self._merging) if part is not None]
        held = sum(x.numel() * x.element_size() for part in parts for x in part.memory)
        collectives = sorted({name for part in parts for name in part.collectives})
        calls = self._kernel.calls if self._kernel else 0
        return Counters(self._row.bytes_sent, self._row.bytes_between_nodes, held, calls, self._pairs, collectives)

    def replay(self, *, compute: bool, communicate: bool) -> Alone | None:
        """The same passes without kernels or without messages; None for a rank alone, which sends nothing."""
        return Alone(self, compute, communicate) if self._row.size > 1 else None


@dataclass(frozen=True)
class Alone:
    """The passes of a run without kernels or without messages. Results mean nothing."""

    run: SplitRun
    compute: bool
    communicate: bool

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.run.forward(q, k, v, sink, compute=self.compute, communicate=self.communicate)

    def forward_cache(self, q: torch.Tensor, cache: Cache, sink: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.run.forward_cache(q, cache, sink, compute=self.compute, communicate=self.communicate)

    def backward(self, dout: torch.Tensor, saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.run.backward(dout, saved)
