"""The results folder: the truth about every attempt, as JSON files; everything else can be rebuilt from it.

    <root>/<sweep>/manifest.json                      the cells of the sweep, the skipped ones with their reason
    <root>/<sweep>/<cell id>/attempt-N.running.json   attempt N is in flight (removed when it ends)
    <root>/<sweep>/<cell id>/attempt-N.json           its result
    <root>/<sweep>/<cell id>/attempt-N.log            what its workers printed
    <root>/<sweep>/<cell id>/prediction.json          what was predicted of the cell; never an attempt
    <root>/<sweep>/packs/<pack id>/pack.json          the cells of one job, and everything its workers need
    <root>/<sweep>/packs/<pack id>/job.json           how it was started: launcher, Slurm job id, pid
    <root>/<sweep>/packs/<pack id>/check.json         what the check of its nodes found
    <root>/<sweep>/packs/<pack id>/end.json           how it came to its end, written by itself
    <root>/<sweep>/packs/<pack id>/again/<cell id>.<block>.json   a later block of timings is in flight (removed when it ends)
    <root>/<sweep>/packs/<pack id>/failures/*.json    how workers of the pack died (written by them or by their agent)

A file appears whole or not at all: temporary name, fsync, rename. An attempt number is claimed by creating the running
marker exclusively, so a second attempt never overwrites the first. What was predicted of a cell is a file of its own, which a
later prediction takes the place of: no reader of attempts, nor an earlier lcbench, can take it for a measurement. A good result is
written anew, under its name, with each later block of timings of its cell. A file that cannot be read all the same (a full disk, a
broken file system, an editor) is renamed to ``<name>.corrupt``, and whoever looks at the sweep is told. One that may not be read,
or that a later lcbench wrote, stays as it is and is left out, by name. docs/results.md describes the files.

Files have the mode that the umask gives, so that a folder can be shared; what only its owner may read is written with
``private``. What lies in the folder is data: whoever can write there must not be able to run anything by it, so names in it are no
paths, and a class that a config names is built only if ``grid/build.py`` or the user allows it (``allow``).
"""

from __future__ import annotations

import errno
import getpass
import json
import math
import os
import pwd
import re
import secrets
import shlex
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from filelock import FileLock

from lcbench.grid.axes import CELL_GROUPS, value_of
from lcbench.grid.cell import Cell
from lcbench.grid.values import parse_direction, parse_dtype, parse_reduce_dtype
from lcbench.measure.blocks import blocks_of
from lcbench.redact import redacted

SCHEMA = 1
Status = Literal["ok", "failed", "skipped", "predicted"]
FAILURE_CLASSES = (
    "oom", "timeout", "hang", "nccl", "numerics", "implausible", "unsupported", "node-fail", "preempted", "crash", "cancelled",
    "no-start",
)  # fmt: skip
CAUSE_LENGTH = 300
CORRUPT = ".corrupt"
MEMORY = "mlflow.json"
PREDICTION = "prediction.json"
AGAIN = "again"
T = TypeVar("T")
Numbers = (int, float)
# What reading something that is no such file may raise.
BROKEN = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError)


class Unreadable(ValueError):
    """A file of the store that cannot be used and stays as it is: it may not be read, or another version of lcbench wrote it."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt did not end well: one of ``FAILURE_CLASSES`` and the first cause in one line."""

    kind: str
    cause: str
    rank: int | None = None  # the first rank that failed, where known


