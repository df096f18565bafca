"""Figures of training steps: what time and memory of a step are made of, a bar per choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lcbench.measure.peak import entry_of
from lcbench.problem import format_tokens
from lcbench.report.amounts import BYTES, SECONDS, Unit, duration, more, percent, size, unit_for
from lcbench.report.drawing import GREY, Drawn, grid
from lcbench.report.palette import MARKERS
from lcbench.report.parts import PEAK, TIME, Shown, groups, slug
from lcbench.report.step import MEMORY, SCALED, Step, colors_of, step_rows

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BAR = 0.34  # inches
NEAR = 0.15  # of the device's memory, from which on bars stand against all of it


def step_parts(of: Shown) -> Iterator[Drawn]:
    """Time of a step by phase, with attention's share hatched, and peak memory by class, side by side: a figure per problem. Failed
    cells are at the end, with their class.
    """
    for group in groups(of, ["what_mask", "seqlen", "scale", "setting"]):
        rows = step_rows(group.rows).sort_values(TIME)
        if rows.empty:
            continue
        steps = [Step.of_row(row) for row in rows.to_dict("records")]
        first = rows.iloc[0]
        where = [first["what_mask"], format_tokens(int(first["seqlen"])), first["scale"]]
        at = " ".join(where)
        title = f"A training step: {steps[0].model}, {steps[0].layers} of {steps[0].of} layers, {at}"
        figure, axes = grid(1, 2, title, of.source, (6.4, 0.9 + BAR * (len(rows) + len(group.failed))))
        (time, memory), device = axes[0], entry_of(of.devices, str(first["device"]))
        colors = colors_of(phase for step in steps for phase in step.phases)
        unit = unit_for(float(rows[TIME].max()), SECONDS)
        _stack(time, [s.phases for s in steps], colors, unit, "time of a step")
        for place, (step, seconds) in enumerate(zip(steps, rows[TIME], strict=True)):
            if step.attention is not None:
                time.barh(
                    place + 0.25, step.attention * seconds / unit.size, height=0.2, color="white", hatch="/////", edgecolor="0.1",
                    linewidth=0.4,
                )  # fmt: skip
            text = duration(seconds) if place == 0 else f"{duration(seconds)}  {more(seconds / rows[TIME].iloc[0])}"
            _at_end(time, max(seconds, sum(step.phases.values())) / unit.size, place, text)
        _memory(memory, rows, steps, device)
        for axis in (time, memory):
            _names(axis, of, [*rows["choice"], *group.failed["choice"]])
            for place, kind in enumerate(group.failed["failure"], start=len(rows)):
                _at_end(axis, 0, place, f"✕ {kind}", color=GREY)
        name = "_".join(["step", *map(slug, [*where, *([first["setting"]] if of.several else [])])])
        yield Drawn(name, title, _caption(steps, device), _alt(rows, steps), figure)


def _stack(axis: Axes, parts: list[dict[str, float]], colors: dict[str, str], unit: Unit, label: str) -> None:
    """Bars of parts, one behind the other, with a key above."""
    for name, color in colors.items():
        if not any(part.get(name) for part in parts):
            continue
        before = [sum(v for k, v in part.items() if [*colors].index(k) < [*colors].index(name)) / unit.size for part in parts]
        axis.barh(range(len(parts)), [part.get(name, 0.0) / unit.size for part in parts], left=before, height=0.75, color=color,
                  label=name)  # fmt: skip
    axis.set_xlabel(f"{label}, {unit.name}", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.legend(fontsize=6.5, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0))


def _memory(axis: Axes, rows: pd.DataFrame, steps: list[Step], device: dict[str, Any] | None) -> None:
    peaks = rows.reindex(columns=[PEAK])[PEAK].fillna(0.0).to_numpy(dtype=float)
    unit = unit_for(max([*peaks, *(sum(s.memory.values()) for s in steps)]), BYTES)
    _stack(axis, [s.memory for s in steps], MEMORY, unit, "memory of the worst rank")
    for place, (peak, step) in enumerate(zip(peaks, steps, strict=True)):
        if peak:
            axis.vlines(peak / unit.size, place - 0.42, place + 0.42, color="0.1", linewidth=2)
            share = f"  {percent(peak / device['memory_bytes'], 0)}" if device else ""
            _at_end(axis, max(peak, sum(step.memory.values())) / unit.size, place, f"{size(peak)}{share}")
    if device and max(peaks) > NEAR * device["memory_bytes"]:
        axis.axvline(device["memory_bytes"] / unit.size, color="#b3261e", linestyle="--", linewidth=1)


def _at_end(axis: Axes, x: float, place: int, text: str, color: str = "0.1") -> None:
    axis.annotate(text, (x, place), xytext=(5, 0), textcoords="offset points", fontsize=7, va="center", color=color)


def _names(axis: Axes, of: Shown, choices: list[str]) -> None:
    """Choices along y, each with its mark."""
    across = axis.get_yaxis_transform()
    for place, choice in enumerate(choices):
        style = of.styles[choice]
        look: dict[str, Any] = {"marker": MARKERS[style.marker], "color": style.color, "markersize": 4.5}
        axis.plot([-0.015], [place], transform=across, label=f"_{choice}", clip_on=False, **look)
    axis.set_yticks(range(len(choices)), choices, fontsize=7)
    axis.tick_params(axis="y", length=0, pad=9)
    axis.set_ylim(len(choices) - 0.4, -0.6)
    axis.set_xlim(0, axis.get_xlim()[1] * 1.3)


def _caption(steps: list[Step], device: dict[str, Any] | None) -> str:
    of = f" The device has {size(device['memory_bytes'])} (dashed, where they come near it)." if device else ""
    return (
        "Medians of the phases, of the slowest rank. Hatched: how much of the whole step attention and its messages take. Memory: "
        f"each class when it is largest, which is not at one time, and the peak (mark).{of} Failed cells are last, with their "
        "class." + (f" The whole model: {_whole(steps[0])}." if steps[0].layers < steps[0].of and steps[0].whole_s else "")
    )


def _whole(step: Step) -> str:
    return f"{duration(step.whole_s)} a step with the fastest choice, {SCALED}"


def _alt(rows: pd.DataFrame, steps: list[Step]) -> str:
    best, step = rows.iloc[0], steps[0]
    least = rows.loc[rows[PEAK].idxmin()] if PEAK in rows and rows[PEAK].notna().any() else None
    mfu = f", MFU {percent(step.mfu)}" if step.mfu is not None else ""
    said = f"{best['choice']} takes least time: {duration(best[TIME])}{mfu}."
    return said if least is None else f"{said} Least memory: {least['choice']}, {size(least[PEAK])}."
