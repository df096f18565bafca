"""One rank of the pipeline of ``dualparal``: its layers, and the latents that come in and go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lcbench.cp.base import Place
from lcbench.cp.exchange import Exchange
from lcbench.cp.steps import STEADY, Inputs, Keep, Kept, StepRun, View
from lcbench.kernels.base import Kernel, Prepared, prepare
from lcbench.masks.band import TokenSpan
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.execute import Counters
from lcbench.schedule.held import Held, Part
from lcbench.schedule.layout import contiguous
from lcbench.schedule.messages import Waits, wait_all

# Messages in the two directions do not wait for one another, also where there are two ranks.
LATENTS, RESULTS = "latents", "results"
MOST_SENT = 2  # messages to a rank that are under way before the next is computed


@dataclass(frozen=True)
class Queue:
    """Which block is computed when, and on which tokens.

    Attributes:
        tokens: of all blocks; ``blocks``: how many there are; ``context``: as of ``DualParal``.
        steps: of each block.
    """

    tokens: int
    blocks: int
    context: float
    steps: int

    @property
    def size(self) -> int:
        return self.tokens // self.blocks

    @property
    def seen(self) -> int:
        """Tokens of a neighbour that a block sees."""
        return int(self.context * self.size)

    def turns(self) -> Iterator[tuple[int, int, bool]]:
        """(step, block, whether it is the first of its round) of everything that goes through the pipeline, in order."""
        for number in range(self.steps + self.blocks - 1):
            newest = min(number, self.blocks - 1)
            for block in range(newest, max(0, number - self.steps + 1) - 1, -1):
                yield number - block, block, block == newest

    def own(self, block: int) -> range:
        return range(block * self.size, (block + 1) * self.size)

    def rows(self, block: int) -> range:
        """The block, and what comes before it."""
        return range(max(0, block * self.size - self.seen), (block + 1) * self.size)

    def after(self, step: int, block: int) -> range:
        """Tokens of the block behind it that a block sees at a step."""
        begin = (block + 1) * self.size
        return range(begin, begin + (self.seen if step and block + 1 < self.blocks else 0))


class DualParalRun(StepRun):
    """One rank of the pipeline. The first one has the latents, and gives them."""

    together = False

    def __init__(self, queue: Queue, problem: Problem, mask: Mask, kernel: Kernel, place: Place, layers: int) -> None:
        ranks = problem.scale.world_size
        self.given = np.arange(problem.seqlen)
        self.tokens = self.given if place.rank == 0 else self.given[:0]
        share = contiguous(layers, ranks).tokens(place.rank)
        self.layers = range(int(share[0]), int(share[-1]) + 1)
        self.queue, self.problem, self.rank, self.ranks, self.device = queue, problem, place.rank, ranks, place.device
        self.to_next, self.to_first = (Exchange.of(problem, place, channel=channel) for channel in (LATENTS, RESULTS))
        self.kernels: dict[tuple[int, int], Prepared] = {}
        for block in range(queue.blocks):
            for step in (0, 1):
                self.kernels[block, len(queue.after(step, block))] = self._made(mask, kernel, step, block)
        self._pairs = sum(self.pairs(mask, problem.heads.q, step) for step in range(queue.steps))

    def _made(self, mask: Mask, kernel: Kernel, step: int, block: int) -> Prepared:
        queue, heads = self.queue, self.problem.heads
        rows = queue.rows(block)
        keys = range(rows.start, rows.stop + len(queue.after(step, block)))
        tile = mask.tile((_span(rows),), (_span(keys),))
        return prepare(kernel, tile, heads, getattr(torch, self.problem.dtype), self.device)

    @property
    def held(self) -> Held:
        return Held(Part(self.given), Part(self.given), Part(self.tokens))

    def phases(self) -> dict[str, range]:
        return {STEADY: range(self.queue.steps)}

    def pairs(self, mask: Mask, q_heads: int, step: int) -> int:
        found = 0
        for block in range(self.queue.blocks):
            rows, after = self.queue.rows(block), self.queue.after(step, block)
            keys = range(rows.start, rows.stop + len(after))
            found += mask.tile((_span(self.queue.own(block)),), (_span(keys),)).pairs(q_heads)
        return found

    def views(self, step: int, part: int) -> Iterator[View]:
        rows, after = (np.array(span, dtype=np.int64) for span in (self.queue.rows(part), self.queue.after(step, part)))
        yield View(rows, np.concatenate([rows, after]), np.repeat([0, 1], [len(rows), len(after)]))

    def advance(self, steps: range, inputs: Inputs, before: Sequence[torch.Tensor], keep: Keep | None) -> list[torch.Tensor]:
        assert len(steps) == self.queue.steps
        for messages in (self.to_next, self.to_first):
            messages.begin()
        return Flow(self, inputs, keep).run()

    def begins(self, results: Sequence[torch.Tensor], step: int, part: int) -> torch.Tensor | None:
        rows, own = self.queue.rows(part), self.queue.own(part)
        earlier = torch.zeros_like(results[0]) if step == 0 else results[step - 1]
        return torch.cat((results[step][rows.start : own.start], earlier[own.start : own.stop]))

    def gave(self, results: Sequence[torch.Tensor], step: int, part: int) -> torch.Tensor:
        own = self.queue.own(part)
        return results[step][own.start : own.stop]

    def counters(self) -> Counters:
        sent = self.to_next.bytes_sent + self.to_first.bytes_sent
        between_nodes = self.to_next.bytes_between_nodes + self.to_first.bytes_between_nodes
        calls = max(kernel.calls for kernel in self.kernels.values())
        return Counters(sent, between_nodes, 0, calls, self._pairs * len(self.layers), [])


class Flow:
    """One pass of all blocks through the pipeline, as a rank sees it.

    Attributes:
        latent: of all tokens as it is now, (N, Hq, D), of the first rank.
        results: of each step, (N, Hq, D), of the first rank.
        done: of each block, how many of its steps have come back to the first rank.
    """

    def __init__(self, run: DualParalRun, inputs: Inputs, keep: Keep | None) -> None:
        like = inputs[0][0].q
        self._run, self._inputs, self._keep = run, inputs, keep
        self._turns = list(run.queue.turns())
        own = like[: len(run.tokens)]
        self.latent = own.new_zeros(own.shape)
        self.results = [own.new_empty(own.shape) for _ in range(run.queue.steps)]
        self.done = [0] * run.queue.blocks
        self._cache: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        self._returning: deque[tuple[int, int, torch.Tensor, list[Waits]]] = deque()
        self._arriving: deque[tuple[torch.Tensor, list[Waits]]] = deque()
        self._sent: deque[list[Waits]] = deque()

    def run(self) -> list[torch.Tensor]:
        self._expect(0)
        for number, (step, block, first) in enumerate(self._turns):
            if first:
                self._cache = [None] * len(self._run.layers)
            before = self._entering(step, block)
            self._expect(number + 1)
            self._leave(step, block, self._through(step, block, before))
        while self._returning:
            self._take()
        while self._sent:
            wait_all(self._sent.popleft())
        return self.results

    def _expect(self, number: int) -> None:
        """Begin to receive the latent of a turn from the rank before."""
        run = self._run
        if run.rank == 0 or number == len(self._turns):
            return
        like, rows = self._inputs[0][0].q, run.queue.rows(self._turns[number][1])
        into = like.new_empty((len(rows), *like.shape[1:]))
        self._arriving.append((into, run.to_next.receive(into, run.rank - 1)))

    def _entering(self, step: int, block: int) -> torch.Tensor:
        """The latent that the rows of a block begin with on this rank."""
        queue = self._run.queue
        if self._run.rank:
            into, works = self._arriving.popleft()
            wait_all(works)
            return into
        rows = queue.rows(block)
        while self.done[block] < step or (rows.start < block * queue.size and self.done[block - 1] <= step):
            self._take()
        return self.latent[rows.start : rows.stop].clone()

    def _through(self, step: int, block: int, before: torch.Tensor) -> torch.Tensor:
        """The latent behind this rank's layers."""
        run, rows, head = self._run, self._run.queue.rows(block), self._run.queue.own(block)[: self._run.queue.seen]
        after = len(run.queue.after(step, block))
        kernel, scale = run.kernels[block, after], run.problem.softmax_scale
        latent, outs = before, []
        for place, (q, k, v) in enumerate(self._inputs[step]):
            keys, values = self._with_cached(place, k[rows.start : rows.stop], v[rows.start : rows.stop], after)
            out = kernel.forward(q[rows.start : rows.stop] + latent, keys, values, softmax_scale=scale)[0].to(q.dtype)
            self._cache[place] = k[head.start : head.stop].clone(), v[head.start : head.stop].clone()
            latent = latent + out
            outs.append(out)
        if self._keep is not None:
            self._keep(Kept(step, block, np.array(rows), before, outs, self._passed_on(latent)))
        return latent

    def _with_cached(self, place: int, k: torch.Tensor, v: torch.Tensor, after: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of rows, and of ``after`` tokens behind them those that this layer computed just before."""
        if not after:
            return k, v
        cached = self._cache[place]
        assert cached is not None
        return torch.cat((k, cached[0])), torch.cat((v, cached[1]))

    def _passed_on(self, latent: torch.Tensor) -> torch.Tensor:
        return latent[-self._run.queue.size :] if self._run.rank == self._run.ranks - 1 else latent

    def _leave(self, step: int, block: int, latent: torch.Tensor) -> None:
        run, x = self._run, self._passed_on(latent)
        if run.ranks == 1:
            self._put(step, block, x)
            return
        if run.rank == run.ranks - 1:
            self._sent.append(run.to_first.send(x, 0))
        else:
            self._sent.append(run.to_next.send(x, run.rank + 1))
        if len(self._sent) > MOST_SENT:
            wait_all(self._sent.popleft())
        if run.rank == 0:
            into = x.new_empty((run.queue.size, *x.shape[1:]))
            self._returning.append((step, block, into, run.to_first.receive(into, run.ranks - 1)))

    def _take(self) -> None:
        """Wait for the block that comes back next."""
        step, block, x, works = self._returning.popleft()
        wait_all(works)
        self._put(step, block, x)

    def _put(self, step: int, block: int, x: torch.Tensor) -> None:
        own = self._run.queue.own(block)
        self.latent[own.start : own.stop] = x
        self.results[step][own.start : own.stop] = x
        self.done[block] += 1


def _span(tokens: range) -> TokenSpan:
    return TokenSpan(tokens.start, len(tokens))
