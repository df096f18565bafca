"""Figures with a bar per cell: the ranking of choices for a problem, and where the time goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lcbench.problem import format_tokens
from lcbench.report.amounts import SECONDS, duration, more, percent, times, unit_for
from lcbench.report.drawing import CROSS, GREY, Drawn, legend, panels
from lcbench.report.frame import best_of, exact_rows, ranked
from lcbench.report.palette import Style
from lcbench.report.parts import RATE, TIME, Group, Shown, groups, in_order, split

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# A problem with fewer choices needs no ranking.
FEWEST_CHOICES = 3
MOST_BARS = 40
BY_DISTANCE = "What approximates comes after what is exact, the closest first, whatever time it takes."
PARTS = {"computing": "#4477aa", "imbalance": "#ccbb44", "exposed communication": "#ee6677", "rest": "#bbbbbb"}
# Bars of where the time goes end here, in times of the best: one slow choice would make all others short.
LONGEST = 4.0
# A rest that is smaller than this share of every iteration is not shown.
NO_REST = 0.005


def ranking(of: Shown) -> Iterator[Drawn]:
    """Time of every choice for a problem, the fastest on top, then what approximates, failed ones at the end: a panel per mask, at
    the longest sequence that at least three choices ran; a figure per scale.
    """
    for group in groups(of, ["scale", "setting"]):
        problems = list(_problems(group))
        if not problems:
            continue
        most = max(len(rows) + len(failed) for _, rows, failed in problems)
        title = f"Choices ranked by time, {group.where}"
        size = (5.2, 0.6 + 0.2 * min(most, 2 * MOST_BARS))
        figure, axes = panels(len(problems), title, of.source, size=size, across=2)
        said = []
        for axis, (mask, rows, failed) in zip(axes, problems, strict=True):
            _rank(axis, rows, failed, of.styles)
            at = format_tokens(int(rows["seqlen"].iloc[0]))
            axis.set_title(f"{mask} {at}", fontsize=9)
            said.append(_ranked(f"{mask} {at}", rows, failed))
        caption = "Time of an iteration with its 95 % interval; line: the best. Failed cells are at the end, with their class."
        caption += f" {BY_DISTANCE}" if any((rows["approximate"] != "").any() for _, rows, _ in problems) else ""
        caption += f" Only the first {MOST_BARS}." if any(len(rows) > MOST_BARS for _, rows, _ in problems) else ""
        yield Drawn(f"ranking_{group.slug}", title, caption, " ".join(said), figure)


def _problems(group: Group) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Per mask (mask, good rows in the order of ``ranked``, failed rows) of the longest sequence that enough choices ran."""
    for mask in in_order(group.rows, "what_mask"):
        rows = group.rows[group.rows["what_mask"] == mask]
        count = rows.groupby("seqlen").size()
        enough = count[count >= FEWEST_CHOICES]
        if len(enough):
            seqlen = enough.index.max()
            failed = group.failed[(group.failed["what_mask"] == mask) & (group.failed["seqlen"] == seqlen)]
            yield str(mask), ranked(rows[rows["seqlen"] == seqlen]), failed


def _rank(axis: Axes, rows: pd.DataFrame, failed: pd.DataFrame, styles: dict[str, Style]) -> None:
    rows = rows.head(MOST_BARS)
    unit = unit_for(float(rows[TIME].iloc[0]), SECONDS)
    seconds = rows[TIME].to_numpy(dtype=float)
    values = seconds / unit.size
    best = values[0] if len(exact_rows(rows)) else None  # what approximates is the best of nothing
    lows, highs = (np.array([getattr(time, end) for time in rows["timed/total"]]) / unit.size for end in ("low", "high"))
    places = range(len(rows))
    bars = axis.barh(places, values, color=[styles[c].color for c in rows["choice"]], height=0.7)
    for bar, choice in zip(bars, rows["choice"], strict=True):
        if styles[choice].hollow:
            bar.set(facecolor="none", edgecolor=styles[choice].color, hatch="////")
    axis.errorbar(values, places, xerr=[values - lows, highs - values], fmt="none", ecolor="0.2", elinewidth=1.0, capsize=2)
    for place, (value, high) in enumerate(zip(values, highs, strict=True)):
        behind = "" if place == 0 or best is None else f"  {more(value / best)}"
        text = f"{unit.of(seconds[place])}{behind}"
        axis.annotate(text, (high, place), xytext=(6, 0), textcoords="offset points", fontsize=7, va="center")
    for place, (choice, kind) in enumerate(zip(failed["choice"], failed["failure"], strict=True), start=len(rows)):
        axis.plot([0], [place], color=styles[choice].color, clip_on=False, label=f"_failed {choice}", **CROSS)
        axis.annotate(kind, (0, place), xytext=(6, 0), textcoords="offset points", fontsize=7, va="center", color=GREY)
    if best is not None:
        axis.axvline(best, color="0.4", linewidth=0.8)
    names = [*rows["choice"], *failed["choice"]]
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 1.35 * min(max(highs), 2 * max(values)))
    axis.set_xlabel(f"time of an iteration, {unit.name}", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)


