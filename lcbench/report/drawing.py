"""How figures of matplotlib look: panels, titles and sources, lines in the report's styles, marks of what failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcbench.problem import format_tokens
from lcbench.report.palette import Style
from lcbench.report.parts import MOST_LINES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (4.0, 2.9)  # inches
ACROSS = 4
DPI = 150
# Intervals of several choices at one place stand beside each other: by this factor, on a logarithmic axis.
DODGE = 1.02
# Failed cells at one place that are marked one above the other; of more it is said how many.
MOST_MARKS = 6
MOST_TICKS = 8
GREY = "0.5"
CROSS: dict[str, Any] = {"marker": "X", "markersize": 6, "markeredgecolor": "0.25", "markeredgewidth": 0.4, "linestyle": "none"}


@dataclass(frozen=True)
class Drawn:
    """A figure. ``name``: of its files, by content; ``caption``: how to read it; ``alt``: what it shows, in words."""

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure

    @property
    def kind(self) -> str:
        """What question it answers: the part of its name before the first underscore."""
        return self.name.partition("_")[0]

    def save(self, folder: Path) -> list[Path]:
        """Write it as PNG and PDF; the folder is made."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.{form}" for form in ("png", "pdf")]
        for path in paths:
            self.figure.savefig(path, dpi=DPI)
            self.figure.set_layout_engine("none")  # it was laid out for the first
        return paths


def grid(rows: int, columns: int, title: str, source: str, size: tuple[float, float] = PANEL) -> tuple[Figure, Any]:
    """A figure with its title above and its source below in grey, and an array of panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, size[0] * columns), size[1] * rows + 1.1), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    figure.supxlabel(source, x=0.99, ha="right", fontsize=6, color=GREY)
    return figure, figure.subplots(rows, columns, squeeze=False)


def panels(
    count: int, title: str, source: str, *, size: tuple[float, float] = PANEL, across: int = ACROSS
) -> tuple[Figure, list[Axes]]:
    """As many panels as asked for, side by side, then below; what is left of the last row stays empty."""
    columns = min(count, across)
    figure, axes = grid(math.ceil(count / columns), columns, title, source, size)
    return figure, used(axes, count)


def used(axes: Any, count: int) -> list[Axes]:
    """The first panels of an array; the rest are hidden."""
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_visible(False)
    return flat[:count]


def draw_line(axis: Axes, x: pd.Series, y: pd.Series, style: Style, **more: Any) -> Any:
    """A line with markers, whose thin dark edges show pale colours too."""
    look = {"markersize": 4.5, "linewidth": 1.3, "markeredgecolor": "0.25", "markeredgewidth": 0.4}
    return axis.plot(x.to_numpy(), y.to_numpy(), **{**look, **style.matplotlib, **more})[0]


def with_gaps(line: pd.DataFrame, x: str, places: Sequence[Any]) -> pd.DataFrame:
    """A line with a row for each of its places, so that one without a result shows as a gap and not as a straight line."""
    return line.drop_duplicates(x).set_index(x).reindex(places).rename_axis(x).reset_index()


def dodged(x: pd.Series, place: int, count: int) -> pd.Series:
    """Places of choice ``place`` of ``count`` beside each other on a logarithmic axis."""
    return x * DODGE ** (place - (count - 1) / 2)


def mark_failures(axis: Axes, failed: pd.DataFrame, x: str, styles: dict[str, Style]) -> None:
    """A cross with its class at the bottom of a panel for every failed cell, in its choice's colour, one above the other."""
    across = axis.get_xaxis_transform()
    for place, cells in failed.groupby(x):
        for height, (choice, kind) in enumerate(zip(cells["choice"][:MOST_MARKS], cells["failure"][:MOST_MARKS], strict=True)):
            y = 0.04 + 0.065 * height
            axis.plot([place], [y], color=styles[choice].color, transform=across, label=f"_failed {choice}", **CROSS)
            axis.annotate(kind, (place, y), xycoords=across, xytext=(5, 0), textcoords="offset points", fontsize=6, va="center")
        if len(cells) > MOST_MARKS:
            axis.text(place, 0.04 + 0.065 * MOST_MARKS, f"{len(cells) - MOST_MARKS} more failed", transform=across, fontsize=6)


def tune(axis: Axes, x: str, ticks: Sequence[Any], title: str, xlabel: str, ylabel: str) -> None:
    """Lengths or numbers of GPUs along x, in powers of two."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [format_tokens(int(t)) if x == "seqlen" else str(int(t)) for t in ticks], fontsize=8)
    axis.set_xlim(min(ticks) / 1.25, max(ticks) * 1.25)
    axis.minorticks_off()
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(xlabel, fontsize=8)
    axis.set_ylabel(ylabel, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)


def share_y(axes: Sequence[Axes], *, floor: float | None = None) -> None:
    """The same limits along y for all panels of a row, from ``floor`` on if there is one."""
    limits = [axis.get_ylim() for axis in axes]
    low = min(low for low, _ in limits) if floor is None else floor
    for axis in axes:
        axis.set_ylim(low, max(high for _, high in limits))


def relative_axis(axes: Sequence[Axes]) -> None:
    """Percent of the best on a logarithmic axis, the same for all panels of a row, with ticks that are read easily."""
    for axis in axes:
        axis.set_yscale("log")
    lines = [line for axis in axes for line in axis.get_lines()]
    lowest = min((float(np.nanmin(line.get_ydata())) for line in lines), default=50.0)
    low = min(lowest * 0.9, 75.0)
    ticks = [100.0]
    for step in (95.0, 90.0, 80.0, 70.0, 50.0, 30.0, 20.0, 10.0, 5.0, 2.0, 1.0):
        if step >= low and ticks[-1] / step >= (100 / low) ** (1 / MOST_TICKS):
            ticks.append(step)
    for axis in axes:
        axis.set_yticks(ticks, [f"{step:g} %" for step in ticks], fontsize=8)
        axis.minorticks_off()
        axis.set_ylim(low, 100 * (100 / low) ** 0.04)


def legend(figure: Figure, drawn: dict[str, Any]) -> None:
    """All that was drawn, by name, beside the panels."""
    if drawn:
        figure.legend(list(drawn.values()), list(drawn), loc="outside right upper", fontsize=8, frameon=False, handlelength=3)


def said_of(left_out: int) -> str:
    """For a caption: that not every choice is drawn."""
    return f" The {MOST_LINES} fastest are drawn; {left_out} more are in the tables." if left_out else ""


def said_of_failures(failed: pd.DataFrame) -> str:
    """For a caption: what crosses are."""
    return " A cross at the bottom is a failed cell, with the class of its failure." if len(failed) else ""
