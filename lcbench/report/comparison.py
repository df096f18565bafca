"""Two sweeps, cell by cell: what became slower or faster beyond the noise, what is only in one, how their environments differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from lcbench.grid.cell import Cell
from lcbench.report.environment import Environment, environment_of
from lcbench.report.frame import PHASES, time_of
from lcbench.report.intervals import Median, Ratio, between_runs
from lcbench.runs.store import Attempt, Sweep


@dataclass(frozen=True)
class Side:
    """The newest good attempts of a sweep by what they measured, and why other cells have none."""

    good: dict[str, tuple[Cell, Attempt]]
    others: dict[str, tuple[Cell, str]]
    environment: Environment


@dataclass(frozen=True)
class Compared:
    """One cell in both. ``ratio``: time in B over time in A, so above 1 is slower."""

    cell: Cell
    a: Attempt
    b: Attempt
    ratio: Ratio

    @property
    def verdict(self) -> str:
        if not self.ratio.beyond_noise:
            return "same"
        return "slower" if self.ratio.value > 1 else "faster"


@dataclass(frozen=True)
class Comparison:
    """``run_to_run``: standard deviation of the logarithm that the intervals were widened by; None where it is not known."""

    phase: str
    cells: list[Compared]
    only_a: dict[str, str]  # what -> why B has it not
    only_b: dict[str, str]
    environment: dict[str, tuple[str, str]]
    run_to_run: float | None

    def by(self, verdict: str) -> list[Compared]:
        """Those with a verdict, the largest difference first."""
        chosen = [c for c in self.cells if c.verdict == verdict]
        return sorted(chosen, key=lambda c: max(c.ratio.value, 1 / c.ratio.value), reverse=True)

    def regressions(self, by: float) -> list[Compared]:
        """Cells that are slower beyond the noise, and by more than this share."""
        return [c for c in self.by("slower") if c.ratio.value > 1.0 + by]


def side_of(sweep: Sweep, across: Sequence[str] = ()) -> Side:
    """A sweep as one side of a comparison; cells are the same if they differ in nothing but ``measure`` and the axes ``across``.

    Raises:
        ValueError: no such axis, or several cells that differ in these only.
    """
    good: dict[str, tuple[Cell, Attempt]] = {}
    others: dict[str, tuple[Cell, str]] = {}
    for record in sweep.look().records.values():
        cell, last = record.entry.cell, record.last
        if unknown := [axis for axis in across if axis not in cell.config]:
            raise ValueError(f"{unknown[0]!r} is not an axis; axes: {', '.join(k for k in cell.config if k != 'measure')}")
        key = json.dumps({k: v for k, v in cell.config.items() if k not in ("measure", *across)}, sort_keys=True)
        if key in good and across:
            raise ValueError(f"sweep {sweep.name} has several cells that differ in {', '.join(across)} only, such as {cell.label}")
        if last is not None and last.status == "ok":
            good[key] = (cell, last)
        else:
            failure = record.failure
            others[key] = (cell, f"{failure.kind}: {failure.cause}" if failure else record.status)
    return Side(good, others, environment_of(attempt for _, attempt in good.values()))


def compare(a: Side, b: Side, phase: str = "total") -> Comparison:
    """Every cell that has a good result in both, by the median time of a phase.

    A ratio's interval covers the iterations of both and, from ``intervals.between_runs``, what two runs of the same differ by.

    Raises:
        ValueError: no such phase.
    """
    if phase not in PHASES:
        raise ValueError(f"phase {phase!r} is not one of {', '.join(PHASES)}")
    pairs = []
    for key in a.good:
        if key in b.good:
            (cell, left), (_, right) = a.good[key], b.good[key]
            if f"{phase}_s" in left.samples and f"{phase}_s" in right.samples:
                pairs.append((cell, left, right, _time(right, phase).over(_time(left, phase))))
    sigma = between_runs([ratio for *_, ratio in pairs])
    cells = [Compared(cell, left, right, ratio.widened(sigma or 0.0)) for cell, left, right, ratio in pairs]
    return Comparison(phase, cells, _only(a, b), _only(b, a), _differences(a.environment, b.environment), sigma)


def _time(attempt: Attempt, phase: str) -> Median:
    return time_of(attempt.metrics, attempt.samples[f"{phase}_s"], phase)


def _only(mine: Side, other: Side) -> dict[str, str]:
    """Good cells of one side that the other has not, and why."""
    missing = [
        (cell, other.others[key][1] if key in other.others else "not in that sweep")
        for key, (cell, _) in mine.good.items()
        if key not in other.good
    ]
    return {f"{cell.label} {cell.id}": why for cell, why in missing}


def _differences(a: Environment, b: Environment) -> dict[str, tuple[str, str]]:
    """What is not the same on both sides, by name."""
    return {name: (_said(a, name), _said(b, name)) for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)}


def _said(environment: Environment, name: str) -> str:
    return ", ".join(sorted(environment.get(name, ()))) or "-"
