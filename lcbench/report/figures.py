"""The figures of a report. Each function takes the good rows of ``frame.reported`` and gives figures, none where its question does
not arise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lcbench.grid.cell import format_tokens
from lcbench.measure.peak import entry_of
from lcbench.problem import itemsize
from lcbench.report import published
from lcbench.report.frame import PHASES, over_seeds, rate_column, rate_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More lines than this cannot be told apart: the fastest are drawn, the rest are in the tables.
MOST_LINES = 12
MOST_BARS = 40
MARKERS = "osD^v<>Pp*Xh"
PANEL = (4.6, 3.1)  # inches


@dataclass(frozen=True)
class Drawn:
    """A figure; ``name`` is that of its files, ``caption`` says how to read it."""

    name: str
    title: str
    caption: str
    figure: Figure


def all_figures(frame: pd.DataFrame, devices: Sequence[dict[str, Any]], links: dict[str, float]) -> Iterator[Drawn]:
    """Every figure that these results call for; of cells that differ in their seed only, the median one is drawn.

    Args:
        devices: the ``conf/device`` entries.
        links: GB/s of a link class, as the check of the nodes measured it.
    """
    if frame.empty:
        return
    frame = over_seeds(frame)
    yield from rate_by_length(frame)
    yield from rate_by_gpus(frame)
    yield from efficiency(frame)
    yield from heat_maps(frame)
    yield from memory_by_length(frame)
    yield from time_split(frame)
    yield from roofline(frame, devices, links)


# -- lines -----------------------------------------------------------------------------------------------------------


def rate_by_length(frame: pd.DataFrame) -> Iterator[Drawn]:
    """TFLOP/s per GPU against sequence length: a row per mask, a column per phase, a line per choice; a figure per scale."""
    for number, (where, rows) in enumerate(_settings(frame, ["scale", "setting"])):
        if rows["seqlen"].nunique() < 2:
            continue
        reference = _kernels_beside(rows)
        title = f"TFLOP/s per GPU by sequence length, {where}"
        yield _lines(f"rate-by-length{_suffix(number)}", title, rows, "seqlen", "sequence length", reference)


def rate_by_gpus(frame: pd.DataFrame) -> Iterator[Drawn]:
    """TFLOP/s per GPU against the number of GPUs, at constant tokens per GPU (weak scaling) or tokens in all (strong)."""
    for name, kind, rows, where in _scalings(frame):
        title = f"TFLOP/s per GPU by number of GPUs, {kind}, {where}"
        yield _lines(f"rate-by-gpus-{name}", title, rows, "world_size", "GPUs", _strategies_beside(rows, name))


def _lines(name: str, title: str, rows: pd.DataFrame, x: str, label: str, reference: pd.DataFrame | None) -> Drawn:
    masks, phases = _order(rows, "what_mask"), _phases(rows)
    choices, left_out = _fastest(rows)
    figure, axes = _grid(len(masks), len(phases))
    drawn: dict[str, Any] = {}
    for i, mask in enumerate(masks):
        for j, phase in enumerate(phases):
            axis = axes[i][j]
            panel = rows[rows["what_mask"] == mask]
            for choice in choices:
                line = panel[panel["choice"] == choice].sort_values(x)
                line = line[line[rate_column(phase)].notna()]
                if line.empty:
                    continue
                rates = [rate_of(row, phase) for row in line.to_dict("records")]
                values = [r.value for r in rates]
                errors = [[r.value - r.low for r in rates], [r.high - r.value for r in rates]]
                number = choices.index(choice)
                drawn[choice] = axis.errorbar(
                    line[x],
                    values,
                    yerr=errors,
                    color=_color(number),
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=4,
                    linewidth=1.3,
                    capsize=2,
                )
                if reference is not None and line[f"{phase}_by_mean"].notna().any():
                    drawn["the same, time as mean over ranks"] = axis.plot(
                        line[x], line[f"{phase}_by_mean"], color=_color(number), linestyle=":", linewidth=1.0
                    )[0]
            if reference is not None:
                _draw_published(axis, reference, mask=panel["mask"].iloc[0], phase=phase, x=x, drawn=drawn)
            _tune(
                axis,
                x,
                sorted(rows[x].unique()),
                f"{mask}: {phase}",
                label if i == len(masks) - 1 else "",
                "TFLOP/s per GPU" if j == 0 else "",
            )
    _legend(figure, drawn)
    known = all(time.known for phase in phases for time in rows[f"timed/{phase}"] if time is not None)
    caption = (
        f"Bars: 95 % interval {'with' if known else 'without the'} run-to-run noise{'' if known else ', which was not measured'}."
        " An iteration lasts as long as its slowest rank."
    )
    return Drawn(
        name, title, caption + _said_of(left_out) + (f" Grey: {published.LABEL}." if reference is not None else ""), figure
    )


def _draw_published(axis: Axes, reference: pd.DataFrame, *, mask: str, phase: str, x: str, drawn: dict[str, Any]) -> None:
    named = reference.columns[0]
    for number, (name, line) in enumerate(
        reference[(reference["mask"] == mask) & (reference["phase"] == phase)].groupby(named, sort=False)
    ):
        found = axis.plot(
            line[x],
            line["tflops_per_gpu"],
            color="0.6",
            linestyle="--",
            linewidth=0.8,
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            markerfacecolor="none",
        )
        drawn[f"published: {name}"] = found[0]


def _kernels_beside(rows: pd.DataFrame) -> pd.DataFrame | None:
    return published.kernels() if _comparable(rows) and set(rows["world_size"]) == {1} else None


def _strategies_beside(rows: pd.DataFrame, kind: str) -> pd.DataFrame | None:
    same = kind.startswith("weak") and set(rows["tokens_per_rank"]) == {published.TOKENS_PER_GPU}
    return published.strategies() if _comparable(rows) and same else None


def _comparable(rows: pd.DataFrame) -> bool:
    """Whether the published figures belong to the same problem: the device is another question, and their label names theirs."""
    return bool(rows["gpu"].all()) and set(rows["heads"]) == {published.HEADS} and set(rows["dtype"]) == {published.DTYPE}


def memory_by_length(frame: pd.DataFrame) -> Iterator[Drawn]:
    """Peak memory of the worst rank against sequence length, a panel per mask."""
    if "memory/peak_bytes" not in frame:
        return
    for number, (where, rows) in enumerate(_settings(frame[frame["memory/peak_bytes"].notna()], ["scale", "setting"])):
        if rows["seqlen"].nunique() < 2:
            continue
        figure, axes, left_out = _by_mask(rows, "seqlen", lambda line: line["memory/peak_bytes"] / 2**30)
        for axis, mask in axes:
            axis.set_yscale("log")
            _tune(axis, "seqlen", sorted(rows["seqlen"].unique()), mask, "sequence length", "GiB", floor=None)
        yield Drawn(
            f"memory-by-length{_suffix(number)}", f"Peak memory by sequence length, {where}",
            "Worst rank's peak of one iteration above the level before it, with the engine's buffers." + _said_of(left_out), figure,
        )  # fmt: skip


def efficiency(frame: pd.DataFrame) -> Iterator[Drawn]:
    """TFLOP/s per GPU over those of the same choice on its fewest GPUs, against GPUs."""
    for name, kind, rows, where in _scalings(frame):
        figure, axes, left_out = _by_mask(rows, "world_size", _of_the_first)
        for axis, mask in axes:
            axis.axhline(100, color="0.7", linewidth=0.8)
            _tune(axis, "world_size", sorted(rows["world_size"].unique()), mask, "GPUs", "% of the fewest GPUs")
        yield Drawn(
            f"efficiency-{name}", f"Scaling efficiency, {kind}, {where}",
            "TFLOP/s per GPU as a share of the same choice's on its fewest GPUs; 100 % is perfect." + _said_of(left_out), figure,
        )  # fmt: skip


def _of_the_first(line: pd.DataFrame) -> pd.Series | None:
    """Rates in percent of the first; None for a single one."""
    rates = line["compute/tflops_per_gpu"]
    return 100 * rates / rates.iloc[0] if len(rates) > 1 else None


def _by_mask(
    rows: pd.DataFrame, x: str, values: Callable[[pd.DataFrame], pd.Series | None]
) -> tuple[Figure, list[tuple[Axes, str]], int]:
    """A panel per mask and in it a line per choice of what ``values`` makes of its rows; the figure, its panels with their masks,
    and how many choices are left out.
    """
    masks = _order(rows, "what_mask")
    choices, left_out = _fastest(rows)
    figure, axes = _panels(len(masks))
    panels = list(zip(axes, masks, strict=False))
    drawn: dict[str, Any] = {}
    for axis, mask in panels:
        for i, choice in enumerate(choices):
            line = rows[(rows["what_mask"] == mask) & (rows["choice"] == choice)].sort_values(x)
            y = values(line) if len(line) else None
            if y is not None:
                drawn[choice] = _plot(axis, line[x], y, i)
    _legend(figure, drawn)
    return figure, panels, left_out


def _scalings(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame, str]]:
    """(name, kind, rows, where) of every way in which these results scale over at least two numbers of GPUs."""
    for kind, column in (("weak", "tokens_per_rank"), ("strong", "seqlen")):
        number = 0
        for where, rows in _settings(frame, [column, "setting"]):
            if rows["world_size"].nunique() < 2:
                continue
            shown = f"{format_tokens(int(rows[column].iloc[0]))} tokens {'per GPU' if kind == 'weak' else 'in all'}"
            yield f"{kind}{_suffix(number)}", f"{kind} scaling ({shown})", rows, where.partition(", ")[2]
            number += 1


# -- heat maps, bars, roofline ---------------------------------------------------------------------------------------


def heat_maps(frame: pd.DataFrame) -> Iterator[Drawn]:
    """Mask x kernel, and mask x strategy: the best TFLOP/s per GPU of each pair; a panel per length, a figure per scale."""
    for what, column in (("kernel", "what_kernel"), ("strategy", "what_cp")):
        number = 0
        for where, rows in _settings(frame, ["scale", "setting"]):
            masks, columns = _order(rows, "what_mask"), _order(rows, column)
            if len(columns) < 2 or len(masks) < 2:
                continue
            lengths = sorted(rows["seqlen"].unique())
            size = (1.6 + 0.75 * len(columns), 1.4 + 0.32 * len(masks))
            figure, axes = _panels(len(lengths), size=size, across=max(1, int(14 // size[0])))
            highest = rows["compute/tflops_per_gpu"].max()
            for axis, length in zip(axes, lengths, strict=False):
                best = rows[rows["seqlen"] == length].groupby(["what_mask", column])["compute/tflops_per_gpu"].max().unstack()
                best = best.reindex(index=masks, columns=columns)
                axis.imshow(best.to_numpy(dtype=float), aspect="auto", cmap="viridis", vmin=0, vmax=highest)
                axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=7)
                axis.set_yticks(range(len(masks)), masks, fontsize=7)
                axis.set_title(format_tokens(int(length)), fontsize=9)
                for (i, j), value in np.ndenumerate(best.to_numpy(dtype=float)):
                    if not math.isnan(value):
                        axis.text(
                            j,
                            i,
                            f"{value:.3g}",
                            ha="center",
                            va="center",
                            fontsize=7,
                            color="white" if value < 0.6 * highest else "black",
                        )
            yield Drawn(
                f"mask-by-{what}{_suffix(number)}", f"TFLOP/s per GPU, mask by {what}, {where}",
                f"The best of what else was varied for each mask and {what}; empty where nothing ran.", figure,
            )  # fmt: skip
            number += 1


def time_split(frame: pd.DataFrame) -> Iterator[Drawn]:
    """Where an iteration's time goes, per cell: computing, waiting for the busiest rank, exposed communication, the rest."""
    parts = split(frame)
    if parts is None:
        return
    for number, (where, rows) in enumerate(_settings(frame.loc[parts.index], ["scale", "setting"])):
        rows = rows.sort_values(["what_mask", "seqlen", "time/total/median_s"])
        left_out = max(0, len(rows) - MOST_BARS)
        if left_out:  # the longest sequences tell most
            rows = rows[rows["seqlen"] == rows["seqlen"].max()].head(MOST_BARS)
        shares = parts.loc[rows.index].div(parts.loc[rows.index].sum(axis=1), axis=0) * 100
        figure, axes = _panels(1, size=(9.5, 1.2 + 0.24 * len(rows)))
        begin = np.zeros(len(rows))
        for column, color in zip(shares.columns, ("#4477aa", "#ccbb44", "#ee6677", "#bbbbbb"), strict=True):
            axes[0].barh(range(len(rows)), shares[column], left=begin, label=column, color=color)
            begin += shares[column].to_numpy()
        names = [f"{r['what_mask']}  {format_tokens(int(r['seqlen']))}  {r['choice']}" for r in rows.to_dict("records")]
        axes[0].set_yticks(range(len(rows)), names, fontsize=7)
        axes[0].invert_yaxis()
        axes[0].set_xlim(0, 100)
        axes[0].set_xlabel("% of an iteration")
        figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
        yield Drawn(
            f"time-split{_suffix(number)}", f"Where the time goes, {where}",
            "Computing: the schedule without its messages, as if the work were spread evenly. Imbalance: what the busiest rank "
            "has more. Exposed communication: the whole minus the schedule without its messages, per phase. Rest: what lies "
            "between the phases." + (f" {left_out} cells are not drawn." if left_out else ""),
            figure,
        )  # fmt: skip


