"""Panels of matplotlib as SVG within a page, without scripts: in the colours and letters of the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from lcbench.report.palette import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Found = TypeVar("Found")
INK = "#010203"  # of a page's text: what becomes currentColor
# What stands for the symbols of matplotlib in the key of a page.
GLYPHS = {
    "circle": "●", "square": "■", "diamond": "◆", "triangle": "▲", "star": "★", "cross": "✚", "times": "✖", "hexagon": "⬢",
}  # fmt: skip


def inked(styles: dict[str, Style]) -> dict[str, Style]:
    """Styles whose black is the text's colour of a page."""
    return {choice: replace(style, color=INK if style.color == "#000000" else style.color) for choice, style in styles.items()}


def key_of(name: str, style: Style) -> dict[str, str]:
    """What the key of a page shows of a style: ``name``, ``glyph``, ``color``, ``look``."""
    color = "currentColor" if style.color in ("#000000", INK) else style.color
    return {"name": name, "glyph": GLYPHS[style.marker], "color": color, "look": "hollow" if style.hollow else ""}


def svg_of(draw: Callable[[Axes], Found], salt: str, alt: str, size: tuple[float, float]) -> tuple[str, Found]:
    """A panel as SVG within HTML, with text as text; and what ``draw`` gives.

    Args:
        salt: of what its parts are called, so that no two figures of a page share a name.
        alt: what it shows, in words.
        size: inches.
    """
    import matplotlib
    from markupsafe import escape
    from matplotlib.figure import Figure

    ink: Any = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, **ink}):
        figure = Figure(figsize=size, layout="constrained")
        drawn = draw(figure.subplots())
        made = io.StringIO()
        figure.savefig(made, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = made.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="[a-zA-Z0-9]+_[0-9]+"', "", text)  # nothing refers to these, and all figures have them
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = text.replace(INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)
    return re.sub(r">\s+<", "><", text), drawn
