"""One rank's run of a batch: its micro-batches one after the other, each an executor of a schedule of all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lcbench.cp.base import Place, RankRun
from lcbench.cp.micro_batch import MicroBatch
from lcbench.kernels.base import Kernel
from lcbench.masks.band import Ints
from lcbench.problem import Problem
from lcbench.schedule.execute import Counters, Executor, Mark, SavedPass, now, seconds_between
from lcbench.schedule.lowering import Lowering


@dataclass(frozen=True)
class SavedBatch:
    """What forward of all micro-batches has saved, of each that this rank is in."""

    parts: tuple[SavedPass, ...]


@dataclass(frozen=True)
class BatchPass:
    """What a whole batch gave this rank: of each of its micro-batches, in order.

    Attributes:
        outs: out (T, Hq, Dv) of each.
        gradients: of each, as ``Passes.backward`` gives them; none without backward.
        saved: what ``BatchRun.lse`` needs.
    """

    outs: tuple[torch.Tensor, ...]
    gradients: tuple[tuple[torch.Tensor, ...], ...]
    saved: SavedBatch


@dataclass(frozen=True, eq=False)
class RankPart:
    """A micro-batch that this rank is in: its number, and the rows of this rank's tensors that are of it."""

    number: int
    run: Executor
    rows: slice


@dataclass(eq=False)
class _Pool:
    """Memory that the buffers of all micro-batches share, since they are at work one after the other."""

    buffers: list[torch.Tensor] = field(default_factory=list)

    def take(self, runs: Sequence[Executor]) -> None:
        """Put the buffers of all where the largest of each are."""
        for run in runs:
            for slot, memory in enumerate(run.buffers):
                if slot == len(self.buffers):
                    self.buffers.append(memory)
                elif len(memory) > len(self.buffers[slot]):
                    self.buffers[slot] = memory
        for run in runs:
            run.share_memory(self.buffers)