def split(frame: pd.DataFrame) -> pd.DataFrame | None:
    """Seconds of an iteration by what they went to, for cells whose parts were measured apart; None if there is none."""
    import pandas as pd

    if "overlap/forward/compute_s" not in frame:
        return None
    rows = frame[frame["overlap/forward/compute_s"].notna()]
    if rows.empty:
        return None
    phases = [p for p in ("forward", "backward") if f"overlap/{p}/compute_s" in rows]
    compute = sum(rows[f"overlap/{p}/compute_s"].fillna(0.0) for p in phases)
    exposed = sum(rows[f"overlap/{p}/exposed_s"].fillna(0.0) for p in phases)
    # A schedule without its messages may by chance be slower than the whole.
    compute = np.minimum(compute, rows["time/total/median_s"])
    even = compute / rows["balance/area_max_over_mean"].fillna(1.0).clip(lower=1.0)
    rest = (rows["time/total/median_s"] - compute - exposed).clip(lower=0.0)
    return pd.DataFrame({"computing": even, "imbalance": compute - even, "exposed communication": exposed, "rest": rest})


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


def roofline(frame: pd.DataFrame, devices: Sequence[dict[str, Any]], links: dict[str, float]) -> Iterator[Drawn]:
    """Every cell under what its device and its links allow: TFLOP/s per GPU against FLOPs per byte of memory, and per byte sent."""
    points = frame.assign(work=frame["compute/tflops_per_gpu"] * 1e12 * frame["time/total/median_s"])
    for number, (where, rows) in enumerate(_settings(points, ["device", "dtype"])):
        peak = float(rows["compute/peak_tflops"].median())
        panels = _roofline_panels(rows, entry_of(devices, str(rows["device"].iloc[0])), links)
        figure, axes = _panels(len(panels), size=(5.6, 4.0))
        choices, left_out = _fastest(rows)
        drawn: dict[str, Any] = {}
        for axis, panel in zip(axes, panels, strict=False):
            drawn |= _points(axis, panel, choices)
            _roofs(axis, panel, peak)
        _legend(figure, drawn)
        yield Drawn(
            f"roofline{_suffix(number)}", f"Roofline, {where}",
            "Left: work over the bytes that a rank's inputs, outputs and gradients have, each touched once. Right: work over the "
            "bytes sent by the rank that sends most; slopes are what the check of the nodes measured between two ranks. A cell "
            "near a slope is bound by it." + _said_of(left_out),
            figure,
        )  # fmt: skip


