"""A job that lcbench takes for ended and that goes on all the same, as one that Slurm has forgotten: its cells were handed over
again, and nothing that has a result meanwhile is measured a second time.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.runs.attempt import Attempt
from lcbench.runs.jobs import SweepStatus, Watch
from lcbench.runs.launch import hand_over, missing, settings_of, sweep_of, write_down
from lcbench.runs.manifest import Entry
from lcbench.runs.notes import Job, write_job
from lcbench.runs.pack import Pack, Settings
from lcbench.runs.settle import settled
from lcbench.runs.store import Sweep
from tests.slurm.stage import ROOT, descendants, wait_until

pytestmark = [pytest.mark.gloo, pytest.mark.slow]
WORDS = [
    "-m", "cp=slowed_ring,ring,usp", "kernel=sdpa_flash", "mask=causal", "seqlen=64", "scale=1x2", "heads=2x2x8", "dtype=float64",
    "measure.warmup=0", "measure.min_iterations=12", "measure.max_iterations=12", "measure.budget_s=1", "measure.blocks=2",
    "hang.min_s=900", "hang.max_s=900", "pack.max_cells=3", "sweep=twice",
]  # fmt: skip


class WrittenDown:
    """A launcher that hands nothing over: the test runs the agents."""

    name, queue, output, measures = "local", None, "quiet", True

    def submit(self, sweep: Sweep, packs: list[Pack]) -> None:
        for pack in packs:
            write_down(pack)


def pack_of(sweep: Sweep, cells: Sequence[Cell], settings: Settings, *, force: bool = False) -> Pack:
    """The pack that a command makes of these cells."""
    todo, (pack,), refusal = hand_over(WrittenDown(), sweep, lambda: missing(sweep, cells, force=force), settings)  # type: ignore[arg-type]
    assert refusal is None
    assert {cell.id for cell in todo.cells} == set(pack.cells)
    return pack


def agent(pack: Pack, fault: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "lcbench.runs.agent", str(pack.path), "--node-rank", "0", "--of", str(os.getpid())]
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, "LCBENCH_TEST_FAULT": str(fault)})


def standing(sweep: Sweep) -> SweepStatus:
    return settled(Watch(sweep), as_mine=True)


def tries(sweep: Sweep, cell_id: str, pack: Pack) -> list[Attempt]:
    return [attempt for attempt in sweep.attempts(cell_id) if attempt.pack == pack.id]


def test_of_two_packs_at_the_same_cells_one_leaves_out_what_the_other_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    monkeypatch.setenv("LCBENCH_TEST_FAULT", str(fault))
    plan = look(
        [
            "--config-dir",
            str(ROOT / "tests" / "conf"),
            *WORDS,
            f"results={tmp_path}",
            f"tracking_uri=sqlite:///{tmp_path}/mlflow.db",
        ]
    )
    sweep, settings = sweep_of(plan), settings_of(plan)
    cells = [planned.cell for planned in plan.cells]
    slow = next(cell.id for cell in cells if cell.label.startswith("slowed_ring"))
    sweep.add([Entry(cell) for cell in cells], command=[], launch={"launcher": "local", "settings": settings.public()})

    first = pack_of(sweep, cells, settings)
    assert first.good == dict.fromkeys(first.cells, 0)
    launcher = subprocess.Popen(["sleep", "3600"])
    write_job(first.folder, Job("local", socket.gethostname(), launcher.pid, time.time(), (launcher.pid,)))
    still_runs = agent(first, fault)
    stopped: list[int] = []
    try:
        # The slow cell takes seconds, in which all of the job is frozen.
        wait_until(lambda: sweep.running(slow), 240, every=0.02)
        stopped = descendants(still_runs.pid)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        assert [r.pack for r in sweep.running(slow)] == [first.id]
        measured = {c: tries(sweep, c, first) for c in first.cells if c != slow and tries(sweep, c, first)}
        assert all(a.status == "ok" for tried in measured.values() for a in tried)

        # Whoever ran it is gone without a word, so lcbench takes the job for ended and closes what it had begun.
        launcher.kill()
        launcher.wait()
        assert {c.state for c in standing(sweep).cells if c.id not in measured} == {"failed"}
        second = pack_of(sweep, cells, settings)
        assert set(second.cells) == set(first.cells) - set(measured)
        assert second.good == dict.fromkeys(second.cells, 0)

        # The job goes on for a while: the cell in flight gets its result after all, in the place of what was said of it.
        fault.unlink()
        _wake(stopped)
        wait_until(lambda: sweep.attempts(slow)[-1].status == "ok", 240)
        fresh = agent(second, fault)
        assert fresh.wait(timeout=300) == 0
        assert still_runs.wait(timeout=300) == 0
    finally:
        _wake(stopped)
        launcher.kill()
        still_runs.kill()

    write_job(second.folder, Job("local", socket.gethostname(), fresh.pid, time.time(), (fresh.pid,)))
    seen = standing(sweep)
    assert {c.state for c in seen.cells} == {"ok"}
    assert not tries(sweep, slow, second)
    (own,) = tries(sweep, slow, first)
    assert (own.number, own.status, own.blocks, own.lost_blocks) == (1, "ok", 2, [])
    log = sweep.attempt_path(slow, 1, "log").read_text()
    assert f"pack {second.id} leaves out the cell: attempt 1 of pack {first.id} is newer" in log
    left = next(p for p in seen.packs if p.id == second.id)
    assert left.reason.endswith("left out, with a newer result of another pack")
    # What is asked for although it has a good result is measured.
    third = pack_of(sweep, [cell for cell in cells if cell.id == slow], settings, force=True)
    assert third.good == {slow: 1}
    assert agent(third, fault).wait(timeout=300) == 0
    assert not (tmp_path / "mlflow.db").exists()  # the command publishes what agents of this machine measure
    (again,) = tries(sweep, slow, third)
    assert (again.number, again.status, again.blocks) == (2, "ok", 2)
    assert tries(sweep, slow, first) == [own]


def _wake(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
