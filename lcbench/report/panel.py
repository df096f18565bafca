"""A figure of one panel that is drawn twice: as a file, and as SVG in a page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lcbench.report.drawing import Drawn, legend, panels
from lcbench.report.palette import Style
from lcbench.report.parts import slug
from lcbench.report.svg import inked, key_of, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes", dict[str, Style]], dict[str, Any]]


@dataclass(frozen=True)
class Panel:
    """A figure.

    Attributes:
        kind: the first part of its files' names.
        title, where: what of, and of which problem.
        caption: how to read it; ``finding``: what it shows, in words.
        size: inches.
        draw: on an axis in these styles; gives what the key names.
        styles: by name.
        cells: ids of the cells that it is made of.
    """

    kind: str
    title: str
    where: str
    caption: str
    finding: str
    size: tuple[float, float]
    draw: Draw
    styles: dict[str, Style]
    cells: list[str]


def _drawn(one: Panel, styles: dict[str, Style], axis: Axes) -> dict[str, Any]:
    return one.draw(axis, styles)


def as_files(given: Iterable[Panel], source: str) -> Iterator[Drawn]:
    """Each as a figure of its own."""
    for one in given:
        title = f"{one.title}: {one.where}"
        figure, axes = panels(1, title, source, size=one.size)
        legend(figure, one.draw(axes[0], one.styles))
        yield Drawn("_".join([one.kind, *map(slug, one.where.split(", "))]), title, one.caption, one.finding, figure)


def in_page(given: Iterable[Panel]) -> Iterator[dict[str, Any]]:
    """For a page, of those behind one another that have one problem and one key: ``where``, ``cells`` (ids), ``key`` (name, glyph,
    color, look), ``caption`` and ``figures`` (title, svg, words).
    """
    for (where, _), beside in itertools.groupby(given, key=lambda one: (one.where, tuple(one.styles))):
        its = list(beside)
        styles = inked(its[0].styles)
        drawn = [svg_of(partial(_drawn, one, styles), f"{one.kind} {where}", f"{where}. {one.finding}", one.size) for one in its]
        names = dict.fromkeys(name for _, named in drawn for name in named)
        yield {
            "where": f"{its[0].title}: {where}" if len(its) == 1 else where,
            "cells": list(dict.fromkeys(cell for one in its for cell in one.cells)),
            "caption": " ".join(one.caption for one in its),
            "key": [key_of(name, styles[name]) for name in names],
            "figures": [
                {"title": one.title if len(its) > 1 else "", "svg": svg, "words": one.finding}
                for one, (svg, _) in zip(its, drawn, strict=True)
            ],
        }  # fmt: skip
