"""Predictions held against what was measured of the same cells: row by row, and how far off they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from lcbench.grid.axes import ALWAYS_TOLD, AXES, LABEL
from lcbench.grid.cell import Cell
from lcbench.grid.labels import words_of
from lcbench.problem import format_tokens
from lcbench.report.amounts import duration, percent, times
from lcbench.report.frame import PHASES
from lcbench.runs.attempt import Attempt
from lcbench.runs.records import Record

MOST_OF = 0.9  # of the errors, which a summary names


@dataclass(frozen=True)
class Held:
    """The time of a phase, predicted and measured, in seconds.

    Attributes:
        band: of the prediction: the time should lie within a factor of 1 + it (95 %).
    """

    cell: Cell
    phase: str
    predicted_s: float
    measured_s: float
    band: float

    @property
    def error(self) -> float:
        """Share of the measured time by which the prediction is more; negative: less."""
        return self.predicted_s / self.measured_s - 1

    @property
    def within(self) -> bool:
        """Whether what was measured lies within the prediction's band."""
        return abs(math.log(self.predicted_s / self.measured_s)) <= math.log1p(self.band)

    def row(self, choice: str, mask: str, further: str) -> dict[str, str]:
        """For a table. ``choice``, ``mask``, ``further``: what to call those of its cell, and the rest of its label."""
        return {
            "cell": self.cell.id, "choice": choice, "mask": mask, "length": format_tokens(self.cell.problem.seqlen),
            "scale": self.cell.config["scale"], "further": further, "phase": self.phase,
            "predicted": duration(self.predicted_s), "measured": duration(self.measured_s), "error": signed(self.error),
            "band": f"within {times(1 + self.band)}", "in its band": "yes" if self.within else "no",
        }  # fmt: skip


def rows_of(found: Sequence[Held]) -> list[dict[str, str]]:
    """For a table, with all that tells one cell from another; no column of what none of them has."""
    cells = [h.cell for h in found]
    words = {axis: words_of(cells, axis) for axis in LABEL if any(axis in cell.config for cell in cells)}
    rest = [axis for axis in words if axis not in ALWAYS_TOLD]
    rows = []
    for h in found:
        told = {axis: by_id[h.cell.id] for axis, by_id in words.items()}
        further = " ".join(
            f"{axis}({told[axis]})" if AXES[axis].has_options else f"{axis}={told[axis]}" for axis in rest if axis in h.cell.config
        )
        rows.append(h.row(f"{told['cp']} {told['kernel']}", told["mask"], further))
    return rows if rest else [{k: v for k, v in row.items() if k != "further"} for row in rows]


def held(records: Iterable[Record], phases: Sequence[str] = PHASES) -> list[Held]:
    """Every phase of every cell that has both a prediction and a good result."""
    return [h for r in records if r.last is not None for h in against(r.entry.cell, r.prediction, r.last, phases)]


def against(cell: Cell, prediction: Attempt | None, measured: Attempt, phases: Sequence[str] = PHASES) -> Iterator[Held]:
    """The phases that both a prediction and a good result of a cell have."""
    if prediction is None or prediction.band is None or measured.status != "ok" or measured.no_speed:
        return
    for phase in phases:
        both = [attempt.metrics.get(f"time/{phase}/median_s", 0.0) for attempt in (prediction, measured)]
        if min(both) > 0:
            yield Held(cell, phase, both[0], both[1], prediction.band)


def said(rows: Sequence[Held]) -> str:
    """How far off predictions of one phase are, in a sentence; there has to be one."""
    errors = [abs(row.error) for row in rows]
    most = float(np.quantile(errors, MOST_OF))
    inside = sum(row.within for row in rows)
    return (
        f"{len(rows)} predictions of {rows[0].phase} held against what was measured: median error {percent(median(errors))}, "
        f"{100 * MOST_OF:.0f} % within {percent(most)}; {inside} of {len(rows)} times lie within their band"
    )


def signed(share: float) -> str:
    return f"{100 * share:+.1f} %"
