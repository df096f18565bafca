"""What a ranking and a race say, in tables and sentences. What is predicted says so, with how far off it may be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcbench.advice.racing import EQUAL, Outcome, Runner
from lcbench.advice.ranking import MAY_WIN, Candidate, by_problem
from lcbench.advice.why import PARTS, Split, decided, measured_splits, predicted_split
from lcbench.predict.predictor import Predictor
from lcbench.report.amounts import digits, duration, more, percent, times
from lcbench.report.fitted import Column, Fitted
from lcbench.report.intervals import LEVEL, Median, Ratio
from lcbench.report.table import Names
from lcbench.report.winners import CLOSE

if TYPE_CHECKING:
    import pandas as pd

MOST_NAMES = 8  # of choices that a line lists
NO_MEMORY = "oom"


def band(error: float) -> str:
    """How far off a prediction may be, as its relative half-width of 95 % says."""
    return f"within {percent(error, 0)}" if error < 0.5 else f"within a factor {1 + error:.2g}"


def predicted_table(group: Sequence[Candidate], predictor: Predictor) -> Fitted:
    """The candidates for one problem that may win; kernels that are predicted alike with one strategy share a row."""
    names = Names.of(c.cell for c in group)
    table = Fitted(names.title(f"predicted for machine {predictor.machine.name}, not measured"), [
        Column("choice", folds=True, wanted=28), Column("ms,\npredicted", right=True), Column("95 %", 1, right=True),
        Column("vs best", right=True), *(Column(part.replace(" ", "\n"), 3, right=True) for part in PARTS),
        Column("GiB a\nrank", 2, right=True), Column("95 %", 4, right=True),
    ])  # fmt: skip
    inside = [c for c in group if c.fate in MAY_WIN]
    best = min((c.prediction.seconds for c in inside if c.prediction), default=0.0)
    for alike in _alike(inside):
        first, kernels = alike[0], [c.cell.config["kernel"]["name"] for c in alike]
        below = f"no prediction: {first.why}" if first.prediction is None else ""
        what = names.what[first.cell.id]
        if len(alike) > 1:
            what, below = (
                f"{first.cell.words['cp']}, any of {len(alike)} kernels",
                below or f"predicted alike: {', '.join(kernels)}",
            )
        table.add(what, *_predicted(first, best), below=below)
    return table


def none_may_win(group: Sequence[Candidate]) -> str | None:
    """A line for a problem that no choice may win, whose table would have no row; None: some may. ``reasons`` says why of each."""
    if any(c.fate in MAY_WIN for c in group):
        return None
    alone = any(c.fate == "approximates" for c in group)
    advice = "; what only approximates is measured, side by side and with its errors, by python -m lcbench.sweep" if alone else ""
    return f"{Names.of(c.cell for c in group).title('nothing to rank')}: no exact choice fits and can run{advice}"


def _alike(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates whose predictions differ in nothing but the name of the kernel, together, in their order."""
    found: dict[str, list[Candidate]] = {}
    for c in candidates:
        config = c.cell.config
        predicted = c.why if c.prediction is None else [c.prediction.seconds, c.prediction.error, *c.prediction.needs_interval]
        found.setdefault(json.dumps([config["cp"], config["reduce_dtype"], predicted]), []).append(c)
    return list(found.values())


def _predicted(candidate: Candidate, best_s: float) -> list[str]:
    found = candidate.prediction
    if found is None:
        return ["-"] * (5 + len(PARTS))
    parts = predicted_split(found).seconds
    low, high = found.interval
    return [
        digits(1e3 * found.seconds), f"{digits(1e3 * low)} to {digits(1e3 * high)}",
        times(1.0) if found.seconds == best_s else more(found.seconds / best_s),
        *(digits(1e3 * parts[part]) for part in PARTS), digits(found.needs_bytes / (1 << 30)),
        " to ".join(digits(end / (1 << 30)) for end in found.needs_interval),
    ]  # fmt: skip


def reasons(group: Sequence[Candidate]) -> list[str]:
    """Lines below the table of a problem: what predictions rest on, and why the choices that are not in it cannot win."""
    names = Names.of(c.cell for c in group)
    found = {
        f"predicted times are {band(c.prediction.error)} in 95 % of cases; {c.prediction.basis}"
        for c in group if c.prediction is not None and c.fate in MAY_WIN
    }  # fmt: skip
    lines = sorted(found)
    slow = [c for c in group if c.fate == "cannot win"]
    if slow:
        least = min(c.prediction.seconds for c in slow if c.prediction)
        choices = [f"{a[0].cell.words['cp']} ({len(a)} kernels)" if len(a) > 1 else names.what[a[0].cell.id] for a in _alike(slow)]
        lines.append(f"cannot win, however far off predictions are: {_listed(choices)}; predicted {duration(least)} and more")
    lines += [f"does not fit: {names.what[c.cell.id]} {c.why}" for c in group if c.fate == "does not fit"]
    lines += [f"no rival, as it approximates: {names.what[c.cell.id]}, {_of(c)}" for c in group if c.fate == "approximates"]
    return [*lines, *_cannot_run(c for c in group if c.fate == "cannot run")]


