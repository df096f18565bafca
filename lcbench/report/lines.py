"""Figures with a line per choice: rates by length and by GPUs, scaling efficiency, memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcbench.measure.peak import entry_of
from lcbench.problem import format_tokens
from lcbench.report import published
from lcbench.report.amounts import percent, size, times
from lcbench.report.drawing import (
    ACROSS,
    CROSS,
    GREY,
    Drawn,
    dodged,
    draw_line,
    grid,
    legend,
    mark_failures,
    panels,
    relative_axis,
    said_of,
    said_of_failures,
    share_y,
    tune,
    used,
    with_gaps,
)
from lcbench.report.frame import PHASES, best_of, exact_rows, rate_column
from lcbench.report.palette import MARKERS
from lcbench.report.parts import (
    PEAK,
    RATE,
    SAME,
    TIME,
    Group,
    Shown,
    alike,
    efficiency_of,
    fastest_choices,
    groups,
    in_order,
    scalings,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Lines = dict[tuple[str, str], "pd.DataFrame"]  # rows of every mask and choice, by increasing x
AXIS = {"seqlen": "sequence length", "world_size": "GPUs"}
GIB = 2**30
# A device's memory is drawn beside peaks of at least this share of it, and where it was not enough.
NEAR_FULL = 1 / 16


def rate_by_length(of: Shown) -> Iterator[Drawn]:
    """TFLOP/s per GPU against sequence length, and below as a share of the best choice's: a panel per mask; a figure per scale."""
    for group in _by_length(of):
        yield _rates(of, group, "seqlen", f"rate-by-length_{group.slug}", f"TFLOP/s per GPU by sequence length, {group.where}")


def rate_by_gpus(of: Shown) -> Iterator[Drawn]:
    """The same against the number of GPUs, at constant tokens per GPU (weak scaling) or tokens in all (strong)."""
    for kind, group in scalings(of):
        title = f"TFLOP/s per GPU by number of GPUs, {kind}, {group.where}"
        yield _rates(of, group, "world_size", f"rate-by-gpus_{group.slug}", title)


def phases_by_length(of: Shown) -> Iterator[Drawn]:
    """Forward and backward apart, against sequence length, with published figures where they are of the same problem."""
    for group in _by_length(of):
        name, title = f"phases-by-length_{group.slug}", f"Forward and backward by sequence length, {group.where}"
        yield from _phases(of, group, "seqlen", name, title, _kernels_beside(group.rows))


def phases_by_gpus(of: Shown) -> Iterator[Drawn]:
    """The same against the number of GPUs."""
    for kind, group in scalings(of):
        name, title = f"phases-by-gpus_{group.slug}", f"Forward and backward by number of GPUs, {kind}, {group.where}"
        yield from _phases(of, group, "world_size", name, title, _strategies_beside(group.rows, kind))


def _by_length(of: Shown) -> Iterator[Group]:
    return (group for group in groups(of, ["scale", "setting"]) if group.rows["seqlen"].nunique() > 1)


def _lines(rows: pd.DataFrame, x: str) -> Lines:
    """Rows of every mask and choice, by increasing x."""
    return dict(iter(rows.sort_values(x, kind="stable").groupby(["what_mask", "choice"], sort=False)))