@dataclass(frozen=True)
class Attempt:
    """The record of one try at one cell, or, in ``prediction.json``, of its prediction.

    ``metrics`` are flat floats keyed as MLflow keys (``time/forward/median_s``, ``compute/mfu``, ``check/dq_error``;
    docs/metrics.md lists them with units); ``samples`` are per-iteration lists (``forward_s``: slowest rank of each
    iteration), lists per block of timings (``block_forward_s``) and per rank (``rank_forward_median_s``); ``checks`` holds
    the errors, their bounds and how the reference was taken; ``provenance`` says where, with what and from which commit, and
    of later blocks when they were measured (``again``) and which were lost and why (``lost_blocks``). A prediction has the status
    ``predicted`` (or ``skipped``, where there can be none), the number 0, metrics by the same keys and no samples; its provenance
    holds ``prediction``: machine, fit, error band, what it rests on. ``config`` is the cell's, so that a file can be read by
    itself. A value that is not finite is left out of ``metrics`` and is null elsewhere, because JSON cannot write it.
    """

    cell_id: str
    sweep: str
    number: int
    status: Status
    failure: Failure | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    pack: str = ""
    started_at: float = 0.0  # seconds since the epoch
    finished_at: float = 0.0
    schema: int = SCHEMA

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Attempt:
        """Raises:
        Unreadable: a later version wrote it.
        ValueError, TypeError, KeyError, AttributeError: it is no record of an attempt.
        """
        _check_schema(data)
        failure = Failure(**data["failure"]) if data.get("failure") else None
        made = cls(**{**data, "failure": failure})
        _check_names(made.cell_id, *filter(None, [made.pack]))
        texts = (failure.kind, failure.cause) if failure else ()
        numbers = (made.number, made.started_at, made.finished_at, *made.metrics.values())
        if made.status not in get_args(Status) or not all(isinstance(t, str) for t in (made.sweep, *texts)):
            raise ValueError(f"no status and cause of an attempt: {made.status!r}, {texts}")
        if made.status == "predicted" and made.number:
            raise ValueError(f"attempt {made.number} is a prediction, and attempts are measured")
        if not all(isinstance(n, Numbers) for n in numbers) or not all(isinstance(v, list) for v in made.samples.values()):
            raise TypeError("a metric that is no number, or samples that are no list")
        if not all(isinstance(d, dict) for d in (made.checks, made.provenance, made.config)):
            raise TypeError("checks, provenance or config that are no table")
        return made

    @property
    def blocks(self) -> int:
        """How many blocks of timings it has; 0 where it was not timed, or before there were blocks."""
        return int(self.metrics.get("time/blocks", 0))

    @property
    def prediction(self) -> dict[str, Any]:
        """Of a prediction: machine, fit, relative half-width of its 95 % interval (``error``), basis; empty of a measurement."""
        found = self.provenance.get("prediction")
        return found if isinstance(found, dict) else {}

    @property
    def band(self) -> float | None:
        """Relative half-width of the 95 % interval of a prediction's times: they lie within a factor of 1 + it; else None."""
        error = self.prediction.get("error")
        return float(error) if self.status == "predicted" and isinstance(error, Numbers) and error >= 0 else None

    @property
    def no_speed(self) -> str:
        """Why the times say nothing about a GPU's speed: ranks shared one, say. The check counts as any other."""
        check = self.provenance.get("check")
        return str(check.get("no_speed", "")) if isinstance(check, dict) else ""

    @property
    def again(self) -> list[dict[str, Any]]:
        """Its later blocks: number, when each began and ended, and how many iterations of the samples are its own."""
        return list(self.provenance.get("again", []))

    @property
    def lost_blocks(self) -> list[dict[str, Any]]:
        """Blocks that began and gave nothing, and why."""
        return list(self.provenance.get("lost_blocks", []))


@dataclass(frozen=True)
class Running:
    """The marker of an attempt in flight, or of a later block of timings of an attempt that has a good result."""

    cell_id: str
    number: int
    pack: str
    started_at: float
    block: int = 1

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Running:
        made = cls(**data)
        _check_names(made.cell_id, made.pack)
        if not all(isinstance(n, Numbers) for n in (made.number, made.started_at, made.block)):
            raise TypeError("a number that is none")
        return made


@dataclass(frozen=True)
class Entry:
    """A cell of a sweep as the manifest has it; ``skip`` says why it cannot run, if so. ``predicted``: it was asked for to be
    predicted only, so nobody measures it unasked.
    """

    cell: Cell
    skip: str | None = None
    predicted: bool = False