def _of(candidate: Candidate) -> str:
    """What is predicted of a choice, in words."""
    found = candidate.prediction
    return f"predicted {duration(found.seconds)}" if found is not None else f"no prediction: {candidate.why}"


def _cannot_run(candidates: Iterable[Candidate]) -> Iterator[str]:
    """A line for each reason, with all kernels, or strategies, that have it."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for c in candidates:
        axis, _, rest = c.why.partition(" ")
        name, _, reason = rest.partition(": ")
        found.setdefault((axis, reason.removeprefix(f"{name} ")), {})[name] = None
    for (axis, reason), cells in found.items():
        yield f"cannot run: {axis} {', '.join(cells)}: {reason}"


def _listed(words: Sequence[str]) -> str:
    shown = ", ".join(words[:MOST_NAMES])
    return f"{shown} and {len(words) - MOST_NAMES} more" if len(words) > MOST_NAMES else shown


def to_rows(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Candidates for a program; what is predicted has a key that says so."""
    return [_row(c) for c in candidates]


def _row(candidate: Candidate) -> dict[str, Any]:
    cell, found = candidate.cell, candidate.prediction
    row: dict[str, Any] = {"cell": cell.id, "label": cell.label, "fate": candidate.fate, "why": candidate.why}
    if found is not None:
        (low, high), (least, most) = found.interval, found.needs_interval
        row["predicted"] = {
            "seconds": found.seconds, "low_s": low, "high_s": high, "needs_bytes": found.needs_bytes, "low_bytes": least,
            "high_bytes": most, "basis": found.basis,
            "machine": found.machine.name, "split_s": dict(predicted_split(found).seconds),
        }  # fmt: skip
    return row


@dataclass(frozen=True)
class Answer:
    """What is said of one problem. ``lines``: sentences, the winner first; ``verdict``: as of a report, and why the race ended."""

    outcome: Outcome
    names: Names
    table: Fitted
    lines: list[str]
    why: str

    @property
    def verdict(self) -> str:
        return (
            "clear" if self.outcome.clear else "close" if self.outcome.margin else "only one ran" if self.outcome.winner else "none"
        )

    def as_dict(self) -> dict[str, Any]:
        found, margin = self.outcome, self.outcome.margin
        return {
            "problem": self.names.same, "winner": self.names.what.get(found.winner), "cell": found.winner or None, "end": found.end,
            "verdict": self.verdict, "seconds": found.seconds.value if found.seconds else None,
            "next": self.names.what.get(found.next), "why": self.why,
            "margin": {"value": margin.value, "low": margin.low, "high": margin.high} if margin else None,
            "choices": [self._choice(r) for r in found.runners],
        }  # fmt: skip

    def _choice(self, runner: Runner) -> dict[str, Any]:
        said = {"cell": runner.name, "choice": self.names.what[runner.name], "state": runner.state}
        return {**said, "why": _named(runner.why, self.names), "blocks_s": blocks_of(runner)}


def blocks_of(runner: Runner) -> list[float]:
    return [seconds for lap in runner.laps for seconds in lap.blocks]


def answers(outcomes: Sequence[Outcome], candidates: Sequence[Candidate], good: pd.DataFrame) -> list[Answer]:
    """An answer for each outcome.

    Args:
        good: the good rows of the sweep (``report.frame``), for what the measured time was split into.
    """
    groups, splits = by_problem(candidates), measured_splits(good)
    return [_answer(outcome, groups[outcome.problem], splits) for outcome in outcomes]


def _answer(outcome: Outcome, group: Sequence[Candidate], measured: Mapping[str, Split]) -> Answer:
    names = Names.of(c.cell for c in group)
    why = _why(outcome, group, measured)
    return Answer(outcome, names, _race_table(outcome, group, names), _sentences(outcome, names, why), why)