def _rates(of: Shown, group: Group, x: str, name: str, title: str) -> Drawn:
    rows, masks = group.rows, in_order(group.rows, "what_mask")
    best = best_of(rows, ["what_mask", x], RATE, "max")
    lines = _lines(rows.assign(relative=100 * rows[RATE] / best), x)
    choices, left_out = fastest_choices(rows)
    across = min(len(masks), ACROSS)
    bands = 2 if len(choices) > 1 else 1  # absolute, and relative to the best
    figure, axes = grid(bands * math.ceil(len(masks) / across), across, title, of.source)
    drawn: dict[str, Any] = {}
    foretold = group.foretold[group.foretold["what_mask"].isin(masks)]
    beside, ticks = _lines(foretold, x), sorted({*rows[x], *foretold[x]})
    for band in range(bands):
        mine = used(axes[band::bands], len(masks))
        for axis, mask in zip(mine, masks, strict=True):
            y, interval = (RATE, "total") if band == 0 else ("relative", "")
            drawn |= _draw(axis, of, lines, mask, choices, x, y, interval)
            label = ("TFLOP/s per GPU", "% of the best")[band] if axis in axes[band::bands, 0] else ""
            tune(axis, x, ticks, mask if band == 0 else "", AXIS[x] if band == bands - 1 else "", label)
            if band == 0:
                drawn |= _beside(axis, of, beside, mask, x)
                mark_failures(axis, group.failed[group.failed["what_mask"] == mask], x, of.styles)
        for row in axes[band::bands]:
            shared = [axis for axis in row if axis in mine]
            share_y(shared, floor=0.0) if band == 0 else relative_axis(shared)
    legend(figure, {choice: drawn[choice] for choice in (*choices, *dict.fromkeys(foretold["choice"])) if choice in drawn})
    said = _said_of_bars(rows, ["total"]) + (
        " Below: as a share of the fastest choice's, on a logarithmic axis." if bands > 1 else ""
    )
    caption = said + said_of(left_out) + said_of_failures(group.failed)
    caption += " Dotted and hollow: predicted, not measured." if len(foretold) else ""
    return Drawn(name, title, caption, _leaders(rows, x), figure)


def _beside(axis: Axes, of: Shown, lines: Lines, mask: str, x: str) -> dict[str, Any]:
    """Predictions beside what was measured, each with its band."""
    drawn = {}
    for (of_mask, choice), line in lines.items():
        if of_mask == mask and line[RATE].notna().any():
            style = of.styles[choice]
            drawn[choice] = draw_line(axis, line[x], line[RATE], style, label=choice)
            factor = 1 + line["band"]
            axis.vlines(line[x], line[RATE] / factor, line[RATE] * factor, color=style.color, linewidth=0.8, linestyle=":")
    return drawn


def _draw(axis: Axes, of: Shown, lines: Lines, mask: str, choices: Sequence[str], x: str, y: str, interval: str) -> dict[str, Any]:
    """Draw a mask's line of every choice, with its intervals of the phase ``interval`` if named; what was drawn."""
    drawn = {}
    places = sorted({place for (of_mask, _), line in lines.items() if of_mask == mask for place in line[x]})
    for place, choice in enumerate(choices):
        line = lines.get((mask, choice))
        if line is None or line[y].isna().all():
            continue
        ends = [f"{interval}_low", f"{interval}_high"] if interval else []
        line = with_gaps(line[[x, y, *ends]], x, places)
        at, style = dodged(line[x], place, len(choices)), of.styles[choice]
        drawn[choice] = draw_line(axis, at, line[y], style, label=choice)
        if interval:
            axis.vlines(at, line[ends[0]], line[ends[1]], color=style.color, linewidth=1.0)
    return drawn


def _phases(of: Shown, group: Group, x: str, name: str, title: str, reference: pd.DataFrame | None) -> Iterator[Drawn]:
    rows, masks = group.rows, in_order(group.rows, "what_mask")
    shown = [p for p in PHASES if p != "total" and rate_column(p) in rows and rows[rate_column(p)].notna().any()]
    if not shown:
        return
    lines = _lines(rows, x)
    choices, left_out = fastest_choices(rows)
    figure, axes = grid(len(masks), len(shown), title, of.source)
    drawn: dict[str, Any] = {}
    for i, mask in enumerate(masks):
        for axis, phase in zip(axes[i], shown, strict=True):
            drawn |= _draw(axis, of, lines, mask, choices, x, rate_column(phase), phase)
            if reference is not None:
                drawn |= _by_mean(axis, of, lines, mask, choices, x, phase)
                drawn |= _published(axis, reference, mask=rows["mask"][rows["what_mask"] == mask].iloc[0], phase=phase, x=x)
            last, first = i == len(masks) - 1, phase == shown[0]
            ylabel = "TFLOP/s per GPU" if first else ""
            tune(axis, x, sorted(rows[x].unique()), f"{mask}: {phase}", AXIS[x] if last else "", ylabel)
            mark_failures(axis, group.failed[group.failed["what_mask"] == mask], x, of.styles)
        share_y(axes[i], floor=0.0)
    legend(figure, drawn)
    beside = f" Grey: {published.LABEL}." if reference is not None else ""
    caption = _said_of_bars(rows, shown) + said_of(left_out) + said_of_failures(group.failed) + beside
    yield Drawn(name, title, caption, _leaders(rows, x), figure)


