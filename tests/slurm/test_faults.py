"""Something dies at a random moment of a sweep; the same command brings it to its end, and nothing that was measured is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import clear
from tests.slurm.stage import FAULTS, Server, Stage, kill, lcbench, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(autouse=True)
def well(devcluster: dict[str, str]) -> None:
    """What one test killed is there again before the next."""
    clear()


@pytest.mark.parametrize(
    "faults",
    [
        "kill_a_worker kill_an_agent", "kill_slurmd scancel", "requeue preempt",
        "kill_slurmctld kill_slurmdbd kill_the_server",
    ],
)  # fmt: skip
def test_after(faults: str, devcluster: dict[str, str], server: Server, tmp_path: Path) -> None:
    stage = Stage(tmp_path, server, devcluster, len(faults))
    done = stage.run()
    assert done.returncode == 0, done.stdout + done.stderr
    before: dict[str, float] = {}
    for fault in faults.split():
        stage.reach_a_random_moment(after=len(before))
        before = stage.measured()
        getattr(stage, fault)()
    stage.bring_to_its_end()
    stage.check(before, set().union(*(FAULTS[fault] for fault in faults.split())))


def test_after_the_submitting_process_died(devcluster: dict[str, str], server: Server, tmp_path: Path) -> None:
    stage = Stage(tmp_path, server, devcluster, 1)
    command = stage.begin("wait=true")
    stage.reach_a_random_moment()
    before = stage.measured()
    kill(command.pid)
    command.wait()
    stage.bring_to_its_end()
    stage.check(before, set())
    assert len(stage.sweep.packs()) == 2  # the jobs had gone on by themselves


def test_after_the_launcher_died_right_behind_sbatch(devcluster: dict[str, str], server: Server, tmp_path: Path) -> None:
    """The job is in the queue, and nobody was told its number."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@"; kill -9 $PPID\n')
    (tools / "sbatch").chmod(0o755)
    stage = Stage(tmp_path / "results", server, {**devcluster, "PATH": f"{tools}:{devcluster['PATH']}"}, 3)
    assert stage.run().returncode == -9
    stage.environment = devcluster
    again = stage.run()
    assert f"{stage.cells} under way" in again.stdout, again.stdout + again.stderr
    told = lcbench("cancel", "faults", "--results", str(stage.sweep.root), environment=devcluster)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("2 jobs")
    wait_until(lambda: stage.standing().ended, 60)
    stage.bring_to_its_end()
    stage.check({}, {"cancelled"})


def test_a_full_disk_loses_nothing(devcluster: dict[str, str], server: Server, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)], check=True)
    try:
        stage = Stage(disk / "results", server, devcluster, 2)
        done = stage.run()
        assert done.returncode == 0, done.stdout + done.stderr
        stage.reach_a_random_moment()
        before = stage.measured()
        filler = disk / "filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], capture_output=True)  # until there is no room
        time.sleep(8)
        during = stage.measured()
        assert set(before) <= set(during)
        refused = stage.run()
        assert refused.returncode in (0, 3), refused.stderr  # what the reserve gave back may be enough for a start
        assert "Traceback" not in refused.stderr
        filler.unlink()
        stage.bring_to_its_end()
        stage.check(during, {"no-start", "crash"})
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
