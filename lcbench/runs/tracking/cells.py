"""The runs of measured cells: each shows the cell's newest attempt, and keeps those before.

An attempt that was published and then got another block of timings is published again: its metrics with a later timestamp, of
which MLflow shows the last, and of its samples what is new.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lcbench.grid.cell import Cell
from lcbench.grid.labels import labels
from lcbench.redact import redacted
from lcbench.runs.attempt import Attempt
from lcbench.runs.manifest import Entry
from lcbench.runs.tracking import shown
from lcbench.runs.tracking.dashboard import PLACE, place_tag
from lcbench.runs.tracking.experiment import Experiment
from lcbench.runs.tracking.memory import FORM, Known, Memory
from lcbench.runs.tracking.origin import Origin
from lcbench.runs.tracking.server import BATCH, TAG_LENGTH, exists

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

SAVE_EVERY_S = 15.0
FILES = "lcbench.files"
CELL_ID = "lcbench.cell_id"


class CellRuns:
    """The runs of a sweep's cells on a server.

    Attributes:
        published: how many cells were published.
        unchanged: how many were there already.
        looked: whether the memory has learned anything of them.
    """

    def __init__(self, client: MlflowClient, experiment: Experiment, origin: Origin, memory: Memory) -> None:
        self._client, self._experiment, self._origin, self._memory = client, experiment, origin, memory
        self.published = self.unchanged = 0
        self.looked = False
        self._saved = 0.0
        self._named: dict[str, str] = {}  # what to call cells, by id

    def publish(self, entries: Mapping[str, Entry], end: float | None) -> bool:
        """Bring the runs up to date; whether there was time for all before ``end`` (``time.monotonic``)."""
        self._named = labels(entry.cell for entry in entries.values())
        for place, (cell_id, entry) in enumerate(entries.items()):
            newest = self._origin.sweep.newest(cell_id)
            written_ns = self._origin.sweep.written_ns(cell_id, newest) if newest else 0
            known = self._memory.cell(cell_id)
            same = (newest, written_ns) == (known.attempt, known.written_ns) and known.form == (FORM if newest else 0)
            if same and (known.files or self._experiment.no_files):
                self.unchanged += newest > 0
                continue
            if end is not None and time.monotonic() > end:
                return False
            if attempts := self._origin.sweep.attempts(cell_id):
                self._memory.cells[cell_id] = self._brought(place, entry, attempts, known, written_ns)
        return True

    def _brought(self, place: int, entry: Entry, attempts: list[Attempt], known: Known, written_ns: int) -> Known:
        """Bring the run of a cell up to date, whose newest attempt was written then."""
        if known.has(attempts[-1]):
            more = not known.files and self._put_files(entry, attempts, known.run_id)
            if more:
                self._client.delete_tag(known.run_id, FILES)
            self.looked = True
            self.published, self.unchanged = self.published + more, self.unchanged + (not more)
            return known._replace(written_ns=written_ns, files=known.files or more)
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self._memory.save(open_=True)
            self._saved = time.monotonic()
        if not known.run_id:
            known = Known(self._create(entry.cell, attempts[0]))
        known, files = self._fill(place, entry, attempts, known)
        self.published += 1
        return Known.of(known.run_id, attempts[-1], written_ns, files)

    def _create(self, cell: Cell, first: Attempt) -> str:
        tags = {**self._origin.tags(), "mlflow.parentRunId": self._memory.parent, CELL_ID: cell.id}
        run = self._client.create_run(
            self._experiment.id, start_time=int(first.started_at * 1000), run_name=self._named[cell.id], tags=tags
        )  # fmt: skip
        return str(run.info.run_id)

    def _fill(self, place: int, entry: Entry, attempts: list[Attempt], known: Known) -> tuple[Known, bool]:
        """Bring a cell's run up to date, in a new one if it was deleted; the run, and whether it has the files too."""
        try:
            return known, self._fill_run(place, entry, attempts, known)
        except Exception:
            if exists(self._client, known.run_id):
                raise
            known = Known(self._create(entry.cell, attempts[0]))
            return known, self._fill_run(place, entry, attempts, known)

    def _fill_run(self, place: int, entry: Entry, attempts: list[Attempt], known: Known) -> bool:
        from mlflow.entities import Param

        newest, run_id = attempts[-1], known.run_id
        changed = [a for a in attempts if a.number > known.attempt or (a.number == known.attempt and not known.has(a))]
        metrics = [metric for attempt in changed for metric in self._metrics(attempt, known)]
        params = [Param(key, value) for key, value in shown.params(entry.cell).items()]
        # Only an attempt that is complete there is marked as there: its number is among the tags, which come last.
        self._client.log_batch(run_id, params=params, metrics=metrics[:BATCH])
        for first in range(BATCH, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[first : first + BATCH])
        files = self._put_files(entry, changed if known.files else attempts, run_id)
        status = {"ok": "FINISHED", "failed": "FAILED", "skipped": "KILLED"}[newest.status]
        self._client.set_terminated(run_id, status, end_time=shown.written_ms(newest))
        more = {FILES: "" if files else "missing", PLACE: place_tag(place), "lcbench.form": str(FORM)}
        self._set_tags(run_id, {**shown.tags(attempts), **self._origin.tags(), **more}, again=known.attempt > 0)
        return files

    def _set_tags(self, run_id: str, tags: Mapping[str, str], *, again: bool) -> None:
        """Set a run's tags; those that say nothing are not there. ``again``: whether some may be there from before."""
        from mlflow.entities import RunTag

        there = self._client.get_run(run_id).data.tags if again else {}
        for key in [key for key, value in tags.items() if not value and key in there]:
            self._client.delete_tag(run_id, key)
        self._client.log_batch(run_id, tags=[RunTag(k, redacted(v)[:TAG_LENGTH]) for k, v in tags.items() if v])

    def _put_files(self, entry: Entry, attempts: list[Attempt], run_id: str) -> bool:
        """Put the files of attempts beside a cell's run; whether they are there."""

        def put() -> None:
            self._client.log_text(run_id, json.dumps(entry.cell.config, indent=1), "config.json")
            self._client.log_text(run_id, json.dumps(attempts[-1].provenance, indent=1), "environment.json")
            for attempt in attempts:
                for suffix in ("json", "log"):
                    path = self._origin.sweep.attempt_path(attempt.cell_id, attempt.number, suffix)
                    if path.exists():
                        self._client.log_artifact(run_id, str(path), "attempts")

        return self._experiment.try_files(put)

    def _metrics(self, attempt: Attempt, known: Known) -> list[Metric]:
        """An attempt's metrics, without what is there of it; what is there and does not hold any more becomes NaN."""
        from mlflow.entities import Metric

        there = known if attempt.number == known.attempt else Known(known.run_id)
        values: list[tuple[str, float]] = []
        if (there.status, there.blocks, there.form) != (attempt.status, attempt.blocks, FORM):
            values = shown.values(attempt)
        if there.status == "ok" and attempt.status == "failed":
            logged = self._client.get_run(known.run_id).data.metrics
            values += [(key, math.nan) for key in sorted(logged.keys() - dict(values)) if not key.startswith("samples/")]
        found = [Metric(key, value, shown.written_ms(attempt), attempt.number) for key, value in values]
        # A sample never changes, so that logged twice, by a publisher that died in between, it is the same one.
        at = int(attempt.finished_at * 1000)
        return found + [Metric(key, value, at, step) for key, value, step in shown.samples(attempt, there.blocks)]


def recalled(runs: Iterable[Run], before: Mapping[str, Known]) -> dict[str, Known]:
    """What the server has of cells, by the tags of their runs.

    ``before``: what is remembered of them; of runs that are still so, it knows which file they are made of.
    """
    cells: dict[str, Known] = {}
    for run in runs:
        tags = run.data.tags
        known = Known(
            run.info.run_id, int(tags.get("lcbench.attempt", 0)), tags.get("lcbench.status"),
            int(tags.get("lcbench.blocks") or 0), len(json.loads(tags.get("lcbench.lost_blocks") or "[]")),
            files=not tags.get(FILES), form=int(tags.get("lcbench.form") or 0),
        )  # fmt: skip
        # A restored experiment has runs again that were deleted one by one: the newest attempt counts.
        if known.attempt >= cells.get(tags[CELL_ID], Known("")).attempt:
            was = before.get(tags[CELL_ID], Known(""))
            cells[tags[CELL_ID]] = was if was == known._replace(written_ns=was.written_ns) else known
    return cells
