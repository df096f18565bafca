"""What sessions share: how a draw begins on every rank, or why some rank cannot run it; its check; and what is counted of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

from lcbench.cp.base import Place, RankRun
from lcbench.kernels.base import Kernel, Platform, Unsupported
from lcbench.masks.mask import Computed, Mask
from lcbench.measure.bounds import Bounds
from lcbench.measure.numerics import Examination, Result, one_pass
from lcbench.measure.owners import Owners, owners
from lcbench.measure.ranks import EVERY, first_refusal
from lcbench.measure.reference import Shard
from lcbench.measure.session import Counted, Gang
from lcbench.problem import Problem
from lcbench.schedule.execute import Counters
from lcbench.workloads.base import Work


class Sent(NamedTuple):
    """Bytes that a rank sends in a phase, all and those to other nodes."""

    bytes: int
    between_nodes: int

    @property
    def within_node(self) -> int:
        return self.bytes - self.between_nodes

    def plus(self, other: Sent) -> Sent:
        return Sent(self.bytes + other.bytes, self.between_nodes + other.between_nodes)


@dataclass(frozen=True)
class Started:
    """A strategy at work on this rank.

    Attributes:
        mask: that it computes, of this draw, for this rank's heads; ``pairs``: its unmasked pairs over all of these.
        asked: the cell's own mask, where the strategy computes another.
        owners: who holds what.
        calls: kernel calls of the rank with most.
        prepare_s: seconds that it took this rank.
        seed: of what the check draws.
    """

    work: Work
    gang: Gang
    mask: Computed
    asked: Mask | None
    pairs: int
    run: RankRun
    owners: Owners
    calls: int
    prepare_s: float
    seed: list[int]

    @property
    def bounds(self) -> Bounds:
        """What its results may be off by."""
        ranks = self.work.problem.scale.world_size
        hops = 0 if self.run.sums_are_wide else ranks
        rounding = self.work.kernel.rounding(Platform.of(self.gang.device))
        return Bounds(self.work.problem, rounding, self.calls * ranks, hops)

    def examination(self, *more: int, no_probe: str | None = None, passed: Callable[[Shard], Result] | None = None) -> Examination:
        """The check of its passes; ``more``: numbers that choose where else it looks; ``no_probe``, ``passed``: see
        ``Examination``; None: the run's forward and backward."""
        run, gang = self.run, self.gang
        return Examination(
            passed or self.passed, self.mask, self.work.problem, self.owners, self.bounds, [*self.seed, *more], gang.ranks,
            own_lse=run.own_lse, rank=gang.cp_rank, asked=self.asked, no_probe=no_probe,
        )  # fmt: skip

    def passed(self, shard: Shard) -> Result:
        """Forward and backward of some inputs. Collective."""
        return one_pass(self.run, shard, self.work.problem)

    def choosing(self, mask: Computed) -> Started:
        """The same of a mask that a pass has chosen."""
        return replace(self, mask=mask, pairs=mask.pairs(self.work.problem.heads.q))

    def counted(self, sent: Mapping[str, Sent], phases: Sequence[str]) -> Counted:
        """What all ranks' runs are made of. Collective.

        Args:
            sent: by phase, by this rank.
            phases: whose bytes are said, also where nothing was sent.
        """
        heads, gang = self.work.problem.heads, self.gang
        areas, densities = zip(*gang.of_groups((self.pairs / heads.q, self.mask.density)), strict=True)
        counted = Counted({"mask/area": fmean(areas), "mask/density": fmean(densities)})
        counters = self.run.counters()
        if counters is None:
            return counted
        metrics, notes = counted.metrics, counted.notes
        own = sum(gang.ranks.all_gather_object(counters.pairs))
        if own != self.pairs:
            raise AssertionError(f"the ranks compute {own} pairs over all query heads, the mask has {self.pairs}")
        ranks: list[tuple[Counters, Mapping[str, Sent]]] = EVERY.all_gather_object((counters, sent))
        rank_pairs = [each.pairs for each, _ in ranks]
        pairs = sum(rank_pairs)
        metrics["balance/area_max_over_mean"] = max(rank_pairs) * len(rank_pairs) / pairs if pairs else 1.0
        for phase in phases:
            every = [of.get(phase, Sent(0, 0)) for _, of in ranks]
            metrics[f"comm/{phase}/bytes"] = float(max(one.bytes for one in every))
            metrics[f"comm/{phase}/within_node_bytes"] = float(max(one.within_node for one in every))
            metrics[f"comm/{phase}/between_nodes_bytes"] = float(max(one.between_nodes for one in every))
        counted.bytes_sent.update((phase, metrics[f"comm/{phase}/bytes"]) for phase in sent)
        metrics["comm/bytes"] = float(max(sum(each.bytes for each in of.values()) for _, of in ranks))
        metrics["memory/buffer_bytes"] = float(max(each.buffer_bytes for each, _ in ranks))
        notes["kernel_calls"] = [each.calls for each, _ in ranks]
        notes["collectives"] = sorted({operation for each, _ in ranks for operation in each.collectives})
        metrics["kernel/calls"] = float(max(notes["kernel_calls"]))
        if launch := self.work.kernel.launch(heads, self.work.problem.dtype, Platform.of(gang.device)):
            notes["kernel_launch"] = launch
        return counted


