"""Publishing to a real MLflow: one run per cell, idempotent, with history; a server that is away costs nothing."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest

from lcbench.measure.measured import Measured
from lcbench.runs.attempt import Attempt, Failure
from lcbench.runs.files import read_json, write_json
from lcbench.runs.manifest import Entry
from lcbench.runs.pack import PRIVATE, Pack, Settings, forget_secrets
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.memory import FORM
from lcbench.runs.tracking.parent import Summary
from lcbench.runs.tracking.publish import attach, publish, tell
from lcbench.runs.tracking.server import TrackingUnavailable
from lcbench.runs.tracking.shown import SAMPLE_STRIDE, SHORT, in_units, values
from lcbench.runs.worker import amended
from tests.databases import database
from tests.runs.test_again import WRONG
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


@pytest.mark.slow
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


KILLED_AT_A_TABLE = """
import os, sys
from alembic.operations import Operations
real = Operations.create_table
def create(self, name, *columns, **options):
    made = real(self, name, *columns, **options)
    if name == "logged_models":
        os.kill(os.getpid(), 9)
    return made
Operations.create_table = create
from pathlib import Path
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.publish import publish
publish(Sweep(Path(sys.argv[1]), "s"), sys.argv[2])
"""


@pytest.mark.slow
def test_a_database_whose_making_was_killed_is_made_again(tmp_path: Path) -> None:
    sweep, cell = Sweep(tmp_path, "s"), made_cell()
    sweep.add([Entry(cell)], command=[])
    attempt(sweep, cell.id, "ok", 1.0)
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED_AT_A_TABLE, tmp_path, uri], capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "new" / "mlflow.db").exists()
    assert publish(sweep, uri).published == 1
    assert {path.name for path in (tmp_path / "new").iterdir()} <= {"mlflow.db", "mlartifacts", ".mlflow.db.lock"}


def with_blocks(sweep: Sweep, cell_id: str, blocks: int) -> None:
    """Write the newest attempt as it is with so many blocks of timings."""
    last = sweep.attempts(cell_id)[-1]
    again = [
        {"block": 2 + i, "started_at": last.finished_at, "finished_at": last.finished_at + (i + 1) / 1000, "iterations": 2}
        for i in range(blocks - 1)
    ]
    values = [float(1 + i // 2) for i in range(2 * blocks)]
    sweep.finish(
        replace(
            last, provenance={**last.provenance, "again": again},
            samples={"forward_s": values, "block_forward_s": values[::2], "rank_forward_median_s": [1.0]},
            metrics={"time/forward/median_s": 10.0 - blocks, "time/blocks": float(blocks), "memory/peak_bytes": 7.0 * 2**30},
        )
    )  # fmt: skip


@pytest.mark.slow
def test_an_attempt_that_got_another_block_is_published_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, cell, other = Sweep(tmp_path / "results", "s"), made_cell(), made_cell(1)
    sweep.add([Entry(cell), Entry(other)], command=["cp=ring"])
    uri = database(tmp_path)
    attempt(sweep, cell.id, "failed", 1.0)
    for each in (cell, other):
        attempt(sweep, each.id, "ok", 1.0)
    with_blocks(sweep, cell.id, 1)
    counts = [(publish(sweep, uri).published, publish(sweep, uri).unchanged)]
    client = mlflow.MlflowClient(tracking_uri=uri)

    def shown() -> Any:
        (found,) = client.search_runs(["1"], f"tags.`lcbench.cell_id` = '{cell.id}'")
        return found

    assert shown().data.tags["lcbench.blocks"] == "1"
    with_blocks(sweep, cell.id, 2)
    counts.append((publish(sweep, uri).published, publish(sweep, uri).unchanged))
    assert shown().data.metrics["time/forward/median_ms"] == 8000.0
    (sweep.folder / "mlflow.json").unlink()  # what is there is found by its tags
    assert publish(sweep, uri).published == 0
    with_blocks(sweep, cell.id, 3)
    counts.append((publish(sweep, uri).published, publish(sweep, uri).unchanged))
    lost = [{"block": 4, "cause": "crash: it broke"}]
    last = sweep.attempts(cell.id)[-1]
    sweep.finish(replace(last, provenance={**last.provenance, "lost_blocks": lost}))
    counts.append((publish(sweep, uri).published, publish(sweep, uri).unchanged))
    assert counts == [(2, 2), (1, 2), (1, 2), (1, 2)]

    run = shown()
    assert (run.data.tags["lcbench.attempt"], run.data.tags["lcbench.blocks"]) == ("2", "3")
    assert json.loads(run.data.tags["lcbench.lost_blocks"]) == lost
    assert run.data.metrics["time/forward/median_ms"] == 7000.0  # the last is no larger than those before
    assert run.data.metrics["time/blocks"] == 3.0

    def history(key: str, number: int = 2) -> list[tuple[int, float]]:
        found = client.get_metric_history(run.info.run_id, key)
        return sorted((m.step, m.value) for m in found if m.step >= SAMPLE_STRIDE * (number - 1))

    values = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert history("samples/forward_ms") == [(SAMPLE_STRIDE + i, 1000 * value) for i, value in enumerate(values)]
    assert history("samples/block_forward_ms") == [(SAMPLE_STRIDE + i, 1000.0 * (1 + i)) for i in range(3)]
    assert history("samples/rank_forward_median_ms") == [(SAMPLE_STRIDE, 1000.0)]
    medians = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "time/forward/median_ms")]
    assert medians == [(1, 1000.0), (2, 9000.0), (2, 8000.0), (2, 7000.0)]
    path = client.download_artifacts(run.info.run_id, "attempts/attempt-2.json", str(tmp_path))
    assert json.loads(Path(path).read_text())["provenance"]["lost_blocks"] == lost

    last = sweep.attempts(cell.id)[-1]
    begun = sweep.begin_again(last, 5)
    sweep.finish(amended(last, begun, Measured(check=WRONG)))
    assert publish(sweep, uri).published == 1
    run = shown()
    assert (run.info.status, run.data.tags["lcbench.status"], run.data.tags.get("lcbench.blocks")) == ("FAILED", "failed", None)
    assert math.isnan(run.data.metrics["time/forward/median_ms"])  # it is no number any more
    assert math.isnan(run.data.metrics["time/blocks"])
    assert run.data.metrics["memory/peak_gib"] == 7.0

    monkeypatch.setattr(Sweep, "attempts", lambda *_: pytest.fail("a result was read though nothing has changed"))
    counts_again = publish(sweep, uri)
    assert (counts_again.published, counts_again.unchanged) == (0, 2)


@pytest.mark.slow
def test_what_an_older_version_published_is_brought_up_to_date_once(tmp_path: Path) -> None:
    sweep, cell = Sweep(tmp_path / "results", "s"), made_cell()
    sweep.add([Entry(cell)], command=["cp=ring"])
    uri = database(tmp_path)
    attempt(sweep, cell.id, "ok", 1.0)
    publish(sweep, uri)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs(["1"], "tags.`lcbench.status` = 'ok'")
    # As it was: a shorter memory, no form, tags that say nothing, a view of all good cells.
    client.delete_tag(run.info.run_id, "lcbench.form")
    for key in ("lcbench.failure", "lcbench.files"):
        client.set_tag(run.info.run_id, key, "")
    mine = f"mlflow.sharedViewState.{sweep.manifest()['id']}"
    client.set_experiment_tag("1", f"{mine}.gone", "deflate;")
    path = sweep.folder / "mlflow.json"
    memory = read_json(path)
    memory[uri]["cells"] = {cell_id: entry[:3] for cell_id, entry in memory[uri]["cells"].items()}
    write_json(path, memory)
    assert [publish(sweep, uri).published for _ in range(2)] == [1, 0]
    path.unlink()  # a new machine asks the server
    assert publish(sweep, uri).published == 0
    assert len(client.search_runs(["1"])) == 2
    tags = client.get_run(run.info.run_id).data.tags
    assert {"lcbench.failure", "lcbench.files"} & set(tags) == set()
    assert tags["lcbench.form"] == str(FORM)
    history = client.get_metric_history(run.info.run_id, "time/forward/median_ms")
    assert [(m.step, m.value) for m in history] == [(1, 1000.0)]
    views = {key for key in client.get_experiment("1").tags if key.startswith(mine)}
    assert views == {mine}
    with_blocks(sweep, cell.id, 3)
    assert publish(sweep, uri).published == 1
    attempt(sweep, cell.id, "ok", 1.0)
    assert publish(sweep, uri).published == 1


@pytest.mark.slow
def test_what_was_deleted_on_the_server_is_made_again(tmp_path: Path) -> None:
    sweep, cells = Sweep(tmp_path / "results", "s"), [made_cell(seed) for seed in range(3)]
    sweep.add([Entry(cell) for cell in cells], command=[], launch={"launcher": "slurm", "settings": {"site": {}}, "by": "ada"})
    uri = database(tmp_path)
    for cell in cells:
        attempt(sweep, cell.id, "ok", 1.0)
    publish(sweep, uri)
    client = mlflow.MlflowClient(tracking_uri=uri)

    def runs() -> dict[str, Any]:
        return {r.data.tags.get("lcbench.cell_id", "parent"): r for r in client.search_runs(["1"])}

    before = runs()
    assert {r.data.tags["mlflow.user"] for r in before.values()} == {"ada"}
    assert before["parent"].data.tags["mlflow.source.type"] == "JOB"
    for cell in cells[:2]:
        client.delete_run(before[cell.id].info.run_id)
    assert publish(sweep, uri, thorough=True).published == 2
    after = runs()
    assert len(after) == 4
    assert after[cells[2].id].info.run_id == before[cells[2].id].info.run_id
    client.delete_run(after[cells[0].id].info.run_id)
    attempt(sweep, cells[0].id, "ok", 2.0)  # whoever has more to say of a run that is gone makes it again too
    assert publish(sweep, uri).published == 1
    client.delete_run(after["parent"].info.run_id)
    assert publish(sweep, uri).published == 0
    again = runs()
    assert {again[c.id].data.tags["mlflow.parentRunId"] for c in cells} == {again["parent"].info.run_id}
    assert again["parent"].data.tags["lcbench.cells.ok"] == "3"

    client.delete_experiment("1")
    with pytest.raises(TrackingUnavailable, match="experiments restore --experiment-id 1,"):
        publish(sweep, uri)
    assert publish(sweep, uri, "other").published == 3
    client.restore_experiment("1")
    assert publish(sweep, uri, thorough=True).unchanged == 3


def test_files_that_cannot_be_put_cost_a_line_and_come_later(tmp_path: Path) -> None:
    sweep, cells = Sweep(tmp_path / "results", "s"), [made_cell(seed) for seed in range(2)]
    sweep.add([Entry(cell) for cell in cells], command=[])
    uri = database(tmp_path)
    client = mlflow.MlflowClient(tracking_uri=uri)
    root = tmp_path / "root"
    root.touch()  # no folder, so nobody can write below it
    made = client.create_experiment("theirs", artifact_location=root.as_uri())
    for cell in cells:
        attempt(sweep, cell.id, "ok", 0.5)
    counts = publish(sweep, uri, "theirs")
    assert (counts.published, counts.unchanged, counts.complete) == (2, 0, True)
    assert "artifact root" in counts.files
    assert "--serve-artifacts" in counts.files
    children = client.search_runs([made], "tags.`lcbench.status` = 'ok'")
    assert [r.data.metrics["time/forward/median_ms"] for r in children] == [500.0, 500.0]
    assert [r.info.status for r in children] == ["FINISHED", "FINISHED"]
    again = publish(sweep, uri, "theirs")
    assert (again.published, again.unchanged, bool(again.files)) == (0, 2, True)
    (sweep.folder / "mlflow.json").unlink()  # a new machine knows it by a tag
    root.unlink()
    later = publish(sweep, uri, "theirs")
    assert (later.published, later.files) == (2, "")
    assert {a.path for a in client.list_artifacts(children[0].info.run_id)} == {"attempts", "config.json", "environment.json"}
    assert publish(sweep, uri, "theirs").unchanged == 2


def test_units_are_for_people_and_the_numbers_of_tables_come_first(tmp_path: Path) -> None:
    known = {
        "time/total/median_s": ("time/total/median_ms", 1500.0), "memory/peak_bytes": ("memory/peak_gib", 1.5),
        "comm/bytes": ("comm/gib", 1.5), "comm/forward/bytes": ("comm/forward/gib", 1.5),
        "compute/mfu": ("compute/mfu_percent", 150.0), "overlap/forward/efficiency": ("overlap/forward/efficiency_percent", 150.0),
        "samples/rank_peak_bytes": ("samples/rank_peak_gib", 1.5), "samples/forward_s": ("samples/forward_ms", 1500.0),
        "check/dq_error": ("check/dq_error", 1.5), "time/blocks": ("time/blocks", 1.5),
        "from/another_version": ("from/another_version", 1.5),
    }  # fmt: skip
    for key, shown in known.items():
        assert in_units(key, 1.5 * 2**30 if "bytes" in key else 1.5) == shown
    metrics = {"check/dq_error": 1e-3, "balance/area_max_over_mean": 1.0, "memory/peak_bytes": 2.0**31, "compute/mfu": 0.625}
    metrics |= {"time/noise": 0.004, "compute/tflops_per_gpu": 500.0, "from/another_version": 1.0, "comm/bytes": 1.0}
    metrics |= {f"time/{phase}/median_s": 0.25 for phase in ("total", "forward", "backward")}
    found = values(Attempt("a" * 12, "s", 1, "ok", metrics=metrics))
    there = [name for name, key in SHORT.items() if key in metrics]
    assert [name for name, _ in found[: len(there)]] == there
    assert dict(found[: len(there)]) == {
        "tflops": 500.0, "mfu_percent": 62.5, "total_ms": 250.0, "fwd_ms": 250.0, "bwd_ms": 250.0, "peak_gib": 2.0,
        "noise_percent": 0.4,
    }  # fmt: skip
    names = [name for name, _ in found]
    order = ["compute/tflops_per_gpu", "time/total/median_ms", "memory/peak_gib", "comm/gib", "check/dq_error"]
    assert sorted(names, key=names.index) == names
    assert [name for name in names if name in order] == order
    assert len(set(names)) == len(names)


def test_a_run_has_no_tag_that_says_nothing_and_names_who_and_what(tmp_path: Path) -> None:
    sweep, cell = Sweep(tmp_path / "results", "s"), made_cell()
    launch = {"launcher": "local", "settings": {"site": {}}, "by": "ada"}
    sweep.add([Entry(cell)], command=["cp=ring", "+site.env.HF_TOKEN=hunter2"], launch=launch)
    uri = database(tmp_path)
    attempt(sweep, cell.id, "failed", 1.0)
    publish(sweep, uri)
    client = mlflow.MlflowClient(tracking_uri=uri)

    def tags() -> dict[str, str]:
        (run,) = client.search_runs(["1"], f"tags.`lcbench.cell_id` = '{cell.id}'")
        return dict(run.data.tags)

    assert tags()["lcbench.cause"] == "it broke"
    attempt(sweep, cell.id, "ok", 1.0)
    publish(sweep, uri)
    now = tags()
    assert "lcbench.cause" not in now
    assert "lcbench.failure" not in now
    assert [key for key, value in now.items() if not value] == []
    assert now["mlflow.user"] == "ada"
    assert now["mlflow.source.name"].startswith("python -m lcbench.sweep cp=ring")
    assert "hunter2" not in str(now)


@pytest.mark.parametrize(
    ("statuses", "status"),
    [(["ok", "failed"], "FINISHED"), (["failed", "failed"], "FAILED"), (["ok", None], "RUNNING"), (["ok", "ok"], "FINISHED")],
)
def test_a_sweep_failed_only_if_nothing_is_ok(tmp_path: Path, statuses: list[str | None], status: str) -> None:
    sweep, cells = Sweep(tmp_path / "results", "s"), [made_cell(seed) for seed in range(2)]
    sweep.add([Entry(cell) for cell in cells], command=[])
    for cell, its in zip(cells, statuses, strict=True):
        if its:
            attempt(sweep, cell.id, its, 1.0)
    uri = database(tmp_path)
    counts = publish(sweep, uri)
    assert counts.ended == (None not in statuses)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (parent,) = client.search_runs(["1"], "tags.`lcbench.cells` = '2'")
    assert parent.info.status == status
    assert parent.data.metrics["cells/ok"] == statuses.count("ok")
    assert parent.data.metrics["cells/failed"] == statuses.count("failed")
    assert parent.data.metrics["cells/missing"] == statuses.count(None)


@pytest.mark.slow
def test_what_a_sweep_comes_to_is_told_again_only_when_it_changed(tmp_path: Path) -> None:
    sweep, cell = Sweep(tmp_path / "results", "s"), made_cell()
    sweep.add([Entry(cell)], command=["cp=ring"])
    uri = database(tmp_path)
    attempt(sweep, cell.id, "ok", 1.0)
    assert not publish(sweep, uri).told  # as a pack does, which does not know it
    told = Summary(
        "Use ring with hunter2.", "more\n" * 9000, {"gpu_hours": 2.0}, {"lcbench.verdict": "Use ring"}, {cell.id: "#123456"}
    )
    assert tell(sweep, uri, None, told) == ""
    assert publish(sweep, uri).told
    client = mlflow.MlflowClient(tracking_uri=uri)
    (parent,) = client.search_runs(["1"], "tags.`lcbench.verdict` = 'Use ring'")
    (run,) = client.search_runs(["1"], "tags.`lcbench.status` = 'ok'")
    assert run.data.tags["mlflow.runColor"] == "#123456"
    assert parent.data.metrics["gpu_hours"] == 2.0
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith("Use ring")
    assert len(note) <= 5000
    assert note.endswith("`python -m lcbench.sweep cp=ring`")  # the body is what is cut
    attempt(sweep, cell.id, "failed", 1.0)
    assert not publish(sweep, uri).told


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_a_copied_or_moved_checkout_writes_nothing_into_the_old_one(tmp_path: Path, how: str) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    sweep, cells = Sweep(old / "results", "s"), [made_cell(seed) for seed in range(2)]
    sweep.add([Entry(cell) for cell in cells], command=[])
    attempt(sweep, cells[0].id, "ok", 1.0)
    assert publish(sweep, database(old)).files == ""
    if how == "moved":
        old.rename(new)
    else:
        shutil.copytree(old, new)
    before = sorted(old.rglob("*")) if old.exists() else None
    moved = Sweep(new / "results", "s")
    attempt(moved, cells[1].id, "ok", 1.0)
    counts = publish(moved, f"sqlite:///{new}/mlflow.db")
    assert counts.published == 1
    assert "keeps them in file://" in counts.files
    assert "--experiment NAME" in counts.files
    assert "\n" not in counts.files
    assert (sorted(old.rglob("*")) if old.exists() else None) == before
    with pytest.raises(TrackingUnavailable, match="not beside its database"):
        attach(moved, f"sqlite:///{new}/mlflow.db", tmp_path / "new")
    assert publish(moved, f"sqlite:///{new}/mlflow.db", "another").files == ""


def test_no_secret_is_stored_but_for_the_pack_that_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"HF_TOKEN": "hunter2-a", "https_proxy": "http://me:hunter2-b@proxy:1", "NCCL_DEBUG": "WARN"}
    site = {"env": env, "tracking_uri": "http://me:hunter2-c@host:5000"}
    settings = Settings(site, [], site["tracking_uri"], {}, {}, {}, "team")  # type: ignore[arg-type]
    pack = Pack("p", "s", str(tmp_path), "slurm", "1x1", (), {}, {}, 1, settings)
    for _ in range(2):  # it may be written again before it is submitted
        pack.write()
    private = pack.folder / PRIVATE
    assert private.stat().st_mode & 0o777 == 0o600
    assert Pack.read(pack.path).settings.tracking_uri == "http://me:hunter2-c@host:5000"
    assert Pack.read(pack.path).site["env"] == env
    forget_secrets(pack.folder)
    assert not private.exists()
    stored = Pack.read(pack.path).settings
    assert "hunter2" not in pack.path.read_text()
    assert stored.tracking_uri == "http://host:5000"
    assert stored.experiment == "team"
    assert stored.site["env"]["NCCL_DEBUG"] == "WARN"
    for key in env:
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(ValueError, match="export HF_TOKEN"):
        stored.revealed()
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2-c@host:5000")
    assert stored.revealed().site["env"] == env
    assert stored.revealed().tracking_uri == "http://me:hunter2-c@host:5000"

    sweep = Sweep(tmp_path, "s")
    sweep.add([Entry(made_cell())], command=["tracking_uri=http://me:hunter2-c@host:5000", "+site.env.HF_TOKEN=hunter2-a"])
    attempt(sweep, made_cell().id, "ok", 1.0)
    write_json(sweep.folder / "mlflow.json", {"http://me:hunter2-c@host:5000": {"sweep_id": "1", "experiment": "1", "cells": {}}})
    publish(sweep, database(tmp_path))
    written = [p for p in tmp_path.rglob("*") if p.is_file() and b"hunter2" in p.read_bytes()]
    assert written == []
