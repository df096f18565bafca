"""LoongTrain: heads exchanged in groups of U ranks, and around them a double ring (arXiv 2406.18485).

The R ring positions are W windows of w. Keys and values go around inside a window, w - 1 hops, while the next window's are already
on their way over a communicator of their own and have w steps to arrive; of all R - 1 hops only W - 1 leave a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.cp.ring import Order, check_order, deal, too_short
from lcbench.cp.ulysses import check_count, gathered, indivisible_heads, returned
from lcbench.masks.band import Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.layout import Layout
from lcbench.schedule.schedule import NO_ROWS, Move, Schedule, Step, head_groups, rows

Placement = Literal["head_first", "context_first"]


@dataclass(frozen=True)
class LoongTrain(Scheduled):
    """A grid of ``ulysses_degree`` ranks per head exchange and a double ring over the rest.

    Attributes:
        ulysses_degree: U, or ``auto``: the largest that divides the GPUs of a node and splits the heads.
        window: ring positions of an inner ring, or ``auto``: those in one node; where that is 1 or all, the divisor of the ring
            nearest to its square root.
        placement: which ranks are neighbours: those of a head exchange, or those of an inner ring.
        order: of tokens over the ring positions.
    """

    ulysses_degree: int | Literal["auto"] = "auto"
    window: int | Literal["auto"] = "auto"
    placement: Placement = "head_first"
    order: Order = "auto"

    def __post_init__(self) -> None:
        check_order(self.order)
        for option in ("ulysses_degree", "window"):
            if getattr(self, option) != "auto":
                check_count(option, getattr(self, option))
        if self.placement not in ("head_first", "context_first"):
            raise ValueError(f"cp.placement={self.placement} is not one of head_first, context_first")

    def degree(self, problem: Problem) -> int:
        return largest_degree(problem) if self.ulysses_degree == "auto" else self.ulysses_degree

    def windows(self, problem: Problem) -> int:
        """W, windows of the outer ring."""
        degree = self.degree(problem)
        ring = problem.scale.world_size // degree
        if self.window != "auto":
            return ring // self.window
        inside = problem.scale.gpus_per_node // (degree if self.placement == "head_first" else 1)
        if 1 < inside < ring and ring % inside == 0:
            return ring // inside
        return min((w for w in range(1, ring + 1) if ring % w == 0), key=lambda w: abs(w - ring**0.5))

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        degree = self.degree(problem)
        ring = problem.scale.world_size // degree
        return refused_grid(problem, degree) or (
            f"window={self.window} does not divide the {ring} positions of the ring"
            if self.window != "auto" and ring % self.window
            else None
        )

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        degree, windows = self.degree(problem), self.windows(problem)
        grid = ranks_of(problem.scale.world_size, degree, outside=self.placement == "context_first")
        return grid_schedule(problem, mask, grid, windows, self.order)


def grid_schedule(problem: Problem, mask: Mask, grid: Ints, windows: int, order: Order) -> Schedule:
    """Heads exchanged along the rows of a grid of ranks, a double ring of ``windows`` windows along its columns."""
    ring, degree = grid.shape
    shards = deal(mask, problem.seqlen, ring, order).split(degree)  # of ring position i: i * degree and what follows
    where = np.argsort(grid, axis=None)  # of each rank; shards are numbered by rank, as the head exchange takes them
    members = tuple(map(tuple, grid.tolist()))
    every = np.arange(grid.size)
    position, lane = np.divmod(where, degree)
    size = ring // windows
    bundles = np.array(members)
    steps = []
    for outer in range(windows):
        for inner in range(size):
            window, place = position // size, position % size
            held = (window - outer) % windows * size + (place - inner) % size
            moves = []
            if inner < size - 1:
                to = grid[window * size + (place + 1) % size, lane]
                moves.append(_bundle_move(every, to, bundles[held], lane, "main"))
            if inner == 0 and outer < windows - 1:
                to = grid[(window + 1) % windows * size + place, lane]
                moves.append(_bundle_move(every, to, bundles[held], lane, "outer", steps=size))
            steps.append(Step(rows(every, lane, position, held), tuple(moves)))
    if degree > 1:
        lanes = np.arange(degree)
        steps = [Step(NO_ROWS, gathered(grid, lanes)), *steps, Step(NO_ROWS, (), returned(grid, lanes))]
    layout = Layout(tuple(shards.shards[i] for i in where))
    return Schedule(grid.size, layout, every, head_groups(problem.heads, degree), members, tuple(steps))


def _bundle_move(source: Ints, to: Ints, bundles: Ints, lane: Ints, channel: str, steps: int = 1) -> Move:
    """Every rank sends all shards of the bundle that it holds."""
    width = bundles.shape[1]
    moved = rows(np.repeat(source, width), np.repeat(to, width), bundles.ravel(), np.repeat(lane, width))
    return Move("kv", moved, steps=steps, channel=channel)


def ranks_of(world_size: int, degree: int, *, outside: bool) -> Ints:
    """A (ring, degree) grid of ranks: those of a head exchange are neighbours, or, ``outside``, those of a ring."""
    every = np.arange(world_size)
    return every.reshape(degree, -1).T.copy() if outside else every.reshape(-1, degree)


def largest_degree(problem: Problem) -> int:
    """The most ranks of a node among which heads can be dealt out evenly."""
    per_node = problem.scale.gpus_per_node
    return max(u for u in range(1, per_node + 1) if per_node % u == 0 and not indivisible_heads(problem.heads, u))


def refused_grid(problem: Problem, degree: int) -> str | None:
    ranks = problem.scale.world_size
    if ranks % degree:
        return f"ulysses_degree={degree} does not divide the {ranks} ranks of scale={problem.scale}"
    return indivisible_heads(problem.heads, degree) or too_short(problem, ranks)
