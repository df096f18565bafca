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


def made_pack(root: Path, *, measured: bool, ended_s_ago: float | None) -> Sweep:
    """A sweep of one cell in one Slurm job."""
    sweep, cell = Sweep(root, "s"), made_cell()
    sweep.add([Entry(cell)], command=[])
    folder = sweep.pack_folder("p")
    write_json(folder / "job.json", {"job_id": "7", "started_at": time.time() - 600})
    pack = {"launcher": "slurm", "cells": [cell.id], "job_name": "n", "index": 0, "settings": {"site": {}, "retry": {}}}
    write_json(folder / "pack.json", {**pack, "seconds": {cell.id: 1.0}})
    if measured:
        running = sweep.begin(cell.id, "p")
        sweep.finish(Attempt(cell.id, "s", running.number, "ok", pack="p"))
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
    sweep = made_pack(tmp_path, measured=True, ended_s_ago=ended_s_ago)
    standing = Watch(sweep, asked(state)).look()
    assert standing.ended == ended
    assert standing.counts() == {"ok": 1}
