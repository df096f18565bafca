"""Figures of attention that chooses its mask: recall against density, what a pass goes to, and what strategies send."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from lcbench.report.amounts import BYTES, SECONDS, duration, percent, size, times, unit_for
from lcbench.report.batches import known, words_of
from lcbench.report.frame import APPROXIMATE
from lcbench.report.palette import COLORS, MARKERS, Style, style
from lcbench.report.panel import Panel
from lcbench.report.parts import Shown, in_order
from lcbench.report.sparse import DENSE, DENSITY, Selection, contests, seconds_of, selections, sparse_rows
from lcbench.report.svg import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, TALL, BAR = 5.2, 3.2, 0.2  # inches: of a panel, and of a bar in it
PARTS = {"select": COLORS[1], "plan": COLORS[4], "attention": COLORS[0]}
FULL = "full attention"
POSSIBLE = "best possible"
OTHERS = {POSSIBLE: Style("#888888", "cross", ())}
SPLIT = {**{part: Style(color, "square", ()) for part, color in PARTS.items()}, FULL: Style(INK, "square", ())}
MOST_BARS = 36  # of a figure: the fastest; the rest are in the table

RECALLED = (
    "Share of the softmax's mass that is kept, mean over heads, against the pairs that are kept. A vertical line goes from the "
    f"head that keeps least to the one that keeps most. Grey: {POSSIBLE} with as many blocks of each block of queries."
)
SPENT = (
    "What a pass goes to. A black line: full attention of the whole mask by the same strategy and kernel. Every pass here chooses "
    "and plans; where several steps may share a choice, the table has the mean step. Choices that keep less than all are "
    "approximate: the table has their distance. Hatched: predicted."
)
MOVED = (
    "Bytes of the rank that sends most in a pass, to choose and to compute, against the pairs that are kept: a mark for every "
    "cell. In the table is how even the ranks' work is."
)


def figures_of(of: Shown) -> Iterator[Panel]:
    """Of every problem in the cells that choose their mask."""
    rows = sparse_rows(of.cells)
    selectors = {name: style(number) for number, name in enumerate(in_order(rows, "selector"))} if len(rows) else {}
    strategies = {name: style(number) for number, name in enumerate(in_order(rows, "what_cp"))} if len(rows) else {}
    for problem, mine in contests(rows):
        where = words_of(problem)
        if found := selections(mine):
            cells = [cell for one in found for cell in one.cells]
            yield Panel(
                "recall", "Recall against density", where, RECALLED, recalled(found), (WIDTH, TALL),
                partial(recall, found=found), {**selectors, **OTHERS}, cells,
            )  # fmt: skip
        bars = sorted((row for row in mine.to_dict("records") if seconds_of(row)), key=lambda row: sum(seconds_of(row).values()))
        if bars:
            more = f" The {MOST_BARS} fastest are drawn." if len(bars) > MOST_BARS else ""
            bars = bars[:MOST_BARS]
            yield Panel(
                "selecting", "What a pass goes to", where, SPENT + more, spent(bars), (WIDTH + 1.2, 0.7 + BAR * len(bars)),
                partial(split, rows=bars), SPLIT, [str(row["cell"]) for row in bars],
            )  # fmt: skip
        moved = [row for row in mine.to_dict("records") if known(row, "comm/bytes") and known(row, DENSITY) is not None]
        if moved:
            yield Panel(
                "critical", "Bytes against density", where, MOVED, sent(moved), (WIDTH, TALL),
                partial(bytes_, rows=moved), strategies, [str(row["cell"]) for row in moved],
            )  # fmt: skip


# -- recall --------------------------------------------------------------------------------------------------------------


def recall(axis: Axes, styles: dict[str, Style], found: list[Selection]) -> dict[str, Any]:
    """Lines of selectors over the densities that they reached; gives what is drawn, by name."""
    drawn: dict[str, Any] = {}
    possible = sorted((one.density, one.best) for one in found)
    look: dict[str, Any] = {**styles[POSSIBLE].matplotlib, "linestyle": "none", "markersize": 4}
    drawn[POSSIBLE] = axis.plot(*([100 * pair[at] for pair in possible] for at in (0, 1)), label=POSSIBLE, **look)[0]
    for name, its in _by_selector(found).items():
        x, y = ([100 * getattr(one, of) for one in its] for of in ("density", "recall"))
        axis.vlines(x, [100 * one.least for one in its], [100 * one.most for one in its], color=styles[name].color, alpha=0.35)
        drawn[name] = axis.plot(x, y, label=name, markersize=5, linewidth=1.2, **styles[name].matplotlib)[0]
    axis.set_xlim(left=0)
    axis.set_ylim(0, 104)
    named(axis, "pairs that are kept, % of the mask's", "mass that is kept, %")
    return drawn


def recalled(found: list[Selection]) -> str:
    """What ``recall`` shows, in words."""
    said = []
    for name, its in _by_selector(found).items():
        said.append(
            f"{name} {', '.join(f'{percent(one.recall)} of the mass at {percent(one.density)} of the pairs' for one in its)}"
        )
    return f"{'; '.join(said)}."


def _by_selector(found: list[Selection]) -> dict[str, list[Selection]]:
    names = dict.fromkeys(one.selector for one in found)
    return {name: sorted((one for one in found if one.selector == name), key=lambda one: one.density) for name in names}


# -- time ----------------------------------------------------------------------------------------------------------------


def split(axis: Axes, styles: dict[str, Style], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A bar for each row, of what a pass goes to; gives what is drawn, by part."""
    drawn: dict[str, Any] = {}
    fulls = [full for row in rows if (full := known(row, DENSE))]
    totals = [sum(seconds_of(row).values()) for row in rows]
    longest = max([*totals, *fulls])
    unit = unit_for(longest, SECONDS)
    for place, (row, total) in enumerate(zip(rows, totals, strict=True)):
        left = 0.0
        for part, seconds in seconds_of(row).items():
            color = styles[part].color
            hatched = {"facecolor": "none", "edgecolor": color, "hatch": "////"}
            look: dict[str, Any] = hatched if row["status"] == "predicted" else {"color": color}
            drawn[part] = axis.barh(place, seconds / unit.size, left=left, height=0.66, label=part, **look)
            left += seconds / unit.size
        if full := known(row, DENSE):
            drawn[FULL] = axis.vlines(
                full / unit.size, place - 0.45, place + 0.45, color=styles[FULL].color, linewidth=1.6, label=FULL
            )
        ends = max(left, (known(row, DENSE) or 0.0) / unit.size)
        text = f"{duration(total)}{'' if not full else f', {times(full / total)}'}"
        axis.annotate(text, (ends, place), xytext=(5, 0), textcoords="offset points", fontsize=6, va="center")
    axis.set_yticks(range(len(rows)), [f"{_plain(row['what_cp'])}, {row['by']}" for row in rows], fontsize=6)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, 1.3 * longest / unit.size)
    named(axis, f"time of a pass, {unit.name}", "")
    axis.tick_params(axis="y", labelsize=6)
    return drawn


