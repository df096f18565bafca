"""The results folder: the truth about every attempt, as JSON files; everything else can be rebuilt from it.

    <root>/<sweep>/manifest.json                      the cells of the sweep, the skipped ones with their reason
    <root>/<sweep>/<cell id>/attempt-N.running.json   attempt N is in flight (removed when it ends)
    <root>/<sweep>/<cell id>/attempt-N.json           its result
    <root>/<sweep>/<cell id>/attempt-N.log            what its workers printed
    <root>/<sweep>/packs/<pack id>/pack.json          the cells of one job, and everything its workers need
    <root>/<sweep>/packs/<pack id>/job.json           how it was started: launcher, Slurm job id, pid
    <root>/<sweep>/packs/<pack id>/check.json         what the check of its nodes found
    <root>/<sweep>/packs/<pack id>/end.json           how it came to its end, written by itself
    <root>/<sweep>/packs/<pack id>/again/<cell id>.<block>.json   a later block of timings is in flight (removed when it ends)
    <root>/<sweep>/packs/<pack id>/failures/*.json    how workers of the pack died (written by them or by their agent)

A file appears whole or not at all: temporary name, fsync, rename. An attempt number is claimed by creating the running
marker exclusively, so a second attempt never overwrites the first. A good result is written anew, under its name, with each later
block of timings of its cell. A file that cannot be read all the same (a full disk, a
broken file system, an editor) is renamed to ``<name>.corrupt``, and whoever looks at the sweep is told. docs/results.md
describes the files.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock

from lcbench.grid.cell import Cell
from lcbench.redact import redacted

SCHEMA = 1
Status = Literal["ok", "failed", "skipped"]
FAILURE_CLASSES = (
    "oom", "timeout", "hang", "nccl", "numerics", "implausible", "unsupported", "node-fail", "preempted", "crash", "cancelled",
    "no-start",
)  # fmt: skip
CAUSE_LENGTH = 300
CORRUPT = ".corrupt"
MEMORY = "mlflow.json"
AGAIN = "again"
T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why an attempt did not end well: one of ``FAILURE_CLASSES`` and the first cause in one line."""

    kind: str
    cause: str
    rank: int | None = None  # the first rank that failed, where known


