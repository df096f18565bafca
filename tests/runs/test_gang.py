"""How ranks die is recorded as it was, and who dies with them is told too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lcbench.runs.attempt import Attempt
from lcbench.runs.store import Sweep
from tests.slurm.stage import ROOT, processes, ranks, wait_until

pytestmark = [pytest.mark.gloo, pytest.mark.slow]

DEATHS = {
    "segfault": ("crash", "rank 1 was killed by SIGSEGV"), "exit": ("crash", "rank 1 exited with code 17"),
    "kill": ("crash", "rank 1 was killed by SIGKILL"), "raise": ("crash", "rank 1: RuntimeError: the faulty kernel raises"),
    "forks": ("crash", "was killed by SIGKILL: the process that forks the ranks was killed, and they with it"),
}  # fmt: skip


def sweep_of(folder: Path, *faults: str) -> tuple[Sweep, list[str]]:
    """A sweep of cells that fail so, one after the other, and the command that begins it."""
    kernels = folder / "conf" / "kernel"
    kernels.mkdir(parents=True)
    for number, fault in enumerate(faults):
        (folder / fault).touch()
        (kernels / f"{number}_{fault}.yaml").write_text(
            f"_target_: lcbench.testing.faulty.Faulty\nname: {number}_{fault}\nfault: {fault}\nrank: 1\n"
            f"while_file: {folder / fault}\n"
        )
    command = [
        sys.executable, "-m", "lcbench.sweep", "--config-dir", str(folder / "conf"),
        f"kernel={','.join(f'{number}_{fault}' for number, fault in enumerate(faults))}", "cp=ring", "mask=causal", "seqlen=64",
        "scale=1x2", "heads=2x2x8", "dtype=float64", "measure.warmup=0", "measure.min_iterations=1", "measure.max_iterations=1",
        "measure.blocks=1", "hang.min_s=900", "sweep=deaths", f"results={folder}",
        "tracking_uri=none",
    ]  # fmt: skip
    return Sweep(folder, "deaths"), command


def newest(sweep: Sweep) -> dict[str, Attempt]:
    """By the fault of the kernel."""
    return {e.cell.config["kernel"]["fault"]: sweep.attempts(c)[-1] for c, e in sweep.entries().items()}


def test_every_death_of_a_rank_has_its_class_and_cause(tmp_path: Path) -> None:
    sweep, command = sweep_of(tmp_path, *DEATHS)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    for fault, attempt in newest(sweep).items():
        kind, cause = DEATHS[fault]
        assert attempt.failure is not None
        assert attempt.failure.kind == kind
        assert cause in attempt.failure.cause, (fault, attempt.failure)


def test_ranks_end_with_an_agent_that_is_killed(tmp_path: Path) -> None:
    sweep, command = sweep_of(tmp_path, "hang")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as begun:
        wait_until(lambda: sweep.exists() and any(sweep.running(cell) for cell in sweep.entries()), 240)
        (pack,) = sweep.packs()
        alive = ranks(tmp_path)
        assert len(alive) == 2
        os.kill(sweep.pack_file(pack, "job.json")["pid"], signal.SIGKILL)
        wait_until(lambda: not processes("lcbench.runs", str(tmp_path)), 60)
        assert begun.wait() == 1
    failure = newest(sweep)["hang"].failure
    assert failure is not None
    assert failure.kind == "crash", failure