def _said_of_bars(rows: pd.DataFrame, phases: Sequence[str]) -> str:
    known = all(time.known for phase in phases for time in rows[f"timed/{phase}"] if time is not None)
    noise = "with run-to-run noise" if known else "without the run-to-run noise, which was not measured"
    return f"Bars: 95 % interval {noise}. An iteration lasts as long as its slowest rank."


def _leaders(rows: pd.DataFrame, x: str) -> str:
    """Per mask at the largest x: who is fastest, and by how much the next and the last are slower."""
    said = []
    for mask, mine in rows.groupby("what_mask", sort=False):
        last = mine[x].max()
        there = exact_rows(mine[mine[x] == last]).sort_values(TIME)
        if there.empty:
            continue
        at = format_tokens(int(last)) if x == "seqlen" else f"{int(last)} GPUs"
        names, ratios = there["choice"].tolist(), (there[TIME] / there[TIME].iloc[0]).tolist()
        if len(names) == 1:
            said.append(f"{mask} at {at}: {names[0]} alone, {there[RATE].iloc[0]:.0f} TFLOP/s")
            continue
        others = [f"{names[1]} takes {times(ratios[1])}", *([f"{names[-1]} {times(ratios[-1])}"] if len(names) > 2 else [])]
        said.append(f"{mask} at {at}: {names[0]} leads, {' and '.join(others)}")
    return "; ".join(said) + "."


# -- published figures ---------------------------------------------------------------------------------------------------


def _by_mean(axis: Axes, of: Shown, lines: Lines, mask: str, choices: Sequence[str], x: str, phase: str) -> dict[str, Any]:
    """Our rates with the mean over ranks for a time, as those beside them are."""
    drawn = {}
    for choice in choices:
        line = lines.get((mask, choice))
        if line is not None and line[f"{phase}_by_mean"].notna().any():
            made = axis.plot(line[x], line[f"{phase}_by_mean"], color=of.styles[choice].color, linestyle=":", linewidth=1.0)
            drawn["the same, time as mean over ranks"] = made[0]
    return drawn


def _published(axis: Axes, reference: pd.DataFrame, *, mask: str, phase: str, x: str) -> dict[str, Any]:
    drawn, markers = {}, list(MARKERS.values())
    mine = reference[(reference["mask"] == mask) & (reference["phase"] == phase)]
    for number, (name, line) in enumerate(mine.groupby(reference.columns[0], sort=False)):
        look: dict[str, Any] = {"color": "0.6", "linestyle": "--", "linewidth": 0.8, "markersize": 4, "markerfacecolor": "none"}
        made = axis.plot(line[x], line["tflops_per_gpu"], marker=markers[number % len(markers)], **look)
        drawn[f"published: {name}"] = made[0]
    return drawn


def _kernels_beside(rows: pd.DataFrame) -> pd.DataFrame | None:
    return published.kernels() if published.comparable(rows) and set(rows["world_size"]) == {1} else None


def _strategies_beside(rows: pd.DataFrame, kind: str) -> pd.DataFrame | None:
    same = kind.startswith("weak") and set(rows["tokens_per_rank"]) == {published.TOKENS_PER_GPU}
    return published.strategies() if published.comparable(rows) and same else None


# -- efficiency ----------------------------------------------------------------------------------------------------------


