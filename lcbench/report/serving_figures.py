"""Figures of passes of a server: time of a new token, rate of the cache and bytes sent, against the context; as files and as SVG in
a page, which needs no script for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lcbench.problem import format_tokens
from lcbench.report.amounts import BYTES, SECONDS, duration, unit_for
from lcbench.report.drawing import Drawn, draw_line, grid, legend, mark_failures, tune
from lcbench.report.palette import Style
from lcbench.report.parts import Shown, slug
from lcbench.report.serving import WHERE, base_of, lines, on, served_rows, timed
from lcbench.report.svg import inked, key_of, svg_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

PANEL = (3.9, 2.7)  # inches
BASE = Style("#7f7f7f", "circle", (4.0, 2.0))


@dataclass(frozen=True)
class Panel:
    """The rows of one figure: ``rows`` with a time, those that ``failed``, ``base`` rows of the fewest GPUs, ``where`` in words."""

    rows: pd.DataFrame
    failed: pd.DataFrame
    base: list[dict[str, Any]]
    where: str
    name: str

    @property
    def contexts(self) -> list[int]:
        return sorted({*self.rows["context"], *self.failed["context"], *(row["context"] for row in self.base)})

    @property
    def cells(self) -> list[str]:
        return [*self.rows["cell"], *self.failed["cell"]]

    @property
    def plots(self) -> list[tuple[str, Callable[[Axes, Shown], dict[str, Any]]]]:
        """What is drawn of it, with its title."""
        found = [("Time of a new token", self._time)]
        reads = self.rows["kind"].iloc[0] != "prefill" and self.rows["gb_s"].notna().any()
        found += [("Cache read by a GPU", self._rate)] if reads else []
        return found + ([("Sent for a new token", self._sent)] if (self.rows["sent"] > 0).any() else [])

    @property
    def finding(self) -> str:
        at = self.rows["context"].max()
        there = min(self.rows[self.rows["context"] == at].to_dict("records"), key=lambda row: row["token"].value)
        return f"At {format_tokens(int(at))} {there['choice']} takes least time: {duration(there['token'].value)} a new token."

    def _time(self, axis: Axes, of: Shown) -> dict[str, Any]:
        times = [*self.rows["token"], *(row["token"] for row in self.base)]
        unit = unit_for(max(time.value for time in times), SECONDS)
        drawn: dict[str, Any] = {}
        for choice, line in lines(self.rows):
            values = line.assign(y=[time.value / unit.size for time in line["token"]])
            drawn[choice] = draw_line(axis, values["context"], values["y"], of.styles[choice], label=choice)
            low, high = ([end / unit.size for end in ends] for ends in zip(*((t.low, t.high) for t in line["token"]), strict=True))
            axis.vlines(line["context"], low, high, color=of.styles[choice].color, linewidth=1.0)
        if self.base:
            name = " or ".join(dict.fromkeys(on(row) for row in self.base))
            look = {**BASE.matplotlib, "markersize": 4.0, "linewidth": 1.1}
            drawn[name] = axis.plot(
                [row["context"] for row in self.base], [row["token"].value / unit.size for row in self.base], label=name, **look
            )[0]
        values = [time.value / unit.size for time in times]
        _ticks_apart(axis, min(values), max(values))
        self._tuned(axis, unit.name)
        mark_failures(axis, self.failed, "context", of.styles)
        return drawn

    def _rate(self, axis: Axes, of: Shown) -> dict[str, Any]:
        drawn = self._drawn(axis, of, "gb_s", 1.0)
        peak = self.rows["peak_gb_s"].max()
        if not math.isnan(peak):
            axis.axhline(peak, color="#b3261e", linestyle="--", linewidth=1)
            axis.annotate("memory's rate", (0.02, peak), xycoords=axis.get_yaxis_transform(), xytext=(0, -9),
                          textcoords="offset points", fontsize=7, color="#b3261e")  # fmt: skip
        axis.set_ylim(bottom=0)
        self._tuned(axis, "GB/s")
        return drawn

    def _sent(self, axis: Axes, of: Shown) -> dict[str, Any]:
        unit = unit_for(float(self.rows["sent"].max()), BYTES)
        drawn = self._drawn(axis, of, "sent", unit.size, above=0.0)
        sent = self.rows["sent"][self.rows["sent"] > 0] / unit.size
        _ticks_apart(axis, sent.min(), sent.max())
        self._tuned(axis, unit.name)
        return drawn

    def _drawn(self, axis: Axes, of: Shown, column: str, unit: float, above: float = -math.inf) -> dict[str, Any]:
        known = self.rows[self.rows[column] > above]
        return {
            choice: draw_line(axis, line["context"], line[column] / unit, of.styles[choice], label=choice)
            for choice, line in lines(known)
        }

    def _tuned(self, axis: Axes, unit: str) -> None:
        tune(axis, "seqlen", self.contexts, "", "context, tokens of a request", unit)


def _ticks_apart(axis: Axes, low: float, high: float) -> None:
    """A logarithmic axis that holds these values, whatever their intervals, with ticks that are read easily."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_yscale("log")
    axis.set_ylim(low / 1.6, high * 1.6)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=7))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e6 else f"{value:.0e}"))


