"""Rooflines: cells under what their device and its links allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lcbench.measure.peak import entry_of
from lcbench.report.amounts import percent
from lcbench.report.drawing import Drawn, legend, panels, said_of
from lcbench.report.palette import MARKERS
from lcbench.report.parts import RATE, TIME, Shown, fastest_choices, groups, least_bytes, only_attention

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class Panel(NamedTuple):
    """One panel of a roofline.

    Attributes:
        label: of its axis.
        cells: rows of ``reported``.
        intensity: FLOPs per byte of each row.
        roofs: GB/s by the name of what moves the bytes.
    """

    label: str
    cells: pd.DataFrame
    intensity: pd.Series
    roofs: dict[str, float]


def roofline(of: Shown, links: dict[str, float]) -> Iterator[Drawn]:
    """Every call of attention under what its device and its links allow: TFLOP/s per GPU against FLOPs per byte of
    memory, and per byte sent.

    Args:
        links: GB/s of a link class, as the check of the nodes measured it.
    """
    for group in groups(of, ["device", "dtype"]):
        rows = group.rows[only_attention(group.rows)]  # of a training step nobody knows the least bytes
        if rows.empty:
            continue
        rows = rows.assign(work=rows[RATE] * 1e12 * rows[TIME])
        peak = float(rows["compute/peak_tflops"].median())
        shown = _panels(rows, entry_of(of.devices, str(rows["device"].iloc[0])), links)
        title = f"Roofline, {group.where}"
        figure, axes = panels(len(shown), title, of.source, size=(5.6, 3.8))
        choices, left_out = fastest_choices(rows)
        drawn: dict[str, Any] = {}
        for axis, panel in zip(axes, shown, strict=True):
            drawn |= _points(axis, panel, choices, of)
            _roofs(axis, panel, peak)
        legend(figure, {choice: drawn[choice] for choice in choices if choice in drawn})
        best = rows.loc[rows[RATE].idxmax()]
        alt = f"The highest rate is {percent(float(best[RATE]) / peak, 0)} of the peak: {best['choice']}, {best['label']}."
        yield Drawn(
            f"roofline_{group.slug}", title,
            "Left: work over the bytes that a rank's inputs, outputs and gradients have, each touched once. Right: work over the "
            "bytes sent by the rank that sends most; slopes are what the check of the nodes measured between two ranks. A point on "
            "a slope is limited by that memory or link, not by the kernel." + said_of(left_out),
            alt, figure,
        )  # fmt: skip


def _panels(rows: pd.DataFrame, device: dict[str, Any] | None, links: dict[str, float]) -> list[Panel]:
    """The panels of cells of one device: bytes of memory, and bytes sent where any were."""
    bandwidth = {"memory": device["memory_gbytes_per_s"]} if device else {}
    names = ["tokens_per_rank", "num_heads_q", "num_heads_kv", "head_dim", "dtype", "direction"]
    touched = rows["work"] / [least_bytes(r) for r in rows[names].to_dict("records")]
    found = [Panel("FLOP per byte of inputs, outputs and gradients", rows, touched, bandwidth)]
    sent = rows[rows["comm/bytes"] > 0] if "comm/bytes" in rows else rows.iloc[:0]
    if not sent.empty:
        found.append(Panel("FLOP per byte sent", sent, sent["work"] / sent["comm/bytes"], links))
    return found


def _points(axis: Axes, panel: Panel, choices: Sequence[str], of: Shown) -> dict[str, Any]:
    """Draw the cells of a panel; what was drawn of each choice."""
    drawn: dict[str, Any] = {}
    for choice in choices:
        mine = panel.cells["choice"] == choice
        if mine.any():
            style = of.styles[choice]
            drawn[choice] = axis.scatter(
                panel.intensity[mine], panel.cells[RATE][mine], s=18, color=style.color, marker=MARKERS[style.marker],
                edgecolors="0.25", linewidths=0.4, label=choice,
            )  # fmt: skip
    return drawn


def _roofs(axis: Axes, panel: Panel, peak: float) -> None:
    """Draw what a panel's cells lie under: the peak, and a slope for each roof."""
    rates = panel.cells[RATE]
    # From left of the bend of every roof, so that it is seen how far from it cells are.
    bends = [1e3 * peak / rate for rate in panel.roofs.values()]
    reach = np.geomspace(min([float(panel.intensity.min()), *bends]) / 4, float(panel.intensity.max()) * 4, 200)
    axis.set_ylim(float(rates.min()) / 3, 2 * max(peak, float(rates.max())))
    roofs = []
    for line, (name, rate) in zip(("-", "--", "-.", ":"), panel.roofs.items(), strict=False):
        slope = np.minimum(peak, reach * rate / 1e3)
        roofs += axis.plot(reach, slope, color="0.4", linestyle=line, linewidth=1, label=f"{name}: {rate:.4g} GB/s")
    roofs.append(axis.axhline(peak, color="0.2", linewidth=1, label=f"peak: {peak:.3g} TFLOP/s"))
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(panel.label, fontsize=8)
    axis.set_ylabel("TFLOP/s per GPU", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.legend(handles=roofs, fontsize=7, loc="lower right")
