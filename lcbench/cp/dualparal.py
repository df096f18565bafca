"""A pipeline of layers, through which blocks of frames go, each at a noise level of its own (DualParal, arXiv 2505.21070).

Ranks have adjacent layers, the first rank the first ones, and of their layers all tokens. The tokens are ``blocks`` equal blocks 0
... B-1, in the order of the video. In round n = 0, 1, ... S + B - 2 the blocks i with 0 <= n - i < S are in the queue, each at its
step t = n - i: block n enters, and a block leaves after step S - 1. A round takes the blocks from the newest, which has most noise,
to the oldest. With c = ``context`` * block size tokens, block i at step t is this in each layer:

* Rows are the block, and before it the last c tokens of block i - 1: [i * b - c, (i + 1) * b).
* They see the keys of these same tokens at step t, and of the first c tokens of block i + 1 the keys of step t - 1, that were
  computed just before in this round and are in the layer's *cache*. In step 0 there are none, since block i + 1 enters a round
  later; the last block never has any. Of all these pairs those count that the mask has.
* The latent that the rows begin with is that of their tokens as it is then: of the block after step t - 1, of those before it after
  step t. All of them take the inputs q, k and v of step t.
* What becomes of the block is its new latent; what becomes of the tokens before it is dropped.

A rank sends the rows' latent to the next rank, and the last one sends the block's to the first, where it is for the next round.
These are all messages: (c + b) * Hq * D numbers from rank to rank, without c of block 0, and b * Hq * D from the last.

The release (``examples/DualParal_Wan.py``, ``src/pipelines``) does the same with frames, and with a model between the messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lcbench.cp.base import Place
from lcbench.cp.steps import STEADY, Inputs, Keep, Kept, OverSteps, StepRun, View
from lcbench.kernels.base import Kernel, Prepared, prepare
from lcbench.masks.band import TokenSpan
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_count
from lcbench.schedule.held import Held, Part
from lcbench.schedule.layout import contiguous

if TYPE_CHECKING:
    import torch

    from lcbench.cp.wire import UnderWay
    from lcbench.schedule.execute import Counters

# Messages in the two directions do not wait for one another, also where there are two ranks.
LATENTS, RESULTS = "latents", "results"
MOST_SENT = 2  # messages to a rank that are under way before the next is computed


@dataclass(frozen=True)
class DualParal(OverSteps):
    """``blocks``: of the tokens; ``context``: tokens of each neighbour that a block sees, as a share of a block, 0 to 1."""

    blocks: int = 8
    context: float = 0.5

    def __post_init__(self) -> None:
        check_count("blocks", self.blocks)
        if not 0 <= self.context <= 1:
            raise ValueError(f"cp.context={self.context} is no share of a block, 0 to 1")

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if reason := super().unsupported(problem, mask):
            return reason
        if problem.seqlen % self.blocks:
            return f"has equal blocks, and cp.blocks={self.blocks} does not divide seqlen={problem.seqlen}"
        return None

    def too_few(self, steps: int, layers: int, problem: Problem) -> str | None:
        if layers < problem.scale.world_size:
            return f"is a pipeline of {problem.scale.world_size} ranks, and layers={layers} leaves one without a layer"
        return None

    def start_steps(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place, steps: int, layers: int) -> StepRun:
        return DualParalRun(Queue(problem.seqlen, self.blocks, self.context, steps), problem, mask, kernel, place, layers)


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
        from lcbench.cp.wire import Wire

        ranks = problem.scale.world_size
        self.given = np.arange(problem.seqlen)
        self.tokens = self.given if place.rank == 0 else self.given[:0]
        share = contiguous(layers, ranks).tokens(place.rank)
        self.layers = range(int(share[0]), int(share[-1]) + 1)
        self.queue, self.problem, self.rank, self.ranks, self.device = queue, problem, place.rank, ranks, place.device
        self.to_next, self.to_first = Wire.of(problem, place, LATENTS), Wire.of(problem, place, RESULTS)
        self.kernels: dict[tuple[int, int], Prepared] = {}
        for block in range(queue.blocks):
            for step in (0, 1):
                self.kernels[block, len(queue.after(step, block))] = self._made(mask, kernel, step, block)
        self._pairs = sum(self.pairs(mask, problem.heads.q, step) for step in range(queue.steps))

    def _made(self, mask: Mask, kernel: Kernel, step: int, block: int) -> Prepared:
        import torch

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
        for wire in (self.to_next, self.to_first):
            wire.begin()
        return Flow(self, inputs, keep).run()

    def begins(self, results: Sequence[torch.Tensor], step: int, part: int) -> torch.Tensor | None:
        import torch

        rows, own = self.queue.rows(part), self.queue.own(part)
        earlier = torch.zeros_like(results[0]) if step == 0 else results[step - 1]
        return torch.cat((results[step][rows.start : own.start], earlier[own.start : own.stop]))

    def gave(self, results: Sequence[torch.Tensor], step: int, part: int) -> torch.Tensor:
        own = self.queue.own(part)
        return results[step][own.start : own.stop]

    def counters(self) -> Counters:
        from lcbench.schedule.execute import Counters

        sent, between_nodes = (
            sum(getattr(wire, name) for wire in (self.to_next, self.to_first)) for name in ("bytes_sent", "bytes_between_nodes")
        )
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
        self._returning: deque[tuple[int, int, torch.Tensor, UnderWay]] = deque()
        self._arriving: deque[tuple[torch.Tensor, UnderWay]] = deque()
        self._sent: deque[UnderWay] = deque()

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
            self._sent.popleft().wait()
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
            into, work = self._arriving.popleft()
            work.wait()
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
        import torch

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
            self._sent.popleft().wait()
        if run.rank == 0:
            into = x.new_empty((run.queue.size, *x.shape[1:]))
            self._returning.append((step, block, into, run.to_first.receive(into, run.ranks - 1)))

    def _take(self) -> None:
        """Wait for the block that comes back next."""
        step, block, x, work = self._returning.popleft()
        work.wait()
        self._put(step, block, x)

    def _put(self, step: int, block: int, x: torch.Tensor) -> None:
        own = self._run.queue.own(block)
        self.latent[own.start : own.stop] = x
        self.results[step][own.start : own.stop] = x
        self.done[block] += 1


def _span(tokens: range) -> TokenSpan:
    return TokenSpan(tokens.start, len(tokens))
