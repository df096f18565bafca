"""What sessions of batches of documents share: what is counted of a plan at work, and when its micro-batches begin and end."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import numpy as np

from lcbench.cp.batch_run import BatchRun
from lcbench.measure.ranks import EVERY
from lcbench.measure.session import Gang
from lcbench.workloads.planned import Planned, idle_share, padding

WATCHED = 3  # passes by which it is seen when micro-batches begin and end
Spans = list[list[float]]  # of a rank, of each of its micro-batches (its number, begin, end of forward, end), in seconds


def counted(planned: Planned, run: BatchRun, gang: Gang) -> dict[str, float]:
    """Metrics of a plan and of the run of it, over all ranks. Collective."""
    every = EVERY.all_gather_object((planned.seconds, run.communicators, run.communicators_s))
    seconds, communicators, making = (max(values) for values in zip(*every, strict=True))
    held = np.array(gang.ranks.all_gather_object(planned.held(run.tokens))).T
    return planned.metrics | {
        "plan/seconds": seconds, "comm/communicators": float(communicators), "time/communicators_s": making,
        "batch/padding": padding(held), "batch/peak_tokens": float(held.max()),
    }  # fmt: skip


def watched(
    planned: Planned, gang: Gang, moments: Callable[[], Spans], ready: Callable[[], None] = lambda: None
) -> tuple[list[Spans], float]:
    """When micro-batches begin and end on each rank of the first context-parallel group, in the pass with the median makespan; and
    the share of the makespan that ranks wait, mean over the groups. Collective over all ranks.

    Args:
        moments: one pass of this rank.
        ready: called before each pass, while ranks need not be together.
    """
    found = []
    for _ in range(WATCHED):
        ready()
        EVERY.all_gather_object(None)  # ranks begin together
        found.append(gang.ranks.all_gather_object(moments()))
    found.sort(key=lambda every: max(span[-1] for own in every for span in own))
    middle = found[WATCHED // 2]
    return gang.of_groups(middle)[0], fmean(gang.of_groups(idle_share(planned.assignment, middle)))
