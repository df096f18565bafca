"""All-gather: every rank gathers all keys and values and computes its queries at once (Llama 3, arXiv 2407.21783, section 3.3.2).

It gathers ``heads_per_step`` key/value heads at a time, the next ones while these are computed. Backward gathers again and sends
every rank's gradients straight to the owners, which sum them: a reduce-scatter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_choice, check_count, deal, too_short
from lcbench.schedule.layout import Layout
from lcbench.schedule.schedule import NO_ROWS, HeadGroup, Move, Schedule, Step, rows

ORDERS = ("auto", "zigzag", "contiguous", "documents")


@dataclass(frozen=True)
class AllGather(Scheduled):
    """``heads_per_step``: key/value heads gathered at a time, or ``all``; ``layout``: how tokens are dealt out."""

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
        dealt = deal(mask, problem.seqlen, ranks, self.layout)
        pieces = sorted((run, rank) for rank, runs in enumerate(dealt.shards) for run in runs)
        owner = np.array([rank for _, rank in pieces])
        shards = Layout(tuple((run,) for run, _ in pieces))
        own = [tuple(np.nonzero(owner == rank)[0].tolist()) for rank in range(ranks)]
        part = heads.kv if self.heads_per_step == "all" else self.heads_per_step
        each = heads.q // heads.kv * part
        groups = tuple(HeadGroup.of(heads, begin, begin + each) for begin in range(0, heads.q, each))

        every, everything = np.arange(ranks), ranks
        steps = []
        for time in range(len(groups) + 1):
            moves: tuple[Move, ...] = ()
            if time < len(groups):
                to, shard = np.meshgrid(every, np.arange(len(pieces)), indexing="ij")
                remote = owner[shard] != to
                moves = (Move("kv", rows(owner[shard[remote]], to[remote], shard[remote], time)),)
            tiles = rows(every, time - 1, every, everything) if time else NO_ROWS
            steps.append(Step(tiles, moves))
        return Schedule(ranks, shards, owner, groups, (*own, tuple(range(len(pieces)))), tuple(steps))
