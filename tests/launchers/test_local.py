"""The local launcher with real gloo ranks: kill -9 in the middle loses at most the attempt in flight, and nothing runs twice."""

from __future__ import annotations

import getpass
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lcbench.runs.store import Sweep
from lcbench.testing.masks import names, softmax_kernels
from tests.slurm.stage import ROOT, processes, wait_until

pytestmark = [pytest.mark.gloo, pytest.mark.slow]


def command(results: Path) -> list[str]:
    return [
        sys.executable, "-m", "lcbench.sweep", "--config-dir", str(ROOT / "tests" / "conf"), "kernel=sdpa_flash,faulty_hang",
        "cp=ring,usp", "mask=causal", "seqlen=512", "scale=2x1", "heads=4x2x16", "dtype=float64", "measure.budget_s=2",
        "measure.warmup=0", "measure.min_iterations=1", "measure.max_iterations=2", "measure.blocks=1", "hang.min_s=900",
        "sweep=killed", f"results={results}", "tracking_uri=none",
    ]  # fmt: skip


def test_kill_in_the_middle_then_the_same_command_does_what_is_missing(tmp_path: Path) -> None:
    sweep, fault = Sweep(tmp_path, "killed"), tmp_path / "fault"
    fault.touch()
    run = {"cwd": ROOT, "env": {**os.environ, "LCBENCH_TEST_FAULT": str(fault)}, "text": True}
    first = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, **run)
    # Two cells are done, the third hangs.
    wait_until(lambda: sweep.exists() and sum(bool(sweep.attempts(c)) for c in sweep.entries()) == 2, 240)
    wait_until(lambda: any(sweep.running(c) for c in sweep.entries()))
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    wait_until(lambda: not processes("lcbench.runs", str(tmp_path)), 90)  # agents and ranks end with their command
    done_before = {c for c in sweep.entries() if sweep.attempts(c)}
    assert len(done_before) == 2
    fault.unlink()

    last = subprocess.run([*command(tmp_path), "output=json"], capture_output=True, **run)
    assert last.returncode == 0, last.stdout + last.stderr
    said = json.loads(last.stdout)
    assert said["sweep"] == "killed"
    assert [c["status"] for c in said["cells"]] == ["ok"] * 4
    assert "to run" in last.stderr
    for cell_id in sweep.entries():
        attempts = sweep.attempts(cell_id)
        assert attempts[-1].status == "ok"
        assert len(attempts) == 1 or attempts[0].failure is not None
        if cell_id in done_before:
            assert len(attempts) == 1  # what was done is not done again


APART = """
import runpy, sys
from lcbench.runs import machine
machine.PREFIX, machine.TURN = "test-{0}", "\\0test-{0}.turn"
runpy.run_module("lcbench.sweep", run_name="__main__")
"""


