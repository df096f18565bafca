"""The local launcher with real gloo ranks: kill -9 in the middle loses at most the attempt in flight, and nothing runs twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lcbench.runs.store import Sweep, read_json
from lcbench.testing.masks import names
from tests.slurm.stage import ROOT, wait_until

pytestmark = [pytest.mark.gloo, pytest.mark.slow]


def command(results: Path) -> list[str]:
    return [
        sys.executable, "-m", "lcbench.sweep", "cp=ring,usp", "mask=full,causal", "seqlen=512", "scale=2x1", "heads=4x2x16",
        "dtype=float64", "measure.budget_s=2", "measure.min_iterations=80", "measure.max_iterations=80", "sweep=killed",
        f"results={results}", f"tracking_uri=sqlite:///{results}/mlflow.db",
    ]  # fmt: skip


def test_kill_in_the_middle_then_the_same_command_does_what_is_missing(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "killed")
    first = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: sweep.exists() and any(sweep.attempts(c) for c in sweep.entries()))
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    # The agents live on: the same command must leave their cells to them.
    again = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert " 0 to run" in again.stdout, again.stdout
    (pack,) = sweep.packs()
    for pid in read_json(sweep.pack_folder(pack) / "job.json")["pids"]:
        os.killpg(pid, signal.SIGKILL)
    subprocess.run(["pkill", "-9", "-f", f"lcbench.runs.worker {tmp_path}"], check=False)
    done_before = {c for c in sweep.entries() if sweep.attempts(c)}
    assert done_before

    last = subprocess.run([*command(tmp_path), "output=json"], cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stdout + last.stderr
    said = json.loads(last.stdout)
    assert said["sweep"] == "killed"
    assert [c["status"] for c in said["cells"]] == ["ok"] * 4
    assert "to run" in last.stderr
    for cell_id in sweep.entries():
        attempts = sweep.attempts(cell_id)
        assert attempts[-1].status == "ok"
        assert len(attempts) == 1 or attempts[0].failure is not None
        if cell_id in done_before and attempts[0].status == "ok":
            assert len(attempts) == 1  # what was done is not done again


def test_a_sweep_of_every_kernel_ends_with_a_result_or_a_reason_for_each(tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    results = tmp_path / "results"
    dense = ["reference", "naive", "sdpa_math", "sdpa_flash", "flex", "triton_band"]
    done = subprocess.run(
        [
            sys.executable, "-m", "lcbench.sweep", "--config-dir", str(ROOT / "tests" / "conf"),
            f"kernel={','.join([*names('kernel'), 'faulty_blind'])}", "mask=causal_document,block_random", "lengths=fixed",
            "lengths.length=64", "cp=none", "seqlen=256", "scale=1x1", "heads=4x4x16", "dtype=float32", "measure.warmup=0",
            "measure.min_iterations=1", "measure.max_iterations=1", "sweep=kernels", f"results={results}",
            f"tracking_uri=sqlite:///{tmp_path}/mlflow.db",
        ],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1", "LCBENCH_TEST_FAULT": str(fault)},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr  # the blind one
    sweep = Sweep(results, "kernels")
    for record in sweep.look().records.values():
        kernel, mask = record.entry.cell.config["kernel"]["name"], record.entry.cell.config["mask"]["name"]
        failure = record.failure
        runs = dense if mask == "causal_document" else [*dense, "flex_sparse", "triton_block_sparse"]
        if kernel in runs:
            assert record.status == "ok", (kernel, mask, failure)
        elif kernel == "faulty_blind":
            assert failure is not None
            assert (record.status, failure.kind) == ("failed", "numerics")
            assert "out: error" in failure.cause
        else:
            assert failure is not None
            assert (record.status, failure.kind) == ("skipped", "unsupported"), (kernel, mask)
            assert any(word in failure.cause for word in ("CUDA devices only", "takes", "direction=forward")), failure
