"""Where packs stand, when Slurm and their own files do not say the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from lcbench.runs.jobs import GHOST_S, Watch
from lcbench.runs.queue import Answer, Job
from lcbench.runs.store import Attempt, Entry, Sweep, write_json
from tests.runs.test_store import made_cell


def made_pack(root: Path, *, cells: int = 1, done_in_s: float | None = 1.0, ended_s_ago: float | None = None) -> Sweep:
    """A sweep in one Slurm job, whose cells are expected to take 100 s; the first has ended after ``done_in_s``."""
    sweep, all_cells = Sweep(root, "s"), [made_cell(number) for number in range(cells)]
    cell = all_cells[0]
    sweep.add([Entry(c) for c in all_cells], command=[])
    folder = sweep.pack_folder("p")
    write_json(folder / "job.json", {"job_id": "7", "started_at": time.time() - 600})
    pack = {
        "launcher": "slurm",
        "cells": [c.id for c in all_cells],
        "job_name": "n",
        "index": 0,
        "settings": {"site": {}, "retry": {}},
    }
    write_json(folder / "pack.json", {**pack, "seconds": {c.id: 100.0 for c in all_cells}})
    if done_in_s is not None:
        number = sweep.begin(cell.id, "p").number
        sweep.finish(Attempt(cell.id, "s", number, "ok", pack="p", started_at=1.0, finished_at=1.0 + done_in_s))
    if ended_s_ago is not None:
        write_json(folder / "end.json", {"failure": None, "time": time.time() - ended_s_ago})
    return sweep


def asked(state: str, *, controller: bool = True) -> Any:
    return lambda *_: Answer({("n", 0): Job(state, "", "7")}, controller)


@pytest.mark.parametrize(
    ("state", "ended_s_ago", "ended"),
    [
        ("RUNNING", None, False),
        ("RUNNING", GHOST_S / 2, False),  # it may still publish
        ("RUNNING", GHOST_S * 2, True),  # slurmctld was killed before it saved the end
        ("UNKNOWN", 1.0, True),
        ("UNKNOWN", None, False),
        ("PENDING", GHOST_S * 2, False),  # requeued, it has not begun anew
        ("COMPLETED", None, True),
    ],
)
def test_a_pack_that_said_how_it_ended_has_ended_whatever_slurm_makes_of_it(
    tmp_path: Path, state: str, ended_s_ago: float | None, ended: bool
) -> None:
    sweep = made_pack(tmp_path, ended_s_ago=ended_s_ago)
    standing = Watch(sweep, asked(state)).look()
    assert standing.ended == ended
    assert standing.counts() == {"ok": 1}


@pytest.mark.parametrize(("done_in_s", "left_s"), [(None, 300.0), (100.0, 200.0), (50.0, 100.0)])
def test_the_time_left_comes_from_estimates_and_from_how_those_turned_out(
    tmp_path: Path, done_in_s: float | None, left_s: float
) -> None:
    sweep = made_pack(tmp_path, cells=3, done_in_s=done_in_s)
    left = Watch(sweep, asked("RUNNING")).look().left()
    assert (left.running_s, left.waiting) == (pytest.approx(left_s), 0)
    waiting = Watch(sweep, asked("PENDING")).look().left()
    assert (waiting.running_s, waiting.waiting, waiting.waiting_s) == (0.0, 1, pytest.approx(left_s))
    assert "1 jobs wait" in str(waiting)


def test_a_cell_in_flight_has_had_its_time(tmp_path: Path) -> None:
    sweep = made_pack(tmp_path, cells=2, done_in_s=None)
    sweep.begin(next(iter(sweep.entries())), "p")
    time.sleep(0.2)
    assert 190 < Watch(sweep, asked("RUNNING")).look().left().running_s < 200
