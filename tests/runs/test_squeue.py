"""What is asked of Slurm, in which environment, and what is made of its answers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lcbench.runs.squeue import Job, ask, cancel, environment, last_incarnation, reason_in, remedy

# As sacct answers for an array's id: an element has that id too, was requeued after its node failed, and then cancelled.
ANSWER = """\
2|COMPLETED
3|FAILED
1|NODE_FAIL
1|CANCELLED by 0
"""


def command(folder: Path, name: str, said: str, script: str = "") -> None:
    """A command of Slurm's that says this, after it has kept its arguments and environment."""
    path = folder / name
    path.write_text(
        f"#!/bin/sh\nenv > {folder}/{name}.env\necho \"$@\" >> {folder}/{name}.args\n{script}\ncat <<'END'\n{said}END\n"
    )
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("squeue", "sacct"):
        command(tmp_path, name, "")
    return tmp_path


@pytest.mark.parametrize(("job", "restarts", "word"), [("1", 1, "NODE_FAIL"), ("1", 2, "CANCELLED"), ("4", 1, "")])
def test_a_requeued_job_knows_how_it_ended_before(tools: Path, job: str, restarts: int, word: str) -> None:
    command(tools, "sacct", ANSWER)
    assert last_incarnation(job, restarts, environment({})) == word