@dataclass(frozen=True)
class Record:
    """A cell of a sweep and all that was tried: attempts that ended, oldest first, and those in flight; and its prediction."""

    entry: Entry
    attempts: tuple[Attempt, ...]
    running: tuple[Running, ...]
    prediction: Attempt | None = None

    def has_attempt_of(self, pack: str) -> bool:
        """Whether a pack has an ended attempt at this cell."""
        return any(a.pack == pack for a in self.attempts)

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def known(self) -> Attempt | None:
        """The newest attempt; of a cell that was never tried its prediction."""
        return self.last or self.prediction

    @property
    def status(self) -> str:
        """Of what is known of it, else ``missing``; a cell that cannot run at all is ``skipped``."""
        if self.entry.skip:
            return "skipped"
        return self.known.status if self.known else "missing"

    @property
    def failure(self) -> Failure | None:
        """Why it has no good result, and no prediction."""
        if self.entry.skip:
            return Failure("unsupported", self.entry.skip)
        return self.known.failure if self.known else None


@dataclass(frozen=True)
class Damaged:
    """A file that was set aside because it could not be read, or one that is left out and stays as it is."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{'set aside' if self.path.name.endswith(CORRUPT) else 'left out'}: {self.path}: {self.reason}"


@dataclass(frozen=True)
class Look:
    """A whole sweep, read once."""

    records: dict[str, Record]
    damaged: tuple[Damaged, ...]
    launch: dict[str, Any] | None  # as the manifest has it

    def foretold(self) -> Look:
        """Predictions alone: every cell as if it had never been tried."""
        return replace(self, records={cell_id: replace(r, attempts=(), running=()) for cell_id, r in self.records.items()})


@dataclass(frozen=True)
class Sweep:
    """One sweep's folder below the results root."""

    root: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def manifest_path(self) -> Path:
        return self.folder / "manifest.json"

    def exists(self) -> bool:
        return os.path.lexists(self.manifest_path) or bool(self.packs())

    def lock(self) -> FileLock:
        """The lock to hold while cells are given to packs, so that two commands at once do not run the same cells."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock", is_singleton=True)  # who has it may take it again

    def manifest(self) -> dict[str, Any]:
        """The manifest: ``{"schema", "sweep", "id", "created_at", "commands", "launch", "cells": {id: {"config", "skip"}}}``.

        One that cannot be read is set aside and made again from packs and attempts.

        Raises:
            ValueError: there is no such sweep.
            Unreadable: its manifest may not be read, or a later lcbench wrote it.
        """
        if not self.exists():
            raise ValueError(f"no sweep {self.name!r} below {self.root}; there are: {', '.join(sweeps(self.root)) or 'none'}")
        found = _read(self.manifest_path, _checked_manifest)
        return self._rebuilt() if found is None else found

    def entries(self) -> dict[str, Entry]:
        """The cells by id, in the order in which they were asked for."""
        return entries_of(self.manifest())

    def add(self, entries: list[Entry], *, command: list[str], launch: dict[str, Any] | None = None) -> None:
        """Write the manifest, or add cells to the one that is there (a sweep may grow; nothing is taken out, and a cell that is
        to be measured stays so when it is predicted).

        ``launch``: how its cells are run, for those who go on with the sweep later.
        """
        known: dict[str, Any] = self.manifest() if self.exists() else _new_manifest(self.name)
        known["commands"] = [[redacted(word) for word in words] for words in (*known["commands"], command)]
        known["launch"] = launch
        for e in entries:
            if not (e.predicted and e.cell.id in known["cells"]):
                only = {"predicted": True} if e.predicted else {}
                known["cells"][e.cell.id] = {"config": e.cell.config, "skip": e.skip, **only}
        write_json(self.manifest_path, known)

    def _rebuilt(self) -> dict[str, Any]:
        manifest = _new_manifest(self.name)
        for known in self.remembered().values():  # what was published goes by it
            manifest["id"] = known["sweep_id"]
        for pack in filter(None, (self.pack_file(pack_id, "pack.json") for pack_id in self.packs())):
            manifest["cells"].update({k: {"config": config, "skip": None} for k, config in pack["configs"].items()})
            manifest["launch"] = {key: pack[key] for key in ("launcher", "settings")}
        for name in sorted(_names(self.folder)):
            foretold = self.prediction(name) if self.predicted_ns(name) else None
            if foretold is not None and foretold.config:
                manifest["cells"].setdefault(foretold.cell_id, {"config": foretold.config, "skip": None, "predicted": True})
            for attempt in self.attempts(name):
                if attempt.config:
                    manifest["cells"][attempt.cell_id] = {"config": attempt.config, "skip": None}
        with suppress(OSError):  # who may only read looks at it all the same
            write_json(self.manifest_path, manifest)
        return manifest

    def look(self) -> Look:
        """Every cell with every attempt, each file read once."""
        records, listed = {}, {}
        manifest = self.manifest()
        for cell_id, entry in entries_of(manifest).items():
            folder = self.folder / cell_id
            names = listed[folder] = _names(folder)
            foretold = self.prediction(cell_id) if PREDICTION in names else None
            records[cell_id] = Record(entry, tuple(self._attempts(cell_id, names)), tuple(self._running(cell_id, names)), foretold)
            if len(names) != 1 or foretold is None:  # reading may have set some aside
                listed[folder] = _names(folder)
        packs = [self.folder / "packs" / name for name in _names(self.folder / "packs")]
        below = [p / name for p in packs for name in ("failures", AGAIN)]
        listed |= {folder: _names(folder) for folder in (self.folder, *packs, *below)}
        aside = [folder / n for folder, names in listed.items() for n in names if n.endswith(CORRUPT)]
        # Of a sweep of several people some may have kept theirs to themselves.
        for cell_id, record in records.items():
            have = {a.number for a in record.attempts}
            names = listed[self.folder / cell_id]
            aside += [self.attempt_path(cell_id, n) for n in sorted(_numbers(names)) if n not in have]
            aside += [self.folder / cell_id / PREDICTION] * (PREDICTION in names and record.prediction is None)
        aside += [p / "pack.json" for p in packs if "pack.json" in listed[p] and not os.access(p / "pack.json", os.R_OK)]
        damaged = [Damaged(path, _unreadable(path)) for path in aside]
        damaged += [Damaged(self.manifest_path, f"cell {i}: {why}") for i, why in _strange_cells(manifest).items()]
        return Look(records, tuple(damaged), manifest["launch"])

    # -- attempts ------------------------------------------------------------------------------------------------

    def attempt_path(self, cell_id: str, number: int, suffix: str = "json") -> Path:
        return self.folder / cell_id / f"attempt-{number}.{suffix}"

    def attempts(self, cell_id: str) -> list[Attempt]:
        """All ended attempts at a cell, oldest first."""
        return self._attempts(cell_id, _names(self.folder / cell_id))

    def has_attempt_of(self, cell_id: str, pack: str) -> bool:
        """Whether a pack has an ended attempt at this cell."""
        return any(a.pack == pack for a in self.attempts(cell_id))

    def running(self, cell_id: str) -> list[Running]:
        """Attempts that have begun and not ended. Their job may be dead."""
        return self._running(cell_id, _names(self.folder / cell_id))

    def _attempts(self, cell_id: str, names: list[str]) -> list[Attempt]:
        found = (read_or_set_aside(self.attempt_path(cell_id, number), Attempt.from_json) for number in sorted(_numbers(names)))
        return [attempt for attempt in found if attempt is not None]

    def _running(self, cell_id: str, names: list[str]) -> list[Running]:
        marked = [n for n in names if n.startswith("attempt-") and n.endswith(".running.json")]
        # Both are there when death came between writing the result and dropping the marker: the result counts. The names may be
        # older than the markers, which is why a result is looked for again.
        found = (read_or_set_aside(self.folder / cell_id / name, Running.from_json) for name in marked)
        alive = (r for r in found if r is not None and not self.attempt_path(cell_id, r.number).exists())
        return sorted(alive, key=lambda r: r.number)

    def prediction(self, cell_id: str) -> Attempt | None:
        """What was predicted of a cell; None if nothing was."""
        return read_or_set_aside(self.folder / cell_id / PREDICTION, _checked_prediction)

    def predict(self, prediction: Attempt) -> None:
        """Keep the prediction of a cell, in place of an earlier one. What was measured of the cell stays as it is."""
        assert prediction.status in ("predicted", "skipped")
        assert prediction.number == 0
        self._write(self.folder / prediction.cell_id / PREDICTION, prediction)

    def predicted_ns(self, cell_id: str) -> int:
        """When a cell's prediction was written (``st_mtime_ns``), without reading it; 0 if there is none."""
        try:
            return (self.folder / cell_id / PREDICTION).stat().st_mtime_ns
        except OSError:
            return 0

    def begin(self, cell_id: str, pack: str) -> Running:
        """Claim the next attempt number of a cell."""
        folder = self.folder / cell_id
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(n[8:].split(".")[0]) for n in _names(folder) if re.match(r"attempt-\d+\.", n, re.ASCII)), default=0)
        while True:
            marker = Running(cell_id, number, pack, time.time())
            try:
                write_json(self.attempt_path(cell_id, number, "running.json"), asdict(marker), new=True)
                return marker
            except FileExistsError:
                number += 1

    def finish(self, attempt: Attempt) -> None:
        """Write the result, then drop the running marker; a crash between the two leaves both, and the result counts."""
        assert attempt.number
        assert attempt.status != "predicted"
        self._write(self.attempt_path(attempt.cell_id, attempt.number), attempt)
        self.attempt_path(attempt.cell_id, attempt.number, "running.json").unlink(missing_ok=True)

    def _write(self, path: Path, record: Attempt) -> None:
        metrics = {k: v for k, v in record.metrics.items() if math.isfinite(v)}
        write_json(path, _finite(asdict(replace(record, sweep=self.name, metrics=metrics))))

    def begin_again(self, attempt: Attempt, block: int) -> Running:
        """Mark that a later block of timings of a good result begins."""
        marker = Running(attempt.cell_id, attempt.number, attempt.pack, time.time(), block)
        write_json(self._again_path(marker), asdict(marker))
        return marker

    def end_again(self, running: Running) -> None:
        """Drop the marker of a later block, after its attempt was written with the block or with why it was lost."""
        self._again_path(running).unlink(missing_ok=True)

    def again(self, pack_id: str) -> list[Running]:
        """Later blocks of a pack that have begun and not ended. Their job may be dead."""
        folder = self.pack_folder(pack_id) / AGAIN
        names = sorted(n for n in _names(folder) if n.endswith(".json") and not n.startswith("."))
        return [r for r in (read_or_set_aside(folder / n, Running.from_json) for n in names) if r is not None]

    def _again_path(self, running: Running) -> Path:
        return self.pack_folder(running.pack) / AGAIN / f"{running.cell_id}.{running.block}.json"

    def newest(self, cell_id: str) -> tuple[int, int]:
        """Number of the newest ended attempt and when its file was last written (``st_mtime_ns``), without reading it; zeros if
        there is none.
        """
        number = max(_numbers(_names(self.folder / cell_id)), default=0)
        try:
            return number, self.attempt_path(cell_id, number).stat().st_mtime_ns if number else 0
        except FileNotFoundError:  # set aside meanwhile
            return 0, 0

    def remembered(self) -> dict[str, Any]:
        """What tracking servers have of this sweep, by address (``mlflow.json``)."""
        return read_or_set_aside(self.folder / MEMORY, dict) or {}

    # -- packs ---------------------------------------------------------------------------------------------------

    def pack_folder(self, pack_id: str) -> Path:
        return self.folder / "packs" / pack_id

    def packs(self) -> list[str]:
        return sorted(p.parent.name for p in (self.folder / "packs").glob("*/pack.json"))

    def pack_file(self, pack_id: str, name: str) -> dict[str, Any]:
        """A small file of a pack, such as ``job.json``; empty where there is none (any more)."""
        return read_or_set_aside(self.pack_folder(pack_id) / name, dict) or {}

    # -- people --------------------------------------------------------------------------------------------------

    @property
    def where(self) -> tuple[str, ...]:
        """What a command typed in the current folder needs to find this sweep's root; nothing where that is ``results``."""
        return () if self.root == Path("results").absolute() else ("--results", str(self.root))

    def command(self, name: str, *words: str) -> str:
        """The command ``python -m lcbench.<name>`` for this sweep, from the current folder, to be copied into a shell."""
        named = (*self.where, *words, "--", self.name) if self.name.startswith("-") else (self.name, *self.where, *words)
        return shlex.join(["python", "-m", f"lcbench.{name}", *named])

    def allow(self, targets: Collection[str]) -> None:
        """Keep which ``_target_`` from outside of lcbench this user runs in this sweep, for its jobs and for going on with it."""
        known = self.allowed()
        if not set(targets) <= known:
            write_json(self._allowed_path, sorted(known | set(targets)), private=True)

    def allowed(self) -> set[str]:
        """The names of ``allow``: only from a file that this user wrote and that nobody else can have written."""
        try:
            found = self._allowed_path.stat()
            if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return set()
            return {str(target) for target in read_json(self._allowed_path)}
        except (OSError, ValueError, TypeError):
            return set()

    @property
    def _allowed_path(self) -> Path:
        return self.folder / f".allowed.{os.geteuid()}.json"

    def check_writable(self, cells: Collection[str] = ()) -> None:
        """Check that results can be written, before anything is measured.

        Raises:
            PermissionError: the folder of the sweep, or one of those of its packs and of these cells, is somebody else's.
        """
        there = {"packs", "jobs", *cells} & set(_names(self.folder))
        for folder in (self.folder, *(self.folder / name for name in sorted(there))):
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(
                    f"{folder} belongs to {owner_of(folder)}, and {user_name()} may not write there; take a sweep of your own"
                    " (sweep=<name>, results=<folder>), or ask for a folder that the group may write (chmod -R g+rwX)"
                )


