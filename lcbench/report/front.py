"""What no other choice beats in time, memory and GPUs at once (the Pareto front), and the figure of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcbench.problem import format_tokens
from lcbench.report.amounts import SECONDS, duration, size, unit_for
from lcbench.report.drawing import GREY, Drawn, grid, legend, share_y
from lcbench.report.parts import PEAK, TIME, Group, Shown, fastest_choices, groups, in_order, slug

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MEASURES = ["world_size", TIME, PEAK]
GIB = 2**30
FAINT = 0.25  # opacity of what is beaten
WIDE = 6.0  # times over the shortest, from which on ticks are 1, 2, 5, 10, ...
MOST_SAID = 4  # choices of the front that are named for a mask


def unbeaten(measures: Sequence[Sequence[float]]) -> list[bool]:
    """Of each row of measures, the less the better: whether no other row is at most as large in all of them and smaller in one.

    Rows that are equal do not beat each other.
    """
    if not len(measures):
        return []
    rows = np.asarray(measures, dtype=float)
    other, mine = rows[:, None], rows[None]
    beats = (other <= mine).all(axis=2) & (other < mine).any(axis=2)
    beaten: list[bool] = np.any(beats, axis=0).tolist()
    return [not its for its in beaten]


def pareto(of: Shown) -> Iterator[Drawn]:
    """GPUs against the time of an iteration, and beside that memory: a row per mask that has results on several numbers of GPUs, a
    figure per length. What nothing beats is drawn with its interval, the rest faint.
    """
    for group in groups(of, ["seqlen", "setting"]):
        rows = front_of(group.rows)
        if rows.empty:
            continue
        tokens = format_tokens(int(rows["seqlen"].iloc[0]))
        setting = group.where.partition(", ")[2]
        title = ", ".join(["Time, memory and GPUs", f"{tokens} tokens", *([setting] if setting else [])])
        name = "_".join(["pareto", tokens, *([slug(setting)] if of.several else [])])
        figure, left_out = _figure(of, rows, _beside(group, rows), title)
        yield Drawn(name, title, _caption(group, rows, left_out), front_said(rows), figure)


def front_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Of rows of one length and setting those that have a time and a peak of memory, of masks with several numbers of GPUs; with
    ``front``, whether no other of its mask beats it in time, memory and GPUs at once: of the exact ones alone.
    """
    rows = rows[(rows[PEAK] > 0) & rows[TIME].notna()] if PEAK in rows else rows.iloc[:0]
    rows = rows[rows.groupby("what_mask")["world_size"].transform("nunique") > 1] if len(rows) else rows
    front = np.zeros(len(rows), dtype=bool)
    exact = (rows["approximate"] == "").to_numpy()
    for of_mask in rows.groupby("what_mask", sort=False).indices.values():
        places = of_mask[exact[of_mask]]
        front[places] = unbeaten(rows[MEASURES].to_numpy(dtype=float)[places])
    return rows.assign(front=front)


def front_said(rows: pd.DataFrame) -> str:
    """What nothing beats, in words, mask by mask, fewer GPUs first.

    Args:
        rows: of ``front_of``.
    """
    said = []
    for mask, mine in rows.groupby("what_mask", sort=False):
        front = mine[mine["front"]].sort_values(MEASURES)
        first = [
            f"{row['choice']} on {row['world_size']} GPUs ({duration(row[TIME])}, {size(row[PEAK])})"
            for row in front.head(MOST_SAID).to_dict("records")
        ]
        more = f" and {len(front) - MOST_SAID} more" if len(front) > MOST_SAID else ""
        said.append(f"{mask}: nothing beats {', '.join(first)}{more}; {len(mine) - len(front)} of {len(mine)} are beaten")
    return ". ".join(said) + "."


def _beside(group: Group, rows: pd.DataFrame) -> pd.DataFrame:
    """Predictions of the masks that are drawn, where time and memory were predicted."""
    beside = group.foretold[group.foretold["what_mask"].isin(rows["what_mask"])]
    return beside[(beside[PEAK] > 0) & beside[TIME].notna()]


