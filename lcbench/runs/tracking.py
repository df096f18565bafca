"""MLflow, published from the store: one parent run per sweep, one child per cell, showing the cell's latest attempt.

Publishing is idempotent by (sweep, cell id): what the server has is remembered beside the results and found again by tag,
so it can be repeated, interrupted, or done over for a new server. It never runs in a measuring process.

Metrics carry ``step = attempt``, so the newest attempt is shown and the history is kept; times of iterations are the metrics
``samples/...``, whose step is ``SAMPLE_STRIDE * (attempt - 1) + iteration``. Seconds of the store become milliseconds here.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from lcbench.grid.cell import Cell
from lcbench.runs.store import Attempt, Entry, Sweep, read_json, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "lcbench"
SAMPLE_STRIDE = 100_000
BATCH = 900  # MLflow takes 1000 metrics a request
TAG_LENGTH = 4000
QUICK = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class TrackingUnavailable(Exception):
    """The tracking server cannot be reached or refuses; nothing is lost, the store has it all."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"{uri} does not take results: {reason}")


@dataclass(frozen=True)
class Counts:
    published: int
    unchanged: int


def publish(sweep: Sweep, uri: str) -> Counts:
    """Bring a tracking server up to date with a sweep's store.

    Raises:
        TrackingUnavailable: within seconds, whatever is wrong with the server.
    """
    os.environ.update({k: os.environ.get(k, v) for k, v in QUICK.items()})
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with FileLock(sweep.folder / ".publish.lock"):
        try:
            if uri.startswith("sqlite:///"):
                Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            return _Publisher(sweep, uri, MlflowClient(tracking_uri=uri)).run()
        except (MlflowException, RequestException, OSError) as error:
            raise TrackingUnavailable(uri, " ".join(str(error).split())[:300]) from error


