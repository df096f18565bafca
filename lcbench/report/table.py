"""The cells of a sweep as rows for scripts and as a table for people: read from the store, never from MLflow."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from lcbench.grid.axes import LABEL, PROBLEM, value_of
from lcbench.grid.cell import Cell
from lcbench.grid.labels import labels, told_apart
from lcbench.report.amounts import BYTES, TFLOPS, Unit, digits, more, percent, times, unit_for
from lcbench.report.fitted import Column, Fitted
from lcbench.report.inert import plain
from lcbench.runs.records import Look, Record
from lcbench.runs.store import Sweep

COLORS = {"ok": "green", "failed": "red", "lost": "red", "skipped": "yellow", "missing": "dim", "predicted": "magenta"}
CHECKED = ("out", "dq", "dk", "dv")
NOISY = 0.05  # a share of the time: from here on its noise stands beside a time at any width
WHAT = 40  # columns of what a cell is, if that leaves out no more than what matters less
FEW = 5  # lines of a summary


def to_rows(seen: Look, ids: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """One dictionary per cell, SI units. Metrics are those of the newest attempt; of a cell that was only predicted, as ``status``
    says, those of its prediction, whose times lie within a factor of 1 + ``band`` (95 %).
    """
    wanted = seen.records.keys() if ids is None else set(ids)
    shown = {cell_id: record for cell_id, record in seen.records.items() if cell_id in wanted}
    named = labels(record.entry.cell for record in shown.values())
    return [_row(cell_id, record, named[cell_id]) for cell_id, record in shown.items()]


@dataclass(frozen=True)
class Names:
    """What to call cells in one table. ``what``: by id, without what all of them share; ``same``: that, for the title."""

    what: dict[str, str]
    same: str

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Names:
        several = list(cells)
        said = {axis for cell in several for axis in cell.words}
        words = {axis: {cell.word(axis) for cell in several} for axis in LABEL if axis in said}
        shared = {axis: next(iter(found)) for axis, found in words.items() if len(found) == 1}
        if len(several) < 2 or len(shared) == len(words):  # a label in a row says more than an empty one
            return cls(labels(several), _heads(several))
        apart = told_apart(several)
        what = {
            cell.id: " ".join(filter(None, [*(cell.told(axis) for axis in words if axis not in shared), apart[cell.id]]))
            for cell in several
        }
        return cls(what, ", ".join([*(f"{axis} {word}" for axis, word in shared.items()), *filter(None, [_heads(several)])]))

    def title(self, text: str) -> str:
        return f"{text}: {self.same}" if self.same else text


def _heads(cells: Sequence[Cell]) -> str:
    found = {str(cell.config["heads"]) for cell in cells}
    return f"heads {found.pop()}" if len(found) == 1 else ""


def _row(cell_id: str, record: Record, label: str) -> dict[str, Any]:
    attempt, failure = record.known, record.failure
    metrics, config = attempt.metrics if attempt else {}, record.entry.cell.config
    errors = [metrics[f"check/{name}_error"] for name in CHECKED if f"check/{name}_error" in metrics]
    choosing = [metrics[key] for key in ("time/select/median_s", "time/plan/median_s") if key in metrics]
    return {
        "cell": cell_id,
        "label": label,
        "status": record.status,
        "attempt": attempt.number if attempt else 0,
        "total_s": metrics.get("time/total/median_s"),
        "forward_s": metrics.get("time/forward/median_s"),
        "backward_s": metrics.get("time/backward/median_s"),
        "tflops_per_gpu": metrics.get("compute/tflops_per_gpu"),
        "mfu": metrics.get("compute/mfu"),
        "tokens_per_s_per_gpu": metrics.get("step/tokens_per_s_per_gpu"),
        "hfu": metrics.get("compute/hfu"),
        "model_step_s": metrics.get("model/step_s"),
        "batch_tokens_per_s": metrics.get("batch/tokens_per_s"),
        "idle_share": metrics.get("batch/idle_share"),
        "choosing_s": sum(choosing) if choosing else None,
        "recompute": value_of(config, "recompute") if "model" in config.get("workload", {}) else None,
        "peak_bytes": metrics.get("memory/peak_bytes"),
        "noise": metrics.get("time/noise"),
        "band": attempt.band if attempt else None,
        "approximate": attempt.approximate if attempt else "",
        "error": max(errors) if errors else None,
        "no_speed": attempt.no_speed if attempt else "",
        "failure": failure.kind if failure else None,
        "cause": failure.cause if failure else None,
    }


def why_not(row: Mapping[str, Any]) -> str:
    """Why a cell has no result, or one that is checked and has no speed."""
    if row["failure"]:
        return f"{row['failure']}: {row['cause']}"
    return f"no speed: {row['no_speed']}" if row["no_speed"] else ""


# -- the table of a sweep ------------------------------------------------------------------------------------------------


def cells_table(seen: Look, name: str, ids: Iterable[str] | None = None, *, predicted: bool = False) -> Fitted:
    """Cells problem by problem, the fastest exact one first, with how much longer than it the others take, then those that
    approximate, the closest first; of predictions (``Look.foretold``) with ``predicted``, else only what was measured has a rank.
    """
    rows = {row["cell"]: row for row in to_rows(seen, ids)}
    cells = {cell_id: seen.records[cell_id].entry.cell for cell_id in rows}
    names = Names.of(cells.values())
    problems = list(by_problem({cell_id: seen.records[cell_id] for cell_id in rows}, predicted=predicted))
    ranked = any(sum(map(math.isfinite, problem.values())) > 1 for problem in problems)
    form = _Form.of(list(rows.values()), ranked=ranked)
    table = Fitted(names.title(f"sweep {name}"), form.columns)
    for problem in problems:
        if ranked and len(problem) > 1:
            table.gap()
        compared = sum(map(math.isfinite, problem.values())) > 1
        for cell_id, ratio in problem.items():
            row = rows[cell_id]
            style = "bold" if compared and ratio == 1 and not row["approximate"] else ""
            values = [names.what[cell_id], *form.numbers(row, _versus(ratio) if compared else "")]
            table.add(
                plain(row["status"], COLORS[row["status"]]), plain(cell_id, style), *(plain(v, style) for v in values),
                below=why_not(row) or row["approximate"],
            )  # fmt: skip
    return table


def by_problem(records: Mapping[str, Record], *, predicted: bool = False) -> Iterator[dict[str, float]]:
    """Of every problem, in the order of the plan, its cells by id in the order of ``frame.rank_of``, with their time over that of
    the fastest that is exact, nan where none is; then those without a time, for which it is infinite.
    """
    from lcbench.report.frame import rank_of

    problems: dict[str, dict[str, float]] = {}
    for cell_id, record in records.items():
        config = record.entry.cell.config
        key = json.dumps({axis: config[axis] for axis in PROBLEM if axis in config}, sort_keys=True)
        problems.setdefault(key, {})[cell_id] = _seconds(record, "predicted" if predicted else "ok")

    exact = {cell_id for cell_id, record in records.items() if record.known is not None and not record.known.approximate}

    def place(cell_id: str, seconds: float) -> tuple[float, float, float]:
        known = records[cell_id].known
        if known is None or math.isinf(seconds):  # as the plan has them
            return math.inf, 0.0, 0.0
        return 0.0, *rank_of(seconds, known.metrics.get("check/distance"), approximate=cell_id not in exact)

    for seconds in problems.values():
        best = min((s for c, s in seconds.items() if c in exact and math.isfinite(s)), default=math.nan)
        order = sorted(seconds.items(), key=lambda item: place(*item))
        yield {c: s / best if math.isfinite(s) else math.inf for c, s in order}


def _seconds(record: Record, good: str) -> float:
    """The time that ranks a cell of this status, in seconds: both phases, or the one that it has; infinite where none counts."""
    last = record.known
    if last is None or record.status != good or last.no_speed:
        return math.inf
    found = (last.metrics.get(f"time/{phase}/median_s") for phase in ("total", "forward"))
    return next((seconds for seconds in found if seconds), math.inf)


def _versus(ratio: float) -> str:
    """A time over that of the best: ``1.00x`` for the best itself, ``+12.0 %``, ``2.40x``."""
    return "-" if not math.isfinite(ratio) else times(1.0) if ratio == 1 else more(ratio)


@dataclass(frozen=True)
class _Form:
    """The columns of a table of cells, each number in one unit, that of its largest value. ``steps``: whether there are training
    steps, ``batches``: batches of documents, whose whole time and tokens tell most, and ``choosing``: masks that are chosen, which
    takes a share of the time that cells are ranked by.
    """

    columns: list[Column]
    rate: Unit
    size: Unit
    ranked: bool
    foretold: bool
    steps: bool
    batches: bool
    choosing: bool

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], *, ranked: bool) -> _Form:
        def most(key: str) -> float:
            return max((row[key] for row in rows if row[key] is not None), default=0.0)

        rate, size = unit_for(most("tflops_per_gpu"), TFLOPS), unit_for(most("peak_bytes"), BYTES)
        noise = 0 if most("noise") > NOISY else 3
        steps = any(row["recompute"] is not None for row in rows)
        whole = [Column("step ms", right=True), Column("tokens/s\nper GPU", right=True)] if steps else []
        batches = any(row["batch_tokens_per_s"] is not None for row in rows)
        whole += [] if steps or not batches else [Column("makespan\nms", right=True)]
        whole += [Column("tokens/s\nof all", right=True), Column("idle", right=True)] if batches else []
        choosing = any(row["choosing_s"] is not None for row in rows)
        whole += [Column("select,\nplan ms", right=True)] if choosing else []
        phase, mfu, peak = (5, 0, 0) if steps else (0, 4, 2)
        numbers = [
            *whole, Column("fwd ms", phase, right=True), Column("bwd ms", phase, right=True), Column("noise", noise, right=True),
            Column(f"{rate.name}\nper GPU", 4 if steps else 1, right=True), Column("MFU", mfu, right=True),
            Column(f"peak\n{size.name}", peak, right=True), Column("max\nerror", 5, right=True),
        ]  # fmt: skip
        versus = [Column("vs best", right=True)] if ranked else []
        foretold = any(row["band"] is not None for row in rows)
        band = [Column("95 % band", right=True)] if foretold else []
        columns = [Column("status"), Column("cell"), Column("what", folds=True, wanted=WHAT), *versus, *band, *numbers]
        return cls(columns, rate, size, ranked, foretold, steps, batches, choosing)

    def numbers(self, row: Mapping[str, Any], versus: str) -> list[str]:
        """What of a row stands behind what the cell is."""
        errors = "" if row["error"] is None else f"{row['error']:.1e}"
        whole_s = row["total_s"] if row["recompute"] is not None or row["batch_tokens_per_s"] is not None else None
        makespan = digits(1e3 * whole_s if whole_s else None)
        shown = [
            *((makespan, digits(row["tokens_per_s_per_gpu"])) if self.steps else (makespan,) if self.batches else ()),
            *((digits(row["batch_tokens_per_s"]), percent(row["idle_share"], 0)) if self.batches else ()),
            *(digits(s if s is None else 1e3 * s) for s in ((row["choosing_s"],) if self.choosing else ())),
            *(digits(s if s is None else 1e3 * s) for s in (row["forward_s"], row["backward_s"])), percent(row["noise"]),
            self.rate.of(row["tflops_per_gpu"], named=False), percent(row["mfu"]), self.size.of(row["peak_bytes"], named=False),
            errors,
        ]  # fmt: skip
        band = "" if row["band"] is None else f"within {times(1 + row['band'])}"
        return [value or "-" for value in [*([versus] if self.ranked else []), *([band] if self.foretold else []), *shown]]


# -- what comes of it ----------------------------------------------------------------------------------------------------


def summary(sweep: Sweep, seen: Look, ids: Iterable[str], *, predicted: bool = False) -> RenderableType | None:
    """In a few lines what to use: how each choice does over all problems; of fewer than three problems the fastest of each. None
    where there was no choice. With ``predicted`` by predictions (``Look.foretold``), else by what was measured.
    """
    from lcbench.report.frame import good_rows, reported
    from lcbench.report.regret import contests

    frame = good_rows(reported(sweep, seen, predicted=predicted))
    chosen = frame[frame["cell"].isin(set(ids))] if len(frame) else frame
    of = contests(chosen)
    parts = [part for name, rows in of.items() for part in _contest(rows, f"{name}: " if len(of) > 1 else "")]
    return Group(*parts) if parts else None


def _contest(chosen: Any, name: str) -> list[RenderableType]:
    """What good rows of one workload come to; ``name`` stands before it."""
    from lcbench.report.regret import regrets, verdict

    found = regrets(chosen)
    said = verdict(found)
    if said is None:
        return list(_fastest(chosen, name))
    table = Fitted(f"{name}if it has to be one, over all problems", [
        Column("choice", folds=True), Column("mean vs best", right=True), Column("worst", right=True),
        Column("where", 1, folds=True), Column("fastest in", right=True), Column("ran in", right=True),
    ])  # fmt: skip
    for regret in found[:FEW]:
        table.add(
            regret.named, times(regret.mean), times(regret.worst), regret.where, str(regret.fastest),
            f"{regret.ran} of {regret.problems}",
        )  # fmt: skip
    if len(found) > FEW:
        table.caption = f"and {len(found) - FEW} more choices"
    return [plain(f"{name}{said}", "bold"), Text(), table]


def _fastest(good: Any, name: str) -> Iterator[Text]:
    """A line for each problem of good rows that had a choice; ``name`` stands before it."""
    from lcbench.report.regret import problem_labels
    from lcbench.report.winners import winners

    names = dict(zip(good["cell"], problem_labels(good), strict=True)) if len(good) else {}
    for winner in winners(good):
        if winner.margin is not None:
            margin = f"{winner.next_choice} {more(winner.margin.value)}, {winner.verdict}"
            yield plain(f"{name}fastest for {names[winner.cell]}: {winner.choice} ({margin})")
        if winner.approximate:
            alone = "" if winner.margin is not None else f" of {winner.choice}, which alone is exact"
            yield plain(f"{name}no rival for {names[winner.cell]}{alone}: {winner.approximate}")
