"""Publishing to a real MLflow: one run per cell, idempotent, with history; a server that is away costs nothing."""

from __future__ import annotations

import time
from pathlib import Path

import mlflow
import pytest

from lcbench.runs.store import Attempt, Entry, Failure, Sweep
from lcbench.runs.tracking import SAMPLE_STRIDE, TrackingUnavailable, publish
from tests.runs.test_store import made_cell


def attempt(sweep: Sweep, cell_id: str, status: str, seconds: float) -> None:
    running = sweep.begin(cell_id, "p")
    sweep.finish(
        Attempt(
            cell_id, sweep.name, running.number, status,  # type: ignore[arg-type]
            Failure("crash", "it broke") if status == "failed" else None,
            {"time/forward/median_s": seconds, "compute/mfu": 0.5}, {"forward_s": [seconds, 2 * seconds]},
            provenance={"versions": {"torch": "2"}, "git": {"commit": "abc"}, "device": "cpu"},
            started_at=time.time() - 1, finished_at=time.time(),
        )
    )  # fmt: skip


def test_publish_is_idempotent_and_shows_the_newest_attempt(tmp_path: Path) -> None:
    sweep, cell, other = Sweep(tmp_path / "results", "s"), made_cell(), made_cell(1)
    sweep.add([Entry(cell), Entry(other)], command=["cp=ring"])
    uri = f"sqlite:///{tmp_path / 'db' / 'mlflow.db'}"
    attempt(sweep, cell.id, "failed", 1.0)
    assert publish(sweep, uri).published == 1
    counts = publish(sweep, uri)
    assert (counts.published, counts.unchanged) == (0, 1)
    attempt(sweep, cell.id, "ok", 0.25)
    attempt(sweep, other.id, "ok", 1.0)
    assert publish(sweep, uri).published == 2
    (sweep.folder / "mlflow.json").unlink()  # a new machine: what is there is found by its tags
    assert publish(sweep, uri).published == 0

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("lcbench")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3  # the parent and two children
    (run,) = [r for r in runs if r.data.tags.get("lcbench.cell_id") == cell.id]
    (parent,) = [r for r in runs if "lcbench.cell_id" not in r.data.tags]
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.metrics["time/forward/median_ms"] == 250.0
    assert [m.value for m in client.get_metric_history(run.info.run_id, "time/forward/median_ms")] == [1000.0, 250.0]
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "samples/forward_ms")]
    assert sorted(steps) == [0, 1, SAMPLE_STRIDE, SAMPLE_STRIDE + 1]
    assert run.data.params["seqlen"] == "1024"
    assert run.data.params["num_heads_kv"] == "2"
    assert run.data.tags["lcbench.attempt"] == "2"
    assert '"class": "crash"' in run.data.tags["lcbench.history"]
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"attempts", "config.json", "environment.json"}


def test_a_server_that_is_away_is_said_quickly(tmp_path: Path) -> None:
    sweep, cell = Sweep(tmp_path, "s"), made_cell()
    sweep.add([Entry(cell)], command=[])
    attempt(sweep, cell.id, "ok", 1.0)
    with pytest.raises(TrackingUnavailable, match=r"127\.0\.0\.1:9"):
        publish(sweep, "http://127.0.0.1:9")
    assert sweep.attempts(cell.id)[0].status == "ok"
