"""What tests/conftest.py refuses, chooses and shows: the markers that people choose tests by are true."""

from __future__ import annotations

import os
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest

from lcbench.testing.spawn import run_ranks
from tests.turns import VARIABLE, due, goes_by_turns, is_due, is_its_turn

ROOT = Path(__file__).parents[1]
MADE = """
import subprocess, sys
import pytest

def run_ranks():
    sys.audit("lcbench.testing.run_ranks", 2)

def run_agent():
    subprocess.run([sys.executable, "-S", "-c", "", "lcbench.runs.agent"], check=True)

@pytest.mark.gloo
def test_marked(): run_ranks()

def test_unmarked(): run_ranks()

def test_unmarked_agent(): run_agent()

def test_without_ranks(): subprocess.run([sys.executable, "-S", "-c", ""], check=True)
"""
CLUSTER = """
import pytest

@pytest.fixture
def devcluster(): pass

def test_it(devcluster): pass
"""
LOGS = """
import pytest

def write(folder):
    (folder / "cell").mkdir()
    (folder / "cell" / "attempt-1.log").write_text("09:00 begun\\nrank 1: Traceback (most recent call last):\\nValueError: a pair")
    (folder / "cell" / "attempt-2.log").write_text("all went well")

def test_fails(tmp_path):
    write(tmp_path)
    assert False

def test_passes(tmp_path): write(tmp_path)

def test_fails_without_a_folder(): assert False
"""
CASES = """
import subprocess, sys
import pytest
from tests.turns import due

@pytest.mark.parametrize("case", range(7))
def test_many(case): pass

@pytest.mark.parametrize("case", range(2))
def test_two(case): pass

def test_one(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.slow
@pytest.mark.parametrize("case", range(3))
def test_slow_cases(case): pass

def own(): return due("ab")

@pytest.mark.slow
def test_slow_by_itself(): own()

def test_by_itself(capfd):
    one = "from tests.turns import due; print('of its own:', due('abcde'))"
    subprocess.run([sys.executable, "-S", "-c", one], check=True)
    with capfd.disabled():
        print(capfd.readouterr().out)
"""


def outcome(path: Path, text: str, *more: str) -> tuple[int, str]:
    """Exit code and words of pytest, with the project's conftest."""
    path.write_text(text)
    options = ["-q", "-rA", "-p", "tests.conftest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), *more]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_test_that_starts_ranks_is_marked_gloo(tmp_path: Path) -> None:
    code, said = outcome(tmp_path / "test_made.py", MADE)
    assert code == 1
    assert "2 failed, 2 passed" in said
    assert said.count("starts ranks; mark it gloo") >= 2
    assert "::test_unmarked" in said


@pytest.mark.slow
def test_a_test_on_the_cluster_is_marked_slurm_and_is_where_make_test_looks_for_it(tmp_path: Path) -> None:
    code, said = outcome(tmp_path / "test_made.py", CLUSTER)
    assert (code, "mark it slurm" in said) == (4, True), said
    code, said = outcome(tmp_path / "test_made.py", f"{CLUSTER}\npytestmark = pytest.mark.slurm\n")
    assert (code, "looks for those in tests/slurm" in said) == (4, True), said


@pytest.mark.slow
def test_a_test_that_fails_shows_the_tracebacks_in_its_folder(tmp_path: Path) -> None:
    code, said = outcome(tmp_path / "test_made.py", LOGS)
    assert code == 1
    assert "2 failed, 1 passed" in said
    shown = said.partition("cell/attempt-1.log")[2]
    assert "rank 1: Traceback (most recent call last):\nValueError: a pair" in shown
    assert said.count("ValueError: a pair") == 1
    assert "attempt-2.log" not in said
    assert "09:00 begun" not in said


@pytest.mark.slow
def test_one_case_in_n_runs_of_every_test_and_n_turns_run_all_of_them(tmp_path: Path) -> None:
    ran: list[str] = []
    own: list[str] = []
    for turn in (6, 7, 8):
        code, said = outcome(tmp_path / "test_made.py", CASES, "--one-in=3", f"--turn={turn}")
        assert code == 0, said
        names = [line.rpartition("::")[2] for line in said.splitlines() if line.startswith("PASSED")]
        every = {"test_many", "test_two", "test_one", "test_slow_cases", "test_slow_by_itself", "test_by_itself"}
        assert {name.partition("[")[0] for name in names} - {"test_slow"} == every
        (taken,) = (line.partition("of its own: ")[2] for line in said.splitlines() if "of its own: " in line)
        own += literal_eval(taken)
        ran += names
    many = [name for name in ran if name.startswith("test_many")]
    assert sorted(many) == [f"test_many[{case}]" for case in range(7)]
    assert {name for name in ran if name.startswith("test_two")} == {"test_two[0]", "test_two[1]"}
    assert ran.count("test_slow") == 1
    assert sorted(own) == list("abcde")


@pytest.mark.slow
def test_every_test_on_the_cluster_comes_every_time() -> None:
    def collected(*more: str) -> set[str]:
        options = ["--collect-only", "-q", "-p", "no:cacheprovider", *more, "tests/slurm"]
        done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, capture_output=True, text=True, check=True)
        return {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}

    every = collected()
    assert len(every) > 20
    for turn in (0, 3):
        assert collected("--one-in=8", f"--turn={turn}") == every


