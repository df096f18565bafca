"""A schedule, or a run of it, as a picture: one row per rank, time to the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lcbench.schedule.verify import ScheduleCost

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Timeline = Sequence[Sequence[Sequence[float]]]  # per rank, per rank step: its number, begin, sent, computed, there; seconds

COMPUTE, SEND, WAIT = "#4878cf", "#e1812c", "#d65f5f"
PREDICTED = "#fbf7e6"  # behind what nobody measured
ROW_HEIGHT = 0.32
FEWEST_ROWS, MOST_ROWS = 6, 64


@dataclass(frozen=True)
class Predicted:
    """A simulated iteration: ``timeline`` as of a measured one, and ``basis``, the machine and what its times rest on, in words."""

    timeline: Timeline
    basis: str


def save(
    report: ScheduleCost, title: str, path: Path, timeline: Timeline | None = None, predicted: Predicted | None = None
) -> None:  # fmt: skip
    """Draw the schedule of forward by work and bytes, and below it, if given, a predicted and a measured iteration.

    Both have one time axis. The suffix names the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = min(max(report.schedule.world_size, FEWEST_ROWS), MOST_ROWS)
    panels = 1 + bool(timeline) + bool(predicted)
    figure = Figure(figsize=(11, panels * (1.2 + ROW_HEIGHT * rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    _planned(report, title, axes[0])
    shown = [each for each in (predicted and predicted.timeline, timeline) if each]
    end = max((there for each in shown for rank_steps in each for *_, there in rank_steps), default=0.0)
    if predicted:
        _bars(predicted.timeline, report.traffic.steps, end, axes[1], "//")
        axes[1].set_title(f"PREDICTED, not measured ({predicted.basis}): the same colours, hatched", fontsize=9)
        axes[1].set_facecolor(PREDICTED)
    if timeline:
        _bars(timeline, report.traffic.steps, end, axes[-1], "")
        axes[-1].set_title("measured: blue computes, orange begins messages, red waits for them and merges", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _planned(report: ScheduleCost, title: str, axes: Axes) -> None:
    """Bars of work: a step is as wide as its busiest rank has pairs. Thin bars of bytes sent: the most is as wide as its step."""
    ranks, steps = report.schedule.world_size, len(report.schedule.steps)
    pairs = report.step_pairs
    sent = np.zeros((steps, ranks))
    for transfer in report.traffic.transfers:
        if transfer.begin < steps:
            np.add.at(sent[transfer.begin], transfer.rows[:, 0], transfer.bytes(report.schedule, report.problem))
    least = pairs.sum() / ranks / max(steps, 1) * 0.25  # a step that only moves things is still to be seen
    widths = np.maximum(pairs.max(axis=1), max(least, 1))
    begins = np.concatenate([[0], np.cumsum(widths)])
    every = np.arange(ranks)
    for step in range(steps):
        axes.barh(every, pairs[step], left=begins[step], height=0.5, color=COMPUTE, edgecolor="white", linewidth=0.4)
        if sent.max():
            wide = sent[step] / sent.max() * widths[step]
            axes.barh(every + 0.36, wide, left=begins[step], height=0.14, color=SEND)
        axes.axvline(begins[step + 1], color="#bbbbbb", linewidth=0.5, zorder=0)
        if ranks <= FEWEST_ROWS:
            _label(report, step, begins[step], axes)
    axes.set_title(
        f"planned, {title}: {steps} steps, each as wide as its busiest rank; balance {report.imbalance:.2f}, 1.00 is perfect",
        fontsize=9,
    )
    what = "unmasked pairs" if report.problem.rule is None else "tokens"
    axes.set_xlabel(f"blue: million {what}, over the query heads; orange: bytes sent in the step", fontsize=8)
    axes.xaxis.set_major_formatter(lambda pairs, _: f"{pairs / 1e6:g}")
    _ranks(axes, ranks, begins[-1])


def _label(report: ScheduleCost, step: int, left: float, axes: Axes) -> None:
    for rank, _, q, k in report.schedule.steps[step].tiles.tolist():
        names = [",".join(map(str, side.bundles[b])) for side, b in ((report.schedule.q, q), (report.schedule.k, k))]
        text = f"q{names[0]} k{names[1]}"
        if len(text) <= 12 and report.step_pairs[step, rank]:
            axes.text(left, rank, f" {text}", va="center", fontsize=6, color="white")


def _bars(timeline: Timeline, steps: int, end: float, axes: Axes, hatch: str) -> None:
    """What each rank did when, from its own start, to ``end`` seconds; backward begins at the dashed line."""
    for rank, rank_steps in enumerate(timeline):
        for number, begin, sent, computed, there in rank_steps:
            for left, right, color in ((begin, sent, SEND), (sent, computed, COMPUTE), (computed, there, WAIT)):
                style = {"color": "white", "edgecolor": color, "linewidth": 0.5} if hatch else {"color": color}
                axes.barh(rank, 1e3 * (right - left), left=1e3 * left, height=0.6, hatch=hatch * 2, **style)
            if number == steps:
                axes.plot([1e3 * begin] * 2, [rank - 0.5, rank + 0.5], color="black", linestyle="--", linewidth=0.8)
    axes.set_xlabel("ms", fontsize=8)
    _ranks(axes, len(timeline), 1e3 * end)


def _ranks(axes: Axes, ranks: int, end: float) -> None:
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_xlim(0, end)
    axes.set_ylabel("rank", fontsize=8)
    axes.set_yticks(range(0, ranks, max(1, ranks // 16)))
    axes.tick_params(labelsize=7)