def efficiency(of: Shown) -> Iterator[Drawn]:
    """TFLOP/s per GPU over those of the same choice on the fewest GPUs of its panel, against GPUs."""
    for kind, group in scalings(of):
        rows, masks, title = group.rows, in_order(group.rows, "what_mask"), f"Scaling efficiency, {kind}, {group.where}"
        choices, left_out = fastest_choices(rows)
        figure, axes = panels(len(masks), title, of.source)
        lines, drawn, ends = _lines(rows, "world_size"), dict[str, Any](), list[str]()
        for axis, mask in zip(axes, masks, strict=True):
            mine = {choice: lines[mask, choice] for choice in choices if (mask, choice) in lines}
            found, places = efficiency_of(mine), sorted(set(rows["world_size"][rows["what_mask"] == mask]))
            for choice, (share, own) in found.items():
                hollow = (
                    {} if own is None else {"markerfacecolor": "none", "markeredgecolor": of.styles[choice].color, "alpha": 0.7}
                )
                name = choice if own is None else f"{choice} (from {own})"
                line = with_gaps(mine[choice][["world_size"]].assign(share=share), "world_size", places)
                drawn[name] = draw_line(axis, line["world_size"], line["share"], of.styles[choice], label=name, **hollow)
            axis.axhline(100, color="0.7", linewidth=0.8, label="_perfect")
            tune(
                axis,
                "world_size",
                sorted(rows["world_size"].unique()),
                mask,
                "GPUs",
                "% of the fewest GPUs" if axis is axes[0] else "",
            )
            mark_failures(axis, group.failed[group.failed["what_mask"] == mask], "world_size", of.styles)
            most = rows["world_size"][rows["what_mask"] == mask].max()
            whole = {c: share for c, (share, own) in found.items() if own is None and mine[c]["world_size"].iloc[-1] == most}
            ends += _kept(mask, int(most), whole)
        share_y(axes, floor=0.0)
        legend(figure, drawn)
        fewest = int(rows["world_size"].min())
        caption = (
            f"TFLOP/s per GPU as a share of the same choice's on the fewest GPUs of its panel; 100 % is perfect. Hollow: it has no "
            f"result there, and begins at 100 % later, so its line is no higher than others for that. A choice may be efficient "
            f"because it is slow on {fewest}."
        )
        caption += said_of(left_out) + said_of_failures(group.failed)
        yield Drawn(f"efficiency_{group.slug}", title, caption, "; ".join(ends) + ".", figure)


def _kept(mask: str, most: int, shares: dict[str, pd.Series]) -> list[str]:
    """What of their rate the best and the worst choice keep at the most GPUs, in words."""
    last = {choice: float(share.iloc[-1]) for choice, share in shares.items()}
    if not last:
        return [f"{mask}: no choice has results on the fewest and on {most} GPUs"]
    best, worst = max(last, key=lambda c: last[c]), min(last, key=lambda c: last[c])
    more = f", {worst} {percent(last[worst] / 100, 0)}" if worst != best else ""
    return [f"{mask} at {most} GPUs: {best} keeps {percent(last[best] / 100, 0)} of its rate per GPU{more}"]


# -- memory --------------------------------------------------------------------------------------------------------------


def memory_by_length(of: Shown) -> Iterator[Drawn]:
    """Peak memory of the worst rank against sequence length, a panel per mask, beside what the device has."""
    for group in _by_length(of):
        rows = group.rows[group.rows[PEAK].notna()] if PEAK in group.rows else group.rows.iloc[:0]
        if rows["seqlen"].nunique() < 2:
            continue
        masks, title = in_order(rows, "what_mask"), f"Peak memory by sequence length, {group.where}"
        choices, left_out = fastest_choices(rows)
        out = group.failed[group.failed["failure"] == "oom"]
        capacity = _capacity(of, rows, bool(len(out)))
        figure, axes = panels(len(masks), title, of.source)
        lines, drawn = _lines(rows.assign(gib=rows[PEAK] / GIB), "seqlen"), dict[str, Any]()
        for axis, mask in zip(axes, masks, strict=True):
            drawn |= _draw(axis, of, lines, mask, choices, "seqlen", "gib", "")
            _name_those_that_coincide(axis, {c: lines[mask, c] for c in choices if (mask, c) in lines})
            ylabel = "GiB" if axis is axes[0] else ""
            tune(axis, "seqlen", sorted({*rows["seqlen"], *out["seqlen"]}), mask, "sequence length", ylabel)
        _memory_axis(axes, float(rows[PEAK].min()) / GIB, float(rows[PEAK].max()) / GIB, capacity)
        for axis, mask in zip(axes, masks, strict=True):
            _cross_where_it_was_too_much(axis, out[out["what_mask"] == mask], capacity, of)
        legend(figure, drawn)
        crosses = " Crosses: out of memory." if len(out) else ""
        line = f" Line: the device's {size(capacity * GIB)}." if capacity else ""
        caption = f"Worst rank's peak of one iteration above the level before it, with the engine's buffers.{line}{crosses}"
        yield Drawn(f"memory-by-length_{group.slug}", title, caption + said_of(left_out), _memory_said(rows, out), figure)


