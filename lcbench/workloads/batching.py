"""A global batch of documents on one rank: what ``workload=batch`` runs, times and checks.

A pass is the whole batch as it is timed: forward and backward of each micro-batch before the next one begins. All checks of
attention (``measure.numerics``) are of such passes, over the tokens of all micro-batches at once: they know nothing of sub-groups.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lcbench.cp.assigned import Assigned
from lcbench.cp.batch_run import BatchPass, BatchRun
from lcbench.kernels.base import accumulation_dtype
from lcbench.measure.bounds import Judge
from lcbench.measure.numerics import Result
from lcbench.measure.ranks import EVERY, first_refusal
from lcbench.measure.reference import Shard
from lcbench.measure.session import Cost, Counted, Gang, Phases, Say
from lcbench.workloads.attention import AttentionSession
from lcbench.workloads.base import Work
from lcbench.workloads.micro_batches import counted as counted_plan
from lcbench.workloads.micro_batches import watched
from lcbench.workloads.parts import BATCH
from lcbench.workloads.planned import planned
from lcbench.workloads.sharing import BUCKET, Sharing, sum_over
from lcbench.workloads.started import Sent
from lcbench.workloads.traffic import Traffic

REDUCE, SUMS = "reduce", "sums of gradients"
VALUES = 251  # different numbers among gradients: few enough that float32 has each sum over 4,096 ranks exactly


class Gradients:
    """As many gradients as a model's weights would have, of numbers that are known, so that a wrong sum shows.

    Gradient i of rank r is i mod 251 + r, or minus that. They have the type that gradients are added up and travel in.
    """

    def __init__(self, size: int, gang: Gang, dtype: torch.dtype) -> None:
        """
        Args:
            size: bytes.
            dtype: of the cell's inputs.
        """
        self._gang, wide = gang, accumulation_dtype(dtype)
        self._own = torch.empty(-(-size // wide.itemsize), dtype=wide, device=gang.device)
        same = Sharing(gang.device_mesh).same
        self._group = None if same is None else same.get_group()
        self.fill(negated=False)

    @property
    def bytes(self) -> int:
        return self._own.numel() * self._own.element_size()

    def _stretches(self) -> list[tuple[int, torch.Tensor]]:
        return [(first, self._own[first : first + BUCKET]) for first in range(0, len(self._own), BUCKET)]

    def _numbers(self, first: int, part: torch.Tensor) -> torch.Tensor:
        return torch.arange(first, first + len(part), device=part.device).remainder_(VALUES)

    def fill(self, *, negated: bool) -> None:
        """Put this rank's numbers in."""
        for first, part in self._stretches():
            part.copy_(self._numbers(first, part).add_(self._gang.cp_rank))
            if negated:
                part.neg_()

    def sum(self, passed: Any) -> Any:
        """Sum them over all ranks that have the same weights; gives on what it is given. Collective."""
        if self._group is not None:
            sum_over(self._group, [self._own])
        return passed

    def check(self, judge: Judge, part: str, *, negated: bool) -> None:
        """Whether they are the sums, exactly."""
        ranks = self._gang.grid.shape[-1]
        for first, got in self._stretches():
            want = self._numbers(first, got).mul_(ranks).add_(ranks * (ranks - 1) // 2).to(got.dtype)
            error = got.add(want) if negated else got.sub(want)
            judge.number(SUMS, part, float(error.abs().max()), 0.0, f"gradients from {first} on")

    def counting(self) -> Any:
        """A context in which ``sent`` is counted."""
        return nullcontext(None) if self._group is None else Traffic({REDUCE: self._group})

    def sent(self, traffic: Traffic | None) -> Sent:
        """Bytes that this rank sends for a sum."""
        sent = 0 if traffic is None else traffic.sent[REDUCE]
        gang = self._gang
        per_node = gang.scale.gpus_per_node if gang.scale else gang.world_size
        nodes = gang.grid[gang.dp_index, gang.tp_index] // per_node
        elsewhere = np.count_nonzero(nodes != gang.rank // per_node)
        return Sent(sent, round(sent * elsewhere / max(1, len(nodes) - 1)))


class BatchSession(AttentionSession):
    """One draw of a batch on this rank.

    Attributes:
        planned: how its documents are shared out.
    """

    run: BatchRun

    def __init__(self, work: Work, number: int, gang: Gang, *, capacity: int, gradient_bytes: int) -> None:
        """
        Args:
            capacity, gradient_bytes: see ``Batch``.
        """
        self._gradients: Gradients | None = None
        self._gantt: list[list[list[float]]] = []
        whole = work.make_mask(number)
        found = planned(work, whole, gang, capacity)
        if isinstance(found, str):
            self.refused = found
            return
        self.planned = found
        if found.wrong:
            self.refused, self.wrong, self.prepare_s = None, f"the planner's assignment: {found.wrong}", 0.0
            return
        strategy = Assigned(found.assignment, found.bounds, work.strategy.inside)
        super().__init__(replace(work, strategy=strategy, make_mask=lambda _: whole), number, gang)
        if self.refused is not None:
            return
        strays = gang.ranks.all_gather_object(found.strays(gang.cp_rank, self.run.tokens))
        self.wrong = self.wrong or first_refusal(EVERY.all_gather_object(first_refusal(strays)))
        if gradient_bytes:
            self._gradients = Gradients(gradient_bytes, gang, getattr(torch, work.problem.dtype))

    # -- inputs ----------------------------------------------------------------------------------------------------

    def draw(self) -> None:
        super().draw()
        self._fill()

    def vary(self) -> None:
        super().vary()
        self._fill()

    def _fill(self) -> None:
        if self._gradients is not None:
            self._gradients.fill(negated=self.negated)

    @property
    def input_bytes(self) -> int:
        return super().input_bytes + (self._gradients.bytes if self._gradients is not None else 0)

    # -- passes ----------------------------------------------------------------------------------------------------

    def _batch(self, shard: Shard) -> BatchPass:
        """The whole batch. Collective."""
        return self.run.batch(shard.q, shard.k, shard.v, shard.dout, shard.sink)

    def phases(self) -> Phases:
        phases: dict[str, Callable[[Any], BatchPass]] = {BATCH: lambda _: self._batch(self.shard)}
        if self._gradients is not None:
            phases[REDUCE] = self._gradients.sum
        return phases

    def first_pass(self) -> None:
        passed = self._batch(self.shard)
        counters = self.run.counters()
        self._sent[BATCH] = Sent(counters.bytes_sent, counters.bytes_between_nodes)
        if self._gradients is not None:
            with self._gradients.counting() as traffic:
                self._gradients.sum(passed)
            self._sent[REDUCE] = self._gradients.sent(traffic)
        self._first = self._result(passed)

    def _one_pass(self, shard: Shard) -> Result:
        return self._result(self._batch(shard))

    def _result(self, passed: BatchPass, lse: torch.Tensor | None = None) -> Result:
        return super()._result(self.run.whole(passed), lse)

    def variants(self) -> dict[str, Phases]:
        """The batch without messages and without kernels, for neither of which anything has to be saved."""
        if self._gang.grid.shape[-1] == 1:
            return {}
        shard = self.shard

        def alone(*, compute: bool) -> Phases:
            given = shard.q, shard.k, shard.v, shard.dout, shard.sink
            return {BATCH: lambda _: self.run.batch(*given, compute=compute, communicate=not compute)}

        return {"compute": alone(compute=True), "communication": alone(compute=False)}

    def shares(self) -> dict[str, float]:
        """When micro-batches begin and end, by passes of their own: that with the median makespan is told. Collective."""
        shard = self.shard
        self._gantt, idle = watched(
            self.planned, self._gang, lambda: self.run.gantt(shard.q, shard.k, shard.v, shard.dout, shard.sink), self.vary
        )
        return {"batch/idle_share": idle}

    def remarks(self) -> dict[str, Any]:
        return {"gantt": self._gantt}

    # -- checks ----------------------------------------------------------------------------------------------------

    def check_first(self, say: Say) -> None:
        self._check_sums("first pass")
        super().check_first(say)

    def check_timed(self, passed: Any) -> None:
        super().check_timed(passed)
        self._check_sums("last timed pass")

    def check_last(self) -> None:
        super().check_last()
        if self._gradients is not None:
            self._gradients.sum(None)
        self._check_sums("last pass")

    def _check_sums(self, part: str) -> None:
        if self._gradients is not None:
            self._gradients.check(self.examination.judge, part, negated=self.negated)

    # -- what it is made of ----------------------------------------------------------------------------------------

    def costs(self) -> dict[str, Cost]:
        """Of the batch, FLOPs and messages of both passes, and the memory of backward: what forward reads may still be there. A
        rank's gradients are in others' sums, so they leave it at least once."""
        passes = self._of_passes()
        forward, backward = passes["forward"], passes["backward"]
        sent = forward.least_bytes_sent + backward.least_bytes_sent
        found = {BATCH: Cost(forward.flops + backward.flops, sent, backward.least_memory_bytes)}
        if self._gradients is not None:
            size = float(self._gradients.bytes)
            found[REDUCE] = Cost(0.0, size if self._gang.grid.shape[-1] > 1 else 0.0, 2 * size)
        return found

    def counted(self) -> Counted:
        counted = self._started.counted(self._sent, list(self.phases()))
        # A library may sum in the switches, with fewer bytes over links than are counted.
        counted.bytes_sent.pop(REDUCE, None)
        counted.metrics.update(counted_plan(self.planned, self.run, self._gang))
        counted.notes.update(self.planned.notes)
        return counted