def _figure(of: Shown, rows: pd.DataFrame, beside: pd.DataFrame, title: str) -> tuple[Any, int]:
    """The figure, and how many choices are not in it: the fastest are, and those on the front."""
    masks, (fastest, _) = in_order(rows, "what_mask"), fastest_choices(rows)
    kept = {*fastest, *rows["choice"][rows["front"]]}
    choices = [choice for choice in of.styles if choice in kept]
    unit = unit_for(float(rows[TIME].max()), SECONDS)
    figure, axes = grid(len(masks), 2, title, of.source)
    drawn: dict[str, Any] = {}
    for (gpus, memory), mask in zip(axes, masks, strict=True):
        mine, foretold = (cells[cells["what_mask"] == mask].assign(
            time=lambda r: r[TIME] / unit.size, gib=lambda r: r[PEAK] / GIB) for cells in (rows, beside))  # fmt: skip
        for axis, y in ((gpus, "world_size"), (memory, "gib")):
            _intervals(axis, mine[mine["front"]], y, unit.size)
            drawn |= _points(axis, mine[mine["choice"].isin(choices)], y, of) | _points(axis, foretold, y, of)
            axis.set_xscale("log")
            axis.set_yscale("log", base=2)
            axis.tick_params(labelsize=8)
            _time_ticks(axis, [*mine["time"], *foretold["time"]])
            axis.margins(y=0.1)
            axis.grid(alpha=0.25)
        _steps(gpus, mine)
        _name_gpus(memory, mine[mine["front"]])
        gpus.set_title(mask, fontsize=9)
        gpus.set_ylabel("GPUs", fontsize=8)
        memory.set_ylabel("GiB a GPU", fontsize=8)
        memory.yaxis.set_major_formatter("{x:.4g}")
        memory.sharex(gpus)
    ticks = sorted({*rows["world_size"], *beside["world_size"]})
    for axis in axes[:, 0]:
        axis.set_yticks(ticks, [str(int(tick)) for tick in ticks], fontsize=8)
        axis.set_ylim(ticks[0] / 1.4, ticks[-1] * 1.4)
    for axis in axes[-1]:
        axis.set_xlabel(f"time of an iteration, {unit.name}", fontsize=8)
    share_y(axes[:, 1])
    legend(figure, {choice: drawn[choice] for choice in of.styles if choice in drawn})
    return figure, rows["choice"].nunique() - len(choices)


def _time_ticks(axis: Axes, times: Sequence[float]) -> None:
    """Ticks that are read easily along a logarithmic axis of times, which may be of several decades or of a part of one."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if max(times) > WIDE * min(times) else MaxNLocator(5))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()


def _points(axis: Axes, cells: pd.DataFrame, y: str, of: Shown) -> dict[str, Any]:
    """A mark per cell in the style of its choice, faint where it is beaten; what a legend shows of each choice."""
    drawn: dict[str, Any] = {}
    for choice, mine in cells.groupby("choice", sort=False):
        look: dict[str, Any] = {"markersize": 5, "markeredgecolor": "0.25", "markeredgewidth": 0.4}
        look |= of.styles[str(choice)].matplotlib | {"linestyle": "none"}
        front = mine["front"].to_numpy(dtype=bool) if "front" in mine else np.ones(len(mine), dtype=bool)
        axis.plot(mine["time"][~front], mine[y][~front], label=f"_beaten {choice}", **look, alpha=FAINT)
        axis.plot(mine["time"][front], mine[y][front], label=str(choice), **look, zorder=3)
        drawn[str(choice)] = _key(look)
    return drawn


def _key(look: dict[str, Any]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)


def _intervals(axis: Axes, front: pd.DataFrame, y: str, unit: float) -> None:
    """The 95 % interval of the times of a front, in the unit of the axis."""
    lows, highs = ([getattr(time, end) / unit for time in front["timed/total"]] for end in ("low", "high"))
    axis.hlines(front[y], lows, highs, color=GREY, linewidth=1.0)


def _steps(axis: Axes, cells: pd.DataFrame) -> None:
    """A line through what is fastest with at most so many GPUs."""
    line = cells[unbeaten(cells[["world_size", TIME]].to_numpy(dtype=float).tolist())].sort_values(MEASURES[:2])
    axis.plot(line["time"], line["world_size"], color=GREY, linewidth=0.8, zorder=1, label="_front")


def _name_gpus(axis: Axes, front: pd.DataFrame) -> None:
    """How many GPUs a point of the front has, beside it."""
    for time, gib, gpus in zip(front["time"], front["gib"], front["world_size"], strict=True):
        axis.annotate(str(gpus), (time, gib), xytext=(4, 4), textcoords="offset points", fontsize=6, color="0.3")


def _caption(group: Group, rows: pd.DataFrame, left_out: int) -> str:
    masks = set(rows["what_mask"])
    failed = int(group.failed["what_mask"].isin(masks).sum())
    without = int(group.rows["what_mask"].isin(masks).sum()) - len(rows)
    foretold = int(group.foretold["what_mask"].isin(masks).sum())
    return (
        "Further left and further down is better. Full marks, with the 95 % interval of their time: no other choice is at least as "
        "good in time, memory and GPUs and better in one; faint ones are beaten, some of them within the noise. Line: the fastest "
        "with at most so many GPUs. GiB a GPU: the peak of the worst rank; a number there: how many GPUs it takes."
        + (f" Left out: {failed} failed cell{'s' * (failed > 1)}." if failed else "")
        + (f" Left out: {without} without a peak of memory." if without else "")
        + (" Hollow: predicted, not measured." if foretold or (rows["status"] == "predicted").any() else "")
        + (" Beside measurements they beat nothing." if foretold else "")
        + (f" The fastest choices and those of the front are drawn; {left_out} more are in the tables." if left_out else "")
    )
