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

``files.py`` writes them whole or not at all, and sets aside what cannot be read; whoever looks at the sweep is told. An attempt
number is claimed by creating the running marker exclusively, so a second attempt never overwrites the first. A prediction is a
record like an attempt's, of number ``FORETOLD`` and in a file of another name: a later one takes its place, and no reader of
attempts, nor an earlier lcbench, can take it for a measurement. A good result is written anew, under its name, with each later
block of timings of its cell. docs/results.md describes the files.

What lies in the folder is data: whoever can write there must not be able to run anything by it, so names in it are no paths, and a
class that a config names is built only if ``grid/build.py`` or the user allows it (``allow``).
"""

from __future__ import annotations

import math
import os
import re
import shlex
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from lcbench.grid.search import Search
from lcbench.grid.trace import Trace
from lcbench.redact import redacted
from lcbench.runs.attempt import FORETOLD, Attempt, Running
from lcbench.runs.files import (
    BROKEN,
    CORRUPT,
    Damaged,
    names_in,
    read_json,
    read_or_raise,
    read_or_set_aside,
    why_unreadable,
    write_json,
)
from lcbench.runs.manifest import Entry, checked_manifest, entries_of, new_manifest, search_of, strange_cells, traces_of
from lcbench.runs.records import Look, Record
from lcbench.runs.users import owner_of, user_name

MEMORY = "mlflow.json"
PREDICTION = "prediction.json"
AGAIN = "again"


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
        found = read_or_raise(self.manifest_path, checked_manifest)
        return self._rebuilt() if found is None else found

    def entries(self) -> dict[str, Entry]:
        """The cells by id, in the order in which they were asked for."""
        return entries_of(self.manifest())

    def add(
        self, entries: list[Entry], *, command: list[str], launch: dict[str, Any] | None = None, search: Search | None = None,
        trace: Trace | None = None,
    ) -> None:  # fmt: skip
        """Write the manifest, or add cells to the one that is there (a sweep may grow; nothing is taken out, and a cell that is
        to be measured stays so when it is predicted).

        ``command``: the words that asked for them; none of cells that a command comes to later. ``launch``: how its cells are run,
        for those who go on with the sweep later. ``search``: what these cells are steps of; without it what was noted stays.
        ``trace``: whose batches they have; it is noted beside others.
        """
        known: dict[str, Any] = self.manifest() if self.exists() else new_manifest(self.name)
        known["commands"] = [[redacted(word) for word in words] for words in (*known["commands"], command) if words]
        known["launch"] = launch
        if search is not None:
            known["search"] = search.note()
        if trace is not None and (note := trace.note()) not in known.get("traces", ()):
            known["traces"] = [*known.get("traces", ()), note]
        for e in entries:
            if not (e.predicted and e.cell.id in known["cells"]):
                only = {"predicted": True} if e.predicted else {}
                known["cells"][e.cell.id] = {"config": e.cell.config, "skip": e.skip, **only}
        write_json(self.manifest_path, known)

    def _rebuilt(self) -> dict[str, Any]:
        manifest = new_manifest(self.name)
        for known in self.remembered().values():  # what was published goes by it
            manifest["id"] = known["sweep_id"]
        for pack in filter(None, (self.pack_file(pack_id, "pack.json") for pack_id in self.packs())):
            manifest["cells"].update({k: {"config": config, "skip": None} for k, config in pack["configs"].items()})
            manifest["launch"] = {key: pack[key] for key in ("launcher", "settings")}
        for name in sorted(names_in(self.folder)):
            foretold = self.prediction(name) if self.written_ns(name, FORETOLD) else None
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
            names = listed[folder] = names_in(folder)
            foretold = self.prediction(cell_id) if PREDICTION in names else None
            records[cell_id] = Record(entry, tuple(self._attempts(cell_id, names)), tuple(self._running(cell_id, names)), foretold)
            if len(names) != 1 or foretold is None:  # reading may have set some aside
                listed[folder] = names_in(folder)
        packs = [self.folder / "packs" / name for name in names_in(self.folder / "packs")]
        below = [p / name for p in packs for name in ("failures", AGAIN)]
        listed |= {folder: names_in(folder) for folder in (self.folder, *packs, *below)}
        aside = [folder / n for folder, names in listed.items() for n in names if n.endswith(CORRUPT)]
        # Of a sweep of several people some may have kept theirs to themselves.
        for cell_id, record in records.items():
            have = {a.number for a in record.attempts}
            names = listed[self.folder / cell_id]
            aside += [self.attempt_path(cell_id, n) for n in sorted(_numbers(names)) if n not in have]
            aside += [self.attempt_path(cell_id, FORETOLD)] * (PREDICTION in names and record.prediction is None)
        aside += [p / "pack.json" for p in packs if "pack.json" in listed[p] and not os.access(p / "pack.json", os.R_OK)]
        damaged = [Damaged(path, why_unreadable(path)) for path in aside]
        damaged += [Damaged(self.manifest_path, f"cell {i}: {why}") for i, why in strange_cells(manifest).items()]
        return Look(records, tuple(damaged), manifest["launch"], search_of(manifest), traces_of(manifest))

    # -- attempts ------------------------------------------------------------------------------------------------

    def attempt_path(self, cell_id: str, number: int, suffix: str = "json") -> Path:
        """A file of an attempt, or, of number ``FORETOLD``, the cell's prediction."""
        return self.folder / cell_id / (f"attempt-{number}.{suffix}" if number != FORETOLD else PREDICTION)

    def attempt(self, cell_id: str, number: int) -> Attempt | None:
        """The record of an ended attempt; None if there is none that can be read."""
        make = Attempt.from_json if number != FORETOLD else Attempt.prediction_from_json
        return read_or_set_aside(self.attempt_path(cell_id, number), make)

    def prediction(self, cell_id: str) -> Attempt | None:
        """What was predicted of a cell; None if nothing was."""
        return self.attempt(cell_id, FORETOLD)

    def attempts(self, cell_id: str) -> list[Attempt]:
        """All ended attempts at a cell, oldest first."""
        return self._attempts(cell_id, names_in(self.folder / cell_id))

    def running(self, cell_id: str) -> list[Running]:
        """Attempts that have begun and not ended. Their job may be dead."""
        return self._running(cell_id, names_in(self.folder / cell_id))

    def _attempts(self, cell_id: str, names: list[str]) -> list[Attempt]:
        found = (self.attempt(cell_id, number) for number in sorted(_numbers(names)))
        return [attempt for attempt in found if attempt is not None]

    def _running(self, cell_id: str, names: list[str]) -> list[Running]:
        marked = [n for n in names if n.startswith("attempt-") and n.endswith(".running.json")]
        # Both are there when death came between writing the result and dropping the marker: the result counts. The names may be
        # older than the markers, which is why a result is looked for again.
        found = (read_or_set_aside(self.folder / cell_id / name, Running.from_json) for name in marked)
        alive = (r for r in found if r is not None and not self.attempt_path(cell_id, r.number).exists())
        return sorted(alive, key=lambda r: r.number)

    def begin(self, cell_id: str, pack: str) -> Running:
        """Claim the next attempt number of a cell."""
        folder = self.folder / cell_id
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(n[8:].split(".")[0]) for n in names_in(folder) if re.match(r"attempt-\d+\.", n, re.ASCII)), default=0)
        while True:
            marker = Running(cell_id, number, pack, time.time())
            try:
                write_json(self.attempt_path(cell_id, number, "running.json"), asdict(marker), new=True)
                return marker
            except FileExistsError:
                number += 1

    def finish(self, attempt: Attempt) -> None:
        """Write the result, then drop the running marker; a crash between the two leaves both, and the result counts. A prediction
        takes the place of an earlier one, and what was measured of the cell stays as it is.
        """
        assert attempt.status in (("predicted", "skipped") if attempt.number == FORETOLD else ("ok", "failed", "skipped"))
        metrics = {k: v for k, v in attempt.metrics.items() if math.isfinite(v)}
        record = replace(attempt, sweep=self.name, metrics=metrics)
        write_json(self.attempt_path(attempt.cell_id, attempt.number), _plain(record))
        if attempt.number != FORETOLD:
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
        """Later blocks of a pack that have begun and not ended. Their job may be dead."""
        folder = self.pack_folder(pack_id) / AGAIN
        names = sorted(n for n in names_in(folder) if n.endswith(".json") and not n.startswith("."))
        return [r for r in (read_or_set_aside(folder / n, Running.from_json) for n in names) if r is not None]

    def _again_path(self, running: Running) -> Path:
        return self.pack_folder(running.pack) / AGAIN / f"{running.cell_id}.{running.block}.json"

    def newest(self, cell_id: str) -> int:
        """Number of the newest ended attempt, without reading it; 0 if there is none."""
        return max(_numbers(names_in(self.folder / cell_id)), default=0)

    def written_ns(self, cell_id: str, number: int) -> int:
        """When the file of an attempt was last written (``st_mtime_ns``); 0 where it is not there (any more)."""
        try:
            return self.attempt_path(cell_id, number).stat().st_mtime_ns
        except OSError:
            return 0

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
        there = {"packs", "jobs", *cells} & set(names_in(self.folder))
        for folder in (self.folder, *(self.folder / name for name in sorted(there))):
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(
                    f"{folder} belongs to {owner_of(folder)}, and {user_name()} may not write there; take a sweep of your own"
                    " (sweep=<name>, results=<folder>), or ask for a folder that the group may write (chmod -R g+rwX)"
                )