def user_name(uid: int | None = None) -> str:
    """A user's name, by default that of whoever runs this; the uid where no list of users has the name."""
    if uid is None:
        with suppress(KeyError, OSError):
            return getpass.getuser()
        uid = os.geteuid()
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def owner_of(path: Path) -> str:
    """Whose a file is."""
    try:
        return user_name(path.stat().st_uid)
    except OSError:
        return "somebody else"


def sweeps(root: Path) -> list[str]:
    """Names of the sweeps below ``root``, oldest first; those in folders that may not be read are not seen."""
    found: dict[str, float] = {}
    for name in os.listdir(root) if root.exists() else ():
        for manifest in (n for n in _names(root / name) if n.startswith("manifest.json")):
            with suppress(OSError):  # gone meanwhile
                found[name] = min((root / name / manifest).lstat().st_mtime, found.get(name, math.inf))
    return sorted(found, key=lambda name: (found[name], name))


def newest_attempts(root: Path) -> Iterator[Attempt]:
    """Every cell's newest attempt that can be read, those of the newest sweep first; nothing is set aside."""
    for name in reversed(sweeps(root)):
        folder = root / name
        for cell_id in _names(folder):
            number = max(_numbers(_names(folder / cell_id)), default=0)
            if number:
                with suppress(*BROKEN, OSError):
                    yield Attempt.from_json(read_json(folder / cell_id / f"attempt-{number}.json"))