@dataclass(frozen=True)
class Attempt:
    """The record of one try at one cell.

    ``metrics`` are flat floats keyed as MLflow keys (``time/forward/median_s``, ``compute/mfu``, ``check/dq_error``;
    docs/metrics.md lists them with units); ``samples`` are per-iteration lists (``forward_s``: slowest rank of each
    iteration), lists per block of timings (``block_forward_s``) and per rank (``rank_forward_median_s``); ``checks`` holds
    the errors, their bounds and how the reference was taken; ``provenance`` says where, with what and from which commit, and
    of later blocks when they were measured (``again``) and which were lost and why (``lost_blocks``). ``config`` is the cell's,
    so that a file can be read by itself. What is not finite is left out of ``metrics`` and is null elsewhere: JSON has no word
    for it.
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
        failure = Failure(**data["failure"]) if data.get("failure") else None
        return cls(**{**data, "failure": failure})

    @property
    def blocks(self) -> int:
        """How many blocks of timings it has; 0 where it was not timed, or before there were blocks."""
        return int(self.metrics.get("time/blocks", 0))

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


@dataclass(frozen=True)
class Entry:
    """A cell of a sweep as the manifest has it; ``skip`` says why it cannot run, if so."""

    cell: Cell
    skip: str | None = None


@dataclass(frozen=True)
class Record:
    """A cell of a sweep and all that was tried: attempts that ended, oldest first, and those in flight."""

    entry: Entry
    attempts: tuple[Attempt, ...]
    running: tuple[Running, ...]

    def has_attempt_of(self, pack: str) -> bool:
        """Whether a pack has an ended attempt at this cell."""
        return any(a.pack == pack for a in self.attempts)

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def status(self) -> str:
        """Of the newest attempt, or ``missing``; a cell that cannot run at all is ``skipped``."""
        if self.entry.skip:
            return "skipped"
        return self.last.status if self.last else "missing"

    @property
    def failure(self) -> Failure | None:
        """Why it has no good result."""
        if self.entry.skip:
            return Failure("unsupported", self.entry.skip)
        return self.last.failure if self.last else None


@dataclass(frozen=True)
class Damaged:
    """A file that was set aside because it could not be read."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Look:
    """A whole sweep, read once."""

    records: dict[str, Record]
    damaged: tuple[Damaged, ...]
    launch: dict[str, Any] | None  # as the manifest has it


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
        return self.manifest_path.is_file() or bool(self.packs())

    def lock(self) -> FileLock:
        """Held while cells are given to packs, so that of two commands at once neither runs what the other does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock", is_singleton=True)  # who has it may take it again

    def manifest(self) -> dict[str, Any]:
        """The manifest: ``{"schema", "sweep", "id", "created_at", "commands", "launch", "cells": {id: {"config", "skip"}}}``.

        One that cannot be read is set aside and made again from packs and attempts.
        """
        if not self.exists():
            raise ValueError(f"no sweep {self.name!r} below {self.root}; there are: {', '.join(sweeps(self.root)) or 'none'}")
        found = read_or_set_aside(self.manifest_path, _checked_manifest)
        return self._rebuilt() if found is None else found

    def entries(self) -> dict[str, Entry]:
        """The cells by id, in the order in which they were asked for."""
        return entries_of(self.manifest())

    def add(self, entries: list[Entry], *, command: list[str], launch: dict[str, Any] | None = None) -> None:
        """Write the manifest, or add cells to the one that is there (a sweep may grow; nothing is taken out).

        ``launch``: how its cells are run, for those who go on with the sweep later.
        """
        known: dict[str, Any] = self.manifest() if self.exists() else _new_manifest(self.name)
        known["commands"] = [[redacted(word) for word in words] for words in (*known["commands"], command)]
        known["launch"] = launch
        known["cells"].update({e.cell.id: {"config": e.cell.config, "skip": e.skip} for e in entries})
        write_json(self.manifest_path, known)

    def _rebuilt(self) -> dict[str, Any]:
        manifest = _new_manifest(self.name)
        for known in self.remembered().values():  # what was published goes by it
            manifest["id"] = known["sweep_id"]
        for pack in filter(None, (self.pack_file(pack_id, "pack.json") for pack_id in self.packs())):
            manifest["cells"].update({k: {"config": config, "skip": None} for k, config in pack["configs"].items()})
            manifest["launch"] = {key: pack[key] for key in ("launcher", "settings")}
        for folder in sorted(self.folder.iterdir()):
            for attempt in self.attempts(folder.name) if folder.is_dir() else ():
                if attempt.config:
                    manifest["cells"][attempt.cell_id] = {"config": attempt.config, "skip": None}
        write_json(self.manifest_path, manifest)
        return manifest

    def look(self) -> Look:
        """Every cell with every attempt, each file read once."""
        records, listed = {}, {}
        manifest = self.manifest()
        for cell_id, entry in entries_of(manifest).items():
            folder = self.folder / cell_id
            names = listed[folder] = _names(folder)
            records[cell_id] = Record(entry, tuple(self._attempts(cell_id, names)), tuple(self._running(cell_id, names)))
            if len(names) != 1:  # reading may have set some aside
                listed[folder] = _names(folder)
        packs = list((self.folder / "packs").glob("*"))
        below = [p / name for p in packs for name in ("failures", AGAIN)]
        listed |= {folder: _names(folder) for folder in (self.folder, *packs, *below)}
        aside = [folder / n for folder, names in listed.items() for n in names if n.endswith(CORRUPT)]
        return Look(records, tuple(Damaged(path, _unreadable(path)) for path in aside), manifest["launch"])

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
        """Attempts that have begun and not ended; their job may be dead all the same."""
        return self._running(cell_id, _names(self.folder / cell_id))

    def _attempts(self, cell_id: str, names: list[str]) -> list[Attempt]:
        found = (read_or_set_aside(self.attempt_path(cell_id, number), Attempt.from_json) for number in sorted(_numbers(names)))
        return [attempt for attempt in found if attempt is not None]

    def _running(self, cell_id: str, names: list[str]) -> list[Running]:
        marked = [n for n in names if n.startswith("attempt-") and n.endswith(".running.json")]
        # Both are there when death came between writing the result and dropping the marker: the result counts. The names may be
        # older than the markers, which is why a result is looked for again.
        found = (read_or_set_aside(self.folder / cell_id / name, lambda data: Running(**data)) for name in marked)
        alive = (r for r in found if r is not None and not self.attempt_path(cell_id, r.number).exists())
        return sorted(alive, key=lambda r: r.number)

    def begin(self, cell_id: str, pack: str) -> Running:
        """Claim the next attempt number of a cell."""
        folder = self.folder / cell_id
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.name.split("-")[1].split(".")[0]) for p in folder.glob("attempt-*.*")), default=0)
        while True:
            marker = Running(cell_id, number, pack, time.time())
            try:
                write_json(self.attempt_path(cell_id, number, "running.json"), asdict(marker), new=True)
                return marker
            except FileExistsError:
                number += 1

    def finish(self, attempt: Attempt) -> None:
        """Write the result, then drop the running marker; a crash between the two leaves both, and the result counts."""
        metrics = {k: v for k, v in attempt.metrics.items() if math.isfinite(v)}
        data = _finite(asdict(replace(attempt, sweep=self.name, metrics=metrics)))
        write_json(self.attempt_path(attempt.cell_id, attempt.number), data)
        self.attempt_path(attempt.cell_id, attempt.number, "running.json").unlink(missing_ok=True)

    def begin_again(self, attempt: Attempt, block: int) -> Running:
        """Mark that a later block of timings of a good result begins."""
        marker = Running(attempt.cell_id, attempt.number, attempt.pack, time.time(), block)
        write_json(self._again_path(marker), asdict(marker))
        return marker

    def end_again(self, running: Running) -> None:
        """Drop the marker of a later block, after its attempt was written with the block or with why it was lost."""
        self._again_path(running).unlink(missing_ok=True)

    def again(self, pack_id: str) -> list[Running]:
        """Later blocks of a pack that have begun and not ended; their job may be dead all the same."""
        folder = self.pack_folder(pack_id) / AGAIN
        names = sorted(n for n in _names(folder) if n.endswith(".json") and not n.startswith("."))
        return [r for r in (read_or_set_aside(folder / n, lambda data: Running(**data)) for n in names) if r is not None]

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


def sweeps(root: Path) -> list[str]:
    """Names of the sweeps below ``root``, oldest first."""
    manifests = sorted(root.glob("*/manifest.json*"), key=lambda p: p.stat().st_mtime)
    return list(dict.fromkeys(p.parent.name for p in manifests))


def _new_manifest(name: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA, "sweep": name, "id": secrets.token_hex(8), "created_at": time.time(), "commands": [], "launch": None,
        "cells": {},
    }  # fmt: skip


def _checked_manifest(data: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(entry["config"], dict) for entry in data["cells"].values()):
        raise ValueError("a cell without its config")
    return {key: data[key] for key in ("schema", "sweep", "id", "created_at", "commands", "launch", "cells")}


def entries_of(manifest: dict[str, Any]) -> dict[str, Entry]:
    """The cells of a manifest by id, in the order in which they were asked for."""
    return {cell_id: Entry(Cell.from_config(e["config"]), e.get("skip")) for cell_id, e in manifest["cells"].items()}


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _numbers(names: list[str]) -> list[int]:
    """Numbers of the ended attempts among a cell's files."""
    return [int(n[8:-5]) for n in names if n.startswith("attempt-") and n.endswith(".json") and n.count(".") == 1]


def _unreadable(path: Path) -> str:
    """Why a file that was set aside cannot be read."""
    try:
        read_json(path)
    except (OSError, ValueError) as error:
        return str(error)
    return "its content is not what such a file holds"


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def find_cell(root: Path, cell_id: str, sweep: str | None = None) -> Iterator[tuple[Sweep, Entry]]:
    """Every sweep that holds a cell whose id starts with ``cell_id``."""
    for name in [sweep] if sweep else sweeps(root):
        candidate = Sweep(root, name)
        for known, entry in candidate.entries().items():
            if known.startswith(cell_id):
                yield candidate, entry


def read_json(path: Path) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def read_or_set_aside(path: Path, make: Callable[[Any], T]) -> T | None:
    """What a file holds; None where there is none, or where it cannot be read, and then it is renamed."""
    try:
        return make(read_json(path))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        with suppress(OSError):  # somebody else's file, or somebody was faster
            path.rename(path.with_name(path.name + CORRUPT))
        return None


def write_json(path: Path, data: Any, *, new: bool = False) -> None:
    """Write atomically: the file holds the old content or the new one, whole, whatever dies when.

    Raises:
        FileExistsError: with ``new``, if it is there; of several who try at once one succeeds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
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
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
