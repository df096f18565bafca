"""How a choice is drawn, the same in every figure of a report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lcbench.report.frame import APPROXIMATE, PREDICTED

if TYPE_CHECKING:
    import pandas as pd

# Okabe and Ito (2008): told apart with deuteranopia and protanopia too. The palest on white paper, yellow, is the last.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#f0e442")
# Names of Observable Plot, and the same of matplotlib.
MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle": "^", "star": "*", "cross": "P", "times": "X", "hexagon": "h",
}  # fmt: skip
# Lengths of strokes and gaps; none: a whole line. One more choice of it for every eight; five and eight have no common divisor, so
# 320 choices differ.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (3, 1))
FORETOLD = (2.0, 2.0)  # of predictions


@dataclass(frozen=True)
class Style:
    """``color``: as #rrggbb; ``marker``: a symbol's name (a key of ``MARKERS``); ``dash``: strokes and gaps in turn, in multiples
    of the line's width, empty for a whole line; ``hollow``: markers are open and bars hatched: a prediction.
    """

    color: str
    marker: str
    dash: tuple[float, ...]
    hollow: bool = False

    @property
    def matplotlib(self) -> dict[str, Any]:
        """As arguments of ``Axes.plot``."""
        open_ = {"markerfacecolor": "none", "markeredgecolor": self.color, "markeredgewidth": 1.0} if self.hollow else {}
        return {"color": self.color, "marker": MARKERS[self.marker], "linestyle": (0, self.dash) if self.dash else "-", **open_}

    @property
    def strokes(self) -> str:
        """As ``stroke-dasharray`` of SVG; empty for a whole line."""
        return " ".join(f"{length:g}" for length in self.dash)


def styles(frame: pd.DataFrame) -> dict[str, Style]:
    """The style of every choice of ``frame.reported``, in the order of the plan.

    Give it the whole frame, with failed and skipped cells: a style must not depend on what ran. Of more than eight choices colours
    repeat, with another marker and dash. What was predicted of a choice looks as what was measured of it, but dotted and hollow.
    """
    plain = {c: c.removesuffix(PREDICTED).replace(APPROXIMATE, "") for c in frame["choice"]} if len(frame) else {}
    numbers = {name: number for number, name in enumerate(dict.fromkeys(plain.values()))}
    made = {choice: style(numbers[name]) for choice, name in plain.items()}
    return {c: replace(s, dash=FORETOLD, hollow=True) if c.endswith(PREDICTED) else s for c, s in made.items()}


def style(number: int) -> Style:
    """Of the choice with this number."""
    round_, place = divmod(number, len(COLORS))
    markers = list(MARKERS)
    return Style(COLORS[place], markers[(place + round_) % len(markers)], DASHES[round_ % len(DASHES)])