def _new_manifest(name: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA, "sweep": name, "id": secrets.token_hex(8), "created_at": time.time(), "commands": [], "launch": None,
        "cells": {},
    }  # fmt: skip


def _checked_manifest(data: dict[str, Any]) -> dict[str, Any]:
    _check_schema(data)
    if not all(isinstance(entry["config"], dict) for entry in data["cells"].values()):
        raise ValueError("a cell without its config")
    if not isinstance(data["created_at"], Numbers) or not all(isinstance(w, str) for line in data["commands"] for w in line):
        raise TypeError("commands that are no words")
    launch = data["launch"]
    if launch is not None and not (isinstance(launch["launcher"], str) and isinstance(launch["settings"]["site"], dict)):
        raise TypeError("a launch without its site")
    return {key: data[key] for key in ("schema", "sweep", "id", "created_at", "commands", "launch", "cells")}


def _checked_prediction(data: dict[str, Any]) -> Attempt:
    made = Attempt.from_json(data)
    if made.number or made.status not in ("predicted", "skipped") or (made.status == "predicted" and made.band is None):
        raise ValueError("no prediction with its error")
    return made


def _check_schema(data: dict[str, Any]) -> None:
    if isinstance(number := data.get("schema"), int) and number > SCHEMA:
        raise Unreadable(f"a later lcbench wrote it (schema {number}; this one reads {SCHEMA})")