def _roofline_panels(rows: pd.DataFrame, device: dict[str, Any] | None, links: dict[str, float]) -> list[Panel]:
    """The panels of cells of one device: bytes of memory, and bytes sent where any were."""
    bandwidth = {"memory": device["memory_gbytes_per_s"]} if device else {}
    touched = rows["work"] / [least_bytes(r) for r in rows.to_dict("records")]
    panels = [Panel("FLOP per byte of inputs, outputs and gradients", rows, touched, bandwidth)]
    sent = rows[rows["comm/bytes"] > 0] if "comm/bytes" in rows else rows.iloc[:0]
    if not sent.empty:
        panels.append(Panel("FLOP per byte sent", sent, sent["work"] / sent["comm/bytes"], links))
    return panels


def _points(axis: Axes, panel: Panel, choices: Sequence[str]) -> dict[str, Any]:
    """Draw the cells of a panel; what was drawn of each choice."""
    drawn: dict[str, Any] = {}
    for i, choice in enumerate(choices):
        mine = panel.cells["choice"] == choice
        if mine.any():
            drawn[choice] = axis.scatter(
                panel.intensity[mine], panel.cells["compute/tflops_per_gpu"][mine], s=16, color=_color(i),
                marker=MARKERS[i % len(MARKERS)],
            )  # fmt: skip
    return drawn


