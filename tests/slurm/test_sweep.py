"""The main job on a real Slurm cluster: checked cells over nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lcbench.runs.store import Sweep
from tests.slurm.stage import lcbench

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SMALL = [
    "site=devcluster", "dtype=float64", "measure.warmup=1", "measure.min_iterations=3", "measure.max_iterations=5",
    "measure.budget_s=1", "measure.precision=0.2", "wait=true",
]  # fmt: skip


def test_cells_are_checked_on_two_nodes(devcluster: dict[str, str], tmp_path: Path) -> None:
    done = lcbench(
        "sweep", "-m", "cp=ring,usp", "mask=causal_document,block_random", "seqlen=1k", "scale=2x4",
        "heads=16x4x16", "sweep=main", "output=json", f"results={tmp_path}", f"tracking_uri=sqlite:///{tmp_path}/mlflow.db", *SMALL,
        environment=devcluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["status"] for row in json.loads(done.stdout)["cells"]] == ["ok"] * 4
    sweep = Sweep(tmp_path, "main")
    assert len(sweep.entries()) == 4
    for cell_id in sweep.entries():
        (attempt,) = sweep.attempts(cell_id)
        assert attempt.status == "ok"
        errors = attempt.checks["errors"]
        assert set(errors) == {"out", "lse", "dq", "dk", "dv"}
        assert max(errors.values()) <= 1e-12
        assert len(attempt.samples["rank_forward_median_s"]) == 8
        assert attempt.provenance["slurm_job_id"]
        checked = attempt.provenance["check"]
        assert checked["fallen"] == {}
        assert len(checked["nodes"]) == 2
        assert all(checked[f"{link} GB/s"]["worst"] > 0 for link in ("allreduce", "within a node", "between nodes"))


@pytest.mark.timeout(1200)
def test_ninety_six_ranks_on_twelve_nodes(devcluster: dict[str, str], tmp_path: Path) -> None:
    done = lcbench(
        "sweep", "cp=usp", "mask=causal_document", "seqlen=768", "scale=12x8", "heads=16x8x8", "sweep=wide",
        f"results={tmp_path}", f"tracking_uri=sqlite:///{tmp_path}/mlflow.db", *SMALL,
        "measure.warmup=0", "measure.min_iterations=1", "measure.max_iterations=1", environment=devcluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = Sweep(tmp_path, "wide")
    for cell_id in sweep.entries():
        (attempt,) = sweep.attempts(cell_id)
        assert max(attempt.checks["errors"].values()) <= 1e-12
        assert len(attempt.samples["rank_forward_median_s"]) == 96
