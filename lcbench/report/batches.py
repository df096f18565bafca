"""Batches of documents in a report: what planners make of them, against one degree for all documents and with planning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lcbench.planners.base import Assignment
from lcbench.problem import format_tokens
from lcbench.report.amounts import digits, duration, more, percent, size
from lcbench.report.frame import PREDICTED, exact_rows, over_seeds
from lcbench.report.intervals import LEVEL, Median, Ratio
from lcbench.report.serving import Answer
from lcbench.report.winners import CLOSE
from lcbench.workloads.planned import idle_share

if TYPE_CHECKING:
    import pandas as pd

CAPACITY = "workload.capacity"  # only a workload of which a planner shares out the documents has one
BASE = "fixed"  # the planner that others are held against: one degree for all documents
PROBLEM = ["what_mask", "seqlen", "scale", "where"]  # what planners of one contest have in common, and the rest of the choice
# What a column of the table says, by metric.
SAYS = (
    ("tokens/s", "batch/tokens_per_s", digits), ("padding", "batch/padding", percent), ("idle", "batch/idle_share", percent),
    ("sent", "comm/bytes", size), ("peak tokens", "batch/peak_tokens", digits), ("mean degree", "batch/degree", digits),
    ("micro-batches", "batch/micro_batches", digits), ("planning", "plan/seconds", duration),
    ("with planning", "batch/with_plan_s", duration), ("planned meanwhile", "batch/pipelined_s", duration),
    ("by the planner's costs", "plan/predicted_s", duration),
)  # fmt: skip


def batch_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells of ``frame.reported`` that are batches of documents, one of those that differ in their seed only, with columns
    besides: ``planner`` as it is told apart, ``rest`` (the choice without it), ``makespan`` (``Median`` of the whole batch, or
    None) and ``foretold`` (whether it was predicted and not measured).
    """
    if CAPACITY not in frame:
        return frame.iloc[:0]
    rows = over_seeds(frame)
    rows = rows[rows[CAPACITY].notna()]
    planners = rows["what_planner"].astype(str)
    rest = [_without(str(choice), planner) for choice, planner in zip(rows["choice"], planners, strict=True)]
    return rows.assign(planner=planners, rest=rest, makespan=rows["timed/total"], foretold=rows["status"] == "predicted")


def _without(choice: str, planner: str) -> str:
    return " + ".join(word for word in choice.removesuffix(PREDICTED).split(" + ") if word != f"planner={planner}")


