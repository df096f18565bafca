"""MLflow, published from the store: one parent run per sweep, one child per cell, showing the cell's latest attempt.

Publishing is idempotent by (sweep, cell id): what the server has is remembered beside the results (``memory.py``) and found again
by tag, so it can be repeated, interrupted, or done over for a new server. It never runs in a measuring process.

Metrics carry ``step = attempt``, so the newest attempt is shown and the history is kept; times of iterations are the metrics
``samples/...``, whose step is ``SAMPLE_STRIDE * (attempt - 1) + iteration``. ``shown.py`` has their names and units.

``report/publishing.py`` publishes the cells (``publish``) and then tells what they come to (``tell``); a pack that publishes at its
end leaves it to whoever comes later.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout

from lcbench.redact import redacted_uri
from lcbench.runs.address import EXPERIMENT
from lcbench.runs.store import Sweep
from lcbench.runs.tracking import cells, predictions, shown
from lcbench.runs.tracking.experiment import Experiment
from lcbench.runs.tracking.memory import Known, Memory
from lcbench.runs.tracking.origin import Origin
from lcbench.runs.tracking.parent import ParentRun, Summary
from lcbench.runs.tracking.server import TrackingUnavailable, alone_with, exists, runs_where

if TYPE_CHECKING:
    from mlflow import MlflowClient

PUBLISH_S = 30.0  # of what a pack has measured, at its end


@dataclass(frozen=True)
class Counts:
    """What came of publishing.

    Attributes:
        published: cells that were published.
        unchanged: cells that were there already.
        complete: whether there was time for all.
        files: why the files of attempts could not be put beside their runs, if so.
        told: whether the sweep's run says what its cells come to as they are now.
        ended: whether every cell that can run has a result.
    """

    published: int
    unchanged: int
    complete: bool = True
    files: str = ""
    told: bool = True
    ended: bool = False


def publish(
    sweep: Sweep, uri: str, experiment: str | None = None, *, budget_s: float | None = None, thorough: bool = False
) -> Counts:
    """Bring a tracking server up to date with a sweep's store.

    Args:
        experiment: the name of MLflow's; by default the sweep's own choice.
        budget_s: stop after this long, and do nothing if somebody else is at it; what is left is published another time.
        thorough: ask the server what it has instead of trusting what is remembered; runs that were deleted there are made again.

    Raises:
        TrackingUnavailable: within seconds, whatever is wrong with the server.
    """
    end = None if budget_s is None else time.monotonic() + budget_s
    try:
        with _publisher(sweep, uri, experiment, wait=budget_s is None, thorough=thorough) as publisher:
            return publisher.run(end)
    except Timeout:
        return Counts(0, 0, complete=False)


def tell(sweep: Sweep, uri: str, experiment: str | None, summary: Summary, page: Path | None = None) -> str:
    """Have the sweep's own run say what its cells come to, and give their runs the colours of their choices.

    Args:
        page: the report's page, to be put beside it.

    Returns: why files could not be put beside it, if so.

    Raises:
        TrackingUnavailable: as for ``publish``.
    """
    with _publisher(sweep, uri, experiment) as publisher:
        return publisher.tell(summary, page)


def attach(sweep: Sweep, uri: str, folder: Path) -> None:
    """Put a folder's files beside the sweep's own run, as artifacts below the folder's name.

    Raises:
        TrackingUnavailable: as for ``publish``.
    """
    with _publisher(sweep, uri) as publisher:
        publisher.attach(folder)


def publish_or_say(
    sweep: Sweep, uri: str | None, how: Callable[[Sweep, str], Counts] | None = None, *, budget_s: float | None = None
) -> None:
    """Publish where there is a tracking server; one that is away costs a line.

    Args:
        how: by default cells only (``publish``).
        budget_s: of ``publish``.
    """
    if not uri:
        return
    try:
        counts = how(sweep, uri) if how else publish(sweep, uri, budget_s=budget_s)
    except TrackingUnavailable as error:
        print(f"not published: {error}; later: {sweep.command('sync')}", file=sys.stderr)
    else:
        if counts.files:
            print(counts.files, file=sys.stderr)


def attach_or_say(sweep: Sweep, uri: str | None, folder: Path) -> None:
    """Attach where there is a tracking server; one that is away costs a line."""
    if not uri:
        return
    try:
        attach(sweep, uri, folder)
    except TrackingUnavailable as error:
        print(f"not attached to the sweep's run: {error}", file=sys.stderr)


@contextmanager
def _publisher(
    sweep: Sweep, uri: str, experiment: str | None = None, *, wait: bool = True, thorough: bool = False
) -> Iterator[_Publisher]:
    """Alone with a sweep and its server (``alone_with``)."""
    with alone_with(sweep, uri, wait=wait) as client:
        yield _Publisher(sweep, uri, client, experiment, thorough=thorough)


class _Publisher:
    """The runs of a sweep on a server."""

    def __init__(self, sweep: Sweep, uri: str, client: MlflowClient, experiment: str | None, *, thorough: bool) -> None:
        self._uri, self._client, self._origin = uri, client, Origin(sweep, sweep.manifest())
        name = experiment or self._origin.launch.get("settings", {}).get("experiment") or EXPERIMENT
        self._experiment, self._memory = Experiment(client, uri, name), Memory(sweep, uri)
        parts = (client, self._experiment, self._origin, self._memory)
        self._cells, self._predictions, self._parent = cells.CellRuns(*parts), predictions.PredictionRuns(*parts), ParentRun(*parts)
        there = self._memory.is_of(self._experiment.id)
        if thorough or self._memory.open or not (there and exists(client, self._memory.parent)):
            self._recall({i: Known(*known) for i, known in self._memory.cells.items()} if there else {})

    def run(self, end: float | None) -> Counts:
        entries, memory = self._origin.entries(), self._memory
        complete = self._cells.publish(entries, end)
        complete = self._predictions.publish(entries, end if complete else 0.0) and complete
        published, unchanged = self._cells.published + self._predictions.published, self._cells.unchanged
        if published or not unchanged or memory.open:
            self._parent.finish(entries, complete)
        if published or self._cells.looked or memory.changed:
            memory.save(open_=False)
        ended = self._parent.statuses(entries)["missing"] == 0
        return Counts(published, unchanged, complete, self._experiment.about_files(), memory.told(self._count), ended)

    @property
    def _count(self) -> int:
        return len(self._origin.manifest["cells"])

    def attach(self, folder: Path) -> None:
        if self._experiment.no_files:
            raise TrackingUnavailable(redacted_uri(self._uri), self._experiment.no_files)
        self._client.log_artifacts(self._memory.parent, str(folder), folder.name)

    def tell(self, summary: Summary, page: Path | None) -> str:
        self._parent.tell(summary, page)
        self._memory.tell(self._count)
        self._memory.save(open_=False)
        return self._experiment.about_files()

    def _recall(self, before: dict[str, Known]) -> None:
        """Find by tag what the server has of this sweep; the parent is made if it is not there. ``before``: what is remembered."""
        client, experiment, sweep_id = self._client, self._experiment.id, self._origin.id
        found = list(runs_where(client, experiment, f"tags.`lcbench.sweep_id` = '{sweep_id}'"))
        children = [run for run in found if cells.CELL_ID in run.data.tags]
        own = [run.info.run_id for run in found if cells.CELL_ID not in run.data.tags]
        foretold = list(runs_where(client, experiment, f"tags.`{shown.PREDICTIONS_OF}` = '{sweep_id}'"))
        parent = own[-1] if own else self._parent.create()
        known = cells.recalled(children, before)
        kept = {k.run_id for k in known.values()}
        for run in [run for run in children if run.info.run_id in kept] + foretold:
            if run.data.tags.get("mlflow.parentRunId") != parent:  # its parent was deleted
                client.set_tag(run.info.run_id, "mlflow.parentRunId", parent)
        self._memory.recall({
            "sweep_id": sweep_id, "experiment": experiment, "parent": parent, "cells": known,
            "predictions": predictions.recalled(foretold),
        })  # fmt: skip
