"""The Pareto front of time, memory and GPUs, by prediction, and its figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lcbench.advice.ranking import Candidate
from lcbench.advice.sizing import GIB, predicted_s, sizable
from lcbench.predict.predictor import Predictor
from lcbench.report.drawing import GREY, Drawn, legend, panels
from lcbench.report.front import unbeaten
from lcbench.report.palette import MARKERS, style
from lcbench.report.table import Names

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in time, memory and GPUs at once, by GPUs and time."""
    timed = sizable(candidates)
    best = unbeaten([(c.cell.scale.world_size, predicted_s(c), c.needs_bytes or 0) for c in timed])
    front = [c for c, its in zip(timed, best, strict=True) if its]
    return sorted(front, key=lambda c: (c.cell.scale.world_size, predicted_s(c)))


def pareto_figure(candidates: Sequence[Candidate], predictor: Predictor) -> Drawn:
    """Time and memory over GPUs, a mark for each choice: hollow, since nothing of it is measured. Those on the front have
    their 95 % interval.
    """
    timed, front = sizable(candidates), pareto(candidates)
    names = Names.of(c.cell for c in timed)
    title = f"Time, memory and GPUs, predicted, not measured: {names.same}"
    figure, (time, memory) = panels(2, title, f"machine {predictor.machine.name}", size=(5.2, 3.6))
    drawn = _marks(time, timed, lambda c: 1e3 * predicted_s(c), "ms, predicted")
    _marks(memory, timed, lambda c: (c.needs_bytes or 0) / GIB, "GiB a GPU, predicted")
    for c in front:
        if c.prediction is not None:
            for axis, ends, unit in ((time, c.prediction.interval, 1e3), (memory, c.prediction.needs_interval, 1 / GIB)):
                axis.plot(2 * [c.cell.scale.world_size], [unit * end for end in ends], color=GREY, linewidth=0.8)
    legend(figure, drawn)
    caption = "Predicted. A line is the 95 % interval of a choice that no other beats in time, memory and GPUs at once."
    alt = f"not beaten: {'; '.join(names.what[c.cell.id] for c in front)}"
    return Drawn("pareto_predicted", title, caption, alt, figure)


def _marks(axis: Axes, candidates: Sequence[Candidate], of: Callable[[Candidate], float], label: str) -> dict[str, object]:
    """A panel over GPUs; what was drawn, by strategy."""
    drawn: dict[str, object] = {}
    for number, strategy in enumerate(dict.fromkeys(c.cell.words["cp"] for c in candidates)):
        own, look = [c for c in candidates if c.cell.words["cp"] == strategy], style(number)
        drawn[strategy] = axis.plot(
            [c.cell.scale.world_size for c in own], [of(c) for c in own],
            linestyle="none", marker=MARKERS[look.marker], markerfacecolor="none", markeredgecolor=look.color,
        )[0]  # fmt: skip
    scales = sorted({c.cell.scale.world_size for c in candidates})
    axis.set_xscale("log", base=2)
    axis.set_xticks(scales, list(map(str, scales)), fontsize=8)
    axis.set_yscale("log")
    axis.set_xlabel("GPUs", fontsize=8)
    axis.set_ylabel(label, fontsize=8)
    axis.grid(alpha=0.25)
    return drawn