class BatchRun(RankRun):
    """A batch at work on one rank. Collective to make.

    Its tensors hold this rank's tokens of all micro-batches, one behind the other. ``forward`` and ``backward`` go over all of
    them, as a check wants it; ``batch`` computes backward of each before the next, as training does, and is what is timed.

    Attributes:
        micro_batches: how many there are, of all ranks.
        peak_tokens: of this rank in a micro-batch.
        communicators: how many are used besides the one of all ranks; ``communicators_s``: the seconds that this rank took to make
            and connect them when they were first made.
    """

    own_lse = negates = True

    def __init__(
        self, micro_batches: Iterable[MicroBatch], kernel: Kernel, problem: Problem, place: Place, lowering: Lowering
    ) -> None:
        """
        Raises:
            Unsupported: the kernel cannot run a tile of this rank.
        """
        self.problem, self.device = problem, place.device
        self._parts: list[RankPart] = []
        self._pool = _Pool()
        made: dict[bytes, Executor] = {}
        tokens, row = [np.empty(0, dtype=np.int64)], 0
        for number, each in enumerate(micro_batches):
            if each.key not in made:
                made[each.key] = Executor(
                    each.schedule, each.mask, kernel, each.problem,
                    rank=place.rank, device=place.device, groups=place.groups, lowering=lowering,
                )  # fmt: skip
                self._pool.take(list(made.values()))
            run = made[each.key]
            if own := len(run.tokens):
                self._parts.append(RankPart(number, run, slice(row, row + own)))
                tokens.append(each.tokens[run.tokens])
                row += own
            self.micro_batches = number + 1
        self.tokens: Ints = np.concatenate(tokens)
        self.sums_are_wide = problem.reduce_dtype != "input"
        self.peak_tokens = max((part.rows.stop - part.rows.start for part in self._parts), default=0)
        self._bytes_sent = self._bytes_between_nodes = 0
        self._collectives = sorted({name for run in made.values() for name in run.collectives})
        wanted = dict.fromkeys(each for run in made.values() for each in run.communicators)
        self.communicators, self.communicators_s = place.groups.took(list(wanted), place.device)

    @property
    def parts(self) -> list[RankPart]:
        """The micro-batches that this rank is in, in order, for who runs the passes of each itself; then calls ``ended``."""
        return self._parts

    def ended(self, part: RankPart) -> None:
        """Backward of a micro-batch is over, of which several forward passes were under way: put its buffers back where those of
        all are."""
        part.run.share_memory(self._pool.buffers)

    def counters(self) -> Counters:
        buffers = sum(map(len, self._pool.buffers))
        calls, pairs = (sum(getattr(part.run, name) for part in self._parts) for name in ("calls", "pairs"))
        return Counters(self._bytes_sent, self._bytes_between_nodes, buffers, calls, pairs, self._collectives)

    # -- whole batches ---------------------------------------------------------------------------------------------

    def batch(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor | None, sink: torch.Tensor | None = None,
        *, compute: bool = True, communicate: bool = True,
    ) -> BatchPass:  # fmt: skip
        """Forward and, where there is a ``dout``, backward of each micro-batch before the next. Collective.

        Without ``compute`` or without ``communicate`` everything else is done as usual, and the results mean nothing.

        Args:
            q, k, v, dout: of this rank's tokens, as ``forward`` and ``backward`` take them.
        """
        return self._batch(q, k, v, dout, sink, compute=compute, communicate=communicate, marks=None)

    def gantt(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor | None, sink: torch.Tensor | None = None
    ) -> list[list[float]]:
        """One batch: (number of the micro-batch, begin, end of forward, end) of each that this rank is in, in seconds since the
        call. Collective. On CUDA these are times of the stream that computes."""
        marks: list[Mark] = [now(self.device)]
        self._batch(q, k, v, dout, sink, compute=True, communicate=True, marks=marks)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        first, *others = marks
        seconds = [seconds_between(first, mark) for mark in others]
        return [[float(part.number), *seconds[3 * i : 3 * i + 3]] for i, part in enumerate(self._parts)]

    def _batch(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor | None, sink: torch.Tensor | None,
        *, compute: bool, communicate: bool, marks: list[Mark] | None,
    ) -> BatchPass:  # fmt: skip
        self._begin()
        outs, gradients, kept = [], [], []
        for part in self._parts:
            run, rows = part.run, part.rows
            self._note(marks)
            out, saved = run.forward(q[rows], k[rows], v[rows], sink, compute=compute, communicate=communicate)
            self._sent(run)
            self._note(marks)
            outs.append(out)
            if dout is not None:
                gradients.append(run.backward(dout[rows], saved, compute=compute, communicate=communicate))
                self._sent(run)
            self._note(marks)
            kept.append(run.for_lse(saved))
        return BatchPass(tuple(outs), tuple(gradients), SavedBatch(tuple(kept)))

    def whole(self, passed: BatchPass) -> tuple[torch.Tensor, SavedBatch, tuple[torch.Tensor, ...]]:
        """What a batch gave as ``forward`` and ``backward`` give it: out, what ``lse`` takes, and gradients."""
        return self._together(passed.outs), passed.saved, self._gradients(passed.gradients)

    # -- as a check takes them ---------------------------------------------------------------------------------------

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, SavedBatch]:
        self._begin()
        outs, saved = [], []
        for part in self._parts:
            run, rows = part.run, part.rows
            out, own = run.forward(q[rows], k[rows], v[rows], sink)
            self._sent(run)
            outs.append(out)
            saved.append(run.copied(own))
        return self._together(outs), SavedBatch(tuple(saved))

    def backward(self, dout: torch.Tensor, saved: SavedBatch) -> tuple[torch.Tensor, ...]:
        self._begin()
        found = []
        for part, own in zip(self._parts, saved.parts, strict=True):
            found.append(part.run.backward(dout[part.rows], own))
            self._sent(part.run)
            part.run.share_memory(self._pool.buffers)  # it has computed where ``own`` has its copies
        return self._gradients(found)

    def lse(self, saved: SavedBatch) -> torch.Tensor:
        parts = [part.run.lse(own) for part, own in zip(self._parts, saved.parts, strict=True)]
        sums = torch.float64 if self.problem.dtype == "float64" else torch.float32
        return torch.cat(parts) if parts else torch.empty((0, self.problem.heads.q), dtype=sums, device=self.device)

    def for_lse(self, saved: SavedBatch) -> SavedBatch:
        return SavedBatch(tuple(part.run.for_lse(own) for part, own in zip(self._parts, saved.parts, strict=True)))

    def _gradients(self, found: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """Gradients of all micro-batches: rows behind one another, those of sinks summed."""
        heads = self.problem.heads
        if not found:
            dtype: torch.dtype = getattr(torch, self.problem.dtype)
            shapes = [(0, heads.q, heads.dim), (0, heads.kv, heads.dim), *([] if heads.latent else [(0, heads.kv, heads.v)])]
            of_tokens = tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape in shapes)
            sums = torch.float64 if self.problem.dtype == "float64" else torch.float32
            of_sink = (torch.zeros(heads.q, dtype=sums, device=self.device),) if self.problem.softmax.sink else ()
            return *of_tokens, *of_sink
        several = zip(*found, strict=True)
        return tuple(torch.cat(each) if each[0].ndim > 1 else torch.stack(each).sum(0) for each in several)

    def _together(self, outs: Sequence[torch.Tensor]) -> torch.Tensor:
        heads, dtype = self.problem.heads, getattr(torch, self.problem.dtype)
        return torch.cat(list(outs)) if outs else torch.empty((0, heads.q, heads.v), dtype=dtype, device=self.device)

    # -- what is counted -----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._bytes_sent = self._bytes_between_nodes = 0

    def _sent(self, run: Executor) -> None:
        """Add what a pass of a micro-batch has sent."""
        counters = run.counters()
        self._bytes_sent += counters.bytes_sent
        self._bytes_between_nodes += counters.bytes_between_nodes

    def _note(self, marks: list[Mark] | None) -> None:
        if marks is not None:
            marks.append(now(self.device))
