"""One rank's run of a strategy that splits keys and values: gather queries, compute them on own keys, merge partial results.

Tensors are packed (T, H, D). Partial results travel in float32 (float64 for float64 inputs), or as ``reduce_dtype`` says, and LSE
in the type of sums. What is sent for a new token does not depend on how many there are before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch

from lcbench.cp.base import Place, RankRun
from lcbench.cp.exchange import Exchange
from lcbench.cp.one_call import OneCall
from lcbench.cp.split_cache import Merge, Split
from lcbench.kernels.base import Kernel, OutLse
from lcbench.kernels.cache import Cache
from lcbench.kernels.merge import merge_into
from lcbench.kernels.sink import with_sink
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
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
        self.memory: list[torch.Tensor] = []
        self._parts = self._buffer((row.size, tokens, heads, value_dim), reduced)

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.memory.append(torch.zeros(shape, dtype=dtype, device=self._device))
        return self.memory[-1]

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
        self._arrived = self._buffer(self._parts.shape, self._parts.dtype)
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
        self._total = self._buffer(self._parts.shape[1:], self._parts.dtype)

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
        self.memory = [self._arrived, self._queries]

    def gathered(self, q: torch.Tensor) -> torch.Tensor:
        """(T, H, D) from (T, H/D, D) of each rank."""
        wait_all(self._row.gather(self._arrived, q.contiguous()))
        self._queries.unflatten(1, (self._row.size, -1)).copy_(self._arrived.transpose(0, 1))
        return self._queries


class SplitRun(OneCall):
    """A rank at work. What depends on the mask alone is prepared here, outside of any timing."""

    def __init__(self, split: Split, problem: Problem, mask: Mask, kernel: Kernel, place: Place, merge: Merge) -> None:
        super().__init__(problem, place, Exchange.of(problem, place, split.rows), split.heads)
        self.tokens, self._split = split.held.out.tokens, split
        self._gathering = self._merging = None
        row = self.exchange
        if row.size > 1:
            own, tokens, heads = split.heads.q // row.size, problem.queries, split.heads
            if split.gathers:
                self._gathering = Gathering(row, tokens, own, heads.dim, self.dtype, self.device)
            self._merging = MERGINGS[merge](row, tokens, own, heads.v, self.reduced, self.sums, self.device)
        parts = [part for part in (self._gathering, self._merging) if part is not None]
        self.buffer_bytes = sum(x.numel() * x.element_size() for part in parts for x in part.memory)
        self.collectives = sorted({name for part in parts for name in part.collectives})
        tile = mask.of_heads(split.first, split.heads.q, problem.heads.q).tile(split.q_runs, split.k_runs).merged()
        self.get_ready(kernel, tile, tile.pairs(split.heads.q))
        # The order in which the kernel takes queries, and back; None: the one in which they come.
        taken = Layout((split.q_runs,)).tokens(0)
        self._order = self._back = None
        if (np.diff(taken) != 1).any():
            self._order, self._back = (torch.from_numpy(x).to(self.device) for x in (taken, np.argsort(taken)))

    @property
    def held(self) -> Held:
        return self._split.held

    @property
    def communicates(self) -> bool:
        return self.exchange.size > 1

    def passed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Cache | None, sink: torch.Tensor | None, *, compute: bool
    ) -> OutLse:
        """out (Tq, Hq/P, Dv) of this rank's heads, and their LSE (Tq, Hq/P), from its q (Tq, H, D) and its k and v (Tk, Hk, .)."""
        out, lse = self._partial(self._gathering.gathered(q) if self._gathering else q, k, v, cache, compute)
        if self._merging:
            out, lse = self._merging.merged(out, lse, compute)
        if sink is not None:
            own = self._split.held.out.heads
            assert own is not None
            out, lse = with_sink(out, lse, sink[own.start : own.stop])
        return out.to(self.dtype), lse

    def _partial(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Cache | None, compute: bool) -> OutLse:
        """Results of the row's heads over this rank's own keys, of queries in the order in which they come."""
        out, lse = self.attend(q if self._order is None else q.index_select(0, self._order), k, v, cache, compute=compute)
        if self._back is not None:
            out, lse = out.index_select(0, self._back), lse.index_select(0, self._back)
        return out, lse.contiguous()

    def share(self, other: RankRun) -> None:
        if isinstance(other, SplitRun) and other.problem.queries == self.problem.queries:
            self._gathering, self._merging = other._gathering, other._merging

    def lse(self, saved: torch.Tensor) -> torch.Tensor:
        return saved
