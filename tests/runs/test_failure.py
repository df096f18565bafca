"""Failure classes: the first cause, not what followed from it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lcbench.runs.attempt import FAILURE_CLASSES
from lcbench.runs.failure import classify_exception, error_in, first_failure, from_slurm_state, job_words
from lcbench.runs.files import write_json
from lcbench.schedule.messages import wait_all


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
        f'Thread 0x1 (most recent call first):\n  File "/x/lcbench/schedule/messages.py", line 2 in {wait_all.__name__}\n'
        '  File "/x/lcbench/schedule/execute.py", line 3 in _moment\n'
    )
    for rank, dump in enumerate((receives, stuck, waits)):
        (tmp_path / f"cell.attempt-1.rank-{rank}.hang.txt").write_text(dump)
    found = first_failure(tmp_path, "cell.attempt-1", since=0)
    assert found is not None
    failure = found.failure
    assert (failure.kind, failure.rank) == ("hang", 1)
    assert "kernels/k.py, line 7 in forward" in failure.cause


def test_a_gang_that_its_agent_ended_says_where_it_stood(tmp_path: Path) -> None:
    word = {"kind": "hang", "cause": "no progress for 60 s at 'timing', iteration 3", "rank": None, "time": 1.0}
    write_json(tmp_path / "cell.attempt-1.ended.json", word)
    died(tmp_path, 1, -9, 2.0)
    # The signal may meet the main thread, or another one.
    (tmp_path / "cell.attempt-1.rank-1.hang.txt").write_text(
        'Thread 0x7 (most recent call first):\n  File "/x/other.py", line 1 in run\n\n'
        'Current thread 0x1 (most recent call first):\n  File "/x/lcbench/kernels/k.py", line 7 in forward\n'
    )
    found = first_failure(tmp_path, "cell.attempt-1", since=0)
    assert found is not None
    assert (found.failure.kind, found.failure.rank) == ("hang", 1)
    assert found.failure.cause == f"{word['cause']}; rank 1 stood at kernels/k.py, line 7 in forward"
    write_json(tmp_path / "cell.attempt-1.ended.json", {**word, "rank": 2})  # a stopped rank writes nothing
    found = first_failure(tmp_path, "cell.attempt-1", since=0)
    assert found is not None
    assert found.failure.cause.endswith("; rank 2 left no stack")


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


TRACEBACK = """Traceback (most recent call last):
  File "/x/submission.py", line 69, in process_job
    raise error
  File "/x/agent.py", line 152, in __call__
    done = run_node(pack)
           ^^^^^^^^^^^^^^
"""
TOLD = f"{TRACEBACK}torch.distributed.elastic.multiprocessing.api.SignalException: Process 26530 got signal: 15\n"
NOISE = """submitit INFO (2026-11-26 21:51:21,899) - Starting with JobEnvironment(job_id=10)
submitit ERROR (2026-11-26 21:51:48,736) - Submitted job triggered an exception
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{TRACEBACK}ValueError: no such error\nmore of its message\n{NOISE}", "ValueError: no such error"),
        (f"{TRACEBACK}OSError: [Errno 28] No space left\n\nThe above exception was the direct cause of the following exception:\n\n"
         f"{TRACEBACK}RuntimeError: cannot write\nsrun: error: n1: task 0: Exited with exit code 1",
         "OSError: [Errno 28] No space left"),
        (f"srun: error: n2: task 1: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=10.0\n"
         f"slurmstepd-n1: error: *** STEP 10.0 ON n1 CANCELLED AT 2026-11-26T21:51:48 ***\n{NOISE}{TOLD}"
         "srun: error: n1: task 0: Exited with exit code 1\nsrun: Force Terminated StepId=10.0", "srun: error: n2: task 1: Killed"),
        ("srun: error: n1: tasks 0-3: Segmentation fault (core dumped)\nsrun: error: n2: task 4: Terminated",
         "srun: error: n1: tasks 0-3: Segmentation fault (core dumped)"),
        ("/var/spool/job12/slurm_script: line 26: 26577 Killed                  srun --error /x/error.log python\n"
         "slurmstepd-n1: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-11-26T21:51:56 ***", "srun (pid 26577): Killed"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.\n"
         f"srun: error: n1: task 0: Out Of Memory\n{TOLD}",
         "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed."),
        ("Lmod has detected the following error:  The following module(s) are unknown: \"cuda/99\"\n\nPlease check the spelling.\n",
         'Lmod has detected the following error:  The following module(s) are unknown: "cuda/99"'),
        ("bash: line 4: module: command not found\nsite.setup failed: module load cuda", "site.setup failed: module load cuda"),
        ("slurmstepd: error: execve(): python: No such file or directory\nsrun: error: n1: task 0: Exited with exit code 2",
         "slurmstepd: error: execve(): python: No such file or directory"),
        (f"{NOISE}{TOLD}", "torch.distributed.elastic.multiprocessing.api.SignalException: Process 26530 got signal: 15"),
        (f"[rank0]: {TRACEBACK}[rank0]: ModuleNotFoundError: No module named 'x'", "ModuleNotFoundError: No module named 'x'"),
        ("all is well\nsubmitit INFO (x) - Job completed successfully", "all is well"), ("", ""),
    ],
)  # fmt: skip
def test_the_line_of_a_log_that_says_why(text: str, says: str) -> None:
    assert error_in(text).startswith(says) if says else not error_in(text)


def test_all_nodes_of_a_job_are_asked_and_its_class_is_true(tmp_path: Path) -> None:
    (tmp_path / "7_0_log.err").write_text(f"{TOLD}srun: error: n2: task 1: Exited with exit code 1\n")
    (tmp_path / "7_0_log.out").write_text(NOISE)
    assert "SignalException" in job_words(tmp_path, "7")
    (tmp_path / "7_1_log.err").write_text(f"{TRACEBACK}KeyError: 'SLURM_NODEID'\n")
    (tmp_path / "7_10_log.err").write_text("an error\n")
    assert job_words(tmp_path, "7") == "KeyError: 'SLURM_NODEID'"
    assert not job_words(tmp_path, "7_1")
    killed = from_slurm_state("FAILED", True, "srun: error: n1: task 0: Out Of Memory")
    assert killed.kind == "oom"
    assert from_slurm_state("FAILED", True, "srun: error: n1: task 0: Killed").kind == "crash"
