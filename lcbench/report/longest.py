"""The longest length that fits, of each choice, as the records of a search's cells say it."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lcbench.grid.build import input_bytes
from lcbench.grid.cell import Cell
from lcbench.grid.search import Bracket, Search, at, resolution
from lcbench.problem import format_tokens
from lcbench.report.amounts import size
from lcbench.report.fitted import Column, Fitted
from lcbench.report.table import Names
from lcbench.runs.attempt import Attempt
from lcbench.runs.records import Look, Record

PEAK = "memory/peak_bytes"
Verdict = Literal["fits", "does not fit", "no answer"]
# found: between two lengths that are next to each other; cannot run, stopped: a cell was left out, or failed for another reason
# than memory; open: not at its end.
End = Literal["found", "all fit", "none fits", "cannot run", "stopped", "open"]
ANSWERS: tuple[End, ...] = ("found", "all fit", "none fits")


@dataclass(frozen=True)
class Probe:
    """What a cell says of its length. ``needs_bytes``: of the rank that needs most, where it is known; ``why``: of what does not
    fit and of what gave no answer; ``skipped``: that is because it cannot run.
    """

    cell: Cell
    verdict: Verdict
    needs_bytes: float | None = None
    why: str = ""
    skipped: bool = False

    @property
    def tokens(self) -> int:
        return self.cell.problem.seqlen


def probe_of(record: Record, cap_bytes: float, *, predicted: bool = False) -> Probe | None:
    """What is known of a cell's length from its newest attempt or, if ``predicted``, from its prediction; None: nothing."""
    cell, last = record.entry.cell, record.prediction if predicted else record.last
    if record.entry.skip:
        return Probe(cell, "no answer", why=record.entry.skip, skipped=True)
    if last is None:
        return None
    if last.status in ("ok", "predicted"):
        return _sized(cell, last, cap_bytes)
    why = f"{last.failure.kind}: {last.failure.cause}" if last.failure else last.status
    out = last.failure is not None and last.failure.kind == "oom"
    return Probe(cell, "does not fit" if out else "no answer", why=why, skipped=last.status == "skipped")


def _sized(cell: Cell, attempt: Attempt, cap_bytes: float) -> Probe:
    if PEAK not in attempt.metrics:
        return Probe(cell, "no answer", why="its peak memory could not be measured here")
    needs = attempt.metrics[PEAK] + input_bytes(cell)
    if needs <= cap_bytes:
        return Probe(cell, "fits", needs)
    return Probe(cell, "does not fit", needs, f"needs {size(needs)}")


@dataclass(frozen=True)
class Choice:
    """A choice that is searched, and what is known of it.

    Attributes:
        cell: of the choice, at any length.
        lengths: that are looked at.
        probes: of cells that are known, by their lengths; of any lengths.
        alone_too_much: the shortest length whose inputs alone need more than the cap; None: those of no length do.
    """

    cell: Cell
    lengths: tuple[int, ...]
    probes: dict[int, Probe]
    alone_too_much: int | None

    @classmethod
    def of(cls, search: Search, cell: Cell, probes: Iterable[Probe]) -> Choice:
        """Raises:
        ValueError: no length of the search suits its ranks.
        """
        lengths = search.lengths(cell.problem.scale.world_size)
        assert search.cap_bytes is not None
        fit = bisect_right(lengths, search.cap_bytes, key=lambda tokens: input_bytes(at(cell, tokens)))
        return cls(cell, lengths, {probe.tokens: probe for probe in probes}, lengths[fit] if fit < len(lengths) else None)

    @property
    def beyond(self) -> int | None:
        """The shortest length that is known not to fit."""
        alone = [self.alone_too_much] if self.alone_too_much is not None else []
        return min([*self._of("does not fit"), *alone], default=None)

    @property
    def inside(self) -> int | None:
        """The longest length that is known to fit, of those that are shorter than what does not."""
        beyond = self.beyond
        return max((tokens for tokens in self._of("fits") if beyond is None or tokens < beyond), default=None)

    @property
    def bracket(self) -> Bracket:
        return Bracket.between(self.lengths, self.inside, self.beyond)

    def _of(self, verdict: Verdict) -> list[int]:
        return [tokens for tokens, probe in self.probes.items() if probe.verdict == verdict]

    @property
    def used(self) -> int:
        """Cells that gave an answer."""
        return sum(probe.verdict != "no answer" for probe in self.probes.values())

    def expected(self, cap_bytes: float) -> tuple[int, int] | None:
        """The outcome that what was measured leads to, as the first and the last that are likely; None: not enough was measured.

        Between two lengths memory is taken to grow along a straight line, from nothing at no tokens. Beyond the two longest that
        fit it is taken to go on as from one to the other, at least as the length does: what is looked at next needs little more
        than the cap then.
        """
        fitting, beyond = self._fitting(), self.beyond
        shorter, low = fitting[-1] if fitting else (0, 0.0)
        high = self.probes[beyond].needs_bytes if beyond in self.probes else None
        if beyond is not None and high is not None:
            tokens = shorter + (cap_bytes - low) / (high - low) * (beyond - shorter)
        elif len(fitting) > 1:
            (before, least), (after, most) = fitting[-2:]
            power = max(1.0, math.log(most / least) / math.log(after / before)) if most > least > 0 else 1.0
            tokens = after * (cap_bytes / most) ** (1 / power)
        else:
            return None
        outcome = bisect_right(self.lengths, tokens)
        return outcome, outcome

    def _fitting(self) -> list[tuple[int, float]]:
        """Lengths that fit, the shortest first, with what they need."""
        inside = self.inside or 0
        return sorted((t, p.needs_bytes) for t, p in self.probes.items() if t <= inside and p.verdict == "fits" and p.needs_bytes)


