"""What a trace of a server takes with each choice: the times of its batches, each as often as it stands for lines of the trace."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lcbench.grid.axes import PROBLEM
from lcbench.grid.cell import Cell
from lcbench.grid.trace import Trace
from lcbench.grid.values import parse_batch
from lcbench.report.amounts import duration, more
from lcbench.report.fitted import Column, Fitted
from lcbench.report.frame import reported
from lcbench.report.intervals import KNOWN, Median
from lcbench.report.table import Names, why_not
from lcbench.runs.records import Look
from lcbench.runs.store import Sweep

if TYPE_CHECKING:
    import pandas as pd

BATCH = ("batch", "seqlen")  # what the cells of a trace differ in
HOW = (
    "Time: forward of one attention call, of all lines, shared by data-parallel replicas. Its interval comes from those of the "
    "batches, and holds nothing of what the batches leave out of the lines"
)


@dataclass(frozen=True)
class Served:
    """What one choice takes for a trace.

    Attributes:
        cell: of the choice, with the first batch of the trace, so that cells of choices differ in nothing but the choice.
        time: seconds of all its lines, forward, which data-parallel replicas share; None where a batch has no time.
        why: the first such batch and why, and how many more there are.
        fastest: the time of the fastest choice for the same problem that is exact; None: no such choice has a time.
        predicted: nothing of it was measured.
        approximate: of one that approximates a batch at least, that, and the largest distance.
    """

    trace: Trace
    cell: Cell
    time: Median | None
    why: str = ""
    fastest: Median | None = None
    predicted: bool = False
    approximate: str = ""

    @property
    def token_s(self) -> float | None:
        """Seconds per new token."""
        return None if self.time is None else self.time.value / self.trace.totals["new tokens"]

    @property
    def slower(self) -> str:
        """By how much it is slower than the fastest, with the 95 % interval; empty of the fastest itself and without a time."""
        if self.time is None or self.fastest is None or self.time is self.fastest:
            return ""
        ratio = self.time.over(self.fastest)
        return f"{more(ratio.value)} ({more(ratio.low)} to {more(ratio.high)})"

    @property
    def interval(self) -> str:
        return "" if self.time is None else f"{duration(self.time.low)} to {duration(self.time.high)}"

    def row(self, what: str) -> dict[str, str]:
        """For a table."""
        seconds = None if self.time is None else self.time.value
        return {
            "trace": self.trace.file, "what": ", ".join(filter(None, [what, self.approximate])), "time": duration(seconds),
            "95 % interval": self.interval, "per new token": duration(self.token_s), "than the fastest": self.slower,
            "why there is none": self.why,
        }  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """For scripts, in seconds."""
        time = self.time
        return {
            "trace": self.trace.file, "choice": {axis: word for axis, word in self.cell.words.items() if axis not in BATCH},
            "time_s": time and time.value, "low_s": time and time.low, "high_s": time and time.high,
            "s_per_new_token": self.token_s, "why": self.why or None, "predicted": self.predicted,
            "approximate": self.approximate or None,
        }  # fmt: skip


def served(sweep: Sweep, seen: Look, frame: pd.DataFrame | None = None, *, predicted: bool = False) -> list[Served]:
    """What every choice takes for every trace of a sweep, problem by problem in the order of the plan, the fastest first.

    Args:
        frame: the sweep's ``frame.reported``, where it is there already.
        predicted: by predictions, whatever was measured.
    """
    if not seen.traces:
        return []
    every = reported(sweep, seen, predicted=predicted) if frame is None else frame
    rows = {str(row["cell"]): row for row in every.to_dict("records")}
    cells = [record.entry.cell for record in seen.records.values()]
    found = []
    for trace in seen.traces:
        problems: dict[str, list[Served]] = {}
        for mine in _by_choice(cells, trace):
            one = _served(trace, mine, rows, predicted=predicted)
            problems.setdefault(_key(one.cell, PROBLEM), []).append(one)
        for answers in problems.values():
            found += _ranked(answers)
    return found


def _by_choice(cells: Iterable[Cell], trace: Trace) -> Iterable[dict[str, Cell]]:
    """Cells with a batch of the trace that differ in nothing else, by their batch."""
    found: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        if cell.config.get("batch") in trace.weights:
            found.setdefault(_key(cell, cell.config), {})[cell.config["batch"]] = cell
    return found.values()


def _key(cell: Cell, axes: Iterable[str]) -> str:
    return json.dumps({axis: cell.config.get(axis) for axis in axes if axis not in BATCH}, sort_keys=True)


def _served(trace: Trace, cells: dict[str, Cell], rows: dict[str, dict[str, Any]], *, predicted: bool) -> Served:
    known = {batch: rows[cell.id] for batch, cell in cells.items() if cell.id in rows}
    missing = {batch: why for batch in trace.weights if (why := _why(known.get(batch)))}
    cell = _at(next(iter(cells.values())), next(iter(trace.weights)))
    if missing:
        batch, why = next(iter(missing.items()))
        others = f"; and {len(missing) - 1} more of {len(trace.weights)} batches" if len(missing) > 1 else ""
        return Served(trace, cell, None, f"{batch}: {why}{others}", predicted=predicted)
    times = [known[batch]["timed/forward"] for batch in trace.weights]
    passes = [lines / cell.mesh.dp for lines in trace.weights.values()]  # replicas have a batch each
    approximate = [known[batch] for batch in trace.weights if known[batch]["approximate"]]
    furthest = max(approximate, key=lambda row: float(row.get("check/distance") or 0.0), default={"approximate": ""})
    time = weighted_sum(times, passes, together=predicted)
    return Served(trace, cell, time, predicted=predicted, approximate=furthest["approximate"])


def _why(row: dict[str, Any] | None) -> str:
    """Why a cell has no time that counts; empty: it has one."""
    if row is None:
        return "not in the sweep"
    if row["good"] and isinstance(row["timed/forward"], Median):
        return ""
    return why_not(row) or ("no time of forward" if row["good"] else f"{row['status']}, not measured")


def _at(cell: Cell, batch: str) -> Cell:
    """The same cell with another batch."""
    made = parse_batch(batch)
    assert made is not None
    return Cell.from_config({**cell.config, "batch": batch, "seqlen": made.tokens})


def _ranked(answers: Sequence[Served]) -> list[Served]:
    ranked = sorted(answers, key=lambda one: math.inf if one.time is None else one.time.value)
    fastest = next((one.time for one in ranked if not one.approximate), None)
    return [replace(one, fastest=fastest) for one in ranked]


def weighted_sum(times: Sequence[Median], weights: Sequence[float], *, together: bool = False) -> Median:
    """The sum of times, each as often as its weight says.

    Its variance is the sum of those of the weighted times: blocks of different cells are independent. Its degrees of freedom are
    those of Welch and Satterthwaite (1946), at most those that all cells' noise was learnt from. The interval is of its logarithm,
    as theirs are.

    Args:
        together: times that are off together, as predictions by one fit are: then their standard deviations add up.
    """
    value = math.fsum(weight * time.value for time, weight in zip(times, weights, strict=True))
    parts = [weight * time.value / value * time.sigma for time, weight in zip(times, weights, strict=True)]
    known = all(time.known for time in times)
    if together:
        return Median(value, math.fsum(parts), KNOWN, KNOWN, known)
    variance = math.fsum(part**2 for part in parts)
    least = math.fsum(part**4 / time.dof for part, time in zip(parts, times, strict=True))
    most = min(time.most_dof for time in times)
    return Median(value, math.sqrt(variance), min(variance**2 / least if least else KNOWN, most), most, known)


def rows_of(found: Iterable[Served]) -> list[dict[str, str]]:
    """As text, for a report."""
    return [one.row(names[one.cell.id]) for _, mine, names, _ in _by_trace(found) for one in mine]


def tables(found: Iterable[Served], name: str) -> Iterator[Fitted]:
    """For a terminal, a table for each trace."""
    for trace, mine, names, same in _by_trace(found):
        predicted = ", predicted, not measured" if any(one.predicted for one in mine) else ""
        title = f"sweep {name}: the time of trace {trace.file}{predicted}"
        table = Fitted(": ".join(filter(None, [title, same])), [
            Column("choice", folds=True, wanted=32), Column("time", right=True), Column("95 % interval", 1, right=True),
            Column("per new\ntoken", right=True), Column("than the fastest", 2, right=True),
        ], caption=f"{trace}. {HOW}")  # fmt: skip
        for one in mine:
            _, _, *numbers, why = one.row("").values()
            table.add(names[one.cell.id], *(number or "-" for number in numbers), below=why or one.approximate)
        yield table


def _by_trace(found: Iterable[Served]) -> Iterator[tuple[Trace, list[Served], dict[str, str], str]]:
    """Of each trace its answers, what to call their cells, and what all of them share."""
    for trace, answers in groupby(found, key=lambda one: one.trace):
        mine = list(answers)
        cells = [one.cell for one in mine]
        names = Names.of(cells)
        what = {cell.id: names.what[cell.id].strip() for cell in cells}
        if len(cells) == 1:
            what = {cell.id: " ".join(cell.told(axis) for axis in cell.words if axis not in BATCH) for cell in cells}
        same = ", ".join(word for word in names.same.split(", ") if word.partition(" ")[0] not in BATCH)
        yield trace, mine, what, same
