"""Figures of batches of documents: makespan by planner, gain over one degree by length distribution, and a batch rank by rank; as
files and as SVG in a page, which needs no script for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lcbench.problem import format_tokens
from lcbench.report import batches
from lcbench.report.amounts import SECONDS, duration, more, unit_for
from lcbench.report.batches import BASE, Box, Gain, Picture, batch_rows, contests, known, words_of
from lcbench.report.drawing import Drawn, grid, legend, panels
from lcbench.report.palette import COLORS, MARKERS
from lcbench.report.parts import Shown, slug
from lcbench.report.svg import inked, key_of, svg_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

WIDTH, BAR, ROW = 5.2, 0.24, 0.19  # inches: of a panel, of a bar in it, and of a rank
PLANNING = "#999999"
MOST_RANKS = 32  # that a picture shows; of more every n-th
MOST_BATCHES = 6  # of which there are pictures
FILLS = COLORS[:6]  # of sub-groups; black is text
FORWARD = 0.55  # how opaque forward is
ROOM = 0.035  # share of the width that a number needs


# -- makespan ------------------------------------------------------------------------------------------------------------


def makespans(of: Shown) -> Iterator[Drawn]:
    """The time of a batch by choice, with planning behind it: a figure per batch."""
    for problem, rows in contests(batch_rows(of.cells)):
        where = words_of(problem)
        title = f"A batch of documents: {where}"
        figure, axes = panels(1, title, of.source, size=(WIDTH + 2, 0.6 + BAR * len(rows)))
        bars(axes[0], rows, of)
        yield Drawn(_name("makespan", where), title, MAKESPAN, finding(rows), figure)


MAKESPAN = (
    "Time from the first rank's begin to the last rank's end, with its 95 % interval. Grey: planning, which is in the time "
    "only where nothing is planned while a batch runs. Hatched: predicted, not measured."
)


def bars(axis: Axes, rows: pd.DataFrame, of: Shown) -> None:
    """A bar per choice, the shortest on top."""
    its = sorted(rows.to_dict("records"), key=lambda row: row["makespan"].value)
    best = min((row for row in its if row["good"]), key=lambda row: row["makespan"].value, default=its[0])["makespan"].value
    unit = unit_for(max(row["makespan"].value for row in its), SECONDS)
    planning = [(known(row, "plan/seconds") or 0.0) / unit.size for row in its]
    # An interval or a planning time that is far longer than all makespans is cut.
    times = [(row["makespan"].value / unit.size, row["makespan"].high / unit.size) for row in its]
    ends = [max(high, value + plan) for (value, high), plan in zip(times, planning, strict=True)]
    most = 1.4 * min(max(ends), 4 * max(value for value, _ in times))
    for place, (row, plan) in enumerate(zip(its, planning, strict=True)):
        time, style = row["makespan"], of.styles[row["choice"]]
        look: dict[str, Any] = (
            {"facecolor": "none", "edgecolor": style.color, "hatch": "////"} if style.hollow else {"color": style.color}
        )
        value, low, high = (seconds / unit.size for seconds in (time.value, time.low, time.high))
        axis.barh(place, value, height=0.62, label=row["choice"], **look)
        axis.barh(place, plan, left=value, height=0.28, color=PLANNING)
        axis.hlines(place, low, high, color="#555555", linewidth=1.2)
        text = unit.of(time.value) if time.value == best else f"{unit.of(time.value)}  {more(time.value / best)}"
        at = (min(ends[place], 0.74 * most), place)
        axis.annotate(text, at, xytext=(5, 0), textcoords="offset points", fontsize=7, va="center")
    axis.set_yticks(range(len(its)), [row["choice"] for row in its], fontsize=7)
    axis.set_ylim(len(its) - 0.4, -0.6)
    axis.set_xlim(0, most)
    axis.set_xlabel(f"makespan, {unit.name}", fontsize=8)
    axis.tick_params(labelsize=7)


def finding(rows: pd.DataFrame) -> str:
    """What bars show, in words."""
    its = sorted(rows.to_dict("records"), key=lambda row: row["makespan"].value)
    said = [f"{row['choice']} {duration(row['makespan'].value)}" for row in its]
    return f"From the shortest to the longest: {', '.join(said)}."


# -- gain ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Gains of one figure: of one length of the batch, scale and setting, over length distributions. ``where``: that in words."""

    gains: list[Gain]
    where: str

    @property
    def distributions(self) -> list[str]:
        return list(dict.fromkeys(str(gain.problem["what_mask"]) for gain in self.gains))

    @property
    def choices(self) -> list[str]:
        return list(dict.fromkeys(gain.choice for gain in self.gains))

    @property
    def size(self) -> tuple[float, float]:
        return WIDTH + 1, 0.8 + 0.13 * len(self.gains) + 0.15 * len(self.distributions)

    @property
    def finding(self) -> str:
        said = []
        for name in self.distributions:
            best = max((g for g in self.gains if g.problem["what_mask"] == name), key=lambda gain: gain.ratio.value)
            said.append(f"{name}: {best.choice} most, {more(best.ratio.value)}")
        return f"Sooner done than with {BASE}: {'; '.join(said)}."


