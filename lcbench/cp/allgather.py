"""All-gather: every rank gathers all keys and values and computes its queries at once (Llama 3, arXiv 2407.21783, section 3.3.2).

It gathers ``heads_per_step`` key/value heads at a time, the next ones while these are computed. Backward gathers again and sends
every rank's gradients straight to the owners, which sum them: a reduce-scatter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_choice, check_count, sides, too_short
from lcbench.schedule.layout import Layout
from lcbench.schedule.schedule import NO_ROWS, HeadGroup, Move, Schedule, Side, Step, rows

ORDERS = ("auto", "zigzag", "contiguous", "documents")


@dataclass(frozen=True)
class AllGather(Scheduled):
    """``heads_per_step``: key/value heads gathered at a time, or ``all``; ``layout``: how tokens are dealt out."""

    by_mask: ClassVar[bool] = True

    heads_per_step: int | Literal["all"] = "all"
    layout: Literal["auto", "zigzag", "contiguous", "documents"] = "auto"

    def __post_init__(self) -> None:
        if self.heads_per_step != "all":
            check_count("heads_per_step", self.heads_per_step)
        check_choice("layout", self.layout, ORDERS)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if self.heads_per_step != "all" and problem.heads.kv % self.heads_per_step:
            return f"heads_per_step={self.heads_per_step} does not divide {problem.heads.kv} key/value heads"
        return too_short(problem, problem.scale.world_size)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks, heads = problem.scale.world_size, problem.heads
        # Stretches of tokens are shards, so that all of them behind one another are the sequence as it was.
        queries, keys = sides(problem, mask, ranks, self.layout)
        q, k = _stretches(queries, ranks), _stretches(keys, ranks)
        part = heads.kv if self.heads_per_step == "all" else self.heads_per_step
        each = heads.q // heads.kv * part
        groups = tuple(HeadGroup.of(heads, range(begin, begin + each)) for begin in range(0, heads.q, each))

        every, everything, owner = np.arange(ranks), ranks, k.owner
        steps = []
        for time in range(len(groups) + 1):
            moves: tuple[Move, ...] = ()
            if time < len(groups):
                to, shard = np.meshgrid(every, np.arange(len(k)), indexing="ij")
                remote = owner[shard] != to
                moves = (Move("kv", rows(owner[shard[remote]], to[remote], shard[remote], time)),)
            tiles = rows(every, time - 1, every, everything) if time else NO_ROWS
            steps.append(Step(tiles, moves))
        return Schedule(ranks, k if keys is queries else q, k, groups, tuple(steps))


def _stretches(layout: Layout, ranks: int) -> Side:
    """Each stretch of tokens as a shard, in the order of the sequence. Bundle r is what rank r owns, the last one is everything."""
    pieces = sorted((run, rank) for rank, runs in enumerate(layout.shards) for run in runs)
    owner = np.array([rank for _, rank in pieces])
    own = [tuple(np.nonzero(owner == rank)[0].tolist()) for rank in range(ranks)]
    return Side(Layout(tuple((run,) for run, _ in pieces)), owner, (*own, tuple(range(len(pieces)))))