def _roofs(axis: Axes, panel: Panel, peak: float) -> None:
    """Draw what a panel's cells lie under: the peak, and a slope for each roof."""
    rates = panel.cells["compute/tflops_per_gpu"]
    # From left of the bend of every roof, so that it is seen how far from it cells are.
    bends = [1e3 * peak / rate for rate in panel.roofs.values()]
    reach = np.geomspace(min([float(panel.intensity.min()), *bends]) / 4, float(panel.intensity.max()) * 4, 200)
    axis.set_ylim(float(rates.min()) / 3, 2 * max(peak, float(rates.max())))
    for style, (name, rate) in zip(("-", "--", "-.", ":"), panel.roofs.items(), strict=False):
        slope = np.minimum(peak, reach * rate / 1e3)
        axis.plot(reach, slope, color="0.4", linestyle=style, linewidth=1, label=f"{name}: {rate:.4g} GB/s")
    axis.axhline(peak, color="0.2", linewidth=1, label=f"peak: {peak:.3g} TFLOP/s")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(panel.label)
    axis.set_ylabel("TFLOP/s per GPU")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, loc="lower right")


def least_bytes(row: Any) -> float:
    """Bytes that a rank has to read or write at least: its q, k, v, out, in backward those again with dout, dq, dk, dv."""
    q, kv = (row["tokens_per_rank"] * row[f"num_heads_{of}"] * row["head_dim"] for of in ("q", "kv"))
    forward = 2 * q + 2 * kv
    return float(itemsize(row["dtype"]) * (forward + (forward + 2 * q + 2 * kv if row["direction"] != "forward" else 0)))


