"""How long packs are expected to take, and whether a command may start them without an explicit budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lcbench.grid.build import on_one_rank
from lcbench.grid.cell import Cell
from lcbench.grid.values import parse_scale
from lcbench.runs.pack import Pack

HOUR_S = 3600.0
MINUTE_S = 60.0


@dataclass(frozen=True)
class Cost:
    """Estimates of packs: ``hours`` of all, one after the other, ``rank_hours`` those times their ranks, and seconds by cell."""

    hours: float
    rank_hours: float
    seconds: dict[Cell, float]

    @classmethod
    def of(cls, packs: Sequence[Pack]) -> Cost:
        hours = [sum(pack.seconds[c] for c in pack.cells) / HOUR_S for pack in packs]
        ranks = [parse_scale(pack.scale).world_size for pack in packs]
        seconds = {Cell.from_config(pack.configs[c]): pack.seconds[c] for pack in packs for c in pack.cells}
        return cls(sum(hours), sum(h * n for h, n in zip(hours, ranks, strict=True)), seconds)

    def __str__(self) -> str:
        if not self.seconds:
            return "estimated: nothing to run"
        cell, longest_s = max(self.seconds.items(), key=lambda item: item[1])
        return (
            f"estimated: {said(self.hours * HOUR_S)}, {hours_of(self.rank_hours)} GPU-hours; "
            f"the longest cell {said(longest_s)} ({cell.label})"
        )

    def refusal(self, budget: Mapping[str, float | None], max_s: float) -> str | None:
        """Why these packs are not started, in one line: more than ``budget`` (``hours``, ``gpu_hours``) allows, or a cell that
        would be ended as hung after ``max_s`` seconds; None if they may.
        """
        for option, wanted, unit in (("hours", self.hours, "hours"), ("gpu_hours", self.rank_hours, "GPU-hours")):
            allowed = budget.get(option)
            if allowed is not None and wanted > allowed:
                return (
                    f"these {len(self.seconds)} cells are expected to take {wanted:,.1f} {unit}, {wanted - allowed:,.1f} more than "
                    f"budget.{option}={allowed:g} allows; nothing was started. Ask for less, or write "
                    f"budget.{option}={math.ceil(wanted)}"
                )
        long = {cell: s for cell, s in self.seconds.items() if s > max_s}
        if long:
            cell, longest_s = max(long.items(), key=lambda item: item[1])
            return (
                f"{len(long)} of {len(self.seconds)} cells are expected to take longer than hang.max_s={max_s:g}, after which they "
                f"would be ended as hung: {cell.label} about {longest_s:,.0f} s; nothing was started. Leave them out, time less "
                f"(measure.min_iterations, measure.blocks), or write hang.max_s={math.ceil(longest_s)}"
            )
        return None

    def on_one_rank(self) -> list[Cell]:
        """Cells whose strategy has nothing to do, because there is one rank."""
        return [cell for cell in self.seconds if alone(cell)]


def alone(cell: Cell) -> bool:
    """Whether a cell has a strategy of context parallelism and one rank."""
    return cell.scale.world_size == 1 and not on_one_rank(cell.config["cp"])


def hours_of(hours: float) -> str:
    """Hours for people, with two digits below ten."""
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def said(seconds: float) -> str:
    """A duration for people."""
    if seconds < HOUR_S:
        return f"{max(1, math.ceil(seconds / MINUTE_S))} min"
    return f"{seconds / HOUR_S:,.1f} h"