def _check_names(*names: str) -> None:
    """That these are names of files and no paths to elsewhere."""
    for name in names:
        if not isinstance(name, str) or not name or name.startswith(".") or set(name) & set("/\0"):
            raise ValueError(f"{name!r} is no name")


def entries_of(manifest: dict[str, Any]) -> dict[str, Entry]:
    """The cells of a manifest by id, in the order in which they were asked for; those that mean nothing here are left out."""
    strange = _strange_cells(manifest)
    cells = manifest["cells"].items()
    return {
        cell_id: Entry(Cell.from_config(e["config"]), e.get("skip"), e.get("predicted") is True)
        for cell_id, e in cells if cell_id not in strange
    }  # fmt: skip


def _strange_cells(manifest: dict[str, Any]) -> dict[str, str]:
    """Cells that cannot be read here, and why: another version's, or no cells at all."""
    found = {}
    for cell_id, entry in manifest["cells"].items():
        try:
            _check_names(cell_id)
            _check_cell(Cell.from_config(entry["config"]))
            if not isinstance(entry.get("skip"), str | None):
                raise TypeError(f"skip is {entry['skip']!r}")
        except BROKEN as error:
            found[cell_id] = f"no cell of this version: {type(error).__name__}: {error}"
    return found


@cache
def _check_cell(cell: Cell) -> None:
    config, problem = cell.config, cell.problem
    if not all(isinstance(value_of(config, group), str) for group in CELL_GROUPS):
        raise TypeError("a name that is none")
    if not all(isinstance(config[key], int) for key in ("seqlen", "seed")):
        raise TypeError("a length or a seed that is no whole number")
    parse_dtype(problem.dtype), parse_direction(problem.direction), parse_reduce_dtype(problem.reduce_dtype)
    draws, blocks = int(config["mask"].get("samples", 1)), blocks_of(config["measure"])
    if not cell.label or not draws or not blocks:
        raise ValueError("nothing to measure")


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP):
            raise
        return []