def _ranked(problem: str, rows: pd.DataFrame, failed: pd.DataFrame) -> str:
    exact = exact_rows(rows)
    names, seconds = exact["choice"].tolist(), exact[TIME].tolist()
    if len(names) > 1:
        said = f"{problem}: {names[0]} is fastest with {duration(seconds[0])}, {names[1]} follows with "
        said += f"{more(seconds[1] / seconds[0])}, {names[-1]} is last with {times(seconds[-1] / seconds[0])}"
    else:
        said = f"{problem}: {names[0] if names else 'nothing'} alone is exact"
    kinds = ", ".join(f"{count} {kind}" for kind, count in failed["failure"].value_counts().items())
    return f"{said}; failed: {kinds}." if kinds else f"{said}."


def time_split(of: Shown) -> Iterator[Drawn]:
    """Where an iteration's time goes, per cell: computing, waiting for the busiest rank, exposed communication, the rest; in times
    of the fastest choice for the same problem.
    """
    parts = split(of.good)
    if parts is None:
        return
    best = best_of(of.good, ["problem"], TIME, "min")
    ratios = parts.div(best.loc[parts.index], axis=0)
    for group in groups(of, ["scale", "setting"]):
        rows = group.rows.loc[group.rows.index.intersection(parts.index)].sort_values(["seqlen", TIME])
        rows = rows.sort_values("what_mask", key=lambda masks: masks.map(in_order(group.rows, "what_mask").index), kind="stable")
        if rows.empty:
            continue
        left_out = max(0, len(rows) - MOST_BARS)
        if left_out:  # the longest sequences tell most
            rows = rows[rows["seqlen"] == rows["seqlen"].max()].head(MOST_BARS)
            left_out = len(group.rows) - len(rows)
        title = f"Where the time goes, {group.where}"
        figure, (axis,) = panels(1, title, of.source, size=(9.5, 0.4 + 0.24 * len(rows)))
        mine = ratios.loc[rows.index]
        if (mine["rest"] < NO_REST * mine.sum(axis=1)).all():
            mine = mine.drop(columns="rest")
        _stack(axis, rows, mine)
        legend(figure, dict(zip(mine, axis.containers, strict=True)))
        yield Drawn(f"time-split_{group.slug}", title, _said_of_parts(mine, left_out), _most_exposed(rows, mine), figure)


def _stack(axis: Axes, rows: pd.DataFrame, ratios: pd.DataFrame) -> None:
    """Bars one below the other, those of a problem together, with their time at their end."""
    places = np.arange(len(rows)) + 0.6 * np.cumsum(rows["problem"].ne(rows["problem"].shift()).to_numpy())
    ends = ratios.cumsum(axis=1)
    begin = np.zeros(len(rows))
    for part in ratios:
        end = np.minimum(ends[part].to_numpy(), LONGEST)
        axis.barh(places, end - begin, left=begin, height=0.8, color=PARTS[str(part)])
        begin = end
    most = float(begin.max())
    for place, end, seconds in zip(places, ends.iloc[:, -1], rows[TIME], strict=True):
        beyond = f" ({times(end)}, cut)" if end > LONGEST else ""
        axis.annotate(
            f"{duration(seconds)}{beyond}",
            (min(end, most), place),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=6,
            va="center",
        )
    texts = zip(rows["what_mask"], rows["seqlen"], rows["choice"], strict=True)
    axis.set_yticks(places, [f"{mask}  {format_tokens(int(seqlen))}  {choice}" for mask, seqlen, choice in texts], fontsize=7)
    axis.set_ylim(places[-1] + 0.6, places[0] - 0.6)
    axis.axvline(1.0, color="0.4", linewidth=0.8)
    axis.set_xlim(0, most * (1.3 if ends.iloc[:, -1].max() > LONGEST else 1.15))
    axis.set_xlabel("times the fastest choice's for the same problem", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)


def _said_of_parts(parts: pd.DataFrame, left_out: int) -> str:
    rest = " Rest: what lies between the phases." if "rest" in parts else ""
    return (
        "Computing: the schedule without its messages, as if the work were spread evenly. Imbalance: what the busiest rank has "
        f"more. Exposed communication: the whole minus the schedule without its messages, per phase.{rest} Line: the fastest time."
        + (f" Bars end at {times(LONGEST)}, what is beyond is cut." if (parts.sum(axis=1) > LONGEST).any() else "")
        + (f" {left_out} cells are not drawn." if left_out else "")
    )  # fmt: skip


def _most_exposed(rows: pd.DataFrame, parts: pd.DataFrame) -> str:
    shares = parts["exposed communication"] / parts.sum(axis=1)
    most, fastest = rows.loc[shares.idxmax()], rows.loc[rows[RATE].idxmax()]

    def named(row: pd.Series) -> str:
        return f"{row['choice']} with {row['what_mask']} {format_tokens(int(row['seqlen']))}"

    computing = percent(float(parts.loc[fastest.name, "computing"] / parts.loc[fastest.name].sum()), 0)
    exposed = percent(float(shares.max()), 0)
    ahead = f"Most exposed communication: {named(most)}, {exposed} of its time."
    return f"{ahead} Highest rate: {named(fastest)}, which computes {computing} of it."
