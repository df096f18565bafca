"""Workers that are forked are as programs that were started: each ends as it does, has what is its own, and dies with its agent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lcbench.grid.build import imports_of
from lcbench.runs.forkserver import ForkServer
from tests.runs.forks import ENDS
from tests.slurm.stage import ROOT, wait_until


def run(what: str, folder: Path) -> tuple[Any, str]:
    """What a process with a fork server says, and its errors."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.runs.forks", what, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return json.loads(done.stdout), done.stderr


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_end_has_the_code_or_signal_that_it_was(tmp_path: Path) -> None:
    codes, errors = run("ends", tmp_path)
    assert codes == ENDS
    assert errors == ""  # no handler of the agent's ran
    assert (tmp_path / "raise.err").read_text().endswith("ValueError: as told\n")
    assert (tmp_path / "exit with words.err").read_text().endswith("words\n")
    for end in ENDS:  # a worker that dies has said what it said
        assert (tmp_path / f"{end}.out").read_text() == f"{end} begins\n"
        assert (tmp_path / f"{end}.err").read_text().startswith(f"{end} complains\n")


def test_a_worker_has_its_own_environment_output_session_and_name(tmp_path: Path) -> None:
    said, _ = run("tell", tmp_path)
    told = json.loads((tmp_path / "tell.out").read_text().splitlines()[-1])  # of the second, which made the files anew
    assert said["codes"] == [0, 0]
    assert told["environment"] == {"PATH": os.environ["PATH"], "RANK": "1"}
    assert told["argv"] == ["__main__", "tell"]
    assert told["session"]
    assert told["name"] == "lcbench rank 4"
    assert told["hangup"] == 1  # what its agent was started to ignore, it ignores
    assert told["parent"] == said["server"]


def test_workers_end_with_an_agent_that_is_killed(tmp_path: Path) -> None:
    pids, _ = run("the agent is killed", tmp_path)
    assert len(pids) == 4
    wait_until(lambda: not any(map(alive, pids)), 10)


@pytest.mark.slow
def test_workers_end_with_their_server_and_count_as_killed(tmp_path: Path) -> None:
    (*pids, codes, lives, why), _ = run("the server is killed", tmp_path)
    wait_until(lambda: not any(map(alive, pids)), 10)
    assert codes == [-9, -9, -9]
    assert not lives
    assert why == "the process that forks the ranks was killed, and they with it"
    pids, _ = run("the server is closed", tmp_path)
    wait_until(lambda: not any(map(alive, pids)), 10)


def test_what_is_sent_to_all_processes_of_a_job_ends_no_server(tmp_path: Path) -> None:
    (*pids, ended, other), errors = run("the server is told to end", tmp_path)
    assert ended == -15
    assert other is None
    wait_until(lambda: not any(map(alive, pids)), 10)
    assert errors == ""


def test_a_process_that_has_used_cuda_forks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is in use here already"):
        ForkServer(print)


LOOKS = """
import json, os, sys
import torch
from lcbench.grid.build import imports_of
from lcbench.runs.worker import run_rank
from lcbench.testing.masks import load, names

looked = []
for module, name in ((torch._C, "_cuda_getDeviceCount"), (torch.cuda, "device_count"), (torch.cuda, "is_available")):
    if hasattr(module, name):  # torch's builds for CPUs have no such members of _C
        setattr(module, name, lambda *_, name=name: looked.append(name) or 0)
tasks = set(os.listdir("/proc/self/task"))
wanted = {workload: imports_of({"workload": load("workload", workload)}) for workload in names("workload")}
for module in {module for modules in wanted.values() for module in modules}:
    __import__(module)
print(json.dumps([wanted, looked, sorted(set(os.listdir("/proc/self/task")) - tasks), torch.cuda.is_initialized()]))
"""


@pytest.mark.slow
def test_what_is_imported_where_ranks_are_forked_looks_at_no_gpu_and_starts_no_thread() -> None:
    # OpenBLAS ends its own threads before a fork, and starts them anew after it.
    alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LOOKS], cwd=ROOT, env=alone, capture_output=True, text=True, check=True)
    wanted, *rest = json.loads(done.stdout)
    assert rest == [[], [], False]
    assert "torch._dynamo" in wanted["block"]
    assert wanted["attention"] == []


def test_an_own_workload_is_not_imported_where_ranks_are_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert imports_of({"workload": {"name": "mine", "_target_": "mine.Workload"}}) == ()
    assert imports_of({}) == ()