# -- common ----------------------------------------------------------------------------------------------------------


def _settings(frame: pd.DataFrame, columns: list[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    for key, rows in frame.groupby(columns, sort=False):
        yield ", ".join(str(k) for k in key if str(k)), rows


def _order(rows: pd.DataFrame, column: str) -> list[str]:
    return list(dict.fromkeys(rows[column]))


def _phases(rows: pd.DataFrame) -> list[str]:
    return (
        [p for p in PHASES if rate_column(p) in rows and rows[rate_column(p)].notna().any()]
        if (rows["direction"] != "forward").any()
        else ["forward"]
    )


def _fastest(rows: pd.DataFrame) -> tuple[list[str], int]:
    """Choices to draw, in the order of the plan, and how many are left out."""
    choices = _order(rows, "choice")
    best = rows.groupby(["problem"])["compute/tflops_per_gpu"].transform("max")
    score = (rows["compute/tflops_per_gpu"] / best).groupby(rows["choice"]).mean().sort_values(ascending=False)
    kept = set(score.index[:MOST_LINES])
    return [c for c in choices if c in kept], max(0, len(choices) - MOST_LINES)


def _said_of(left_out: int) -> str:
    return f" The {MOST_LINES} fastest are drawn; {left_out} more are in the tables." if left_out else ""


def _suffix(number: int) -> str:
    return f"-{number + 1}" if number else ""


def _color(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](number * 2 % 20 + (number // 10))


def _plot(axis: Axes, x: Any, y: Any, number: int) -> Any:
    """The line of choice ``number``."""
    return axis.plot(x, y, color=_color(number), marker=MARKERS[number % len(MARKERS)], markersize=4, linewidth=1.3)[0]


def _grid(rows: int, columns: int, size: tuple[float, float] = PANEL) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.6), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _panels(count: int, *, size: tuple[float, float] = PANEL, across: int = 3) -> tuple[Figure, list[Axes]]:
    """As many panels as asked for, side by side, then below; what is left of the last row stays empty."""
    columns = min(count, across)
    figure, grid = _grid(math.ceil(count / columns), columns, size)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes


def _tune(axis: Axes, x: str, ticks: Sequence[Any], title: str, xlabel: str, ylabel: str, floor: float | None = 0.0) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [format_tokens(int(t)) if x == "seqlen" else str(int(t)) for t in ticks], fontsize=8)
    axis.minorticks_off()
    if floor is not None:
        axis.set_ylim(bottom=floor)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(xlabel, fontsize=8)
    axis.set_ylabel(ylabel, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)


def _legend(figure: Figure, drawn: dict[str, Any]) -> None:
    figure.legend(
        list(drawn.values()), list(drawn), loc="outside upper center", ncols=min(4, len(drawn)) or 1, fontsize=8, frameon=False
    )
