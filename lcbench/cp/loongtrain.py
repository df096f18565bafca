"""LoongTrain: heads exchanged in groups of U ranks, and around them a double ring (arXiv 2406.18485).

The R ring positions form W windows of w positions. Keys and values go around inside a window in w - 1 hops. Meanwhile those of the
next window travel over a communicator of their own and have w steps to arrive. Of all R - 1 hops only W - 1 leave a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lcbench.cp.base import HeadGrid, Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import Order, check_choice, check_count, check_order, grid_schedule, ranks_of, refused_grid
from lcbench.schedule.schedule import Schedule

Placement = Literal["head_first", "context_first"]


@dataclass(frozen=True)
class LoongTrain(HeadGrid, Scheduled):
    """A grid of ``ulysses_degree`` ranks per head exchange and a double ring over the rest.

    Attributes:
        window: ring positions of an inner ring, or ``auto``: those in one node; where that is 1 or all, the divisor of the ring
            nearest to its square root.
        placement: which ranks are neighbours: those of a head exchange, or those of an inner ring.
        layout: of tokens over the ring positions.
    """

    by_mask: ClassVar[bool] = True

    window: int | Literal["auto"] = "auto"
    placement: Placement = "head_first"
    layout: Order = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.layout)
        if self.window != "auto":
            check_count("window", self.window)
        check_choice("placement", self.placement, ("head_first", "context_first"))

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
        return grid_schedule(problem, mask, grid, windows, self.layout)
