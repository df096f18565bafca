"""Figures of linear attention: tokens per second and bytes by strategy, over length and over GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lcbench.problem import format_tokens
from lcbench.report.amounts import digits, size
from lcbench.report.drawing import draw_line, tune
from lcbench.report.linear import RATE, SENT, bytes_in_words, growths, linear_rows
from lcbench.report.palette import Style
from lcbench.report.panel import Panel
from lcbench.report.parts import Shown, in_order

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SIZE = (5.2, 3.2)  # inches
RATES = (
    "Tokens of the whole sequence over the time of a pass and the number of GPUs, with 95 % intervals. Hollow, dotted: predicted."
)
VOLUMES = (
    "Bytes of the rank that sends most in a pass. A state has key/value heads x dim of keys x dim of values numbers. In a phase "
    "lasp and zeco send it once, lasp2 to each other rank with what a rank's tokens do to a state; ulysses sends tokens."
)


@dataclass(frozen=True)
class Line:
    """What a figure goes along: ``column`` of the frame, ``label`` of its axis, ``kind`` in the names of files."""

    column: str
    label: str
    kind: str


LENGTH, GPUS = Line("seqlen", "tokens in all", "length"), Line("world_size", "GPUs", "gpus")


def figures_of(of: Shown) -> Iterator[Panel]:
    """Of every problem on one scale over lengths, and at one number of tokens per GPU over GPUs."""
    rows = linear_rows(of.cells)
    for (where, scale), mine in rows.groupby(["where", "scale"], sort=False) if len(rows) else ():
        yield from _along(LENGTH, mine, f"{where}, {scale}", of)
    for (where, tokens), mine in rows.groupby(["where", "tokens_per_rank"], sort=False) if len(rows) else ():
        yield from _along(GPUS, mine, f"{where}, {format_tokens(int(tokens))} per GPU", of)


def _along(line: Line, rows: pd.DataFrame, where: str, of: Shown) -> Iterator[Panel]:
    if rows[line.column].nunique() < 2:
        return
    over = "length" if line is LENGTH else "GPUs"
    cells = [*rows["cell"].astype(str)]
    yield Panel(
        f"tokens-by-{line.kind}", f"Tokens per second over {over}", where, RATES, fastest(rows, line), SIZE,
        partial(rates, rows=rows, line=line), of.styles, cells,
    )  # fmt: skip
    sent = rows[rows[SENT] > 0] if SENT in rows else rows.iloc[:0]
    if sent[line.column].nunique() > 1:
        words = bytes_in_words(grown) if line is LENGTH and (grown := growths(sent)) else volumes_in_words(sent, line)
        yield Panel(
            f"states-by-{line.kind}", f"Bytes over {over}", where, VOLUMES, words, SIZE,
            partial(volumes, rows=sent, line=line), of.styles, [*sent["cell"].astype(str)],
        )  # fmt: skip


def rates(axis: Axes, styles: dict[str, Style], rows: pd.DataFrame, line: Line) -> dict[str, Any]:
    """Tokens per second and GPU, a line for each choice; gives what is drawn, by choice."""
    drawn: dict[str, Any] = {}
    for choice, its in _lines(rows, line):
        drawn[choice] = draw_line(axis, its[line.column], its[RATE], styles[choice], label=choice)
        ends = [(rate * t.value / t.high, rate * t.value / t.low) for rate, t in zip(its[RATE], its["timed/total"], strict=True)]
        axis.vlines(its[line.column], *zip(*ends, strict=True), color=styles[choice].color, linewidth=1.0)
    tune(axis, line.column, sorted(rows[line.column].unique()), "", line.label, "tokens/s per GPU")
    axis.yaxis.set_major_formatter(lambda value, _: digits(value))
    # Intervals that are far wider than what is between the lines would leave nothing to see.
    axis.set_ylim(0, 1.4 * float(rows[RATE].max()))
    return drawn


def volumes(axis: Axes, styles: dict[str, Style], rows: pd.DataFrame, line: Line) -> dict[str, Any]:
    """Bytes that are sent, a line for each choice; gives what is drawn, by choice."""
    drawn = {
        choice: draw_line(axis, its[line.column], its[SENT], styles[choice], label=choice) for choice, its in _lines(rows, line)
    }
    tune(axis, line.column, sorted(rows[line.column].unique()), "", line.label, "sent by the rank that sends most")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: size(value))
    return drawn


def fastest(rows: pd.DataFrame, line: Line) -> str:
    """What ``rates`` shows, in words: each choice at both ends."""
    return f"Tokens/s per GPU: {'; '.join(_ends(rows, line, RATE, digits))}."


def volumes_in_words(rows: pd.DataFrame, line: Line) -> str:
    """What ``volumes`` shows, in words: each choice at both ends."""
    return f"Sent: {'; '.join(_ends(rows, line, SENT, size))}."


def _ends(rows: pd.DataFrame, line: Line, column: str, form: Any) -> Iterator[str]:
    for choice, its in _lines(rows, line):
        values = [f"{form(its[column].iloc[at])} at {_place(its[line.column].iloc[at], line)}" for at in (0, -1)]
        yield f"{choice} {', '.join(dict.fromkeys(values))}"


def _place(value: int, line: Line) -> str:
    return format_tokens(int(value)) if line is LENGTH else f"{value} GPUs"


def _lines(rows: pd.DataFrame, line: Line) -> Iterator[tuple[str, pd.DataFrame]]:
    """Of each choice its rows by increasing place, in the order of the plan."""
    for choice in in_order(rows, "choice"):
        yield choice, rows[rows["choice"] == choice].sort_values(line.column)
