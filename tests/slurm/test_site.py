"""On a real cluster: names, environments and filters that hide jobs elsewhere, jobs that Slurm holds, and what sbatch refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from lcbench.runs.store import Sweep
from tests.slurm.stage import lcbench, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SMALL = [
    "site=devcluster", "scale=1x1", "cp=none", "seqlen=64", "heads=2x2x8", "dtype=float64", "measure.warmup=0",
    "measure.min_iterations=1", "measure.max_iterations=1", "measure.blocks=1",
]  # fmt: skip
# Each hides jobs, reshapes answers, or sends the question elsewhere.
ODD = {
    "SQUEUE_STATES": "COMPLETED", "SQUEUE_FORMAT2": "jobid", "SACCT_FORMAT": "user", "SLURM_TIME_FORMAT": "relative",
    "SLURM_CLUSTERS": "nowhere", "SCANCEL_STATE": "SUSPENDED", "SBATCH_PARTITION": "nowhere", "SLURM_BITSTR_LEN": "1",
}  # fmt: skip


def slurm(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_jobs_are_found_whatever_a_sweep_is_called_and_released_where_slurm_holds_them(
    devcluster: dict[str, str], tmp_path: Path
) -> None:
    """One sweep of three jobs: they are held, one is released and ends well, the rest is cancelled."""
    odd, name, results = {**devcluster, **ODD}, "x'y;$(z)é[1]", tmp_path / 'it\'s a "res" folder'
    where = ["--results", str(results)]
    quoted = str(results).replace("'", "\\'")
    command = [
        *SMALL, "seed=1,2,3", "pack.max_cells=1", f'sweep="{name}"', f"results='{quoted}'", "+site.sbatch.hold=true",
        "site.collector=false", "tracking_uri=none",
    ]  # fmt: skip
    done = lcbench("sweep", *command, environment=odd)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = Sweep(results, name)
    master = sweep.pack_file(sweep.packs()[0], "job.json")["job_id"].partition("_")[0]
    assert sweep.pack_file(sweep.packs()[0], "job.json")["cluster"] == "lcbench"
    assert f"{master}|lcbench sweep x_y___z___1_" in slurm(devcluster, "squeue", "-h", "-o", "%A|%k")

    def seen() -> tuple[list[str], set[str]]:
        shown = json.loads(lcbench("status", name, *where, "--json", environment=odd).stdout)
        return sorted(c["state"] for c in shown["cells"]), {p["reason"] for p in shown["packs"]}

    assert seen() == (["pending"] * 3, {"JobHeldUser"})
    helps = f"job {master} does not go on by itself (JobHeldUser), and 3 cells wait for it: scontrol release {master}"
    again = lcbench("sweep", *command, environment=odd)
    assert "3 under way, 0 to run" in again.stdout
    assert helps in again.stdout
    waited = lcbench("sweep", *command, "wait=true", environment=odd)  # it comes back
    assert waited.returncode == 1
    assert helps in waited.stderr

    slurm(devcluster, "scontrol", "release", f"{master}_1")
    wait_until(lambda: len([i for i in sweep.entries() if sweep.attempts(i)]) == 1, 120)
    followed = lcbench("status", name, *where, "--follow", "--quiet", environment=odd)
    assert followed.returncode == 1
    assert "2 cells wait for it" in followed.stderr
    assert seen()[0] == ["ok", "pending", "pending"]
    assert [p.name for p in results.iterdir()] == [name]  # logs lie below the sweep and nowhere else
    assert {p.name for p in (sweep.folder / "jobs").glob(f"*/{master}_1_*_log.out")} == {f"{master}_1_0_log.out"}

    told = lcbench("cancel", name, *where, environment=odd)
    assert told.stdout.startswith("2 jobs"), told.stdout + told.stderr
    assert slurm(devcluster, "squeue", "-h", "-j", master, "-t", "PD,R") == ""
    assert seen()[0] == ["failed", "failed", "ok"]
