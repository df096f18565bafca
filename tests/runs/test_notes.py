"""The small files of a pack: what is written is read, and a damaged one is set aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcbench.runs import notes
from lcbench.runs.attempt import Failure
from lcbench.runs.files import CORRUPT


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for job in (notes.job_here("slurm"), notes.Job("local", "n1", 7, 1.5, (7, 8), timeout_min=3)):
        notes.write_job(tmp_path, job)
        assert notes.read_job(tmp_path) == job
    for ending in (notes.Ending(None, 2.0), notes.Ending(Failure("node-fail", "c", 1), 3.0, {"n1": "no GPU"})):
        notes.write_ending(tmp_path, notes.STOP, ending)
        assert notes.read_ending(tmp_path, notes.STOP) == ending
    assert not notes.ended(tmp_path)
    notes.write_ending(tmp_path, notes.END, notes.Ending(None))
    assert notes.ended(tmp_path)
    notes.forget(tmp_path)
    assert notes.read_ending(tmp_path, notes.STOP) is None
    assert not notes.ended(tmp_path)
    notes.cancel_cell(tmp_path, "abc")
    assert notes.cancelled_cells(tmp_path) == ("abc",)


@pytest.mark.parametrize("text", ["", "[]", '{"pids": "seven"}', '{"started_at": {}}'])
def test_what_is_no_note_is_set_aside(tmp_path: Path, text: str) -> None:
    (tmp_path / notes.JOB).write_text(text)
    assert notes.read_job(tmp_path) is None
    assert (tmp_path / f"{notes.JOB}{CORRUPT}").read_text() == text
