"""A sweep on its tracking server, whole: its cells, and in a run of its own what they come to.

That run's description begins with what to use, since MLflow's page folds it after a few lines; then come links to views and to the
report, what every choice costs if it has to be one, and why cells failed. It has the report's page as a file.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lcbench.grid.devices import known_devices
from lcbench.report.amounts import digits, duration
from lcbench.report.causes import FAILED, causes, suspects
from lcbench.report.frame import good_rows, reported
from lcbench.report.page import write_report
from lcbench.report.palette import styles
from lcbench.report.regret import Regret, contests, problem_labels, regrets, verdict
from lcbench.report.winners import winners
from lcbench.runs.records import Look
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.parent import Summary
from lcbench.runs.tracking.publish import Counts, publish, tell
from lcbench.runs.tracking.shown import gpu_hours, written_ms

if TYPE_CHECKING:
    import pandas as pd

MOST_CELLS = 1000  # of a sweep whose report is written unasked
MOST_CAUSES = 10
CAUSE_LENGTH = 160


def publish_sweep(sweep: Sweep, uri: str, experiment: str | None = None, *, thorough: bool = False) -> Counts:
    """Bring a tracking server up to date with a sweep, cells first, then what they come to, where that has changed.

    The report is written and put there once every cell that can run has a result, of at most ``MOST_CELLS`` cells.

    Args: as for ``tracking.publish.publish``.

    Raises:
        TrackingUnavailable: within seconds, whatever is wrong with the server.
    """
    counts = publish(sweep, uri, experiment, thorough=thorough)
    if counts.told:
        return counts
    seen = sweep.look()
    with tempfile.TemporaryDirectory() as folder:
        wanted = counts.ended and not counts.files and 0 < len(seen.records) <= MOST_CELLS
        page = write_report(sweep, Path(folder), known_devices(), predicted=only_predicted(seen)).page if wanted else None
        return replace(counts, told=True, files=tell(sweep, uri, experiment, summary_of(sweep, seen), page))


def only_predicted(seen: Look) -> bool:
    """Whether a sweep has predictions and nothing that was tried."""
    records = seen.records.values()
    return any(r.prediction for r in records) and not any(r.attempts for r in records)


def summary_of(sweep: Sweep, seen: Look) -> Summary:
    """What a sweep comes to, as a look at it showed it: by what was measured, or, where nothing was, by predictions as such."""
    predicted = only_predicted(seen)
    frame = reported(sweep, seen, predicted=predicted)
    good = good_rows(frame)
    found = {workload: regrets(rows) for workload, rows in contests(good).items()}
    uses = {workload: use for workload, ranked in found.items() if (use := verdict(ranked))}
    use = "  \n".join(f"{workload}: {said}" if len(found) > 1 else said for workload, said in uses.items())
    said = use or "  \n".join(_fastest(good)) or ("Nothing exact ran." if len(good) else "No cell has a good result with a time.")
    said = f"Predicted, nothing measured: {said}" if predicted else said
    counts = Counter(record.status for record in seen.records.values())
    attempts = [attempt for record in seen.records.values() for attempt in record.attempts]
    colors = styles(frame)
    devices = [attempt.provenance.get("device") for attempt in attempts]
    hours = gpu_hours(attempts)
    words = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return Summary(
        verdict="  \n".join(f"**{line}**" for line in said.split("  \n")) if use else said,
        body="\n".join([f"{len(seen.records)} cells: {words}" + (f"; {digits(hours)} GPU-hours" if hours else "") + ".",
                        *_regret_tables(found), *_causes(frame, sweep)]),
        metrics={"gpu_hours": round(hours, 3)} if hours else {},
        tags={"lcbench.verdict": said, "lcbench.device": ", ".join(dict.fromkeys(filter(None, devices)))},
        colors={row.cell: colors[row.choice].color for row in frame[["cell", "choice"]].itertuples()} if len(frame) else {},
        at=max((written_ms(attempt) for attempt in attempts), default=0) / 1000,
    )  # fmt: skip


def _fastest(good: pd.DataFrame) -> Iterator[str]:
    """The winners of a few problems, where there are too few for a verdict over all."""
    names = dict(zip(good["cell"], problem_labels(good), strict=True)) if len(good) else {}
    for winner in winners(good)[:3]:
        where = names[winner.cell]
        behind = f"; {winner.next_choice} is next, slower by {winner.slower}" if winner.margin else ""
        beside = f" No rival: {winner.approximate}." if winner.approximate else ""
        yield f"{where}: {winner.choice} is fastest, {duration(winner.seconds)}{behind}. Verdict: {winner.verdict}.{beside}"


def _regret_tables(found: Mapping[str, Sequence[Regret]]) -> list[str]:
    """A table for each workload that has choices."""
    columns, lines = ("choice", "mean", "worst", "where", "fastest in", "ran in"), list[str]()
    for workload, ranked in found.items():
        of = f": {workload}" if len(found) > 1 else ""
        rows = [list(r.row().values()) for r in ranked]
        lines += ["", f"### If it has to be one{of}", "", *_table(columns, rows),
                  "", "Time over that of the best of each problem; mean: geometric."] if rows else []  # fmt: skip
    return lines


def _causes(frame: pd.DataFrame, sweep: Sweep) -> list[str]:
    failed = [cause for cause in causes(frame, sweep) if cause.status in FAILED]
    if not failed:
        return []
    rows = [[str(len(c.cells)), c.kind or c.status, c.cause[:CAUSE_LENGTH], ", ".join(c.nodes)] for c in failed[:MOST_CAUSES]]
    more = [f"and {len(failed) - MOST_CAUSES} more causes"] if len(failed) > MOST_CAUSES else []
    nodes = [line for s in suspects(frame, sweep) for line in ("", f"{s.says} Without it: `{s.command}`")]
    return ["", "### Why cells failed", "", *_table(("cells", "class", "cause", "nodes"), rows), *more, *nodes]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """In Markdown. What a cell's cause says is no markup."""
    return [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}", *(f"| {' | '.join(map(_plain, row))} |" for row in rows)]


def _plain(text: str) -> str:
    for sign in "\\`*_[]<|":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