def sweeps(root: Path) -> list[str]:
    """Names of the sweeps below ``root``, oldest first; those in folders that may not be read are not seen."""
    found: dict[str, float] = {}
    for name in os.listdir(root) if root.exists() else ():
        for manifest in (n for n in names_in(root / name) if n.startswith("manifest.json")):
            with suppress(OSError):  # gone meanwhile
                found[name] = min((root / name / manifest).lstat().st_mtime, found.get(name, math.inf))
    return sorted(found, key=lambda name: (found[name], name))


def newest_attempts(root: Path) -> Iterator[Attempt]:
    """Every cell's newest attempt that can be read, those of the newest sweep first; nothing is set aside."""
    for name in reversed(sweeps(root)):
        folder = root / name
        for cell_id in names_in(folder):
            number = max(_numbers(names_in(folder / cell_id)), default=0)
            if number:
                with suppress(*BROKEN, OSError):
                    yield Attempt.from_json(read_json(folder / cell_id / f"attempt-{number}.json"))


def _numbers(names: list[str]) -> list[int]:
    """Numbers of the ended attempts among a cell's files."""
    return [int(n[8:-5]) for n in names if re.fullmatch(r"attempt-\d{1,9}\.json", n, re.ASCII)]


def _plain(data: Any) -> Any:
    """What JSON can say of a record, which ``asdict`` would copy first, value by value; what is not finite is null."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        if all(isinstance(value, (int, float)) for value in data):  # thousands of times, as a rule
            return [value if isinstance(value, int) or math.isfinite(value) else None for value in data]
        return [_plain(value) for value in data]
    return {f.name: _plain(getattr(data, f.name)) for f in fields(data)} if is_dataclass(data) else data