@pytest.mark.parametrize("one_in", [1, 2, 3, 5, 6, 8])
def test_in_time_every_case_of_a_test_comes_with_each_that_it_goes_through_by_itself(
    one_in: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cases in (1, 2, 3, 5, 6, 31):
        for inner in (1, 2, 4, 33):
            seen = set()
            for turn in range(min(one_in, cases) * min(one_in, inner)):
                monkeypatch.setenv(VARIABLE, f"{one_in} {turn} {cases}")
                taken = due(range(inner))
                assert taken
                seen |= {(case, own) for case in range(cases) if is_due(case, cases) for own in taken}
            assert len(seen) == cases * inner, (cases, inner)


@pytest.mark.parametrize("one_in", [1, 2, 6])
def test_a_test_without_cases_comes_once_in_n_turns(one_in: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for test in ("tests/a.py::test_one", "tests/a.py::test_other", "tests/b.py::test_one"):
        taken = []
        for turn in range(40, 40 + one_in):
            monkeypatch.setenv(VARIABLE, f"{one_in} {turn} 1")
            taken.append(is_its_turn(test))
        assert sum(taken) == 1


def of_its_own() -> None:
    assert [due(case) for case in ("ab", "cd")]


def through_a_function() -> None:
    of_its_own()


def not_by_turns() -> None:
    assert sorted("ab")


def test_what_goes_through_its_cases_by_turns_is_found_by_what_it_names() -> None:
    assert goes_by_turns(of_its_own)
    assert goes_by_turns(through_a_function)
    assert not goes_by_turns(not_by_turns)


def takes(_: int, variable: str, value: str | None) -> None:
    assert os.environ.get(variable) == value


def same(variable: str, value: str | None) -> tuple[str, str | None]:
    assert os.environ.get(variable) == value
    return variable, value


def takes_what_is_prepared(rank: int, prepared: tuple[str, str | None]) -> None:
    takes(rank, *prepared)


@pytest.mark.gloo
@pytest.mark.slow
def test_ranks_have_the_environment_of_the_test_that_starts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("1", "2", None):  # the first starts the process that all come from
        if value is None:
            monkeypatch.delenv("LCBENCH_OF_A_TEST")
        else:
            monkeypatch.setenv("LCBENCH_OF_A_TEST", value)
        run_ranks(2, takes, "LCBENCH_OF_A_TEST", value)
        run_ranks(2, takes_what_is_prepared, "LCBENCH_OF_A_TEST", value, prepare=same)
