"""The development cluster for tests: a module finds all nodes well and no jobs, whatever the one before it left."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "devcluster" / "devcluster"
STATE = Path(os.environ.get("LCBENCH_DEVCLUSTER_DIR", ROOT / ".devcluster"))
# What the report of a failed test shows of the cluster.
SHOWN = (
    ["squeue", "--all", "-t", "all", "-o", "%i %j %T %r %N %M"], ["sinfo", "-N", "-p", "gpu", "-o", "%N %T %C %E"],
    ["tail", "-n", "60", str(STATE / "log" / "slurmctld.log")],
)  # fmt: skip


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, str]]:
    """Environment of a running development cluster; started for these tests where it is not up. Never skipped in CI."""
    up = subprocess.run([SCRIPT, "status"], capture_output=True).returncode == 0
    if not up:
        started = subprocess.run([SCRIPT, "up"], capture_output=True, text=True)
        if started.returncode != 0:
            if os.environ.get("CI"):
                pytest.fail(f"the development cluster did not start: {started.stderr}")
            pytest.skip(f"no development cluster: {started.stderr.strip()}")
    yield {**os.environ, "SLURM_CONF": str(STATE / "slurm.conf")}
    if not up:
        subprocess.run([SCRIPT, "down"], check=True)


@pytest.fixture(scope="module")
def devcluster(cluster: dict[str, str]) -> dict[str, str]:
    """Environment of the development cluster, all of whose nodes are idle and well when a module of tests begins."""
    clear()
    return cluster


def clear() -> None:
    """End all jobs, and bring back nodes and daemons that are not well."""
    done = subprocess.run([SCRIPT, "clear"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failed test goes what the cluster looked like."""
    report = yield
    if report.failed and "cluster" in getattr(item, "fixturenames", ()):
        environment = {**os.environ, "SLURM_CONF": str(STATE / "slurm.conf")}
        for command in SHOWN:
            said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
            report.sections.append((" ".join(command), said.stdout + said.stderr))
    return report
