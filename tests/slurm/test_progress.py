"""On the development cluster: what hangs on another node is found, and whose agent died is told."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from lcbench.runs.store import Sweep
from tests.slurm.stage import agents, kill, lcbench, wait_until
from tests.slurm.test_classes import SMALL

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_a_rank_that_is_stopped_on_another_node_and_an_agent_that_is_killed(devcluster: dict[str, str], tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    environment = {**devcluster, "LCBENCH_TEST_FAULT": str(fault)}
    common = [*SMALL, "cp=ring", "scale=2x1", f"results={tmp_path}", "tracking_uri=none"]
    # One that hangs until its agent on the second node is killed, and one whose rank there is stopped.
    for sweep, kernel, patience in (("killed", "faulty_hang", "900"), ("stopped", "faulty_stop", "10")):
        asked = [*common, f"kernel={kernel}", f"sweep={sweep}", f"hang.min_s={patience}", "hang.factor=0.01"]
        assert lcbench("sweep", *asked, environment=environment).returncode == 0
    killed, stopped = Sweep(tmp_path, "killed"), Sweep(tmp_path, "stopped")
    wait_until(lambda: any(killed.running(c) for c in killed.entries()), 300)
    (pack,) = killed.packs()
    (said,) = killed.pack_folder(pack).glob("rendezvous-*.json")
    where = json.loads(said.read_text())
    with socket.socket() as probe:  # its nodes are all here, and so it listens here only
        assert where["address"].startswith("127.")
        assert probe.connect_ex((where["address"], where["port"])) == 0
    kill(max(agents(killed.folder)))
    for sweep in (killed, stopped):
        lcbench("status", sweep.name, "--results", str(tmp_path), "--follow", environment=environment)  # type: ignore[attr-defined]
    (first,) = (a for c in killed.entries() for a in killed.attempts(c))
    assert first.failure is not None
    assert first.failure.kind == "crash"
    assert "task" in first.failure.cause, first.failure
    assert "Killed" in first.failure.cause, first.failure
    (attempt,) = (a for c in stopped.entries() for a in stopped.attempts(c))
    assert attempt.failure is not None
    assert (attempt.failure.kind, attempt.failure.rank) == ("hang", 1)
    assert "at 'building', rank 1 is stopped" in attempt.failure.cause
