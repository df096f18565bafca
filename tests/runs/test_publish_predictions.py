"""Predictions on a tracking server: runs of their own, which nobody who looks for measured ones finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest

from lcbench.runs.manifest import Entry
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.publish import publish
from tests.databases import database
from tests.report.made import foretell, made_sweep

GRID = ["-m", "cp=ring,ulysses", "kernel=flash_attn3", "mask=causal", "seqlen=48k,96k", "scale=1x8", "heads=16x16x64"]


def runs_of(uri: str, where: str) -> list[Any]:
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("lcbench")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], where))


@pytest.mark.slow
def test_a_prediction_has_a_run_of_its_own_that_no_view_of_measured_ones_has(tmp_path: Path) -> None:
    uri = database(tmp_path)
    measured = made_sweep(tmp_path / "results", "measured", [w for w in GRID if "96k" not in w] + ["seqlen=48k"])
    sweep = foretell(measured, made_sweep(tmp_path / "other", "longer", GRID))
    assert publish(sweep, uri).published == 2 + 4
    sweep_id = sweep.manifest()["id"]
    cells = runs_of(uri, f"tags.`lcbench.sweep_id` = '{sweep_id}' and tags.`lcbench.status` != ''")
    assert [run.data.tags["lcbench.status"] for run in cells] == ["ok", "ok"]
    foretold = runs_of(uri, "tags.`lcbench.predicted` = 'true'")
    assert len(foretold) == 4
    (parent,) = runs_of(uri, f"tags.`lcbench.sweep_id` = '{sweep_id}' and tags.`lcbench.cells` != ''")
    assert parent.data.metrics["cells/predicted"] == 2, "of the four two were measured too"
    for run in foretold:
        tags = run.data.tags
        assert tags["lcbench.status"] == "predicted"
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.run_name.endswith("(predicted)")
        assert tags["mlflow.runColor"] not in {other.data.tags.get("mlflow.runColor") for other in cells}
        assert tags["mlflow.note.content"].startswith("**predicted, not measured**")
        assert run.data.metrics["band_percent"] == 25
        assert run.data.metrics["total_ms"] > 0


@pytest.mark.slow
def test_publishing_again_changes_nothing_and_a_new_prediction_stays_in_its_run(tmp_path: Path) -> None:
    uri = database(tmp_path)
    source = made_sweep(tmp_path / "results", "measured", GRID)
    sweep = foretell(Sweep(tmp_path / "results", "foretold"), source)
    assert publish(sweep, uri).published == 4
    assert publish(sweep, uri).published == 0
    before = {run.info.run_id for run in runs_of(uri, "tags.`lcbench.predicted` = 'true'")}
    foretell(sweep, source, band=0.5)
    (sweep.folder / "mlflow.json").unlink()  # a new machine: what is there is found by its tags
    assert publish(sweep, uri).published == 4
    runs = runs_of(uri, "tags.`lcbench.predicted` = 'true'")
    assert {run.info.run_id for run in runs} == before
    assert {run.data.metrics["band_percent"] for run in runs} == {50}


def test_a_prediction_that_cannot_be_made_any_more_leaves_the_server(tmp_path: Path) -> None:
    uri = database(tmp_path)
    source = made_sweep(tmp_path / "results", "measured", GRID)
    sweep = foretell(Sweep(tmp_path / "results", "foretold"), source)
    publish(sweep, uri)
    record = next(iter(sweep.look().records.values()))
    assert record.prediction is not None
    from dataclasses import replace

    sweep.finish(replace(record.prediction, status="skipped", metrics={}))
    publish(sweep, uri)
    assert len(runs_of(uri, "tags.`lcbench.predicted` = 'true'")) == 3
    assert publish(sweep, uri).published == 0


def test_a_cell_that_is_only_predicted_stays_so_until_it_is_asked_for(tmp_path: Path) -> None:
    source = made_sweep(tmp_path / "results", "measured", GRID)
    sweep = foretell(Sweep(tmp_path / "results", "foretold"), source)
    assert all(entry.predicted for entry in sweep.entries().values())
    cell = next(iter(sweep.entries().values())).cell
    sweep.add([Entry(cell)], command=["cp=ring"])
    sweep.add([Entry(cell, predicted=True)], command=["hydra/launcher=simulate"])
    assert not sweep.entries()[cell.id].predicted
    (sweep.folder / "manifest.json").write_text("{")
    assert {entry.predicted for entry in sweep.entries().values()} == {True}, "what was only predicted is all that is known"
