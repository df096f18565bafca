"""What sessions share: how a draw begins on every rank, or why some rank cannot run it, and what is counted of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lcbench.cp.base import RankRun
from lcbench.kernels.base import Platform, Unsupported
from lcbench.masks.mask import Mask
from lcbench.measure.bounds import Bounds
from lcbench.measure.numerics import misowned
from lcbench.measure.ranks import all_gather_object, first_refusal
from lcbench.measure.session import Counted, Gang
from lcbench.schedule.execute import Counters
from lcbench.workloads.base import Work


@dataclass(frozen=True)
class Started:
    """A strategy at work.

    Attributes:
        mask: of this draw.
        run: on this rank.
        calls: kernel calls of the rank with most.
        prepare_s: seconds that it took this rank.
        wrong: what is wrong with who owns which tokens; None if nothing is.
    """

    mask: Mask
    run: RankRun
    calls: int
    prepare_s: float
    wrong: str | None

    def bounds(self, work: Work, gang: Gang) -> Bounds:
        """What its results may be off by."""
        hops = 0 if self.run.sums_are_wide else gang.world_size
        return Bounds(work.problem, work.kernel.rounding(Platform.of(gang.device)), self.calls * gang.world_size, hops)


def started(work: Work, number: int, gang: Gang, refuses: Callable[[RankRun], str | None] = lambda run: None) -> Started | str:
    """Draw ``number`` of a cell, ready to run, or why the ranks cannot run it. Collective.

    Args:
        refuses: why a run will not do, or None.
    """
    begun = time.perf_counter()
    mask = work.make_mask(number)
    reason, calls, run = None, 1, None
    try:
        run = work.strategy.start(work.problem, mask, work.kernel, gang.place)
        calls = counters.calls if (counters := run.counters()) else 1
        reason = refuses(run)
    except Unsupported as refused:
        reason = str(refused)
    # One rank's tile may be what its kernel cannot run while the others' are well.
    reasons, every_calls = zip(*all_gather_object((reason, calls)), strict=True)
    if (refusal := first_refusal(reasons)) is not None:
        return refusal
    assert run is not None
    prepare_s = time.perf_counter() - begun
    return Started(mask, run, max(every_calls), prepare_s, misowned(run.tokens, work.problem.seqlen, gang.device))


def count(
    counted: Counted, work: Work, gang: Gang, run: RankRun, pairs: float, sent: Mapping[str, int], phases: Sequence[str]
) -> None:
    """Add what all ranks' runs are made of, where that is counted. Collective.

    Args:
        pairs: of the mask, over all query heads.
        sent: bytes by phase, by this rank.
        phases: whose bytes are said, also where nothing was sent.
    """
    counters = run.counters()
    if counters is None:
        return
    metrics, notes = counted.metrics, counted.notes
    ranks: list[tuple[Counters, Mapping[str, int]]] = all_gather_object((counters, sent))
    rank_pairs = [own.pairs for own, _ in ranks]
    if sum(rank_pairs) != pairs:
        raise AssertionError(f"the ranks compute {sum(rank_pairs)} pairs over all query heads, the mask has {pairs}")
    metrics["balance/area_max_over_mean"] = max(rank_pairs) * len(rank_pairs) / pairs if pairs else 1.0
    for phase in phases:
        metrics[f"comm/{phase}/bytes"] = float(max(own.get(phase, 0) for _, own in ranks))
    counted.bytes_sent.update((phase, metrics[f"comm/{phase}/bytes"]) for phase in sent)
    metrics["comm/bytes"] = float(max(sum(own.values()) for _, own in ranks))
    metrics["memory/buffer_bytes"] = float(max(own.buffer_bytes for own, _ in ranks))
    notes["kernel_calls"] = [own.calls for own, _ in ranks]
    notes["collectives"] = list(counters.collectives)
    metrics["kernel/calls"] = float(max(notes["kernel_calls"]))
    if launch := work.kernel.launch(work.problem.heads, work.problem.dtype, Platform.of(gang.device)):
        notes["kernel_launch"] = launch