def _race_table(outcome: Outcome, group: Sequence[Candidate], names: Names) -> Fitted:
    """Who was measured, or failed, the fastest first: measured times, and beside them what was predicted."""
    predicted = {c.cell.id: c.prediction for c in group}
    table = Fitted(names.title("measured"), [
        Column("choice", folds=True, wanted=28), Column("ms,\nmeasured", right=True), Column("vs best", right=True),
        Column("blocks", 2, right=True), Column("ms,\npredicted", 1, right=True), Column("", folds=True, wanted=30),
    ])  # fmt: skip
    timed = {r.name: timing.value for r in outcome.runners if (timing := r.timing)}
    best = timed.get(outcome.winner, 0.0)
    entered = [r for r in outcome.runners if r.laps or r.state == "failed"]
    for r in sorted(entered, key=lambda r: (r.name != outcome.winner, timed.get(r.name, math.inf))):
        found, seconds = predicted[r.name], timed.get(r.name)
        state = f"{r.state}: {_named(r.why, names)}" if r.why else "may be as fast"
        table.add(
            names.what[r.name], digits(1e3 * seconds) if seconds else "-",
            "-" if not seconds or not best else times(1.0) if r.name == outcome.winner else more(seconds / best),
            str(len(blocks_of(r))), digits(1e3 * found.seconds) if found else "-",
            "fastest" if r.name == outcome.winner else state,
        )  # fmt: skip
    return table


def _sentences(outcome: Outcome, names: Names, why: str) -> list[str]:
    if outcome.seconds is None:
        return [f"no choice ran for {names.same}; the table says why"]
    rivals = [names.what[r.name] for r in outcome.open]
    so_far = " so far" if rivals and outcome.end != "equal" else ""
    winner = f"fastest{so_far} for {names.same}: {names.what[outcome.winner]}, {_interval(outcome.seconds)}"
    if outcome.margin is None:
        return [f"{winner}; nothing else was measured", *_undecided(outcome, rivals)]
    margin = f"{names.what[outcome.next]} is slower by {_margin(outcome.margin)}: {_verdict(outcome, names)}"
    return [f"{winner}; {margin}", *_undecided(outcome, rivals), f"what decided: {why}"]


def _undecided(outcome: Outcome, rivals: Sequence[str]) -> list[str]:
    """That it is not decided, and why, in a line; nothing where it is."""
    if not rivals:
        return []
    if outcome.end == "equal":
        return [f"decided as far as it matters: less than {EQUAL:.1%} to {_listed(rivals)}; take the simplest of them"]
    if any(r.state == "left behind" for r in outcome.open) or outcome.end == "budget":
        return [f"not decided: the budget ended before it was told apart from {_listed(rivals)}; a larger budget= goes on"]
    return [f"not decided after {max(len(r.laps) for r in outcome.runners)} rounds: {_listed(rivals)} may be as fast"]


def _why(outcome: Outcome, group: Sequence[Candidate], measured: Mapping[str, Split]) -> str:
    """What made the winner the fastest: a part of the time, or memory that a choice which is predicted faster lacks."""
    if not outcome.winner:
        return ""
    predicted = {c.cell.id: predicted_split(c.prediction) for c in group if c.prediction is not None}
    said = []
    for splits in (measured, predicted):
        if outcome.next and outcome.winner in splits and outcome.next in splits:
            said.append(decided(splits[outcome.winner], splits[outcome.next]))
            break
    mine = predicted.get(outcome.winner)
    shut_out = [c for c in group if c.fate == "does not fit" and mine is not None and predicted[c.cell.id].total < mine.total]
    names = Names.of(c.cell for c in group)
    said += [f"memory: {names.what[c.cell.id]} is predicted faster, and {c.why}" for c in shut_out]
    said += [f"memory: {names.what[r.name]} ran out of it" for r in outcome.runners if r.why.startswith(f"{NO_MEMORY}:")]
    return "; ".join(said) or "not known: the parts of its time were neither measured nor predicted"


def _verdict(outcome: Outcome, names: Names) -> str:
    if outcome.clear:
        return "clear"
    if outcome.p > LEVEL:
        return f"close, within the noise{f' of {names.what[outcome.least_sure]}' if outcome.least_sure else ''}"
    return f"close, less than {CLOSE:.0%}"


def _interval(median: Median) -> str:
    if not median.known:
        return f"{duration(median.value)} (run-to-run noise not measured)"
    return f"{duration(median.value)} (95 %: {duration(median.low)} to {duration(median.high)})"


def _margin(ratio: Ratio) -> str:
    if not ratio.known:
        return f"{more(ratio.value)} (run-to-run noise not measured)"
    return f"{more(ratio.value)} (95 %: {more(ratio.low)} to {more(ratio.high)})"


def _named(text: str, names: Names) -> str:
    """Words of a race with choices in the place of cells' ids."""
    for cell_id, what in names.what.items():
        text = text.replace(cell_id, what)
    return text
