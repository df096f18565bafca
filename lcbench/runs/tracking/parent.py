"""The run of a sweep itself: counts of its cells, what they come to, links to its views, its report.

What a sweep comes to (what to use, why cells failed, colours of choices) is known to ``report/`` only, which tells it as a
``Summary``.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lcbench.grid.labels import labels
from lcbench.redact import redacted
from lcbench.runs.manifest import Entry
from lcbench.runs.tracking.dashboard import View, failures_view, predictions_view, run_path, views_of
from lcbench.runs.tracking.experiment import Experiment
from lcbench.runs.tracking.memory import Known, Memory
from lcbench.runs.tracking.origin import Origin

if TYPE_CHECKING:
    from mlflow import MlflowClient

NOTE_LENGTH, LINKS_LENGTH = 5000, 2500  # of a sweep's description, and of the links to its views in it
REPORT = "report"


@dataclass(frozen=True)
class Summary:
    """What a sweep comes to, for its own run.

    Attributes:
        verdict: what to use, Markdown; empty where there is nothing to say.
        body: the rest of the description, Markdown: each line of it may be left out where there is no room.
        metrics: of the sweep as a whole.
        tags: of the sweep's run.
        colors: of each cell's run, as #rrggbb, by cell id.
        at: when the last of its results was measured, in seconds since the epoch.
    """

    verdict: str = ""
    body: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    colors: Mapping[str, str] = field(default_factory=dict)
    at: float = 0.0


class ParentRun:
    """The run of a sweep on a server, which those of its cells are below."""

    def __init__(self, client: MlflowClient, experiment: Experiment, origin: Origin, memory: Memory) -> None:
        self._client, self._experiment, self._origin, self._memory = client, experiment, origin, memory

    def create(self) -> str:
        """Make it; its id."""
        tags = {**self._origin.tags(), "mlflow.note.content": self._origin.about()[:NOTE_LENGTH]}
        begun = int(self._origin.created_at * 1000)
        run = self._client.create_run(self._experiment.id, start_time=begun, run_name=self._origin.sweep.name, tags=tags)
        return str(run.info.run_id)

    def finish(self, entries: Mapping[str, Entry], complete: bool) -> None:
        """Views, counts by status, and cells that cannot run, which have no run of their own."""
        from mlflow.entities import Metric, RunTag

        memory, parent, statuses = self._memory, self._memory.parent, self.statuses(entries)
        self._experiment.set_views(self._origin.id, self._views(statuses))
        said = ("ok", "failed", "skipped", "missing", *(["predicted"] if statuses["predicted"] else []))
        counts = {f"cells/{status}": statuses[status] for status in said}
        tags = {**self._origin.tags(), "lcbench.cells": str(len(entries)), "lcbench.published": "all" if complete else "in part"}
        tags |= {f"lcbench.{key.replace('/', '.')}": str(count) for key, count in counts.items()}
        now = int(time.time() * 1000)
        self._client.log_batch(
            parent, metrics=[Metric(key, float(count), now, 0) for key, count in counts.items()],
            tags=[RunTag(k, v) for k, v in tags.items()],
        )  # fmt: skip
        named = labels(e.cell for e in entries.values())
        skipped = {i: {"what": named[i], "why": e.skip} for i, e in entries.items() if e.skip}
        if skipped:
            self._experiment.try_files(lambda: self._client.log_text(parent, json.dumps(skipped, indent=1), "skipped.json"))
        if complete and not statuses["missing"]:
            written = [
                *(Known(*known).written_ns for known in memory.cells.values()),
                *(at for _, at in memory.predictions.values()),
            ]
            fine = statuses["ok"] or statuses["predicted"]
            self._client.set_terminated(parent, "FINISHED" if fine else "FAILED", end_time=max(written, default=0) // 10**6 or now)
        else:
            self._client.update_run(parent, "RUNNING")

    def statuses(self, entries: Mapping[str, Entry]) -> Counter[str]:
        """How many cells are ok, failed, skipped, predicted only or missing, as far as they are published."""
        cells, otherwise = self._memory.cells, dict.fromkeys(self._memory.predictions, "predicted")
        return Counter(
            "skipped" if e.skip else cells[i][2] if i in cells else otherwise.get(i, "missing") for i, e in entries.items()
        )

    def _views(self, statuses: Mapping[str, int]) -> list[View]:
        """The sweep's views, that of its failures first."""
        of = (self._origin.sweep.name, self._origin.id, self._origin.created_at)
        failed, foretold = statuses["failed"], len(self._memory.predictions)
        return [
            *([failures_view(*of, failed)] if failed else []),
            *views_of(self._origin.sweep.name, self._origin.manifest),
            *([predictions_view(*of, foretold)] if foretold else []),
        ]

    def tell(self, summary: Summary, page: Path | None) -> None:
        """Have it say what the cells come to, and give their runs the colours of their choices; ``page``: the report's."""
        from mlflow.entities import Metric, RunTag

        parent, colors = self._memory.parent, self._memory.colors
        for cell_id, color in summary.colors.items():
            run_id = self._memory.cell(cell_id).run_id
            if run_id and colors.get(run_id) != color:
                self._client.set_tag(run_id, "mlflow.runColor", color)
                colors[run_id] = color
        if page is not None:
            self._experiment.try_files(lambda: self._client.log_artifact(parent, str(page), REPORT))
        tags = {**summary.tags, "mlflow.note.content": self._note(summary)}
        at = int(summary.at * 1000)
        self._client.log_batch(
            parent, metrics=[Metric(key, value, at, 0) for key, value in summary.metrics.items()],
            tags=[RunTag(key, redacted(value)[:NOTE_LENGTH]) for key, value in tags.items()],
        )  # fmt: skip

    def _note(self, summary: Summary) -> str:
        """The description, Markdown. The page folds it after a few lines, so what matters most comes first."""
        experiment, parent = self._experiment.id, self._memory.parent
        page = f"{REPORT}/report.html"
        there: list[str] = []
        self._experiment.try_files(lambda: there.extend(file.path for file in self._client.list_artifacts(parent, REPORT)))
        links = []
        if page in there:
            links.append(f"[Report](#{run_path(experiment, parent, page)})")
        views = self._views(self.statuses(self._origin.entries()))
        links += [f"[{view.short}](#{view.path(experiment)})" for view in views if not view.key.endswith(".failed")]
        failed = [f"[**{view.short}**](#{view.path(experiment)})" for view in views if view.key.endswith(".failed")]
        links = failed + links
        while sum(map(len, links)) > LINKS_LENGTH:
            links.pop()
        more = len(views) + 1 - len(links)
        said = [summary.verdict, " · ".join(links) + (f" and {more} more among the page's views" if more > 1 else "")]
        end = self._origin.about()
        body = summary.body.split("\n")
        while body and len("\n\n".join([*said, "\n".join(body), end])) > NOTE_LENGTH:
            body.pop()
        return "\n\n".join(filter(None, [*said, "\n".join(body), end]))[:NOTE_LENGTH]
