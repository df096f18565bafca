"""The runs of predictions: one of its own for each, which no view of measured cells has."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lcbench.grid.labels import labels
from lcbench.redact import redacted
from lcbench.runs.attempt import FORETOLD, Attempt
from lcbench.runs.manifest import Entry
from lcbench.runs.tracking import shown
from lcbench.runs.tracking.cells import CELL_ID
from lcbench.runs.tracking.dashboard import PLACE, place_tag
from lcbench.runs.tracking.experiment import Experiment
from lcbench.runs.tracking.memory import Memory
from lcbench.runs.tracking.origin import Origin
from lcbench.runs.tracking.server import TAG_LENGTH, exists

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


class PredictionRuns:
    """The runs of a sweep's predictions on a server. ``published``: how many were published."""

    def __init__(self, client: MlflowClient, experiment: Experiment, origin: Origin, memory: Memory) -> None:
        self._client, self._experiment, self._origin, self._memory = client, experiment, origin, memory
        self.published = 0
        self._named: dict[str, str] = {}  # what to call cells, by id

    def publish(self, entries: Mapping[str, Entry], end: float | None) -> bool:
        """Give every prediction that is new a run; whether there was time for all before ``end`` (``time.monotonic``)."""
        self._named = labels(entry.cell for entry in entries.values())
        there = self._memory.predictions
        for place, (cell_id, entry) in enumerate(entries.items()):
            written_ns = self._origin.sweep.written_ns(cell_id, FORETOLD)
            run_id, known_ns = there.get(cell_id, ("", 0))
            if written_ns == known_ns:
                continue
            if end is not None and time.monotonic() > end:
                return False
            prediction = self._origin.sweep.prediction(cell_id)
            made = prediction is not None and prediction.status == "predicted"
            if not (made or run_id):
                continue
            if not self.published:
                self._memory.save(open_=True)
            if prediction is not None and made:
                there[cell_id] = [self._fill(place, entry, prediction, run_id), written_ns]
            else:  # with this machine and fit there can be none any more
                self._client.delete_run(run_id)
                del there[cell_id]
            self.published += 1
        return True

    def _fill(self, place: int, entry: Entry, prediction: Attempt, run_id: str) -> str:
        """Bring the run of a prediction up to date, which is made if it is not there; its id."""
        from mlflow.entities import Metric, Param, RunTag

        mine = {**self._origin.tags(), shown.PREDICTIONS_OF: self._origin.id}
        del mine["lcbench.sweep_id"]  # by which measured cells are found
        at = shown.written_ms(prediction)
        if not exists(self._client, run_id):
            tags = {**mine, "mlflow.parentRunId": self._memory.parent, CELL_ID: entry.cell.id, shown.PREDICTED: "true"}
            name = f"{self._named[entry.cell.id]} (predicted)"
            run_id = str(self._client.create_run(self._experiment.id, start_time=at, run_name=name, tags=tags).info.run_id)
        self._client.log_batch(
            run_id, params=[Param(key, value) for key, value in shown.params(entry.cell).items()],
            metrics=[Metric(key, value, at, 0) for key, value in shown.prediction_values(prediction)],
        )  # fmt: skip
        self._client.set_terminated(run_id, "FINISHED", end_time=at)
        tags = {**mine, **shown.prediction_tags(prediction), PLACE: place_tag(place)}
        self._client.log_batch(run_id, tags=[RunTag(k, redacted(v)[:TAG_LENGTH]) for k, v in tags.items()])
        return run_id


def recalled(runs: Iterable[Run]) -> dict[str, Any]:
    """The runs of predictions by cell; what is in them is not known."""
    return {run.data.tags[CELL_ID]: [run.info.run_id, 0] for run in runs}