def _numbers(names: list[str]) -> list[int]:
    """Numbers of the ended attempts among a cell's files."""
    return [int(n[8:-5]) for n in names if re.fullmatch(r"attempt-\d{1,9}\.json", n, re.ASCII)]


def _unreadable(path: Path) -> str:
    """Why a file that was set aside, or left out, cannot be read."""
    try:
        _check_schema(read_json(path))
    except PermissionError:
        return _denied(path)
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return "its content is not what such a file holds"


def _denied(path: Path) -> str:
    try:
        mode = f", mode {stat.S_IMODE(path.stat().st_mode):o}"
    except OSError:
        mode = ""
    return f"it belongs to {owner_of(path)}{mode}, and {user_name()} may not read it"


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def read_json(path: Path) -> Any:
    """Raises:
    OSError: it is not there, or may not be read.
    ValueError: it is no JSON, or no file: one would wait for a pipe for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is no file")
    with os.fdopen(descriptor, encoding="utf-8") as file:
        try:
            return json.load(file)
        except RecursionError as error:
            raise ValueError("it is nested without end") from error


def read_or_set_aside(path: Path, make: Callable[[Any], T]) -> T | None:
    """What a file holds; None where there is none, where it cannot be read, and then it is renamed, or where it may not be read
    or is of a later version, and then it stays.
    """
    try:
        return _read(path, make)
    except Unreadable:
        return None


def _read(path: Path, make: Callable[[Any], T]) -> T | None:
    """Raises:
    Unreadable: it may not be read, or is of a later version.
    """
    try:
        return make(read_json(path))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise Unreadable(f"{path}: {_denied(path)}") from error
    except Unreadable as error:
        raise Unreadable(f"{path}: {error}") from error
    except (*BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ELOOP:
            raise
        with suppress(OSError):  # somebody else's file, or somebody was faster
            path.rename(path.with_name(path.name + CORRUPT))
        return None


def write_json(path: Path, data: Any, *, new: bool = False, private: bool = False) -> None:
    """Write atomically: the file holds the old content or the new one, whole, whatever dies when.

    ``private``: for its owner only, whatever the umask says.

    Raises:
        FileExistsError: with ``new``, if it is there; of several who try at once one succeeds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if new:
            os.link(temporary, path)
            os.unlink(temporary)
        else:
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
