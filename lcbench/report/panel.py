"""A figure of one panel that is drawn twice: as a file, and as SVG in a page."""

from __future__ import annotations

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
    """For a page, of each: ``where``, ``cells`` (ids), ``key`` (name, glyph, color, look), ``caption`` and ``figures``."""
    for one in given:
        styles = inked(one.styles)
        svg, names = svg_of(partial(_drawn, one, styles), f"{one.kind} {one.where}", f"{one.where}. {one.finding}", one.size)
        yield {
            "where": f"{one.title}: {one.where}", "cells": list(dict.fromkeys(one.cells)), "caption": one.caption,
            "key": [key_of(name, styles[name]) for name in names],
            "figures": [{"title": "", "svg": svg, "words": one.finding}],
        }  # fmt: skip
