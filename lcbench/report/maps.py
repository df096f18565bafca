"""Heat maps: the best rate of each pair of two axes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lcbench.problem import format_tokens
from lcbench.report.drawing import Drawn, panels
from lcbench.report.frame import closest, exact_rows
from lcbench.report.parts import RATE, Group, Shown, groups, in_order

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

WORDS = {"what_kernel": "kernel", "what_cp": "strategy", "what_mask": "mask"}
FEWEST_CHOICES = 3
WIDE = 14.0  # inches


def mask_by_kernel(of: Shown) -> Iterator[Drawn]:
    """Mask x kernel: the best TFLOP/s per GPU of each pair; a panel per length, a figure per scale."""
    return _by_length(of, "what_kernel")


def mask_by_strategy(of: Shown) -> Iterator[Drawn]:
    """Mask x strategy, likewise."""
    return _by_length(of, "what_cp")


def kernel_by_strategy(of: Shown) -> Iterator[Drawn]:
    """Kernel x strategy for problems with at least three choices: a panel per mask, at the longest sequence; a figure per scale."""
    for group in groups(of, ["scale", "setting"]):
        rows = group.rows[group.rows["choice"].groupby(group.rows["problem"]).transform("nunique") >= FEWEST_CHOICES]
        if rows["what_kernel"].nunique() < 2 or rows["what_cp"].nunique() < 2:
            continue
        longest = rows[rows["seqlen"] == rows.groupby("what_mask")["seqlen"].transform("max")]
        parts = [
            (f"{mask} {format_tokens(int(mine['seqlen'].iloc[0]))}", mine)
            for mask, mine in longest.groupby("what_mask", sort=False)
        ]
        yield _map(of, group, "what_kernel", "what_cp", parts)


def _by_length(of: Shown, column: str) -> Iterator[Drawn]:
    for group in groups(of, ["scale", "setting"]):
        if group.rows[column].nunique() < 2 or group.rows["what_mask"].nunique() < 2:
            continue
        parts = [(format_tokens(int(length)), rows) for length, rows in group.rows.groupby("seqlen")]
        yield _map(of, group, "what_mask", column, parts)


def _map(of: Shown, group: Group, down: str, right: str, parts: list[tuple[str, pd.DataFrame]]) -> Drawn:
    """Panels of the best rate of each pair, with one scale of colours."""
    index, columns = in_order(group.rows, down), in_order(group.rows, right)
    size = (1.6 + 0.75 * len(columns), 1.2 + 0.32 * len(index))
    title = f"TFLOP/s per GPU, {WORDS[down]} by {WORDS[right]}, {group.where}"
    figure, axes = panels(len(parts), title, of.source, size=size, across=max(1, int(WIDE // size[0])))
    highest = float(group.rows[RATE].max())
    for axis, (name, rows) in zip(axes, parts, strict=True):
        best = _best(rows, down, right).unstack().reindex(index=index, columns=columns)
        failed = group.failed[group.failed["seqlen"].isin(rows["seqlen"]) & group.failed["what_mask"].isin(rows["what_mask"])]
        _fill(axis, best, {key: cells["failure"].iloc[0] for key, cells in failed.groupby([down, right])}, highest)
        axis.set_title(name, fontsize=9)
    which = "" if len(exact_rows(group.rows)) == len(group.rows) else ", of what is closest to exact results"
    caption = (
        f"The best of what else was varied for each {WORDS[down]} and {WORDS[right]}{which}; a word says why none ran, empty: not "
        "tried."
    )
    return Drawn(f"{WORDS[down]}-by-{WORDS[right]}_{group.slug}", title, caption, _extremes(parts, down, right), figure)


def _best(rows: pd.DataFrame, down: str, right: str) -> pd.Series[float]:
    """The highest rate of each pair, of what is closest to exact results there."""
    best: pd.Series[float] = closest(rows, [down, right]).groupby([down, right])[RATE].max()
    return best


def _fill(axis: Axes, best: pd.DataFrame, failed: dict[tuple[str, str], str], highest: float) -> None:
    values = best.to_numpy(dtype=float)
    axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
    axis.set_xticks(range(len(best.columns)), best.columns, rotation=40, ha="right", fontsize=7)
    axis.set_yticks(range(len(best.index)), best.index, fontsize=7)
    for (i, j), value in np.ndenumerate(values):
        text = failed.get((best.index[i], best.columns[j]), "") if math.isnan(value) else f"{value:.3g}"
        dark = not math.isnan(value) and value < 0.6 * highest
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")


def _extremes(parts: list[tuple[str, pd.DataFrame]], down: str, right: str) -> str:
    """Per panel the pair with the highest rate, and that with the lowest best one."""
    said = []
    for name, rows in parts:
        best = _best(closest(rows, []), down, right)
        (top, low) = best.idxmax(), best.idxmin()
        ends = f"{top[0]} with {top[1]} reaches most, {best.max():.0f} TFLOP/s per GPU"
        said.append(f"{name}: {ends}" + (f"; {low[0]} with {low[1]} least, {best.min():.0f}" if top != low else ""))
    return ". ".join(said) + "."
