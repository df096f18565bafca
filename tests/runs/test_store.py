"""The store: whole files or none, an attempt number is claimed once, history is kept."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcbench.commands.arguments import find_cell
from lcbench.grid.cell import Cell
from lcbench.runs.attempt import Attempt, Failure
from lcbench.runs.files import read_json, write_json
from lcbench.runs.manifest import Entry
from lcbench.runs.store import Sweep, sweeps


def made_cell(seed: int = 0) -> Cell:
    group = {"name": "x", "_target_": "y"}
    return Cell.from_config(
        {
            "kernel": group, "cp": group, "mask": group, "seqlen": 1024, "scale": "1x2", "heads": "4x2x8", "dtype": "float32",
            "direction": "forward", "reduce_dtype": "float32", "seed": seed, "measure": {"budget_s": 1.0},
        }
    )  # fmt: skip


def claim(root: Path, cell_id: str) -> int:
    return Sweep(root, "s").begin(cell_id, "p").number


def test_a_result_is_written_as_plain_values(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "s")
    nested = {
        "times": ((1.0, math.nan), [math.inf, 2], [10**400, -math.inf]),
        "failure": Failure("oom", "too big", 3),
        "none": None,
    }
    attempt = Attempt("c", "", 1, "failed", Failure("hang", "it waits"), {"a": 1.0, "b": math.nan}, provenance=nested)
    sweep.finish(attempt)
    plain = {
        "times": [[1.0, None], [None, 2], [10**400, None]],
        "failure": {"kind": "oom", "cause": "too big", "rank": 3},
        "none": None,
    }
    failure = {"kind": "hang", "cause": "it waits", "rank": None}
    said = {**asdict(attempt), "sweep": "s", "failure": failure, "metrics": {"a": 1.0}, "provenance": plain}
    text = sweep.attempt_path("c", 1).read_text()
    assert json.dumps(json.loads(text)) == json.dumps(said)  # in the same order
    assert ' "times": [\n   [1.0, null],\n   [null, 2],\n' in text
    assert attempt.provenance is nested


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers() | st.booleans(), inner),
)


@given(data=JSON)
@pytest.mark.slow
def test_whatever_is_written_says_what_python_s_own_encoder_says(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "anything.json"
    write_json(path, data)
    assert json.dumps(json.loads(path.read_text())) == json.dumps(json.loads(json.dumps(data)))


@pytest.mark.slow
def test_concurrent_attempts_get_numbers_of_their_own(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        numbers = pool.starmap(claim, [(tmp_path, "cell")] * 24)
    assert sorted(numbers) == list(range(1, 25))


def test_attempts_round_trip_and_a_second_never_overwrites_the_first(tmp_path: Path) -> None:
    sweep, cell = Sweep(tmp_path, "s"), made_cell()
    sweep.add([Entry(cell), Entry(made_cell(1), "because")], command=["a=b"])
    first = sweep.begin(cell.id, "p1")
    assert [r.number for r in sweep.running(cell.id)] == [1]
    sweep.finish(Attempt(cell.id, "s", first.number, "failed", Failure("oom", "too big", 3), {"time/x_s": 1.5}, pack="p1"))
    assert not sweep.running(cell.id)
    second = sweep.begin(cell.id, "p2")
    sweep.finish(Attempt(cell.id, "s", second.number, "ok", pack="p2"))
    assert [(a.number, a.status, a.failure) for a in sweep.attempts(cell.id)] == [
        (1, "failed", Failure("oom", "too big", 3)),
        (2, "ok", None),
    ]
    record = sweep.look().records[cell.id]
    assert record.has_attempt_of("p1")
    assert not record.has_attempt_of("p3")
    assert [e.skip for e in sweep.entries().values()] == [None, "because"]
    assert sweeps(tmp_path) == ["s"]
    assert [entry.cell for _, entry in find_cell(tmp_path, cell.id[:6])] == [cell]


def test_result_counts_when_death_came_before_the_marker_was_dropped(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "s")
    running = sweep.begin("cell", "p")
    write_json(sweep.attempt_path("cell", 1), {**Attempt("cell", "s", running.number, "ok").__dict__})
    assert not sweep.running("cell")
    assert sweep.begin("cell", "p").number == 2


@pytest.mark.slow
def test_kill_in_the_middle_of_writing_leaves_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    code = (
        "from lcbench.runs.files import write_json\nfrom pathlib import Path\ni=0\n"
        f"while True:\n i+=1\n write_json(Path({str(path)!r}), [i]*20000)"
    )
    for pause in (0.6, 0.75, 0.9):
        writer = subprocess.Popen([sys.executable, "-c", code])
        while not path.exists():  # a busy machine starts it late
            time.sleep(0.05)
        time.sleep(pause)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        content = read_json(path)
        assert len(content) == 20000
        assert len(set(content)) == 1


def test_unknown_sweep_names_those_that_exist(tmp_path: Path) -> None:
    Sweep(tmp_path, "here").add([], command=[])
    with pytest.raises(ValueError, match="there are: here"):
        Sweep(tmp_path, "gone").manifest()


def begin_and_finish(root: Path, count: int) -> None:
    sweep = Sweep(root, "s")
    for _ in range(count):
        running = sweep.begin("cell", "p")
        sweep.finish(Attempt("cell", "s", running.number, "ok"))


@pytest.mark.slow
def test_whoever_looks_while_attempts_begin_and_end_sees_whole_files(tmp_path: Path) -> None:
    writer = multiprocessing.get_context("spawn").Process(target=begin_and_finish, args=(tmp_path, 60))
    writer.start()
    sweep, looks = Sweep(tmp_path, "s"), 0
    while writer.is_alive():
        assert len(sweep.running("cell")) <= 1
        looks += 1
    writer.join()
    assert writer.exitcode == 0
    assert looks > 60
    assert len(sweep.attempts("cell")) == 60
