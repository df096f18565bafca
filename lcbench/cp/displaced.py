"""Displaced patch parallelism: a step takes the other ranks' keys and values of the step before, and sends its own meanwhile.

DistriFusion (arXiv 2402.19481, section 4; the release's ``distrifuser/modules/pp/attn.py``). Each rank has an equal patch of the
tokens. In the first ``warmup`` steps every layer all-gathers keys and values, and waits for them. From then on a layer takes its
own keys and values of this step and the others' of the step before, which are there; an all-gather of this step's goes on
behind it until the same layer of the next step. So of all keys that a rank uses, those of other ranks are one step old, never more.

What is as in the release: the exact count of bytes, (P - 1) times a rank's keys and values in each layer and step; a buffer for
each layer. What is not: the last step sends nothing, since no step reads it, and ``warmup`` counts the synchronous steps, of which
the release does one more than its option says.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lcbench.cp.base import Place
from lcbench.cp.steps import STEADY, WARMUP, LayerByLayer, OverSteps, StepRun, View
from lcbench.kernels.base import Kernel, OutLse, prepare
from lcbench.masks.band import TokenSpan
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_count
from lcbench.schedule.layout import contiguous

if TYPE_CHECKING:
    import torch

    from lcbench.schedule.execute import Counters
    from lcbench.schedule.messages import Waits


@dataclass(frozen=True)
class Displaced(OverSteps):
    """``warmup``: steps at the begin that wait for keys and values of their own."""

    warmup: int = 4

    def __post_init__(self) -> None:
        check_count("warmup", self.warmup)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if reason := super().unsupported(problem, mask):
            return reason
        if problem.seqlen % problem.scale.world_size:
            return f"has equal patches, and {problem.scale.world_size} ranks do not divide seqlen={problem.seqlen}"
        return None

    def too_few(self, steps: int, layers: int, problem: Problem) -> str | None:
        if steps <= self.warmup:
            return f"workload.steps={steps} leaves no step behind the {self.warmup} of cp.warmup={self.warmup}"
        return None

    def start_steps(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place, steps: int, layers: int) -> StepRun:
        return DisplacedRun(self.warmup, problem, mask, kernel, place, steps, layers)


class Stored:
    """Keys and values of all tokens, as one kernel call takes them and one collective fills them.

    Attributes:
        planes: (N, Hk, 2 * D), or keys and values (N, Hk, D) each for a kernel that wants them contiguous.
        k, v: (N, Hk, D), views of these.
    """

    def __init__(self, problem: Problem, kernel: Kernel, device: torch.device) -> None:
        import torch

        heads, dtype = problem.heads, getattr(torch, problem.dtype)
        widths = (heads.dim, heads.dim) if kernel.contiguous_kv else (2 * heads.dim,)
        self.planes = [torch.zeros((problem.seqlen, heads.kv, width), dtype=dtype, device=device) for width in widths]
        self.k, self.v = self.planes[0][..., : heads.dim], self.planes[-1][..., -heads.dim :]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.planes)


class DisplacedRun(LayerByLayer):
    """Displaced steps on one rank. Each layer has two buffers: what its kernel reads, and what arrives for the step after."""

    def __init__(self, warmup: int, problem: Problem, mask: Mask, kernel: Kernel, place: Place, count: int, layers: int) -> None:
        import torch

        from lcbench.cp.exchange import Exchange

        layout = contiguous(problem.seqlen, problem.scale.world_size)
        super().__init__(layout.tokens(place.rank), count, layers)
        self._warmup, self._problem, self._rank, self._layout = warmup, problem, place.rank, layout
        self._compute = self._communicate = True
        self._own = slice(int(self.tokens[0]), int(self.tokens[-1]) + 1)
        tile = mask.tile(layout.shards[place.rank], (TokenSpan(0, problem.seqlen),))
        self._kernel = prepare(kernel, tile, problem.heads, getattr(torch, problem.dtype), place.device)
        self._pairs = tile.pairs(problem.heads.q)
        self._exchange = Exchange.of(problem, place)
        self._read, self._arriving = ([Stored(problem, kernel, place.device) for _ in range(layers)] for _ in range(2))
        self._under_way: list[list[Waits]] = [[] for _ in range(layers)]

    def phases(self) -> dict[str, range]:
        return {WARMUP: range(self._warmup), STEADY: range(self._warmup, self.count)}

    def begin(self) -> None:
        self._exchange.begin(communicate=self._communicate)

    def attend(self, step: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if step < self._warmup:
            self._fill(layer, k, v)
        else:
            self._renew(layer, k, v, more=step + 1 < self.count)
        return self._attended(layer, q)[0] if self._compute else q.new_zeros(q.shape)

    def _attended(self, layer: int, q: torch.Tensor) -> OutLse:
        stored = self._read[layer]
        return self._kernel.forward(q, stored.k, stored.v, softmax_scale=self._problem.softmax_scale)

    def _fill(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Have all keys and values of this step."""
        from lcbench.schedule.messages import wait_all

        self._put(layer, k, v)
        wait_all(self._sent(layer, self._read[layer]))

    def _renew(self, layer: int, k: torch.Tensor, v: torch.Tensor, *, more: bool) -> None:
        """Have the keys and values of this rank of this step and the others' of the step before, and begin to send this step's."""
        from lcbench.schedule.messages import wait_all

        if self._under_way[layer]:
            wait_all(self._under_way[layer])
            self._read[layer], self._arriving[layer] = self._arriving[layer], self._read[layer]
        self._put(layer, k, v)
        self._under_way[layer] = self._sent(layer, self._arriving[layer]) if more else []

    def _put(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        stored = self._read[layer]
        stored.k[self._own], stored.v[self._own] = k, v

    def _sent(self, layer: int, into: Stored) -> list[Waits]:
        """Begin to gather what this rank has put."""
        if self._exchange.size == 1:
            return []
        planes = zip(into.planes, self._read[layer].planes, strict=True)
        return [work for target, source in planes for work in self._exchange.gather(target, source[self._own])]

    def views(self, step: int, part: int) -> Iterator[View]:
        for owner in range(self._problem.scale.world_size):
            stale = step >= self._warmup and owner != self._rank
            yield View(self._layout.tokens(owner), self.tokens, np.full_like(self.tokens, int(stale)))

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        """A layer of a step that waits for its keys and values."""
        self.begin()
        self._fill(0, k, v)
        return self._attended(0, q)

    def lse(self, saved: Any) -> torch.Tensor:
        lse: torch.Tensor = saved
        return lse

    def counters(self) -> Counters:
        from lcbench.schedule.execute import Counters

        sent, several = self._exchange, self._exchange.size > 1
        held = sum(stored.bytes for stored in (*self._read, *self._arriving))
        return Counters(
            sent.bytes_sent, sent.bytes_between_nodes, held, self._kernel.calls, self._pairs, ["all_gather"] if several else []
        )

    def bare(self, *, compute: bool, communicate: bool) -> StepRun | None:
        if self._exchange.size == 1:
            return None
        run = copy(self)
        run._compute, run._communicate = compute, communicate
        run._read, run._arriving, run._under_way = list(self._read), list(self._arriving), [[] for _ in self.layers]
        return run
