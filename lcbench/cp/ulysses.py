"""Ulysses: an all-to-all gives every rank the whole sequence for its share of the heads (arXiv 2309.14509).

KV heads are replicated where there are fewer of them than ranks; their gradients are summed over the replicas. With several
stages the heads of a rank come in as many parts, and the exchange of one part runs while another is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.cp.ring import too_short
from lcbench.masks.band import Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem
from lcbench.schedule.layout import contiguous
from lcbench.schedule.schedule import NO_ROWS, Move, Schedule, Step, head_groups, rows


@dataclass(frozen=True)
class Ulysses(Scheduled):
    """``uneven_heads``: let ranks have different numbers of query heads; ``stages``: parts of a rank's heads."""

    uneven_heads: bool = False
    stages: int = 1

    def __post_init__(self) -> None:
        check_count("stages", self.stages)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        ranks = problem.scale.world_size
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
        whole = (tuple(range(ranks)),)
        return Schedule(ranks, contiguous(problem.seqlen, ranks), every, groups, whole, tuple(steps))


def exchanged(grid: Ints) -> tuple[Ints, Ints, Ints]:
    """(owner, other rank, column of the other) of every ordered pair of ranks in one row of a grid; shard i is owned by rank i."""
    rows, width = grid.shape
    owner, other = np.repeat(grid, width, axis=1), np.tile(grid, (1, width))
    column = np.tile(np.arange(width), (rows, width))
    apart = owner != other
    return owner[apart], other[apart], column[apart]


def gathered(grid: Ints, groups: Ints) -> tuple[Move, ...]:
    """Heads of the column's group from every rank of a row to the rank in that column, kept for backward."""
    owner, other, column = exchanged(grid)
    moved = rows(owner, other, owner, groups[column])
    return Move("q", moved, kept=True), Move("kv", moved, kept=True)


def returned(grid: Ints, groups: Ints) -> Ints:
    """The way back of their results."""
    owner, other, column = exchanged(grid)
    return rows(other, owner, owner, groups[column])


def indivisible_heads(heads: Heads, ranks: int) -> str | None:
    """Why heads cannot be dealt out evenly to an exchange group of this size, or None."""
    if heads.q % ranks:
        return f"cannot split {heads.q} query heads evenly over {ranks} ranks"
    if heads.kv % ranks and ranks % heads.kv:
        return f"cannot split or replicate {heads.kv} key/value heads evenly over {ranks} ranks"
    return None


def too_few_heads(heads: Heads, parts: int) -> str | None:
    return f"cannot split {heads.q} query heads into {parts} parts" if heads.q < parts else None


def check_count(option: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"cp.{option}={value} is no number of at least 1")