def _plain(strategy: str) -> str:
    return strategy.removesuffix(APPROXIMATE)


def spent(rows: list[dict[str, Any]]) -> str:
    """What ``split`` shows, in words."""
    first, last = rows[0], rows[-1]
    said = f"From {first['choice']}, {duration(sum(seconds_of(first).values()))}, to {last['choice']}"
    said += f", {duration(sum(seconds_of(last).values()))}"
    full = [(sum(seconds_of(row).values()), dense) for row in rows if (dense := known(row, DENSE))]
    if not full:
        return f"{said}."
    return f"{said}; {sum(total < dense for total, dense in full)} of {len(full)} take less than full attention."


# -- bytes ---------------------------------------------------------------------------------------------------------------


def bytes_(axis: Axes, styles: dict[str, Style], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A mark for each row; gives what is drawn, by strategy."""
    drawn: dict[str, Any] = {}
    unit = unit_for(max(float(row["comm/bytes"]) for row in rows), BYTES)
    for number, (name, its) in enumerate((strategies := _by_strategy(rows)).items()):
        x, y = [100 * float(row[DENSITY]) for row in its], [float(row["comm/bytes"]) / unit.size for row in its]
        look: dict[str, Any] = {
            "linestyle": "none",
            "marker": MARKERS[styles[name].marker],
            "color": styles[name].color,
            "markersize": 2 + 3 * (len(strategies) - number),
        }
        drawn[name] = axis.plot(x, y, label=name, **look)[0]
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    named(axis, "pairs that are kept, % of the mask's", f"sent by the rank that sends most, {unit.name}")
    return drawn


def sent(rows: list[dict[str, Any]]) -> str:
    """What ``bytes_`` shows, in words."""
    said = []
    for name, its in _by_strategy(rows).items():
        least, most = (of(float(row["comm/bytes"]) for row in its) for of in (min, max))
        uneven = [value for row in its if (value := known(row, "balance/area_max_over_mean"))]
        even = f", the busiest rank has up to {times(max(uneven))} the mean of pairs" if uneven else ""
        said.append(f"{name} sends {size(least)}{'' if least == most else f' to {size(most)}'}{even}")
    return f"{'; '.join(said)}."


def _by_strategy(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    names = dict.fromkeys(str(row["what_cp"]) for row in rows)
    return {name: [row for row in rows if row["what_cp"] == name] for name in names}


def named(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