def test_commands_run_in_an_environment_of_ours(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither formats and filters of the person who calls nor the programs of a stored site."""
    for name in (
        "SQUEUE_STATES", "SQUEUE_ACCOUNT", "SACCT_FEDERATION", "SLURM_BITSTR_LEN", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT",
        "SCANCEL_CTLD", "SBATCH_QOS", "SLURM_JOB_ID",
    ):  # fmt: skip
        monkeypatch.setenv(name, "odd")
    monkeypatch.setenv("SLURM_CONF", "mine.conf")
    monkeypatch.setenv("SLURM_JWT", "token")
    own = environment(
        {"env": {"PATH": "/evil", "LD_PRELOAD": "/evil.so", "PYTHONPATH": "/evil", "SLURM_CONF": "site.conf", "A": 1}}
    )
    assert own["PATH"] == os.environ["PATH"]
    assert not [k for k, v in own.items() if "evil" in v or v == "odd"]
    assert (own["SLURM_CONF"], own["SLURM_JWT"], own.get("A")) == ("site.conf", "token", None)
    ask(["lcbench-a"], time.time(), environment({}))
    for name in ("squeue", "sacct"):
        seen = (tools / f"{name}.env").read_text()
        assert "SLURM_CONF=mine.conf" in seen
        assert "=odd" not in seen


def test_names_of_earlier_versions_do_not_break_the_answer(tools: Path) -> None:
    """Bars separate fields, and commas names."""
    command(tools, "squeue", "7|N/A|RUNNING|None|N/A|lcbench-a|b-x\n8|1|PENDING|Priority|N/A|lcbench-p,q\n")
    command(tools, "sacct", "9|FAILED|None|lcbench-r|s\n")
    names = ["lcbench-a|b-x", "lcbench-p,q", "lcbench-r|s"]
    answer = ask(names, time.time(), environment({}), ["8"])
    assert answer.jobs == {
        ("lcbench-a|b-x", 0): Job("RUNNING", "", "7"),
        ("lcbench-p,q", 1): Job("PENDING", "Priority", "8_1"),
        ("lcbench-r|s", 0): Job("FAILED", "", "9"),
    }
    by_name, by_id = (tools / "squeue.args").read_text().splitlines()
    assert "--name=lcbench-a|b-x,lcbench-r|s" in by_name
    assert "--jobs=8" in by_id


def test_what_accounting_calls_alive_has_not_ended_because_squeue_is_silent(tools: Path) -> None:
    command(
        tools,
        "sacct",
        "5_[0-1,3%2]|PENDING|None|n\n5_2|RUNNING|None|n\n5_4|COMPLETED|None|n\n6|REQUEUED|None|m\n7.batch|FAILED||m\n",
    )
    answer = ask(["n", "m"], time.time(), environment({}))
    assert answer.controller
    assert {key: job.state for key, job in answer.jobs.items()} == {
        ("n", 0): "PENDING", ("n", 1): "PENDING", ("n", 3): "PENDING", ("n", 2): "RUNNING", ("n", 4): "COMPLETED",
        ("m", 0): "REQUEUED",
    }  # fmt: skip
    assert answer.jobs["n", 2].reason == "accounting calls it RUNNING, squeue does not list it"
    command(tools, "squeue", "", "exit 1")
    silent = ask(["n", "m"], time.time(), environment({}))
    assert not silent.controller
    assert {job.state for job in silent.jobs.values()} == {"UNKNOWN"}
    # That it knows none of the ids is an answer.
    command(tools, "squeue", "", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert ask(["n"], time.time(), environment({})).controller


@pytest.mark.parametrize(
    ("state", "reason", "helps"),
    [
        ("PENDING", "JobHeldUser", "scontrol release 4_1"),
        ("PENDING", "JobHeldAdmin", "scontrol release 4_1"),
        ("PENDING", "launch failed requeued held", "scontrol release 4_1"),
        ("PENDING", "job requeued in held state", "scontrol release 4_1"),
        ("PENDING", "JobHoldMaxRequeue", "scontrol release 4_1"),
        ("SPECIAL_EXIT", "None", "scontrol release 4_1"),
        ("PENDING", "DependencyNeverSatisfied", "scancel 4_1"),
        ("PENDING", "QOSMaxWallDurationPerJobLimit", "scancel 4_1"),
        ("PENDING", "AccountNotAllowed", "scancel 4_1"),
        ("PENDING", "Dependency", ""),
        ("PENDING", "Priority", ""),
        ("PENDING", "AssocGrpCPUMinutesLimit", ""),
        ("PENDING", "ReqNodeNotAvail, UnavailableNodes:held01", ""),
        ("PENDING", "BeginTime", ""),
        ("RUNNING", "None", ""),
        ("CANCELLED by 0", "JobHeldUser", ""),
    ],
)
def test_a_job_that_waits_for_a_person_says_what_helps(state: str, reason: str, helps: str) -> None:
    assert remedy(state, reason, "4_1") == helps


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sbatch: option '--requeue' doesn't allow an argument\nTry \"sbatch --help\" for more information\n",
         "sbatch: option '--requeue' doesn't allow an argument"),
        ("sbatch: unrecognized option '--foo=1'\nTry \"sbatch --help\" for more information",
         "sbatch: unrecognized option '--foo=1'"),
        ("Invalid time specification (pos=0): 960\nsbatch: error: Invalid --begin specification",
         "sbatch: error: Invalid --begin specification"),
        ("sbatch: info: your project has 3 h left\n\nsbatch: error: no budget\nsbatch: error: Batch job submission failed",
         "sbatch: error: no budget"),
        ("sbatch: lua: Welcome\nsbatch: warning: old option\nsbatch: error:   use   --gpus", "sbatch: error: use --gpus"),
        ("Try \"srun --help\" for more information", "Try \"srun --help\" for more information"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_reason_is_the_first_line_that_says_something(text: str, reason: str) -> None:
    assert reason_in(text) == reason


def test_cancelling_says_what_it_could_not(tools: Path) -> None:
    said = (
        "scancel: Terminating job 5_1\nscancel: error: Kill job error on job id 5_1: Access/permission denied\n"
        "scancel: error: Kill job error on job id 6: Invalid job id specified\n"
        "scancel: error: Kill job error on job id 7: Job/step already completing or completed\n"
    )
    command(tools, "scancel", "", f"cat >&2 <<'ERR'\n{said}ERR")
    refused = cancel(["5_1", "6", "7", "8", "--help", "8"], environment({}))
    assert refused == {"5_1": "Access/permission denied", "6": "Invalid job id specified"}
    assert (tools / "scancel.args").read_text() == "-v 5_1 6 7 8\n"  # an id is a number, whatever a file says
    command(tools, "scancel", "", "echo 'scancel: error: Unable to contact slurm controller' >&2; exit 1")
    assert cancel(["8"], environment({})) == {"8": "scancel: error: Unable to contact slurm controller"}