def panels_of(of: Shown) -> Iterator[Panel]:
    """A panel for every mask, kind of batch and scale; what ran on the fewest GPUs alone is in all of the others."""
    rows = served_rows(of.cells, of.devices)
    if rows.empty:
        return
    for where, group in rows.groupby(WHERE, sort=False):
        around, mask, series = where
        small, base = base_of(timed(group))
        for scale, mine in group.groupby("scale", sort=False):
            shown, failed = mine[mine["token"].notna()], mine[mine["status"] == "failed"]
            if shown.empty or (scale == small and shown["choice"].nunique() < 2):
                continue
            words = [word for word in (series, mask, around, scale) if word]
            beside = [] if scale == small else list(base.values())
            yield Panel(shown, failed, beside, ", ".join(words), "_".join(["serving", *map(slug, words)]))


def serving_lines(of: Shown) -> Iterator[Drawn]:
    """Of passes of a server: what a new token takes, how fast the cache is read, what is sent; a figure per panel."""
    for panel in panels_of(of):
        plots, title = panel.plots, f"Serving: {panel.where}"
        figure, axes = grid(1, len(plots), title, of.source, PANEL)
        drawn: dict[str, Any] = {}
        for axis, (name, draw) in zip(axes[0], plots, strict=True):
            drawn |= draw(axis, of)
            axis.set_title(name, fontsize=9)
        legend(figure, drawn)
        yield Drawn(panel.name, title, caption_of(panel), panel.finding, figure)


def caption_of(panel: Panel) -> str:
    """How to read it."""
    base = " Grey: on the fewest GPUs." if panel.base else ""
    foretold = " Dotted and hollow: predicted, not measured." if (panel.rows["status"] == "predicted").any() else ""
    failed = " A cross at the bottom is a failed cell, with the class of its failure." if len(panel.failed) else ""
    return (
        "Forward of one attention call over its new tokens, with its 95 % interval. Cache: bytes that the busiest rank has to "
        f"read, over that time. Sent: by the rank that sends most; who sends nothing has no line.{base}{foretold}{failed}"
    )


# -- in a page -----------------------------------------------------------------------------------------------------------


def page_panels(of: Shown) -> Iterator[dict[str, Any]]:
    """For a page, of each panel: ``where``, ``cells`` (ids), ``key`` (name, glyph, color, look), ``caption`` and ``figures``
    (title, svg, words below it).
    """
    here = replace(of, styles=inked(of.styles))
    for panel in panels_of(of):
        names: dict[str, Any] = {}
        figures = []
        for title, draw in panel.plots:
            alt = f"{title}: {panel.where}. {panel.finding}"
            svg, drawn = svg_of(partial(_on, draw, here), f"{panel.name} {title}", alt, PANEL)
            names |= drawn
            figures.append({"title": title, "svg": svg, "words": ""})
        key = [key_of(name, of.styles.get(name, BASE)) for name in names]
        yield {"where": panel.where, "cells": panel.cells, "key": key, "caption": caption_of(panel), "figures": figures}


def _on(draw: Callable[[Axes, Shown], dict[str, Any]], of: Shown, axis: Axes) -> dict[str, Any]:
    return draw(axis, of)
