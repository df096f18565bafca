"""USP: heads exchanged in groups of U ranks, a ring across R groups, U x R = P (Fang & Zhao, arXiv 2405.07719)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lcbench.cp.base import HeadGrid, Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import Order, check_choice, check_order, grid_schedule, ranks_of, refused_grid
from lcbench.schedule.schedule import Schedule


@dataclass(frozen=True)
class USP(HeadGrid, Scheduled):
    """Ulysses inside a ring.

    Attributes:
        layout: of tokens over the ring positions.
        ulysses: ``inside``: the ranks of a head exchange are neighbours, in one node as long as U fits; ``outside``: those of
            a ring are.
    """

    by_mask: ClassVar[bool] = True

    layout: Order = "auto"
    ulysses: Literal["inside", "outside"] = "inside"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.layout)
        check_choice("ulysses", self.ulysses, ("inside", "outside"))

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return refused_grid(problem, self.degree(problem))

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        grid = ranks_of(problem.scale.world_size, self.degree(problem), outside=self.ulysses == "outside")
        return grid_schedule(problem, mask, grid, 1, self.layout)