GAIN = (
    f"The time of {BASE} over that of each planner, with its 95 % interval: right of the line the planner is sooner done. Measured "
    "against measured, predicted (hollow, dotted) against predicted; an interval of predictions takes their errors for independent."
)


def compared(rows: pd.DataFrame) -> Iterator[Compared]:
    """Of ``batch_rows``."""
    found: dict[tuple[Any, ...], list[Gain]] = {}
    for gain in batches.gains(rows):
        found.setdefault(tuple(gain.problem[key] for key in ("seqlen", "scale", "where")), []).append(gain)
    for (seqlen, scale, where), its in found.items():
        yield Compared(its, ", ".join(filter(None, [format_tokens(int(seqlen)), str(scale), str(where)])))


def gains_by_lengths(of: Shown) -> Iterator[Drawn]:
    """How much sooner a batch is done than with one degree for all documents, by length distribution."""
    for one in compared(batch_rows(of.cells)):
        title = f"Gain over {BASE}: {one.where}"
        figure, axes = grid(1, 1, title, of.source, one.size)
        legend(figure, gain_lines(axes[0][0], one, of))
        yield Drawn(_name("gain", one.where), title, GAIN, one.finding, figure)


def gain_lines(axis: Axes, one: Compared, of: Shown) -> dict[str, Any]:
    """A mark with its interval per distribution and choice; gives what is drawn, by choice."""
    drawn: dict[str, Any] = {}
    for gain in one.gains:
        style, ratio = of.styles[gain.choice], gain.ratio
        beside = (one.choices.index(gain.choice) - (len(one.choices) - 1) / 2) * 0.8 / len(one.choices)
        place = one.distributions.index(str(gain.problem["what_mask"])) + beside
        value, low, high = (100 * (number - 1) for number in (ratio.value, ratio.low, ratio.high))
        axis.hlines(place, low, high, color=style.color, linewidth=1.2, linestyle=":" if style.hollow else "-")
        face = "none" if style.hollow else style.color
        drawn[gain.choice] = axis.plot(
            [value], [place], linestyle="none", marker=MARKERS[style.marker], color=style.color, markerfacecolor=face, markersize=5,
            label=gain.choice,
        )[0]  # fmt: skip
    values = [100 * (gain.ratio.value - 1) for gain in one.gains]
    ends = [100 * (end - 1) for gain in one.gains for end in (gain.ratio.low, gain.ratio.high)]
    # Intervals that are far wider than what is between the values would leave nothing to see.
    reach = max(3.0, 3 * max(map(abs, values)))
    axis.set_xlim(1.1 * max(min(*ends, 0.0), -reach) - 1, 1.1 * min(max(*ends, 0.0), reach) + 1)
    axis.axvline(0, color="#888888", linewidth=0.9)
    axis.set_yticks(range(len(one.distributions)), one.distributions, fontsize=7)
    axis.set_ylim(len(one.distributions) - 0.5, -0.5)
    axis.set_xlabel(f"sooner done than with {BASE}, %", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(axis="x", alpha=0.25)
    return drawn


# -- a batch, rank by rank -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictured:
    """Pictures of one batch by choice: what was measured, then what was predicted of it. ``cells``: their ids."""

    where: str
    pictures: list[tuple[str, Picture]]
    cells: list[str]

    @property
    def end(self) -> float:
        """Seconds that all panels show: those of one batch share an axis."""
        return max(picture.end for _, picture in self.pictures)


GANTT = (
    "A row per rank. A colour is a sub-group, with its number of ranks where there is room; pale is forward, full is backward, "
    "blank: the rank is in no micro-batch. Hatched: a sub-group with a document that is longer than an even share of a rank. "
    "All panels have one axis of time."
)


def pictured(rows: pd.DataFrame) -> Iterator[Pictured]:
    """Of the first ``MOST_BATCHES`` batches in ``batch_rows`` of which there are pictures."""
    left = MOST_BATCHES
    for problem, its in contests(rows):
        both = [(row, picture) for row in its.to_dict("records") for picture in batches.pictures_of(row)]
        if both and left:
            left -= 1
            named = [(_titled(row, picture), picture) for row, picture in both]
            yield Pictured(words_of(problem), named, [str(row["cell"]) for row, _ in both])


def _titled(row: dict[str, Any], picture: Picture) -> str:
    return f"{row['choice']}, predicted" if picture.foretold and not row["foretold"] else str(row["choice"])


def gantts(of: Shown) -> Iterator[Drawn]:
    """When each rank was at work on which documents, by choice: a figure per batch."""
    for one in pictured(batch_rows(of.cells)):
        title = f"Rank by rank: {one.where}"
        tall = max(height(picture) for _, picture in one.pictures)
        figure, axes = panels(len(one.pictures), title, of.source, size=(WIDTH, tall), across=2)
        for axis, (name, picture) in zip(axes, one.pictures, strict=True):
            gantt(axis, picture, one.end)
            axis.set_title(name, fontsize=9)
        said = [f"{name}: {picture.words}." for name, picture in one.pictures]
        yield Drawn(_name("gantt", one.where), title, GANTT, " ".join(said), figure)


def height(picture: Picture) -> float:
    """Of its panel, in inches."""
    return 0.7 + ROW * min(picture.ranks, MOST_RANKS)


def gantt(axis: Axes, picture: Picture, end: float) -> None:
    """A picture on an axis of time up to ``end`` seconds."""
    stride = -(-picture.ranks // MOST_RANKS)
    shown = range(0, picture.ranks, stride)
    place_of = {rank: place for place, rank in enumerate(shown)}
    unit = unit_for(end, SECONDS)
    for box in picture.boxes:
        color = FILLS[box.number % len(FILLS)]
        hatch = "////" if box.long else None
        for rank in box.spans.keys() & place_of.keys():
            begin, forward, last = (seconds / unit.size for seconds in box.spans[rank])
            look: dict[str, Any] = {"height": 0.86, "color": color, "hatch": hatch, "edgecolor": "#ffffff", "linewidth": 0.3}
            axis.barh(place_of[rank], forward - begin, left=begin, **{**look, "alpha": FORWARD})
            axis.barh(place_of[rank], last - forward, left=forward, **look)
        _degree(axis, box, place_of, end, unit.size)
    axis.set_yticks(range(len(shown)), [str(rank) for rank in shown], fontsize=6)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlim(0, 1.01 * end / unit.size)
    axis.set_xlabel(f"time, {unit.name}", fontsize=8)
    axis.set_ylabel("rank" if stride == 1 else f"every {stride}th rank", fontsize=8)
    axis.tick_params(labelsize=6)


def _degree(axis: Axes, box: Box, place_of: dict[int, int], end: float, unit: float) -> None:
    """How many ranks a sub-group has, in the middle of the stretch of its ranks that are drawn, where there is room."""
    drawn = sorted(rank for rank in box.spans if rank in place_of)
    if not drawn:
        return
    rank = drawn[len(drawn) // 2]
    begin, _, last = box.spans[rank]
    if (last - begin) / end >= ROOM:
        at = ((begin + last) / 2 / unit, place_of[rank])
        patch = {"boxstyle": "round,pad=0.15", "facecolor": "#ffffff", "edgecolor": "none", "alpha": 0.8}
        axis.annotate(str(box.degree), at, fontsize=6, ha="center", va="center", color="#111111", bbox=patch)


# -- in a page -----------------------------------------------------------------------------------------------------------


def page_figures(of: Shown) -> Iterator[dict[str, Any]]:
    """For a page, of each group of figures: ``where``, ``cells`` (ids), ``key`` (name, glyph, color, look), ``caption`` and
    ``figures`` (title, svg, words).
    """
    here, rows = replace(of, styles=inked(of.styles)), batch_rows(of.cells)
    for problem, its in contests(rows):
        where = words_of(problem)
        svg, _ = svg_of(
            partial(bars, rows=its, of=here), f"makespan {where}", f"{where}. {finding(its)}", (WIDTH, 0.6 + BAR * len(its))
        )
        yield _figure(f"Makespan: {where}", [*its["cell"]], [], MAKESPAN, [{"title": "", "svg": svg, "words": ""}])
    for one in compared(rows):
        svg, names = svg_of(partial(gain_lines, one=one, of=here), f"gain {one.where}", f"{one.where}. {one.finding}", one.size)
        key = [key_of(name, here.styles[name]) for name in names]
        cells = [cell for gain in one.gains for cell in gain.cells]
        yield _figure(
            f"Gain over {BASE}, by documents: {one.where}", cells, key, GAIN, [{"title": "", "svg": svg, "words": one.finding}]
        )
    for batch in pictured(rows):
        figures = []
        for name, picture in batch.pictures:
            alt = f"{name}: {picture.words}."
            svg, _ = svg_of(partial(gantt, picture=picture, end=batch.end), f"{name} {batch.where}", alt, (WIDTH, height(picture)))
            figures.append({"title": name, "svg": svg, "words": f"{picture.words}."})
        yield _figure(f"Rank by rank: {batch.where}", batch.cells, [], GANTT, figures)


def _figure(where: str, cells: list[str], key: list[dict[str, str]], caption: str, figures: list[dict[str, str]]) -> dict[str, Any]:
    return {"where": where, "cells": list(dict.fromkeys(cells)), "key": key, "caption": caption, "figures": figures}


def _name(kind: str, where: str) -> str:
    """Of a figure's files."""
    return "_".join([kind, *map(slug, where.split(", "))])
