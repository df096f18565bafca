"""How long packs are expected to take, and whether a command may start them without an explicit budget."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lcbench.grid.build import on_one_rank
from lcbench.grid.cell import Cell
from lcbench.grid.values import parse_scale
from lcbench.measure.blocks import blocks_of
from lcbench.runs.pack import Pack

HOUR_S = 3600.0
MINUTE_S = 60.0
NAMED = 3  # of what estimates rest on


@dataclass(frozen=True)
class Cost:
    """Estimates of packs.

    Attributes:
        hours: of all, one after the other.
        rank_hours: those times their ranks.
        most_rank_hours: what ends them lets them take: time limits, or here, where there are none, ``hang.max_s`` of each block of
            a cell. What is tried again by itself comes on top.
        limited_by: that, in words.
        seconds: by cell.
        bases: how many cells' estimates rest on what.
    """

    hours: float
    rank_hours: float
    most_rank_hours: float
    limited_by: str
    seconds: dict[Cell, float]
    bases: dict[str, int]

    @classmethod
    def of(cls, packs: Sequence[Pack], *, here: bool) -> Cost:
        """``here``: whether packs are processes of this machine, and not jobs with a time limit."""
        hours = [sum(pack.seconds[c] for c in pack.cells) / HOUR_S for pack in packs]
        ranks = [parse_scale(pack.scale).world_size for pack in packs]
        seconds = {Cell.from_config(pack.configs[c]): pack.seconds[c] for pack in packs for c in pack.cells}
        if here:
            most = [sum(blocks_of(config["measure"]) for config in p.configs.values()) * p.settings.hang["max_s"] for p in packs]
        else:  # the packs of a scale are an array, whose jobs have one limit
            limits = {pack.scale: max(p.timeout_min for p in packs if p.scale == pack.scale) for pack in packs}
            most = [limits[pack.scale] * MINUTE_S for pack in packs]
        return cls(
            sum(hours), sum(h * n for h, n in zip(hours, ranks, strict=True)),
            sum(s * n for s, n in zip(most, ranks, strict=True)) / HOUR_S,
            "hang.max_s a block; there are no time limits here" if here else "time limits", seconds,
            dict(Counter(basis for pack in packs for basis in pack.basis.values()).most_common()),
        )  # fmt: skip

    def __str__(self) -> str:
        if not self.seconds:
            return "estimated: nothing to run"
        cell, longest_s = max(self.seconds.items(), key=lambda item: item[1])
        return (
            f"estimated: {self.gpu_hours}; {said(self.hours * HOUR_S)} one after the other, the longest cell {said(longest_s)} "
            f"({cell.label})\nestimated from: {self.basis}"
        )

    @property
    def gpu_hours(self) -> str:
        """GPU-hours, expected and at most, in words."""
        return f"about {hours_of(self.rank_hours)} GPU-hours, at most {hours_of(self.most_rank_hours)} ({self.limited_by})"

    @property
    def basis(self) -> str:
        """What the estimates rest on, and of how many cells, in words."""
        named = [f"{basis} ({count:,} cell{'s' * (count != 1)})" for basis, count in itertools.islice(self.bases.items(), NAMED)]
        others = sum(self.bases.values()) - sum(itertools.islice(self.bases.values(), NAMED))
        return ", ".join(named) + (f", and others ({others:,} cells)" if others else "")

    def after(self, earlier: Cost) -> Cost:
        """The same, on top of what the same command started before."""
        return replace(
            self, hours=self.hours + earlier.hours, rank_hours=self.rank_hours + earlier.rank_hours,
            most_rank_hours=self.most_rank_hours + earlier.most_rank_hours, seconds={**earlier.seconds, **self.seconds},
        )  # fmt: skip

    def refusal(self, budget: Mapping[str, float | None], max_s: float, started: str = "nothing was started") -> str | None:
        """Why these packs are not started, in one line: by their estimates they need more than ``budget`` (``hours``,
        ``gpu_hours``) allows, or a cell would be ended as hung after ``max_s`` seconds; None if they may. ``started``: what was, in
        words.
        """
        for option, wanted, unit in (("hours", self.hours, "hours"), ("gpu_hours", self.rank_hours, "GPU-hours")):
            allowed = budget.get(option)
            if allowed is not None and wanted > allowed:
                return (
                    f"these {len(self.seconds)} cells are expected to take {wanted:,.1f} {unit}, {wanted - allowed:,.1f} more than "
                    f"budget.{option}={allowed:g} allows ({self.gpu_hours}); {started}. Ask for less, or write "
                    f"budget.{option}={math.ceil(wanted)}"
                )
        long = {cell: s for cell, s in self.seconds.items() if s > max_s}
        if long:
            cell, longest_s = max(long.items(), key=lambda item: item[1])
            return (
                f"{len(long)} of {len(self.seconds)} cells are expected to take longer than hang.max_s={max_s:g}, after which they "
                f"would be ended as hung: {cell.label} about {longest_s:,.0f} s; {started}. Leave them out, time less "
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
