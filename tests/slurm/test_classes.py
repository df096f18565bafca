"""Every failure class, provoked for real on the development cluster, and what people do about it: logs, cancel, rerun."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from lcbench.runs.store import Sweep
from tests.slurm.stage import ROOT, lcbench, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

CGROUPS = Path("/sys/fs/cgroup")
SMALL = [
    "--config-dir", str(ROOT / "tests" / "conf"), "site=devcluster", "seqlen=128", "heads=4x2x8", "dtype=float64",
    "measure.warmup=0", "measure.min_iterations=1", "measure.max_iterations=1", "measure.blocks=1",
]  # fmt: skip


@pytest.fixture
def faulty(devcluster: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Environment in which the kernels called faulty are."""
    fault = tmp_path / "fault"
    fault.touch()
    return {**devcluster, "LCBENCH_TEST_FAULT": str(fault)}


@pytest.fixture(scope="module", autouse=True)
def late(devcluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, dict[str, str]]:
    """Sweeps that take minutes, and run beside the others: one whose job comes to its time limit, and one with a rank that is not
    scheduled any more, and so cannot end itself.
    """
    folder = tmp_path_factory.mktemp("late")
    fault = folder / "fault"
    fault.touch()
    environment = {**devcluster, "LCBENCH_TEST_FAULT": str(fault)}
    done = lcbench(
        "sweep", *SMALL, "kernel=faulty_hang,sdpa_flash", "cp=ring,ulysses", "scale=1x2", "pack.max_minutes=2", "retry.timeout=0",
        "hang.min_s=900", "sweep=late", f"results={folder}", "tracking_uri=none", environment=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    done = lcbench(
        "sweep", *SMALL, "kernel=faulty_stop", "kernel.rank=0", "cp=none", "scale=1x1", "hang.min_s=5", "hang.factor=0.01",
        "sweep=stopped", f"results={folder}", "tracking_uri=none", environment=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return Sweep(folder, "late"), environment


@pytest.fixture
def small_memory(faulty: dict[str, str], tmp_path: Path) -> Iterator[str | None]:
    """A memory cgroup of 64 MiB; None where none can be made."""
    name = f"lcbench-test-{os.getpid()}"
    for root, limit in ((CGROUPS / "memory", "memory.limit_in_bytes"), (CGROUPS, "memory.max")):
        folder = root / name
        try:
            folder.mkdir()
            (folder / limit).write_text(str(64 << 20))
        except OSError:
            continue
        yield str(folder)
        folder.rmdir()
        return
    yield None


def cells(sweep: Sweep, environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Cells by kernel, as ``status --json`` shows them."""
    shown = lcbench("status", sweep.name, "--results", str(sweep.root), "--json", environment=environment)
    kernel_of = {i: entry.cell.config["kernel"]["name"] for i, entry in sweep.entries().items()}
    return {kernel_of[cell["id"]]: cell for cell in json.loads(shown.stdout)["cells"]}


def test_failures_carry_class_and_cause_and_rerun_repairs_one(
    faulty: dict[str, str], small_memory: str | None, tmp_path: Path
) -> None:
    results, uri = tmp_path / "results", f"sqlite:///{tmp_path}/mlflow.db"
    faults = ["raise", "exit", "kill", "hang", "wrong", "oom", "disconnect", *(["oom_killer"] if small_memory else [])]
    environment = {**faulty, "LCBENCH_TEST_CGROUP": small_memory or ""}
    command = [
        *SMALL, f"kernel={','.join(f'faulty_{f}' for f in faults)},flash_attn2,sdpa_flash", "mask=causal", "scale=2x1",
        "hang.min_s=12", "hang.factor=0.1", "sweep=faults", f"results={results}", f"tracking_uri={uri}", "wait=true",
    ]  # fmt: skip
    done = lcbench("sweep", *command, environment=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    want = {
        "sdpa_flash": ("ok", "", ""),
        "flash_attn2": ("skipped", "unsupported", ""),
        "faulty_raise": ("failed", "crash", "the faulty kernel raises, as told"),
        "faulty_exit": ("failed", "crash", "rank 1 exited with code 17"),
        "faulty_kill": ("failed", "crash", "rank 1 was killed by SIGKILL"),
        "faulty_hang": ("failed", "hang", "rank 1 stood at testing/faulty.py"),
        "faulty_wrong": ("failed", "numerics", "out: error"),
        "faulty_oom": ("failed", "oom", "allocate"),
        "faulty_oom_killer": ("failed", "oom", "rank 1 was killed by SIGKILL: the kernel's out-of-memory killer"),
        "faulty_disconnect": ("failed", "nccl", ""),
    }
    sweep = Sweep(results, "faults")
    seen = cells(sweep, environment)
    assert len(seen) == len(faults) + 2
    for kernel, cell in seen.items():
        state, kind, cause = want[kernel]
        assert (cell["state"], cell["failure"]) == (state, kind), cell
        assert cause in cell["cause"], cell
    # Broken connections are tried once more, then it is enough; the rest is not tried again by itself.
    assert {k for k, c in seen.items() if c["attempt"] == 2} == {"faulty_disconnect"}

    hung = seen["faulty_hang"]["id"]
    logs = lcbench("logs", hung, "--results", str(results), environment=environment).stdout
    for rank in range(2):
        assert f"--- stacks of rank {rank} when it was ended" in logs
    assert "testing/faulty.py" in logs
    raised = lcbench("logs", seen["faulty_raise"]["id"], "--results", str(results), environment=environment).stdout
    assert "RuntimeError: the faulty kernel raises, as told" in raised

    planned = lcbench("sweep", *command, "hydra/launcher=dry", environment=environment)
    assert planned.stdout.count("done before") == 1, planned.stdout
    assert planned.stdout.count("given up: killed its gang twice") == 1  # the one that was tried twice

    Path(environment["LCBENCH_TEST_FAULT"]).unlink()
    again = lcbench("rerun", hung, "--results", str(results), "--wait", environment=environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [a.status for a in sweep.attempts(hung)] == ["failed", "ok"]
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("lcbench")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`lcbench.cell_id` = '{hung}'")
    assert run.data.tags["lcbench.status"] == "ok"
    assert run.data.tags["lcbench.attempt"] == "2"
    assert [a["class"] for a in json.loads(run.data.tags["lcbench.history"])] == ["hang", None]
    assert len(client.search_runs([experiment.experiment_id], "tags.`lcbench.failure` = 'crash'")) == 3


def test_cancel_a_cell_then_the_sweep(faulty: dict[str, str], tmp_path: Path) -> None:
    done = lcbench(
        "sweep", *SMALL, "kernel=faulty_hang,sdpa_math,faulty_exit", "mask=causal", "scale=1x2", "hang.min_s=600", "sweep=cut",
        f"results={tmp_path}", "tracking_uri=none", environment=faulty,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--follow" in done.stdout
    sweep = Sweep(tmp_path, "cut")
    where = ["--results", str(tmp_path)]
    hung = next(i for i, e in sweep.entries().items() if e.cell.config["kernel"]["name"] == "faulty_hang")
    wait_until(lambda: sweep.running(hung), 60)
    assert cells(sweep, faulty)["faulty_hang"]["state"] == "running"
    assert lcbench("rerun", hung, *where, environment=faulty).returncode == 2  # it is under way
    told = lcbench("cancel", hung[:8], *where, environment=faulty)
    assert told.returncode == 0, told.stderr
    wait_until(lambda: len([i for i in sweep.entries() if sweep.attempts(i)]) == 3, 60)
    seen = cells(sweep, faulty)
    assert (seen["faulty_hang"]["state"], seen["faulty_hang"]["failure"]) == ("failed", "cancelled")
    assert seen["sdpa_math"]["state"] == "ok"

    assert lcbench("rerun", hung, *where, environment=faulty).returncode == 0
    wait_until(lambda: sweep.running(hung), 60)
    assert lcbench("cancel", "cut", *where, environment=faulty).returncode == 0
    wait_until(lambda: cells(sweep, faulty)["faulty_hang"]["state"] == "failed", 60)
    cell = cells(sweep, faulty)["faulty_hang"]
    assert (cell["failure"], cell["attempt"]) == ("cancelled", 2)

    def queued() -> str:
        return subprocess.run(["squeue", "-h", "-o", "%k"], env=faulty, capture_output=True, text=True).stdout

    wait_until(lambda: "lcbench sweep cut" not in queued(), 30)  # neither its jobs nor its collector


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("site.partition=nope", "invalid partition"),
        ("site.account=nobody", "Invalid account"),
        ("scale=13x8 seqlen=1k", "node"),
        ("+site.sbatch.licenses=nope:1", "Invalid license specification"),
        ("+site.sbatch.foo=1", "unrecognized option '--foo=1'"),
        ("+site.sbatch.no-kill=maybe", "no-kill"),
        ("site.gpus=nope:1", "Invalid generic resource (gres) specification"),
        ("+site.sbatch.begin=tuesday-ish", "Invalid --begin specification"),
    ],
)
def test_what_slurm_refuses_is_one_line_and_the_class_of_its_cells(
    override: str, word: str, devcluster: dict[str, str], tmp_path: Path
) -> None:
    done = lcbench(
        "sweep", *SMALL, "scale=1x1", "cp=ring", *override.split(), "sweep=no", f"results={tmp_path}", environment=devcluster
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Slurm refused" in done.stderr
    assert done.stderr.count("\n") == 1
    assert word.lower() in done.stderr.lower()
    sweep = Sweep(tmp_path, "no")
    (cell_id,) = sweep.entries()
    (attempt,) = sweep.attempts(cell_id)
    assert attempt.failure is not None
    assert attempt.failure.kind == "no-start"
    assert word.lower() in attempt.failure.cause.lower()


def test_a_set_up_line_that_fails_and_a_container_without_pyxis_do_not_start(devcluster: dict[str, str], tmp_path: Path) -> None:
    for name, override, word in (
        ("module", "site.setup=[module load cuda/99]", "site.setup failed: module load cuda/99"),
        ("image", "site.container={image: x.sqsh}", "unrecognized option '--container-image=x.sqsh'"),
    ):
        done = lcbench(
            "sweep",
            *SMALL,
            "cp=none",
            "scale=1x1",
            override,
            f"sweep={name}",
            f"results={tmp_path}",
            "wait=true",
            environment=devcluster,
        )
        assert done.returncode == 1, done.stdout + done.stderr
        sweep = Sweep(tmp_path, name)
        (cell_id,) = sweep.entries()
        (attempt,) = sweep.attempts(cell_id)
        assert attempt.failure is not None
        assert attempt.failure.kind == "no-start"
        assert word in attempt.failure.cause, attempt.failure


def test_a_node_that_is_not_well_is_named_and_left_out(devcluster: dict[str, str], tmp_path: Path) -> None:
    """The site promises H100s, which no node here has."""
    command = [
        *SMALL, "cp=none", "scale=1x1", "site.device=h100", "retry.node-fail=1", "sweep=ill", f"results={tmp_path}", "wait=true",
    ]  # fmt: skip
    done = lcbench("sweep", *command, environment=devcluster)
    assert done.returncode == 1, done.stdout + done.stderr
    sweep = Sweep(tmp_path, "ill")
    (cell_id,) = sweep.entries()
    first, second = sweep.attempts(cell_id)
    for attempt, node in ((first, "lc01"), (second, "lc02")):  # tried again by itself, elsewhere
        assert attempt.failure is not None
        assert attempt.failure.kind == "node-fail"
        assert f"{node}: nvidia-smi does not answer, though the site promises h100" in attempt.failure.cause
    planned = lcbench("sweep", *command, "hydra/launcher=dry", environment=devcluster)
    assert "--exclude=lc01,lc02" in planned.stdout


def test_more_jobs_than_the_quota_has_room_for(devcluster: dict[str, str], tmp_path: Path) -> None:
    def limit(value: int) -> None:
        subprocess.run(
            ["sacctmgr", "-i", "modify", "account", "lcbench", "set", f"MaxSubmitJobs={value}"],
            env=devcluster, check=True, capture_output=True,
        )  # fmt: skip

    limit(2)
    try:
        command = [
            *SMALL, "cp=none", "seed=range(4)", "scale=1x1", "pack.max_cells=1", "sweep=quota", f"results={tmp_path}",
            "tracking_uri=none",
        ]  # fmt: skip
        done = lcbench("sweep", *command, "site.collector=false", environment=devcluster)
        assert done.returncode == 3, done.stdout + done.stderr
        assert "2 cells wait" in done.stderr
        sweep = Sweep(tmp_path, "quota")
        assert len(sweep.packs()) == 2
        # The waiting command hands the rest over as room comes.
        done = lcbench("sweep", *command, "site.collector=false", "wait=true", environment=devcluster)
        assert len([i for i in sweep.entries() if sweep.attempts(i)]) == 4, done.stdout + done.stderr
        assert all(len(sweep.attempts(i)) == 1 for i in sweep.entries())
    finally:
        limit(-1)


def test_a_time_limit_takes_one_cell_and_the_rest_goes_on(late: tuple[Sweep, dict[str, str]]) -> None:
    """The job was warned, could not finish the cell in flight, and was requeued for those behind it."""
    sweep, environment = late
    lcbench("status", sweep.name, "--results", str(sweep.root), "--follow", environment=environment)
    for cell_id, entry in sweep.entries().items():
        (attempt,) = sweep.attempts(cell_id)
        if entry.cell.config["kernel"]["name"] == "sdpa_flash":
            assert attempt.status == "ok"
        else:
            assert attempt.failure is not None
            assert (attempt.failure.kind, attempt.failure.cause) == ("timeout", "the time limit of its job came")


def test_a_rank_that_cannot_end_itself_is_ended_by_its_agent(late: tuple[Sweep, dict[str, str]]) -> None:
    sweep, environment = Sweep(late[0].root, "stopped"), late[1]
    lcbench("status", sweep.name, "--results", str(sweep.root), "--follow", environment=environment)
    (cell_id,) = sweep.entries()
    (attempt,) = sweep.attempts(cell_id)
    assert attempt.failure is not None
    assert attempt.failure.kind == "hang"
    assert attempt.failure.cause.endswith("at 'building', rank 0 is stopped; rank 0 left no stack")
