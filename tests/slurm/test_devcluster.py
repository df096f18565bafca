"""The development cluster is a real one."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm


def run(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout


def final_state(environment: dict[str, str], job: str) -> str:
    """What accounting says once the job has ended; accounting lags a little."""
    state = ""
    for _ in range(100):
        state = run(environment, "sacct", "-X", "-n", "-P", "-j", job, "-o", "State").strip()
        if state and state not in ("PENDING", "RUNNING", "COMPLETING"):
            break
        time.sleep(0.2)
    return state


def test_twelve_nodes_with_eight_gpu_slots(devcluster: dict[str, str]) -> None:
    nodes = run(devcluster, "sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %G").split("\n")
    assert [n for n in nodes if n] == [f"lc{i:02d} gpu:8" for i in range(1, 13)]


def test_a_job_spans_all_nodes_and_sees_its_gpu_slots(devcluster: dict[str, str]) -> None:
    command = "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    lines = run(devcluster, "srun", "-N12", "--ntasks-per-node=1", "--gres=gpu:8", "sh", "-c", command).split("\n")
    assert sorted(line for line in lines if line) == [f"lc{i:02d} 0,1,2,3,4,5,6,7" for i in range(1, 13)]


def test_accounting_knows_how_jobs_end(devcluster: dict[str, str]) -> None:
    ended = {}
    for command, state in (("true", "COMPLETED"), ("exit 3", "FAILED")):
        ended[run(devcluster, "sbatch", "--parsable", "-o", "/dev/null", "--wrap", command).strip()] = state
    cancelled = run(devcluster, "sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 100").strip()
    run(devcluster, "scancel", cancelled)
    for job, state in ended.items():
        assert final_state(devcluster, job) == state
    assert final_state(devcluster, cancelled).startswith("CANCELLED")


def test_its_daemons_listen_on_the_loopback_only(devcluster: dict[str, str]) -> None:
    shown = run(devcluster, "scontrol", "show", "config")
    first = next(int(line.split()[-1]) for line in shown.splitlines() if line.startswith("SlurmctldPort"))
    sockets = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {int(local.split(":")[1], 16): local.split(":")[0] for local, _, state in sockets if state == "0A"}
    ours = {port: listening[port] for port in range(first, first + 21) if port in listening}
    assert len(ours) == 15  # slurmctld, slurmdbd, MariaDB and twelve slurmd
    assert set(ours.values()) == {"0100007F"}
