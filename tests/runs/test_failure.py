"""Failure classes: the first cause, not what followed from it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lcbench.cp.execute import _wait
from lcbench.runs.failure import classify_exception, first_failure, from_slurm_state
from lcbench.runs.store import FAILURE_CLASSES, write_json


def test_exceptions_are_classified_by_their_innermost_cause() -> None:
    assert classify_exception(torch.OutOfMemoryError("CUDA out of memory")).kind == "oom"
    assert classify_exception(MemoryError()).kind == "oom"
    assert classify_exception(RuntimeError("[..gloo/transport/tcp/pair.cc] Connection closed by peer")).kind == "nccl"
    try:
        try:
            raise ValueError("the cause\nmore")
        except ValueError as error:
            raise RuntimeError("outer") from error
    except RuntimeError as error:
        failure = classify_exception(error)
    assert (failure.kind, failure.cause) == ("crash", "ValueError: the cause")


def said(folder: Path, rank: int, kind: str, at: float) -> None:
    record = {"kind": kind, "cause": f"{kind} on {rank}", "rank": rank, "time": at}
    write_json(folder / f"cell.attempt-1.rank-{rank}.json", record)


def died(folder: Path, rank: int, code: int, at: float) -> None:
    write_json(folder / f"exit.0.1.{rank}.json", {"exitcode": code, "rank": rank, "pid": 1, "time": at})


def test_broken_connections_are_a_consequence_of_the_rank_that_raised(tmp_path: Path) -> None:
    said(tmp_path, 0, "nccl", 1.0)
    said(tmp_path, 1, "oom", 2.0)
    found = first_failure(tmp_path, "cell.attempt-1", since=0)
    assert found is not None
    failure = found.failure
    assert (failure.kind, failure.rank) == ("oom", 1)


@pytest.mark.parametrize(("code", "text"), [(-9, "SIGKILL"), (17, "exited with code 17"), (-11, "SIGSEGV")])
def test_a_rank_that_died_without_a_word_is_the_cause(tmp_path: Path, code: int, text: str) -> None:
    said(tmp_path, 0, "nccl", 1.0)
    died(tmp_path, 0, 1, 2.0)
    died(tmp_path, 1, code, 2.0)
    died(tmp_path, 2, -15, 2.0)  # ended by the agent
    found = first_failure(tmp_path, "cell.attempt-1", since=0.5)
    assert found is not None
    failure = found.failure
    assert found.may_follow == (code < 0)  # a signal may as well be Slurm's, when it ends the job
    assert failure.kind == "crash"
    assert failure.rank == 1
    assert text in failure.cause


def test_earlier_deaths_belong_to_other_attempts(tmp_path: Path) -> None:
    died(tmp_path, 1, -9, 1.0)
    assert first_failure(tmp_path, "cell.attempt-1", since=time.time()) is None


def test_a_hang_names_the_rank_that_waits_for_nobody(tmp_path: Path) -> None:
    waits = (
        'Thread 0x1 (most recent call first):\n  File "/x/torch/distributed/c.py", line 1 in barrier\n'
        '  File "/x/lcbench/cp/e.py", line 2 in f\n'
    )
    stuck = 'Thread 0x1 (most recent call first):\n  File "/x/lcbench/kernels/k.py", line 7 in forward\n'
    receives = (
        f'Thread 0x1 (most recent call first):\n  File "/x/lcbench/cp/execute.py", line 2 in {_wait.__name__}\n'
        '  File "/x/lcbench/cp/execute.py", line 3 in _moment\n'
    )
    for rank, dump in enumerate((receives, stuck, waits)):
        (tmp_path / f"cell.attempt-1.rank-{rank}.hang.txt").write_text(dump)
    found = first_failure(tmp_path, "cell.attempt-1", since=0)
    assert found is not None
    failure = found.failure
    assert (failure.kind, failure.rank) == ("hang", 1)
    assert "kernels/k.py, line 7 in forward" in failure.cause


def test_every_class_is_explained_and_has_its_retries() -> None:
    root = Path(__file__).parents[2]
    retry = OmegaConf.load(root / "conf" / "config.yaml").retry
    assert set(retry) == set(FAILURE_CLASSES) - {"unsupported"}  # which is skipped, and so not tried
    table = (root / "docs" / "clusters.md").read_text()
    assert set(re.findall(r"^\| `([a-z-]+)` \|.*\|.*\|$", table, re.M)) >= set(FAILURE_CLASSES)
    tags = re.search(r"`\.failure` \(([^)]*)\)", (root / "docs" / "metrics.md").read_text())
    assert tags is not None
    assert tuple(tags[1].replace("\n", " ").split(", ")) == FAILURE_CLASSES


def test_slurm_states() -> None:
    for state, kind in (
        ("TIMEOUT", "timeout"),
        ("NODE_FAIL", "node-fail"),
        ("CANCELLED by 0", "cancelled"),
        ("OUT_OF_MEMORY", "oom"),
        ("FAILED", "crash"),
    ):
        assert from_slurm_state(state, True, "").kind == kind
    failure = from_slurm_state("FAILED", False, "module: command not found")
    assert failure.kind == "no-start"
    assert "module: command not found" in failure.cause
    assert from_slurm_state("TIMEOUT", False, "").kind == "timeout"
