"""The main job on a real Slurm cluster: checked cells over nodes, failures that carry their cause, rerun, resume, refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest

from lcbench.runs.store import Sweep

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
FAULTY = ["--config-dir", str(ROOT / "tests" / "conf")]
SMALL = [
    "site=devcluster", "dtype=float64", "measure.warmup=1", "measure.min_iterations=3", "measure.max_iterations=5",
    "measure.budget_s=1", "measure.precision=0.2", "wait=true",
]  # fmt: skip


def lcbench(command: str, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"lcbench.{command}", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def cells(results: Path, sweep: str, environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    shown = lcbench("status", sweep, "--results", str(results), "--json", environment=environment)
    return {cell["id"]: cell for cell in json.loads(shown.stdout)["cells"]}


def test_every_strategy_and_mask_is_checked_on_two_nodes(devcluster: dict[str, str], tmp_path: Path) -> None:
    done = lcbench(
        "sweep", "-m", "cp=ring,ulysses,usp", "mask=full,dual_scope,causal_document,share_question,block_random", "seqlen=512,1k",
        "scale=2x8", "heads=16x4x16", "sweep=main", f"results={tmp_path}", f"tracking_uri=sqlite:///{tmp_path}/mlflow.db", *SMALL,
        environment=devcluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = Sweep(tmp_path, "main")
    assert len(sweep.entries()) == 30
    for cell_id in sweep.entries():
        (attempt,) = sweep.attempts(cell_id)
        assert attempt.status == "ok"
        errors = attempt.checks["errors"]
        assert set(errors) == {"out", "lse", "dq", "dk", "dv"}
        assert max(errors.values()) <= 1e-12
        assert len(attempt.samples["rank_forward_median_s"]) == 16
        assert attempt.provenance["slurm_job_id"]


@pytest.mark.timeout(1200)
def test_ninety_six_ranks_on_twelve_nodes(devcluster: dict[str, str], tmp_path: Path) -> None:
    done = lcbench(
        "sweep", "cp=usp,groupcast", "mask=causal_document", "seqlen=768", "scale=12x8", "heads=16x8x8", "sweep=wide",
        f"results={tmp_path}", f"tracking_uri=sqlite:///{tmp_path}/mlflow.db", *SMALL,
        "measure.warmup=0", "measure.min_iterations=1", "measure.max_iterations=1", environment=devcluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = Sweep(tmp_path, "wide")
    for cell_id in sweep.entries():
        (attempt,) = sweep.attempts(cell_id)
        assert max(attempt.checks["errors"].values()) <= 1e-12
        assert len(attempt.samples["rank_forward_median_s"]) == 96


def test_failures_carry_class_and_cause_and_rerun_repairs_one(devcluster: dict[str, str], tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    environment = {**devcluster, "LCBENCH_TEST_FAULT": str(fault)}
    results = tmp_path / "results"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    command = [
        *FAULTY, "kernel=faulty_raise,faulty_exit,faulty_hang,faulty_wrong,sdpa_flash", "cp=ring,usp", "seqlen=128", "scale=2x2",
        "heads=4x2x8", "hang.min_s=15", "hang.factor=0.1", "sweep=faults", f"results={results}", f"tracking_uri={uri}", *SMALL,
    ]  # fmt: skip
    done = lcbench("sweep", *command, environment=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    entries = Sweep(results, "faults").entries()
    kernel_of = {cell_id: entry.cell.config["kernel"]["name"] for cell_id, entry in entries.items()}
    want = {
        "sdpa_flash": ("ok", "", ""),
        "faulty_raise": ("failed", "crash", "the faulty kernel raises, as told"),
        "faulty_exit": ("failed", "crash", "rank 1 exited with code 17"),
        "faulty_hang": ("failed", "hang", "rank 1 stood at testing/faulty.py"),
        "faulty_wrong": ("failed", "numerics", "out: error"),
    }
    for cell_id, cell in cells(results, "faults", environment).items():
        state, kind, cause = want[kernel_of[cell_id]]
        assert (cell["state"], cell["failure"]) == (state, kind), cell
        assert cause in cell["cause"]
        assert cell["job_id"]

    planned = lcbench("sweep", *command, "hydra/launcher=dry", environment=environment)
    assert planned.stdout.count("done before") == 2, planned.stdout
    assert planned.stdout.count("to run") == 8

    fault.unlink()
    repaired = next(c for c, name in kernel_of.items() if name == "faulty_hang")
    again = lcbench("rerun", repaired, "--results", str(results), "--wait", environment=environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [a.status for a in Sweep(results, "faults").attempts(repaired)] == ["failed", "ok"]
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("lcbench")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`lcbench.cell_id` = '{repaired}'")
    assert run.data.tags["lcbench.status"] == "ok"
    assert run.data.tags["lcbench.attempt"] == "2"
    assert [a["class"] for a in json.loads(run.data.tags["lcbench.history"])] == ["hang", None]
    failed = client.search_runs([experiment.experiment_id], "tags.`lcbench.failure` = 'crash'")
    assert len(failed) == 4


def test_a_cancelled_job_is_told_from_a_crash(devcluster: dict[str, str], tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    environment = {**devcluster, "LCBENCH_TEST_FAULT": str(fault)}
    done = lcbench(
        "sweep", *FAULTY, "kernel=faulty_hang", "seqlen=128", "scale=1x2", "heads=4x2x8", "sweep=cut", f"results={tmp_path}",
        f"tracking_uri=sqlite:///{tmp_path}/mlflow.db", *SMALL[:-1], environment=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sweep = Sweep(tmp_path, "cut")
    (cell_id,) = sweep.entries()
    for _ in range(300):
        if sweep.running(cell_id):
            break
        subprocess.run(["sleep", "0.2"], check=True)
    (cell,) = cells(tmp_path, "cut", environment).values()
    assert (cell["state"], cell["job_state"]) == ("running", "RUNNING")
    subprocess.run(["scancel", cell["job_id"]], env=environment, check=True)
    for _ in range(150):
        (cell,) = cells(tmp_path, "cut", environment).values()
        if cell["state"] == "failed":
            break
        subprocess.run(["sleep", "0.2"], check=True)
    assert (cell["state"], cell["failure"]) == ("failed", "cancelled"), cell


def test_a_refused_job_is_one_line_and_code_3(devcluster: dict[str, str], tmp_path: Path) -> None:
    done = lcbench(
        "sweep", "seqlen=1k", "scale=13x8", "heads=8x8x8", f"results={tmp_path}", *SMALL, environment=dict(os.environ) | devcluster
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Slurm refused pack" in done.stderr