def test_a_second_pack_waits_for_the_first_and_either_ends_when_told(tmp_path: Path) -> None:
    """Other tests measure on this machine too: these two commands know of each other only."""
    fault = tmp_path / "fault"
    fault.touch()
    run = {"cwd": ROOT, "env": {**os.environ, "LCBENCH_TEST_FAULT": str(fault), "LCBENCH_SHARE_MACHINE": "0"}, "text": True}
    run["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's children ignore it
    begin = [sys.executable, "-c", APART.format(os.getpid()), *command(tmp_path)[3:]]
    small = ["cp=none", "seqlen=64", "scale=1x1", "kernel=faulty_hang", "kernel.rank=0"]
    one = [word for word in begin if not word.startswith(("cp=", "seqlen=", "scale=", "kernel=", "sweep="))] + small
    sweeps = [Sweep(tmp_path, "first"), Sweep(tmp_path, "second")]

    def measures(sweep: Sweep) -> bool:
        return sweep.exists() and any(sweep.running(cell) for cell in sweep.entries())

    first = subprocess.Popen([*one, "sweep=first"], stdout=subprocess.DEVNULL, **run)
    wait_until(lambda: measures(sweeps[0]), 240)
    second = subprocess.Popen([*one, "sweep=second"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **run)
    assert second.stderr is not None
    said = second.stderr.readline()
    assert said.startswith(f"waits for sweep first of {getpass.getuser()} (pid {first.pid}) on cpu; LCBENCH_SHARE_MACHINE=1"), said
    assert not measures(sweeps[1])
    first.send_signal(signal.SIGHUP)
    assert first.wait() == 130
    wait_until(lambda: measures(sweeps[1]), 240)
    second.terminate()
    second.communicate()
    assert second.returncode == 130
    assert not processes("lcbench.runs", str(tmp_path))


def test_a_cell_that_goes_on_is_no_hang_and_has_until_max_s(tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    done = subprocess.run(
        [
            *command(tmp_path)[:5], "-m", "cp=slowed_ring", "measure.min_iterations=60,2000", "measure.max_iterations=2000",
            "measure.warmup=0", "measure.budget_s=1", "measure.blocks=1", "seqlen=64", "scale=1x2", "heads=2x2x8", "dtype=float64",
            "hang.factor=0.01", "hang.min_s=15", "hang.max_s=60", "sweep=slow", f"results={tmp_path}",
            "tracking_uri=none",
        ],
        cwd=ROOT, env={**os.environ, "LCBENCH_TEST_FAULT": str(fault)}, capture_output=True, text=True,
    )  # fmt: skip
    sweep = Sweep(tmp_path, "slow")
    found = {e.cell.config["measure"]["min_iterations"]: sweep.attempts(c)[-1] for c, e in sweep.entries().items()}
    assert found[60].status == "ok", done.stdout + done.stderr  # 60 times 0.3 s are longer than any patience here
    failure = found[2000].failure
    assert failure is not None
    assert failure.kind == "hang"
    assert failure.cause.startswith("not at its end after hang.max_s=60 s; it was at 'timing', iteration "), failure.cause
    assert "stood at" in failure.cause


def faulty_again(folder: Path, *faults: str) -> list[str]:
    """A command for a cell whose kernel is well, and for one each that fails so in its second block of timings."""
    kernels = folder / "conf" / "kernel"
    kernels.mkdir(parents=True)
    for fault in faults:
        (folder / fault).touch()
        (kernels / f"again_{fault}.yaml").write_text(
            f"_target_: lcbench.testing.faulty.Faulty\nname: again_{fault}\nfault: {fault}\nrank: 1\nagain: true\n"
            f"while_file: {folder / fault}\n"
        )
    return [
        sys.executable, "-m", "lcbench.sweep", "--config-dir", str(folder / "conf"),
        f"kernel=sdpa_flash,{','.join(f'again_{fault}' for fault in faults)}", "cp=ring", "mask=causal", "seqlen=64", "scale=1x2",
        "heads=2x2x8", "dtype=float64", "measure.max_iterations=9", "measure.budget_s=1", "sweep=again", f"results={folder}",
        "tracking_uri=none", "output=json",
    ]  # fmt: skip


def test_what_ends_a_later_block_of_timings_costs_that_block(tmp_path: Path) -> None:
    faults = ("kill", "raise", "hang", "wrong")
    command = [*faulty_again(tmp_path, *faults), "hang.min_s=10", "hang.factor=0.1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr  # the wrong one
    sweep = Sweep(tmp_path, "again")
    causes = {
        "kill": "crash: rank 1 was killed by SIGKILL", "raise": "crash: rank 1: RuntimeError: the faulty kernel raises, as told",
        "hang": "hang: no progress for ",
    }  # fmt: skip
    for record in sweep.look().records.values():
        (attempt,) = record.attempts
        fault = record.entry.cell.config["kernel"]["name"].removeprefix("again_")
        if fault == "wrong":
            assert attempt.failure is not None
            assert (attempt.status, attempt.failure.kind) == ("failed", "numerics")
            assert attempt.failure.cause.startswith("block 2 of timings: out: error")
            assert "time/total/median_s" not in attempt.metrics
            continue
        lost = [block["block"] for block in attempt.lost_blocks]
        assert (attempt.status, attempt.blocks, lost) == ("ok", 3 - len(lost), [2] if fault in faults else []), (fault, attempt)
        if lost:
            cause = attempt.lost_blocks[0]["cause"]
            assert cause.startswith(causes[fault])
            assert fault != "hang" or "'building'; rank 1 stood at testing/faulty.py" in cause
        medians = attempt.samples["block_total_s"]
        assert len(medians) == attempt.blocks
        assert attempt.metrics["time/total/median_s"] == pytest.approx(sum(medians) / len(medians))
        assert attempt.metrics["time/iterations"] == len(attempt.samples["total_s"])
    (pack,) = sweep.packs()
    assert not sweep.again(pack)
    assert json.loads(done.stdout)["cells"][0]["status"] == "ok"


def test_a_sweep_that_is_killed_in_a_later_block_has_all_its_results(tmp_path: Path) -> None:
    sweep, command = Sweep(tmp_path, "again"), faulty_again(tmp_path, "hang")
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: not (tmp_path / "hang").exists(), 240)  # it hangs now
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    (pack,) = sweep.packs()
    (begun,) = sweep.again(pack)
    wait_until(lambda: not processes("lcbench.runs", str(tmp_path)), 90)

    last = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stdout + last.stderr
    assert " 2 done before, 0 under way, 0 to run" in last.stderr
    assert not sweep.again(pack)
    for cell_id in sweep.entries():
        (attempt,) = sweep.attempts(cell_id)
        assert (attempt.status, len(attempt.samples["block_total_s"])) == ("ok", attempt.blocks)
        # The block in flight, and those that nobody came to.
        assert [block["block"] for block in attempt.lost_blocks] == list(range(attempt.blocks + 1, 4)), attempt.provenance
        assert attempt.blocks == 1 or cell_id != begun.cell_id
        assert all(block["cause"].startswith("cancelled: the launching command") for block in attempt.lost_blocks)


def test_a_sweep_of_every_kernel_ends_with_a_result_or_a_reason_for_each(tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    results = tmp_path / "results"
    dense = ["reference", "naive", "sdpa_math", "sdpa_flash", "flex", "triton_band"]
    done = subprocess.run(
        [
            sys.executable, "-m", "lcbench.sweep", "--config-dir", str(ROOT / "tests" / "conf"),
            f"kernel={','.join([*names('kernel'), 'faulty_blind'])}", "mask=causal_document,block_random", "lengths=fixed",
            "lengths.length=64", "cp=none", "seqlen=256", "scale=1x1", "heads=2x2x16", "dtype=float32", "measure.warmup=0",
            "measure.min_iterations=1", "measure.max_iterations=1", "measure.blocks=1", "sweep=kernels", f"results={results}",
            "tracking_uri=none",
        ],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1", "LCBENCH_TEST_FAULT": str(fault)},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr  # the blind one
    sweep, softmax = Sweep(results, "kernels"), softmax_kernels()
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
            reasons = ("CUDA devices only", "takes", "direction=forward", "not a dynamic block mask")
            if kernel not in softmax:
                reasons = ("is for linear attention, and the workload's is softmax",)
            assert any(reason in failure.cause for reason in reasons), failure
