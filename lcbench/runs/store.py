"""The results folder: the truth about every attempt, as JSON files; everything else can be rebuilt from it.

    <root>/<sweep>/manifest.json                      the cells of the sweep, the skipped ones with their reason
    <root>/<sweep>/<cell id>/attempt-N.running.json   attempt N is in flight (removed when it ends)
    <root>/<sweep>/<cell id>/attempt-N.json           its result
    <root>/<sweep>/<cell id>/attempt-N.log            what its workers printed
    <root>/<sweep>/packs/<pack id>/pack.json          the cells of one job, and everything its workers need
    <root>/<sweep>/packs/<pack id>/job.json           how it was started: launcher, Slurm job id, pid
    <root>/<sweep>/packs/<pack id>/failures/*.json    how workers of the pack died (written by them or by their agent)

A file appears whole or not at all: temporary name, fsync, rename. An attempt number is claimed by creating the running
marker exclusively, so a second attempt never overwrites the first.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lcbench.grid.cell import Cell

SCHEMA = 1
Status = Literal["ok", "failed", "skipped"]
FAILURE_CLASSES = (
    "oom", "timeout", "hang", "nccl", "numerics", "unsupported", "node-fail", "preempted", "crash", "cancelled",
)  # fmt: skip


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
    iteration) and per-rank lists (``rank_forward_median_s``); ``checks`` holds the errors, their bounds and how the
    reference was taken; ``provenance`` says where, with what and from which commit.
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
    pack: str = ""
    started_at: float = 0.0  # seconds since the epoch
    finished_at: float = 0.0
    schema: int = SCHEMA

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Attempt:
        failure = Failure(**data["failure"]) if data.get("failure") else None
        return cls(**{**data, "failure": failure})


@dataclass(frozen=True)
class Running:
    """The marker of an attempt in flight."""

    cell_id: str
    number: int
    pack: str
    started_at: float


@dataclass(frozen=True)
class Entry:
    """A cell of a sweep as the manifest has it; ``skip`` says why it cannot run, if so."""

    cell: Cell
    skip: str | None = None


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
        return self.manifest_path.is_file()

    def manifest(self) -> dict[str, Any]:
        """The manifest: ``{"schema", "sweep", "created_at", "commands": [...], "cells": {id: {"config", "skip"}}, ...}``."""
        if not self.exists():
            raise ValueError(f"no sweep {self.name!r} below {self.root}; there are: {', '.join(sweeps(self.root)) or 'none'}")
        manifest: dict[str, Any] = read_json(self.manifest_path)
        return manifest

    def entries(self) -> dict[str, Entry]:
        """The cells by id, in the order in which they were asked for."""
        cells = self.manifest()["cells"]
        return {cell_id: Entry(Cell.from_config(e["config"]), e.get("skip")) for cell_id, e in cells.items()}

    def add(self, entries: list[Entry], *, command: list[str], extra: dict[str, Any] | None = None) -> None:
        """Write the manifest, or add cells to the one that is there (a sweep may grow; nothing is taken out)."""
        known: dict[str, Any] = self.manifest() if self.exists() else {
            "schema": SCHEMA, "sweep": self.name, "created_at": time.time(), "commands": [], "cells": {},
        }  # fmt: skip
        known["commands"].append(command)
        known["cells"].update({e.cell.id: {"config": e.cell.config, "skip": e.skip} for e in entries})
        known.update(extra or {})
        write_json(self.manifest_path, known)

    # -- attempts ------------------------------------------------------------------------------------------------

    def attempt_path(self, cell_id: str, number: int, suffix: str = "json") -> Path:
        return self.folder / cell_id / f"attempt-{number}.{suffix}"

    def attempts(self, cell_id: str) -> list[Attempt]:
        """All ended attempts at a cell, oldest first."""
        files = (self.folder / cell_id).glob("attempt-*.json")
        numbered = {int(p.stem.removeprefix("attempt-")): p for p in files if p.stem.count(".") == 0}
        return [Attempt.from_json(read_json(numbered[n])) for n in sorted(numbered)]

    def has_attempt_of(self, cell_id: str, pack: str) -> bool:
        """Whether a pack has an ended attempt at this cell."""
        return any(a.pack == pack for a in self.attempts(cell_id))

    def running(self, cell_id: str) -> list[Running]:
        """Attempts that have begun and not ended; their job may be dead all the same."""
        found = []
        for path in (self.folder / cell_id).glob("attempt-*.running.json"):
            with suppress(FileNotFoundError):  # it ended just now
                found.append(Running(**read_json(path)))
        ended = {a.number for a in self.attempts(cell_id)} if found else set()
        return sorted((r for r in found if r.number not in ended), key=lambda r: r.number)

    def begin(self, cell_id: str, pack: str) -> Running:
        """Claim the next attempt number of a cell."""
        folder = self.folder / cell_id
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.name.split("-")[1].split(".")[0]) for p in folder.glob("attempt-*.*json")), default=0)
        while True:
            marker = Running(cell_id, number, pack, time.time())
            try:
                write_json(self.attempt_path(cell_id, number, "running.json"), asdict(marker), new=True)
                return marker
            except FileExistsError:
                number += 1

    def finish(self, attempt: Attempt) -> None:
        """Write the result, then drop the running marker; a crash between the two leaves both, and the result counts."""
        write_json(self.attempt_path(attempt.cell_id, attempt.number), asdict(replace(attempt, sweep=self.name)))
        self.attempt_path(attempt.cell_id, attempt.number, "running.json").unlink(missing_ok=True)

    # -- packs ---------------------------------------------------------------------------------------------------

    def pack_folder(self, pack_id: str) -> Path:
        return self.folder / "packs" / pack_id

    def packs(self) -> list[str]:
        return sorted(p.parent.name for p in (self.folder / "packs").glob("*/pack.json"))


def sweeps(root: Path) -> list[str]:
    """Names of the sweeps below ``root``, oldest first."""
    return [p.parent.name for p in sorted(root.glob("*/manifest.json"), key=lambda p: p.stat().st_mtime)]


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