class _Publisher:
    def __init__(self, sweep: Sweep, uri: str, client: MlflowClient) -> None:
        self._sweep, self._uri, self._client = sweep, uri, client
        self._memory = sweep.folder / "mlflow.json"
        self._experiment = self._find_experiment()

    def run(self) -> Counts:
        known = read_json(self._memory) if self._memory.exists() else {}
        mine: dict[str, Any] = known.get(self._uri, {})
        if mine.get("experiment") != self._experiment or not self._exists(mine.get("parent", "")):
            mine = self._recall()
        published = unchanged = 0
        entries = self._sweep.entries()
        statuses = []
        for cell_id, entry in entries.items():
            attempts = self._sweep.attempts(cell_id)
            statuses.append(attempts[-1].status if attempts else None)
            if not attempts:
                continue
            run_id, last = mine["cells"].get(cell_id, (None, 0))
            if last == attempts[-1].number:
                unchanged += 1
                continue
            run_id = run_id or self._create_child(entry.cell, attempts[0], mine["parent"])
            # Remembered before it is filled: an interruption here must not make a second run of the cell.
            mine["cells"][cell_id] = (run_id, last)
            write_json(self._memory, {**known, self._uri: mine})
            self._fill(run_id, entry, attempts, since=last)
            mine["cells"][cell_id] = (run_id, attempts[-1].number)
            published += 1
        self._finish_parent(mine["parent"], statuses, entries)
        write_json(self._memory, {**known, self._uri: mine})
        return Counts(published, unchanged)

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        location = None
        if self._uri.startswith("sqlite:///"):  # else artifacts land in the working directory
            location = (Path(self._uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
        return str(self._client.create_experiment(EXPERIMENT, artifact_location=location))

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        if not run_id:
            return False
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _recall(self) -> dict[str, Any]:
        """What the server has of this sweep, found by tag; the parent is made if it is not there."""
        where = f"tags.`lcbench.sweep` = '{self._sweep.name}'"
        cells, parent, token = {}, None, None
        while True:
            page = self._client.search_runs([self._experiment], where, max_results=1000, page_token=token)
            for run in page:
                cell_id = run.data.tags.get("lcbench.cell_id")
                if cell_id:
                    cells[cell_id] = (run.info.run_id, int(run.data.tags.get("lcbench.attempt", 0)))
                else:
                    parent = run.info.run_id
            token = page.token
            if not token:
                break
        return {"experiment": self._experiment, "parent": parent or self._create_parent(), "cells": cells}

    def _create_parent(self) -> str:
        manifest = self._sweep.manifest()
        commands = "\n".join("    python -m lcbench.sweep " + " ".join(c) for c in manifest["commands"])
        tags = {
            "lcbench.sweep": self._sweep.name,
            "mlflow.note.content": f"Sweep `{self._sweep.name}`, results in `{self._sweep.folder}`.\n\n{commands}\n",
        }
        begun = int(manifest["created_at"] * 1000)
        run = self._client.create_run(self._experiment, start_time=begun, run_name=self._sweep.name, tags=tags)
        return str(run.info.run_id)

    def _create_child(self, cell: Cell, first: Attempt, parent: str) -> str:
        tags = {"mlflow.parentRunId": parent, "lcbench.sweep": self._sweep.name, "lcbench.cell_id": cell.id}
        run = self._client.create_run(self._experiment, start_time=int(first.started_at * 1000), run_name=cell.label, tags=tags)
        return str(run.info.run_id)

    def _fill(self, run_id: str, entry: Entry, attempts: list[Attempt], since: int) -> None:
        from mlflow.entities import Metric, Param, RunTag

        newest = attempts[-1]
        metrics = [
            Metric(key, value, int(attempt.finished_at * 1000), step)
            for attempt in attempts
            if attempt.number > since
            for key, value, step in _metrics(attempt)
        ]
        params = [Param(k, str(v)[:6000]) for k, v in flat_params(entry.cell).items()]
        tags = [RunTag(k, str(v)[:TAG_LENGTH]) for k, v in _tags(attempts).items()]
        # Only an attempt that is complete there is marked as there: its number comes with the last batch.
        self._client.log_batch(run_id, params=params)
        for first in range(0, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[first : first + BATCH])
        self._client.log_text(run_id, json.dumps(entry.cell.config, indent=1), "config.json")
        self._client.log_text(run_id, json.dumps(newest.provenance, indent=1), "environment.json")
        for attempt in attempts:
            if attempt.number > since:
                for suffix in ("json", "log"):
                    path = self._sweep.attempt_path(attempt.cell_id, attempt.number, suffix)
                    if path.exists():
                        self._client.log_artifact(run_id, str(path), "attempts")
        self._client.log_batch(run_id, tags=tags)
        status = {"ok": "FINISHED", "failed": "FAILED", "skipped": "KILLED"}[newest.status]
        self._client.set_terminated(run_id, status, end_time=int(newest.finished_at * 1000))

    def _finish_parent(self, run_id: str, statuses: Sequence[str | None], entries: dict[str, Entry]) -> None:
        counts = {s: statuses.count(s) for s in ("ok", "failed", "skipped", None)}
        self._client.set_tag(run_id, "lcbench.cells", str(len(entries)))
        for status, count in counts.items():
            self._client.set_tag(run_id, f"lcbench.cells.{status or 'missing'}", str(count))
        if not counts[None]:
            self._client.set_terminated(run_id, "FAILED" if counts["failed"] else "FINISHED")


def flat_params(cell: Cell) -> dict[str, Any]:
    """Every axis as a param: a group's value under the group's name, its options below it."""
    problem = cell.problem
    params = _flat("", cell.config)
    return params | {
        "nodes": problem.scale.nodes, "gpus_per_node": problem.scale.gpus_per_node,
        "world_size": problem.scale.world_size, "num_heads_q": problem.heads.q, "num_heads_kv": problem.heads.kv,
        "head_dim": problem.heads.dim,
    }  # fmt: skip


def _flat(prefix: str, config: dict[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            if "name" in value:
                params[name] = value["name"]
            params |= _flat(f"{name}.", {k: v for k, v in value.items() if k not in ("name", "_target_")})
        else:
            params[name] = value
    return params


def _metrics(attempt: Attempt) -> list[tuple[str, float, int]]:
    """(key, value, step) of an attempt, times in milliseconds."""
    found = [(*_in_ms(key, value), attempt.number) for key, value in attempt.metrics.items()]
    first = SAMPLE_STRIDE * (attempt.number - 1)
    for key, values in attempt.samples.items():
        found += [(*_in_ms(f"samples/{key}", value), first + i) for i, value in enumerate(values)]
    return found


def _in_ms(key: str, value: float) -> tuple[str, float]:
    return (f"{key[:-2]}_ms", value * 1e3) if key.endswith("_s") else (key, value)


def _tags(attempts: list[Attempt]) -> dict[str, Any]:
    newest = attempts[-1]
    provenance = newest.provenance
    git, versions = provenance.get("git") or {}, provenance.get("versions") or {}
    history = [
        {"attempt": a.number, "status": a.status, "class": a.failure.kind if a.failure else None, "pack": a.pack} for a in attempts
    ]
    return {
        "lcbench.status": newest.status,
        "lcbench.failure": newest.failure.kind if newest.failure else "",
        "lcbench.cause": newest.failure.cause if newest.failure else "",
        "lcbench.attempt": newest.number,
        "lcbench.history": json.dumps(history),
        "lcbench.pack": newest.pack,
        "lcbench.slurm_job_id": provenance.get("slurm_job_id") or "",
        "lcbench.nodes": provenance.get("nodes") or "",
        "lcbench.device": provenance.get("device") or "",
        "lcbench.stopped_by": provenance.get("stopped_by") or "",
        "lcbench.peak_source": provenance.get("peak_source") or "",
        **{f"lcbench.version.{name}": version for name, version in versions.items()},
        "mlflow.source.git.commit": git.get("commit") or "",
        "lcbench.git_dirty": git.get("dirty", ""),
    }
