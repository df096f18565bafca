"""Ulysses: an all-to-all gives every rank the whole sequence for its share of the heads (arXiv 2309.14509).

KV heads are replicated where there are fewer of them than ranks; their gradients are summed over the replicas. With several
stages the heads of a rank come in as many parts, and the exchange of one part runs while another is computed.

In linear attention decays and strengths go where keys and values go, and each rank goes through all tokens with its heads' states.

With ``async_projections`` a training step exchanges q while it projects k, and k while it projects v; in backward those of v and
k compute while the gradients after theirs arrive (asynchronous Ulysses of VeOmni, arXiv 2508.02317).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_count, dealt, gathered, indivisible_heads, returned, sides, too_few_heads, too_short
from lcbench.schedule.schedule import NO_ROWS, Move, Schedule, Step, head_groups, rows


@dataclass(frozen=True)
class Ulysses(Scheduled):
    """``uneven_heads``: let ranks have different numbers of query heads; ``stages``: parts of a rank's heads;
    ``async_projections``: exchange q, k and v one by one, as they are projected."""

    uneven_heads: bool = False
    stages: int = 1
    # At its default it is no part of a cell, whose id is from before there was a choice.
    async_projections: bool = field(default=False, metadata={"left_out": True})
    operators: ClassVar[tuple[str, ...]] = ("softmax", "linear")

    @property
    def apart(self) -> bool:
        return self.async_projections

    def only_in_a_step(self) -> str | None:
        return "cp.async_projections=true needs the projections of a layer: workload=block" if self.async_projections else None

    def __post_init__(self) -> None:
        check_count("stages", self.stages)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        ranks = problem.scale.world_size
        if self.async_projections and self.stages > 1:
            return f"cp.async_projections=true exchanges all heads at once: cp.stages={self.stages} is not 1"
        refused = None if self.uneven_heads else indivisible_heads(problem.heads, ranks)
        return refused or too_few_heads(problem.heads, ranks * self.stages) or too_short(problem, ranks)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        every = np.arange(ranks)
        groups = head_groups(problem.heads, ranks * self.stages)  # of rank r: r * stages and what follows
        steps = []
        for time in range(self.stages + 2):
            moves: tuple[Move, ...] = ()
            tiles = returns = NO_ROWS
            if time < self.stages:  # heads of this stage come in
                moves = gathered(every[None], every * self.stages + time)
            if 1 <= time <= self.stages:
                tiles = rows(every, every * self.stages + time - 1, 0, 0)
            if time >= 2:
                returns = returned(every[None], every * self.stages + time - 2)
            steps.append(Step(tiles, moves, returns))
        q, k = dealt(*sides(problem, mask, ranks, "contiguous"), every, [tuple(range(ranks))])
        return Schedule(ranks, q, k, groups, tuple(steps))