@dataclass(frozen=True)
class Longest:
    """The answer for one choice.

    Attributes:
        cell: of the choice, at the search's longest length, so that cells of choices differ in nothing but the choice.
        tokens: the longest length that is known to fit; None: none is.
        needs_bytes: of a rank there.
        beyond: the shortest length that is known not to fit; None: none is.
        why: why that does not fit, or why there is no answer.
        cells: that gave an answer.
        predicted: nothing of it was measured.
    """

    cell: Cell
    tokens: int | None
    needs_bytes: float | None
    beyond: int | None
    why: str
    cells: int
    end: End
    predicted: bool

    @classmethod
    def of(cls, search: Search, choice: Choice, stopped: Probe | None = None, *, predicted: bool = False) -> Longest:
        """``stopped``: what gave no answer, so that the search of this choice goes no further if it is not at its end."""
        bracket, inside, beyond = choice.bracket, choice.inside, choice.beyond
        why = _why_beyond(choice, beyond)
        end: End = "open"
        if bracket.closed:
            end = "none fits" if not bracket.low else "all fit" if bracket.high == len(choice.lengths) else "found"
        elif stopped is not None:
            end, why = "cannot run" if stopped.skipped else "stopped", stopped.why
        needs = choice.probes[inside].needs_bytes if inside is not None else None
        return cls(at(choice.cell, search.longest), inside, needs, beyond, why, choice.used, end, predicted)

    def as_dict(self) -> dict[str, Any]:
        """For scripts, in tokens and bytes."""
        return {
            "choice": self.cell.words, "end": self.end, "seqlen": self.tokens, "needs_bytes": self.needs_bytes,
            "too_long": self.beyond, "why": self.why or None, "cells": self.cells, "predicted": self.predicted,
        }  # fmt: skip


def _why_beyond(choice: Choice, beyond: int | None) -> str:
    if beyond is None:
        return ""
    known = choice.probes.get(beyond)
    if known is not None and known.verdict == "does not fit":
        return known.why
    return f"its inputs alone need {size(input_bytes(at(choice.cell, beyond)))}"


def choice_key(cell: Cell) -> str:
    """What cells of one choice have in common: all but the length."""
    return json.dumps({name: value for name, value in cell.config.items() if name != "seqlen"}, sort_keys=True)


def by_choice(records: Iterable[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(choice_key(record.entry.cell), []).append(record)
    return found


def longest_of(seen: Look, *, predicted: bool = False) -> list[Longest]:
    """The answers of a sweep that was a search, from its records alone, in the order of its plan; none for any other sweep.

    Args:
        predicted: by predictions, whatever was measured.
    """
    search = seen.search
    if search is None or search.cap_bytes is None:
        return []
    found = []
    for records in by_choice(seen.records.values()).values():
        cell = records[0].entry.cell
        try:
            probes = [p for r in records if (p := probe_of(r, search.cap_bytes, predicted=predicted)) is not None]
            stopped = next((p for p in reversed(probes) if p.verdict == "no answer"), None)
            found.append(Longest.of(search, Choice.of(search, cell, probes), stopped, predicted=predicted))
        except ValueError as error:  # a workload that is not known here, or ranks that the lengths do not suit
            found.append(Longest(at(cell, search.longest), None, None, None, str(error), 0, "stopped", predicted))
    return found


def longest_table(found: Sequence[Longest], search: Search, name: str) -> Fitted:
    """The answers, the longest first within each problem's order."""
    names = Names.of(one.cell for one in found)
    predicted = ", predicted, not measured" if any(one.predicted for one in found) else ""
    same = ", ".join(word for word in names.same.split(", ") if not word.startswith("seqlen "))
    table = Fitted(f"sweep {name}: the longest length that fits {size(search.cap_bytes)} a rank{predicted}: {same}", [
        Column("choice", folds=True, wanted=32), Column("longest\nthat fits", right=True), Column("needs", right=True),
        Column("does\nnot fit", right=True), Column("cells", 1, right=True), Column("why", folds=True, wanted=24),
    ], caption=_caption(found, search))  # fmt: skip
    for one in sorted(found, key=lambda one: -(one.tokens or 0)):
        table.add(
            names.what[one.cell.id].strip(), _tokens(one), size(one.needs_bytes) or "-",
            "-" if one.beyond is None else format_tokens(one.beyond), str(one.cells), _said(one, search),
        )  # fmt: skip
    return table


def _tokens(one: Longest) -> str:
    if one.tokens is None:
        return "none" if one.end == "none fits" else "-"
    return format_tokens(one.tokens) if one.end in ANSWERS else f"at least {format_tokens(one.tokens)}"


def _said(one: Longest, search: Search) -> str:
    words = {
        "all fit": f"nothing longer than search.to={format_tokens(search.longest)} was looked at",
        "none fits": f"nothing shorter than search.from={format_tokens(search.shortest)} was looked at; {one.why}",
        "open": "not at its end: the same command with this sweep's name goes on", "stopped": one.why,
    }  # fmt: skip
    return words.get(one.end, one.why)


def _caption(found: Sequence[Longest], search: Search) -> str:
    steps = [resolution(search.lengths(one.cell.problem.scale.world_size)) for one in found]
    ends = f"{format_tokens(search.shortest)} to {format_tokens(search.longest)}"
    return (
        "needs: the peak of an iteration and the inputs, of the rank that needs most. Looked at: "
        f"{ends}, steps of at most {100 * max(steps, default=0):.3g} %; what is longer than what does not fit is taken not to fit"
    )
