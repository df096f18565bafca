"""A rank's run of a strategy that serves: one kernel call over the keys that the rank has, and messages around it. Forward only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from lcbench.cp.base import Passes, Place, RankRun
from lcbench.kernels.base import Kernel, OutLse, Platform, Prepared, Unsupported, accumulation_dtype, prepare, softmax_arguments
from lcbench.kernels.cache import Cache, CacheKind, PreparedForCache, unread
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem
from lcbench.schedule.replay import Replay

if TYPE_CHECKING:
    import torch

    from lcbench.cp.exchange import Exchange
    from lcbench.schedule.execute import Counters


class OneCall(RankRun):
    """What such runs share. A subclass calls ``get_ready``, and says what a pass is.

    Args:
        heads: of the kernel's call.

    Attributes:
        exchange: its messages.
        dtype, sums, reduced: the types of inputs, of sums, and of partial results under way between ranks.
        buffer_bytes: see ``Counters``.
        collectives: the operations of a pass that has messages, by name.
    """

    buffer_bytes: int = 0
    collectives: Sequence[str] = ()

    def __init__(self, problem: Problem, place: Place, exchange: Exchange, heads: Heads) -> None:
        import torch

        self.problem, self.rank, self.device, self.exchange = problem, place.rank, place.device, exchange
        self._heads, self._softmax = heads, softmax_arguments(problem)
        self.dtype: torch.dtype = getattr(torch, problem.dtype)
        self.sums = accumulation_dtype(self.dtype)
        self.reduced = self.dtype if problem.reduce_dtype == "input" else self.sums

    def get_ready(self, kernel: Kernel, tile: Mask, pairs: int) -> None:
        """Prepare the kernel for the mask of its call; ``pairs``: of the results that this rank answers for, over its query heads.

        Raises:
            Unsupported: the kernel cannot run the tile.
        """
        self._kernel, self._pairs = kernel, pairs
        self._prepared: Prepared | None = None
        if len(tile):
            self._prepared = prepare(kernel, tile, self._heads, self.dtype, self.device)

    @property
    @abstractmethod
    def communicates(self) -> bool:
        """Whether a pass has messages."""

    @abstractmethod
    def passed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Cache | None, sink: torch.Tensor | None, *, compute: bool
    ) -> tuple[torch.Tensor, Any]:
        """A pass: out of what this rank gives, and what it saves. Collective.

        Args:
            cache: that the kernel reads in place of k and v.
        """

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Cache | None, *, compute: bool) -> OutLse:
        """The kernel's results, with LSE in the type of sums; without ``compute``, or without pairs, those over no keys."""
        import torch

        if self._prepared is None or not compute:
            out = torch.zeros((len(q), self._heads.q, self._heads.v), dtype=self.reduced, device=self.device)
            return out, torch.full(out.shape[:2], -torch.inf, dtype=self.sums, device=self.device)
        if cache is not None:
            out, lse = cast(PreparedForCache, self._prepared).forward_cache(q, cache, **self._softmax)
        else:
            if self._kernel.contiguous_kv:
                k, v = k.contiguous(), v.contiguous()
            out, lse = self._prepared.forward(q, k, v, **self._softmax)
        return out, lse.to(self.sums)

    # -- see ``RankRun`` -------------------------------------------------------------------------------------------

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None, *, compute: bool = True,
        communicate: bool = True,
    ) -> tuple[torch.Tensor, Any]:  # fmt: skip
        """Without ``compute`` or without ``communicate`` everything else is done as usual, and the results mean nothing."""
        self.exchange.begin(communicate=communicate)
        return self.passed(q, k, v, None, sink, compute=compute)

    def forward_cache(
        self, q: torch.Tensor, cache: Cache, sink: torch.Tensor | None = None, *, compute: bool = True, communicate: bool = True
    ) -> tuple[torch.Tensor, Any]:
        """The cache is read where it lies if ``reads`` says so."""
        self.exchange.begin(communicate=communicate)
        if self.reads(cache.kind) is None:
            return self.passed(q, cache.k, cache.v, cache, sink, compute=compute)
        return self.passed(q, *cache.read(), None, sink, compute=compute)

    def reads(self, kind: CacheKind) -> str | None:
        return unread(self._kernel, kind, replace(self.problem, heads=self._heads), Platform.of(self.device))

    def backward(
        self, dout: torch.Tensor, saved: Any, *, compute: bool = True, communicate: bool = True
    ) -> tuple[torch.Tensor, ...]:
        raise Unsupported("serving has no backward")

    def counters(self) -> Counters:
        from lcbench.schedule.execute import Counters

        sent, calls = self.exchange, self._prepared.calls if self._prepared else 0
        collectives = self.collectives if self.communicates else ()
        return Counters(sent.bytes_sent, sent.bytes_between_nodes, self.buffer_bytes, calls, self._pairs, collectives)

    def replay(self, *, compute: bool, communicate: bool) -> Passes | None:
        return Replay(self, compute, communicate) if self.communicates else None
