"""Two sweeps, cell by cell: what became slower or faster beyond the noise, what is only in one, how their environments differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median

from lcbench.grid.axes import CHOICE, LABEL, PROBLEM, renamed
from lcbench.grid.cell import Cell
from lcbench.grid.labels import labels, words_of
from lcbench.report.environment import Environment, environment_of
from lcbench.report.foretold import Held, against
from lcbench.report.frame import PHASES
from lcbench.report.intervals import LEVEL, Ratio, Timing, holm, ratios
from lcbench.runs.attempt import Attempt
from lcbench.runs.store import Sweep


@dataclass(frozen=True)
class Side:
    """The newest good attempts of a sweep by what they measured, why other cells have none, and predictions."""

    good: dict[str, tuple[Cell, Attempt]]
    others: dict[str, tuple[Cell, str]]
    environment: Environment
    foretold: dict[str, tuple[Cell, Attempt]]  # predictions, whatever was measured


@dataclass(frozen=True)
class Compared:
    """One cell in both. ``ratio``: time in B over time in A, so above 1 is slower; ``p_adjusted``: its p value after Holm's
    correction for all cells that were compared.
    """

    cell: Cell
    a: Attempt
    b: Attempt
    ratio: Ratio
    p_adjusted: float

    @property
    def verdict(self) -> str:
        if self.p_adjusted > LEVEL:
            return "same"
        return "slower" if self.ratio.value > 1 else "faster"


@dataclass(frozen=True)
class Share:
    """The cells of one value of an axis, or all of them. ``ratio``: geometric mean of time in B over time in A."""

    axis: str
    value: str
    cells: int
    ratio: float
    faster: int
    slower: int

    @classmethod
    def of(cls, axis: str, value: str, cells: Sequence[Compared]) -> Share:
        verdicts = [c.verdict for c in cells]
        ratio = geometric_mean([c.ratio.value for c in cells])
        return cls(axis, value, len(cells), ratio, verdicts.count("faster"), verdicts.count("slower"))

    @property
    def counts(self) -> str:
        """In words: ``0 slower, 57 faster, 426 same of 483 cells``."""
        same = self.cells - self.faster - self.slower
        return f"{self.slower} slower, {self.faster} faster, {same} same of {self.cells} cells"


@dataclass(frozen=True)
class Comparison:
    """``run_to_run``: standard deviation of the logarithm by which the sweeps differ from cell to cell beyond what blocks explain,
    which the intervals hold; None where there are too few cells to tell. ``same``: what of the environments was compared and is the
    same.
    """

    phase: str
    cells: list[Compared]
    only_a: dict[str, str]  # what -> why B has it not
    only_b: dict[str, str]
    environment: dict[str, tuple[str, str]]
    run_to_run: float | None
    same: tuple[str, ...] = ()

    @property
    def whole(self) -> Share:
        """All cells; there has to be one."""
        return Share.of("", "", self.cells)

    def by_axis(self) -> list[Share]:
        """Of each axis of a label with several values here: each of them, with options that differ, in the order of the plan."""
        found = []
        for axis in LABEL:
            groups: dict[str, list[Compared]] = {}
            words = words_of((c.cell for c in self.cells), axis)
            for c in self.cells:
                groups.setdefault(words[c.cell.id], []).append(c)
            if len(groups) > 1:
                found += [Share.of(axis, value, cells) for value, cells in groups.items()]
        return found

    def by(self, verdict: str) -> list[Compared]:
        """Those with a verdict, the largest difference first."""
        chosen = [c for c in self.cells if c.verdict == verdict]
        return sorted(chosen, key=lambda c: max(c.ratio.value, 1 / c.ratio.value), reverse=True)

    @property
    def known(self) -> bool:
        """Whether run-to-run noise is in every interval: from blocks, or from the spread of the ratios."""
        return all(c.ratio.known for c in self.cells)

    @property
    def median_ratio(self) -> float | None:
        """Of all cells; None if there are none. It holds what all cells of a sweep share: a slower node, or a change."""
        return median(c.ratio.value for c in self.cells) if self.cells else None

    def regressions(self, by: float) -> list[Compared]:
        """Cells that are slower beyond the noise (than 1), and by more than this share."""
        return [c for c in self.by("slower") if c.ratio.value > 1.0 + by]


def side_of(sweep: Sweep, across: Sequence[str] = ()) -> Side:
    """A sweep as one side of a comparison. Cells are the same if they differ only in how they were measured and in ``across``.

    Args:
        across: axes in which the same cell may differ.

    Raises:
        ValueError: no such axis, or several cells that differ in these only.
    """
    if unknown := [axis for axis in across if axis not in (*CHOICE, *PROBLEM)]:
        raise ValueError(renamed(unknown[0]) or f"{unknown[0]!r} is not an axis; axes: {', '.join((*CHOICE, *PROBLEM))}")
    alike = {*CHOICE, *PROBLEM} - {*across}
    good: dict[str, tuple[Cell, Attempt]] = {}
    others: dict[str, tuple[Cell, str]] = {}
    foretold: dict[str, tuple[Cell, Attempt]] = {}
    for record in sweep.look().records.values():
        cell, last = record.entry.cell, record.last
        key = json.dumps({k: v for k, v in cell.config.items() if k in alike}, sort_keys=True)
        if key in good and across:
            raise ValueError(f"sweep {sweep.name} has several cells that differ in {', '.join(across)} only, such as {cell.label}")
        if record.prediction is not None and record.prediction.status == "predicted":
            foretold[key] = (cell, record.prediction)
        if last is not None and last.status == "ok" and not last.no_speed:
            good[key] = (cell, last)
        elif last is not None and last.status == "ok":
            others[key] = (cell, f"no speed: {last.no_speed}")
        else:
            failure = record.failure
            others[key] = (cell, f"{failure.kind}: {failure.cause}" if failure else record.status)
    return Side(good, others, environment_of(attempt for _, attempt in good.values()), foretold)


def predictions_of(a: Side, b: Side, phase: str) -> list[Held]:
    """What was predicted in one sweep held against what was measured in the other, both ways; of a cell that has both ways one."""
    found: dict[tuple[str, str], Held] = {}
    for measured, predicted in ((a, b), (b, a)):
        for key in measured.good.keys() & predicted.foretold.keys():
            rows = against(predicted.foretold[key][0], predicted.foretold[key][1], measured.good[key][1], [phase])
            found |= {(measured.good[key][0].id, row.phase): row for row in rows}
    return list(found.values())


def compare(a: Side, b: Side, phase: str = "total") -> Comparison:
    """Every cell that has a good result in both, by its time of a phase. ``intervals.ratios`` says what noise an interval holds.

    Raises:
        ValueError: no such phase.
    """
    if phase not in PHASES:
        raise ValueError(f"phase {phase!r} is not one of {', '.join(PHASES)}")
    pairs = []
    for key in a.good:
        if key in b.good and not _unlike(a.good[key][1], b.good[key][1]):
            (cell, left), (_, right) = a.good[key], b.good[key]
            timings = [Timing.of(attempt.metrics, attempt.samples, phase) for attempt in (left, right)]
            if timings[0] is not None and timings[1] is not None:
                pairs.append((cell, left, right, timings[0], timings[1]))
    found, run_to_run = ratios([before for *_, before, _ in pairs], [after for *_, after in pairs])
    adjusted = holm([ratio.p for ratio in found])
    cells = [Compared(*pair[:3], ratio, p) for pair, ratio, p in zip(pairs, found, adjusted, strict=True)]
    differences = _differences(a.environment, b.environment)
    same = tuple(name for name in dict.fromkeys([*a.environment, *b.environment]) if name not in differences)
    return Comparison(phase, cells, _only(a, b), _only(b, a), differences, run_to_run, same)


def _only(mine: Side, other: Side) -> dict[str, str]:
    """Good cells of one side that the other has not, or has of a strategy that is no equal, and why."""
    missing = [
        (cell, other.others[key][1] if key in other.others else "not in that sweep")
        for key, (cell, _) in mine.good.items()
        if key not in other.good
    ]
    missing += [
        (cell, _unlike(attempt, other.good[key][1])) for key, (cell, attempt) in mine.good.items() if key in other.good
        and _unlike(attempt, other.good[key][1])
    ]  # fmt: skip
    named = labels(cell for cell, _ in mine.good.values()) if missing else {}
    return {f"{named[cell.id]} {cell.id}": why for cell, why in missing}


def _unlike(mine: Attempt, other: Attempt) -> str:
    """Why the times of two results are of no equal work, where one alone approximates; else empty."""
    if bool(mine.approximate) == bool(other.approximate):
        return ""
    return f"there {other.approximate}, here exact" if other.approximate else f"there exact, here {mine.approximate}"


def _differences(a: Environment, b: Environment) -> dict[str, tuple[str, str]]:
    """What is not the same on both sides, by name."""
    return {name: (_said(a, name), _said(b, name)) for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)}


def _said(environment: Environment, name: str) -> str:
    return ", ".join(sorted(environment.get(name, ()))) or "-"
