"""Where packs stand, when Slurm and their own files do not say the same."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lcbench.runs import jobs
from lcbench.runs.attempt import Attempt
from lcbench.runs.files import write_json
from lcbench.runs.jobs import GHOST_S
from lcbench.runs.manifest import Entry
from lcbench.runs.settle import settled
from lcbench.runs.squeue import NOT_LISTED, Job
from lcbench.runs.store import Sweep
from tests.runs.queues import Watching, says
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


def asked(state: str, *, controller: bool = True) -> Watching:
    return says({("n", 0): Job(state, "", "7")}, controller=controller)


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
    standing = settled(asked(state)(sweep))
    assert standing.ended == ended
    assert standing.counts() == {"ok": 1}


@pytest.mark.parametrize(("done_in_s", "left_s"), [(None, 300.0), (100.0, 200.0), (50.0, 100.0)])
def test_the_time_left_comes_from_estimates_and_from_how_those_turned_out(
    tmp_path: Path, done_in_s: float | None, left_s: float
) -> None:
    sweep = made_pack(tmp_path, cells=3, done_in_s=done_in_s)
    left = settled(asked("RUNNING")(sweep)).left()
    assert (left.running_s, left.waiting) == (pytest.approx(left_s), 0)
    waiting = settled(asked("PENDING")(sweep)).left()
    assert (waiting.running_s, waiting.waiting, waiting.waiting_s) == (0.0, 1, pytest.approx(left_s))
    assert "1 jobs wait" in str(waiting)


def test_a_cell_in_flight_has_had_its_time(tmp_path: Path) -> None:
    sweep = made_pack(tmp_path, cells=2, done_in_s=None)
    sweep.begin(next(iter(sweep.entries())), "p")
    time.sleep(0.2)
    assert 190 < settled(asked("RUNNING")(sweep)).left().running_s < 200


HELD = Job("PENDING", "launch failed requeued held", "7")


def test_a_job_that_slurm_holds_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells, one of which had begun before, are not running; who waits stops and says what helps."""
    sweep = made_pack(tmp_path, cells=3)
    cells = list(sweep.entries())
    sweep.begin(cells[1], "p")
    standing = settled(says({("n", 0): HELD})(sweep))
    assert [c.state for c in standing.cells] == ["ok", "pending", "pending"]
    assert standing.cells[1].cause == "launch failed requeued held: scontrol release 7"
    assert not standing.ended
    assert standing.at_rest
    assert standing.under_way == set(cells[1:])
    said = "job 7 does not go on by itself (launch failed requeued held), and 2 cells wait for it: scontrol release 7"
    assert standing.held_words() == [said]
    # One that waits for it does not go on either; one that waits its turn does.
    pack = sweep.pack_file("p", "pack.json")
    write_json(sweep.pack_folder("q") / "pack.json", {**pack, "job_name": "m"})
    for reason, rests in (("Dependency", True), ("Priority", False)):
        watch = says({("n", 0): HELD, ("m", 0): Job("PENDING", reason, "8")})(sweep)
        assert settled(watch).at_rest == rests
    assert not settled(says({("n", 0): Job("PENDING", "Dependency", "7")})(sweep)).at_rest
    # Of an array that is held one command helps.
    write_json(sweep.pack_folder("q") / "pack.json", {**pack, "index": 1})
    both = {("n", i): Job("PENDING", "JobHeldUser", f"7_{i}") for i in range(2)}
    (line,) = settled(says(both)(sweep)).held_words()
    assert line.endswith(": scontrol release 7")


def test_a_job_that_squeue_does_not_list_lives_while_accounting_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = made_pack(tmp_path, cells=2)
    unlisted = says({("n", 0): Job("RUNNING", NOT_LISTED.format(state="RUNNING"), "7")})
    watch = unlisted(sweep)
    for _ in range(2):
        standing = watch.look()
        assert not standing.ended
        assert not standing.at_rest
        assert standing.counts() == {"ok": 1, "pending": 1}
    monkeypatch.setattr(jobs, "UNLISTED_S", -1.0)  # whoever waits is told after a while
    standing = watch.look()
    assert standing.at_rest
    assert not standing.ended
    assert standing.held_words()[0].endswith("python -m lcbench.cancel s")


def test_another_cluster_s_silence_ends_nothing(tmp_path: Path) -> None:
    sweep = made_pack(tmp_path, cells=2)
    folder = sweep.pack_folder("p")
    write_json(folder / "job.json", {"job_id": "7", "started_at": time.time() - 600, "cluster": "big"})
    (pack,) = settled(says({}, cluster="small")(sweep)).packs
    assert (pack.state, pack.reason) == ("UNKNOWN", "its cluster is big, and Slurm's commands here ask small")
    assert settled(says({}, cluster="big")(sweep)).packs[0].state == "ENDED"


@pytest.mark.parametrize("text", ["", '{"cell_id": "'])
def test_a_result_that_was_damaged_is_measured_again_and_then_said(tmp_path: Path, text: str) -> None:
    sweep = made_pack(tmp_path, cells=2)
    damaged = next(iter(sweep.entries()))
    sweep.attempt_path(damaged, 1).write_text(text)  # truncated while its job ran
    assert settled(asked("RUNNING")(sweep)).counts() == {"pending": 2}
    standing = settled(asked("COMPLETED")(sweep))
    # No attempt: whoever brings the sweep to its end runs it again. What its job never came to has its job's class.
    assert [c.state for c in standing.cells] == ["missing", "failed"]
    assert [d.path.name for d in standing.seen.damaged] == ["attempt-1.json.corrupt"]
    assert settled(asked("COMPLETED")(sweep)).cells == standing.cells
    number = sweep.begin(damaged, "p").number
    assert number == 2
    sweep.attempt_path(damaged, 2, "running.json").unlink()
    sweep.attempt_path(damaged, 2).write_text(text)
    cell = settled(asked("COMPLETED")(sweep)).cells[0]
    assert (cell.state, cell.failure) == ("failed", "crash")
    assert cell.cause == "its result was damaged after it was written, and set aside: attempt-2.json.corrupt"
    # A later good result stays the last word.
    sweep.finish(Attempt(damaged, "s", sweep.begin(damaged, "q").number, "ok", pack="q", started_at=1.0, finished_at=2.0))
    assert settled(asked("COMPLETED")(sweep)).cells[0].state == "ok"


def test_looking_records_nothing(tmp_path: Path) -> None:
    sweep = made_pack(tmp_path, cells=2)

    def files() -> dict[Path, str]:
        return {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    assert asked("COMPLETED")(sweep).look().counts() == {"ok": 1, "missing": 1}
    assert files() == before
    assert settled(asked("COMPLETED")(sweep)).counts() == {"ok": 1, "failed": 1}
