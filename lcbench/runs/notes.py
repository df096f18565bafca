"""The small files in a pack's folder by which its launcher, its agents and commands tell each other where it stands.

job.json    who runs it: written by the launcher, before anybody is told of the pack and again when it has been handed over
check.json  what the check of its nodes found: written by the workers (``measure/nodes.py`` says what is in it)
stop.json   that workers are to end between cells, and why
end.json    how it came to its end, written by itself
cancel/     a file for each cell that is to be left
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lcbench.runs.attempt import Failure
from lcbench.runs.files import read_or_set_aside, write_json

JOB, CHECK, STOP, END = "job.json", "check.json", "stop.json", "end.json"
CANCEL = "cancel"


@dataclass(frozen=True)
class Job:
    """Who runs a pack. A pack with a ``job_id`` is a scheduler's, one with ``pids`` is run by agents on ``host``; with neither, the
    process ``pid`` on ``host`` is still handing it over.
    """

    launcher: str = ""
    host: str = ""
    pid: int | None = None
    started_at: float = 0.0  # seconds since the epoch
    pids: tuple[int, ...] | None = None  # of its agents
    job_id: str = ""
    timeout_min: int | None = None
    cluster: str | None = None  # Slurm's name of it, where known


@dataclass(frozen=True)
class Ending:
    """Why a pack ends or has ended. ``failure``: None if all went well. ``fallen``: why nodes are not well, by node."""

    failure: Failure | None
    time: float = field(default_factory=time.time)  # seconds since the epoch
    fallen: dict[str, str] = field(default_factory=dict)


_JOB, _ENDING = TypeAdapter(Job), TypeAdapter(Ending)


def job_here(launcher: str) -> Job:
    """The job of a pack that this process is about to hand over."""
    return Job(launcher, socket.gethostname(), os.getpid(), time.time())


def write_job(folder: Path, job: Job) -> None:
    """Say in a pack's folder who runs it."""
    write_json(folder / JOB, {name: value for name, value in asdict(job).items() if value not in (None, "")})


def read_job(folder: Path) -> Job | None:
    """Who runs a pack; None where nobody has said so, or the file cannot be read, and then it is set aside."""
    return read_or_set_aside(folder / JOB, _JOB.validate_python)


def write_ending(folder: Path, name: str, ending: Ending) -> None:
    """Leave word in a pack's folder; ``name``: STOP or END."""
    written: dict[str, Any] = asdict(ending)
    if not ending.fallen:
        del written["fallen"]
    write_json(folder / name, written)


def read_ending(folder: Path, name: str) -> Ending | None:
    """The word that is in a pack's folder under ``name``, STOP or END; None where there is none."""
    return read_or_set_aside(folder / name, _ENDING.validate_python)


def ended(folder: Path) -> bool:
    """Whether a pack has said how it came to its end."""
    return (folder / END).exists()


def told_to_stop(folder: Path) -> bool:
    """Whether the workers of a pack are to end before the next cell."""
    return (folder / STOP).exists()


def forget(folder: Path) -> None:
    """Remove the words of an earlier run of a pack's job."""
    for name in (STOP, END, CHECK):
        (folder / name).unlink(missing_ok=True)


def cancelled_cells(folder: Path) -> tuple[str, ...]:
    """Ids of the cells that a pack is to leave."""
    return tuple(path.name for path in (folder / CANCEL).glob("*"))


def is_cancelled(folder: Path, cell_id: str) -> bool:
    """Whether a pack is to leave this cell."""
    return (folder / CANCEL / cell_id).exists()


def cancel_cell(folder: Path, cell_id: str) -> None:
    """Tell a pack to leave a cell."""
    path = folder / CANCEL / cell_id
    path.parent.mkdir(exist_ok=True)
    path.touch()