def distance(examination: Examination, gang: Gang) -> dict[str, float]:
    """The metric of how far a strategy that computes another mask is from what its cell asks for; empty for others. Collective."""
    own = examination.distance
    return {} if own is None else {"check/distance": max(gang.of_groups(own))}


class OnAllRanks(NamedTuple):
    """A strategy at work on every rank: this rank's run, and the kernel calls of the rank that makes most."""

    own: RankRun
    calls: int


def run_of_all(begin: Callable[[], RankRun], refuses: Callable[[RankRun], str | None] = lambda run: None) -> OnAllRanks | str:
    """What ``begin`` makes on this rank, or why some rank cannot run it. Collective."""
    reason, calls, run = None, 1, None
    try:
        run = begin()
        calls = counters.calls if (counters := run.counters()) else 1
        reason = refuses(run)
    except Unsupported as refused:
        reason = str(refused)
    # One rank's tile may be what its kernel cannot run while the others' are well.
    reasons, every_calls = zip(*EVERY.all_gather_object((reason, calls)), strict=True)
    if (refusal := first_refusal(reasons)) is not None:
        return refusal
    assert run is not None
    return OnAllRanks(run, max(every_calls))


def started(
    work: Work,
    number: int,
    gang: Gang,
    refuses: Callable[[RankRun], str | None] = lambda run: None,
    begin: Callable[[Problem, Mask, Kernel, Place], Any] | None = None,
) -> Started | str:
    """Draw ``number`` of a cell, ready to run, or why the ranks cannot run it. Collective.

    Args:
        refuses: why a run will not do, or None.
        begin: makes the run; None: ``Strategy.start``.
    """
    begun, problem = time.perf_counter(), work.problem
    asked = gang.own_heads(work.make_mask(number), problem.heads.q)
    mask = work.strategy.computes(problem, asked)
    begins = begin or work.strategy.start
    run = run_of_all(lambda: begins(problem, mask, work.kernel, gang.place), refuses)
    if isinstance(run, str):
        return run
    prepare_s = time.perf_counter() - begun
    found = owners(run.own.held, mask, problem, gang.device, gang.ranks)
    seed = [work.seed, work.attempt, number, *([gang.dp_index, gang.tp_index] if gang.mesh.count > 1 else [])]
    pairs = mask.pairs(problem.heads.q)
    return Started(work, gang, mask, None if asked is mask else asked, pairs, run.own, found, run.calls, prepare_s, seed)