def _capacity(of: Shown, rows: pd.DataFrame, ran_out: bool) -> float | None:
    """GiB of the smallest device of these rows, where it is known and their peaks come near it."""
    entries = [entry_of(of.devices, str(name)) for name in set(rows["device"])]
    least = min((entry["memory_bytes"] / GIB for entry in entries if entry), default=None)
    return least if least and (ran_out or rows[PEAK].max() / GIB >= NEAR_FULL * least) else None


def _memory_axis(axes: Sequence[Axes], least: float, most: float, capacity: float | None) -> None:
    """GiB in powers of two, with three ticks at least, the same for all panels."""
    low, high = math.floor(math.log2(least / 1.1)), math.ceil(math.log2(max(most, capacity or 0.0) * 1.1))
    while high - low < 2:
        low, high = low - 1, high + (high - low < 1)
    step = max(1, (high - low) // 6)
    ticks = [2.0**power for power in range(low, high + 1, step)]
    for axis in axes:
        axis.set_yscale("log", base=2)
        axis.set_ylim(2.0**low, 2.0**high)
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axis.minorticks_off()
        if capacity:
            axis.axhline(capacity, color=GREY, linewidth=1.0, linestyle="--", label="_capacity")


def _cross_where_it_was_too_much(axis: Axes, out: pd.DataFrame, capacity: float | None, of: Shown) -> None:
    height = capacity or axis.get_ylim()[1]
    for place, cells in out.groupby("seqlen"):
        for number, choice in enumerate(cells["choice"]):
            at = float(dodged(np.float64(place), number, len(cells)))
            axis.plot([at], [height], color=of.styles[choice].color, label=f"_failed {choice}", clip_on=False, **CROSS)


def _name_those_that_coincide(axis: Axes, lines: dict[str, pd.DataFrame]) -> None:
    """Choices of which only one line is seen, at its right end."""
    for group in alike(lines, "seqlen", "gib"):
        if len(group) > 1:
            longest = max((lines[choice] for choice in group), key=lambda line: line["seqlen"].iloc[-1])
            names = " = ".join(group[:3]) + (" = … " if len(group) > 3 else " ") + f"({len(group)})"
            end = (longest["seqlen"].iloc[-1], longest["gib"].iloc[-1])
            axis.annotate(names, end, xytext=(0, 6), textcoords="offset points", fontsize=6, ha="right", color="0.3")


def _memory_said(rows: pd.DataFrame, out: pd.DataFrame) -> str:
    """Who needs least and most at the longest sequence, and who had too little."""
    said = []
    for mask, mine in rows.groupby("what_mask", sort=False):
        longest = mine[mine["seqlen"] == mine["seqlen"].max()].sort_values(PEAK)
        first, last = longest.iloc[0], longest.iloc[-1]
        at = f"{mask} at {format_tokens(int(first['seqlen']))}"
        if last[PEAK] < (1 + SAME) * first[PEAK]:
            said.append(f"{at}: {'all need' if len(longest) > 1 else first['choice'] + ' needs'} {size(last[PEAK])}")
        else:
            said.append(f"{at}: {first['choice']} needs least, {size(first[PEAK])}, {last['choice']} most, {size(last[PEAK])}")
    lacked = ", ".join(f"{choice} {count}" for choice, count in out["choice"].value_counts().items())
    return "; ".join(said) + "." + (f" Cells out of memory: {lacked}." if lacked else "")