def timed(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of ``batch_rows`` with a time, measured or predicted."""
    return rows[rows["makespan"].notna()] if len(rows) else rows


def contests(rows: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Of ``timed`` rows those of one batch, in the order of the plan."""
    for key, mine in timed(rows).groupby(PROBLEM, sort=False) if len(timed(rows)) else ():
        yield dict(zip(PROBLEM, key, strict=True)), mine


def words_of(problem: Mapping[str, Any]) -> str:
    """A batch in words: ``causal_document(web_text), 256k, 2x8``."""
    length = format_tokens(int(problem["seqlen"]))
    return ", ".join(filter(None, [str(problem["what_mask"]), length, str(problem["scale"]), str(problem["where"])]))


# -- against one degree --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """How much sooner a batch is done than with one degree for all documents.

    Attributes:
        problem: the batch, by ``PROBLEM``.
        choice: with its planner; ``planner`` alone, and the ``rest``.
        ratio: the time of ``fixed`` over that of the planner, both measured or both predicted: above 1 it is sooner done.
        with_plan: the same, of times with planning, where nothing is planned while a batch runs; None where it is not known.
        foretold: whether both are predictions.
        cells: ids of both.
    """

    problem: dict[str, Any]
    choice: str
    planner: str
    rest: str
    ratio: Ratio
    with_plan: float | None
    foretold: bool
    cells: tuple[str, str]

    def row(self) -> dict[str, str]:
        """For a table."""
        problem = self.problem
        return {
            "documents": problem["what_mask"], "length": format_tokens(int(problem["seqlen"])), "scale": problem["scale"],
            "setting": problem["where"], "choice": self.choice, f"sooner than {BASE}": more(self.ratio.value),
            "95 % interval": f"{more(self.ratio.low)} to {more(self.ratio.high)}", "with planning": more(self.with_plan),
        }  # fmt: skip


def gains(rows: pd.DataFrame) -> list[Gain]:
    """Of every planner but ``fixed`` in ``batch_rows``, against the fastest ``fixed`` with the same rest of the choice; what was
    measured against what was measured, what was predicted against what was predicted.
    """
    found: list[Gain] = []
    for problem, batch in contests(rows):
        for (_, foretold), mine in exact_rows(batch).groupby(["rest", "foretold"], sort=False):
            its = mine.to_dict("records")
            bases = sorted((row for row in its if is_base(row)), key=lambda row: row["makespan"].value)
            others = [row for row in its if not is_base(row)]
            found += [_gain(problem, row, base, bool(foretold)) for base in bases[:1] for row in others]
    return found


def is_base(row: Mapping[str, Any]) -> bool:
    """Whether a row of ``batch_rows`` is of what others are held against; its options may be any."""
    return str(row["planner"]).partition("(")[0] == BASE


def _gain(problem: dict[str, Any], row: dict[str, Any], base: dict[str, Any], foretold: bool) -> Gain:
    both = [known(one, "batch/with_plan_s") for one in (base, row)]
    with_plan = both[0] / both[1] if both[0] and both[1] else None
    return Gain(
        problem, str(row["choice"]), str(row["planner"]), str(row["rest"]), base["makespan"].over(row["makespan"]), with_plan,
        foretold, (str(row["cell"]), str(base["cell"])),
    )  # fmt: skip


def known(row: Mapping[str, Any], key: str) -> float | None:
    """A number of a row; None where it has none."""
    value = row.get(key)
    return None if value is None or math.isnan(value) else float(value)


# -- in words ------------------------------------------------------------------------------------------------------------


def answers(rows: pd.DataFrame) -> list[Answer]:
    """What is done first, of every batch in ``batch_rows`` that has a good result."""
    found = []
    against = {gain.cells[0]: gain for gain in gains(rows)}
    for problem, batch in contests(rows):
        good = exact_rows(batch[batch["good"]])
        if len(good):
            ranked = sorted(good.to_dict("records"), key=lambda row: row["makespan"].value)
            found.append(_answer(problem, ranked, against.get(str(ranked[0]["cell"]))))
    return found


def _answer(problem: dict[str, Any], ranked: list[dict[str, Any]], gain: Gain | None) -> Answer:
    best = ranked[0]
    parts = [(False, f"{words_of(problem)}: "), (True, str(best["choice"]))]
    alone = " ran alone" if len(ranked) == 1 else " is done first"
    said = [f"{alone}, in {duration(best['makespan'].value)}"]
    if len(ranked) > 1:
        ratio = ranked[1]["makespan"].over(best["makespan"])
        unsure = "" if ratio.value - 1 >= CLOSE and ratio.p < LEVEL else ", and the order of the two is not known"
        said.append(f"next {ranked[1]['choice']}, {more(ratio.value)}{unsure}")
    if gain is not None:
        said.append(f"{BASE} takes {more(gain.ratio.value)} ({more(gain.ratio.low)} to {more(gain.ratio.high)})")
    if (planning := known(best, "plan/seconds")) is not None:
        hidden = planning <= best["makespan"].value
        said.append(f"planning takes {duration(planning)}" + (", less than a batch" if hidden else ", longer than a batch"))
    parts.append((False, f"{'; '.join(said)}."))
    return Answer(parts, tuple(str(row["cell"]) for row in ranked))


# -- tables --------------------------------------------------------------------------------------------------------------


def table(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Every batch of ``batch_rows`` that has a time, measured or predicted, as text."""
    return [_row(row) for row in timed(rows).to_dict("records")]


def _row(row: dict[str, Any]) -> dict[str, str]:
    time: Median = row["makespan"]
    return {
        "cell": str(row["cell"]), "documents": row["what_mask"], "length": format_tokens(int(row["seqlen"])), "scale": row["scale"],
        "setting": row["where"], "choice": row["choice"], "makespan": duration(time.value),
        "95 % interval": f"{duration(time.low)} to {duration(time.high)}",
        **{name: form(known(row, key)) for name, key, form in SAYS},
    }  # fmt: skip


# -- a batch as it ran ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """What the ranks of a sub-group did in a micro-batch.

    Attributes:
        number: of the sub-group, over the whole batch.
        spans: by rank (begin, end of forward, end), in seconds from the begin of the batch.
        tokens: of its documents together.
        long: whether one of its documents is longer than the batch would have for a rank if it were shared evenly.
    """

    number: int
    spans: dict[int, tuple[float, float, float]]
    tokens: int
    long: bool

    @property
    def degree(self) -> int:
        return len(self.spans)


@dataclass(frozen=True)
class Picture:
    """When ranks were at work on which documents, in one pass over a batch.

    Attributes:
        ranks: how many there are.
        boxes: of all sub-groups, micro-batch by micro-batch.
        idle: share of that time in which ranks wait, as ``batch/idle_share``.
        foretold: whether it is a prediction.
    """

    ranks: int
    boxes: tuple[Box, ...]
    idle: float
    foretold: bool

    @property
    def end(self) -> float:
        """Seconds until the last rank is done."""
        return max(span[2] for box in self.boxes for span in box.spans.values())

    @property
    def words(self) -> str:
        """What it shows."""
        degrees = [box.degree for box in self.boxes]
        span = f"{min(degrees)} rank{'s' * (max(degrees) > 1)}"
        span = span if len(set(degrees)) == 1 else f"{min(degrees)} to {max(degrees)} ranks"
        how = "predicted" if self.foretold else "measured"
        groups = f"{len(self.boxes)} sub-group{'s' * (len(self.boxes) > 1)} of {span}"
        return (
            f"{self.ranks} ranks are at work on {groups}, until {duration(self.end)} ({how}); they wait for "
            f"{percent(self.idle, 0)} of that"
        )


def pictures_of(row: Mapping[str, Any]) -> list[Picture]:
    """Of a row of ``batch_rows``: of what was measured, then of what was predicted of it; none where provenance has none."""
    found = []
    for what in ("measured", "predicted"):
        notes = row.get(f"assigned/{what}")
        if isinstance(notes, Mapping):
            found.append(_picture(notes, foretold=what == "predicted"))
    return found


def _picture(notes: Mapping[str, Any], *, foretold: bool) -> Picture:
    assignment, tokens = Assignment.of_plain(notes["assignment"]), np.asarray(notes["documents"])
    ranks = len(notes["gantt"])
    spans = {(rank, int(span[0])): (span[1], span[2], span[3]) for rank, own in enumerate(notes["gantt"]) for span in own}
    boxes = []
    for number, (micro_batch, group) in enumerate(assignment.groups):
        own = tokens[list(group.documents)]
        its = {rank: spans[rank, micro_batch] for rank in group.ranks if (rank, micro_batch) in spans}
        if its:
            boxes.append(Box(number, its, int(own.sum()), bool(own.max() > tokens.sum() / ranks)))
    return Picture(ranks, tuple(boxes), idle_share(assignment, notes["gantt"]), foretold)
