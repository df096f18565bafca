from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "devcluster" / "devcluster"


@pytest.fixture(scope="session")
def devcluster() -> Iterator[dict[str, str]]:
    """Environment of a running development cluster; started for these tests where it is not up. Never skipped in CI."""
    up = subprocess.run([SCRIPT, "status"], capture_output=True).returncode == 0
    if not up:
        started = subprocess.run([SCRIPT, "up"], capture_output=True, text=True)
        if started.returncode != 0:
            if os.environ.get("CI"):
                pytest.fail(f"the development cluster did not start: {started.stderr}")
            pytest.skip(f"no development cluster: {started.stderr.strip()}")
    state = Path(os.environ.get("LCBENCH_DEVCLUSTER_DIR", ROOT / ".devcluster"))
    yield {**os.environ, "SLURM_CONF": str(state / "slurm.conf")}
    if not up:
        subprocess.run([SCRIPT, "down"], check=True)
