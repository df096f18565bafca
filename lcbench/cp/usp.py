"""USP: heads exchanged in groups of U ranks, a ring across R groups, U x R = P (Fang & Zhao, arXiv 2405.07719)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lcbench.cp.base import Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import (
    Order,
    check_choice,
    check_count,
    check_order,
    grid_schedule,
    largest_degree,
    ranks_of,
    refused_grid,
)
from lcbench.schedule.schedule import Schedule


@dataclass(frozen=True)
class USP(Scheduled):
    """Ulysses inside a ring.

    Attributes:
        ulysses_degree: U, or ``auto``: the largest that divides the GPUs of a node and splits the heads.
        ulysses: ``inside``: the ranks of a head exchange are neighbours, in one node as long as U fits; ``outside``: those of
            a ring are.
    """

    ulysses_degree: int | Literal["auto"] = "auto"
    layout: Order = "auto"
    ulysses: Literal["inside", "outside"] = "inside"

    def __post_init__(self) -> None:
        check_order(self.layout)
        if self.ulysses_degree != "auto":
            check_count("ulysses_degree", self.ulysses_degree)
        check_choice("ulysses", self.ulysses, ("inside", "outside"))

    def degree(self, problem: Problem) -> int:
        """U, ranks of a head exchange."""
        return largest_degree(problem) if self.ulysses_degree == "auto" else self.ulysses_degree

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return refused_grid(problem, self.degree(problem))

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        grid = ranks_of(problem.scale.world_size, self.degree(problem), outside=self.ulysses == "outside")
        return grid_schedule(problem, mask, grid, 1, self.layout)
