"""A pack: cells that share one allocation, and so one job; how cells are grouped into packs; and when one is tried again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcbench.grid.cell import Cell
from lcbench.measure.blocks import blocks_of
from lcbench.problem import Scale
from lcbench.redact import redacted_uri, redacted_values, secrets_of, with_environment, with_password, without_secret
from lcbench.runs.attempt import CAUSE_LENGTH, Attempt, Failure
from lcbench.runs.files import read_json, write_json
from lcbench.runs.notes import END, Ending, write_ending
from lcbench.runs.store import Sweep

if TYPE_CHECKING:
    from lcbench.runs.estimate import Estimator

# What a gang needs before its first cell (imports, rendezvous, process groups, the check of its nodes), once more after one
# restart, and a grace at the end; on an oversubscribed machine ranks start one after the other.
STARTUP_S = 180.0
STARTUP_PER_RANK_S = 3.0
# A cell may overrun its estimate by this factor before the job's time limit ends it, or take what its iterations may take at most.
SLACK = 1.5
# These end the gang of their cell, and with it cost the others a restart.
GANG_KILLERS = ("crash", "hang", "nccl", "oom")
KILLS = 2
# A file of a running pack that holds room for its next result.
RESERVE = "reserve"
# The secrets of a pack that is to run, readable by its owner only; gone when the pack has ended.
PRIVATE = "private.json"


@dataclass(frozen=True)
class Settings:
    """What a launch says besides its cells; kept with the sweep, so that it can go on without the command that began it."""

    site: dict[str, Any]  # resolved conf/site
    devices: list[dict[str, Any]]  # every conf/device file: peaks and memory by device name
    tracking_uri: str | None
    pack: dict[str, int | None]  # max_cells, max_minutes, max_jobs
    hang: dict[str, float]  # factor, min_s, max_s
    retry: dict[str, int]  # failure class -> how often
    experiment: str = "lcbench"  # MLflow's

    def public(self) -> dict[str, Any]:
        """What may be stored where others read it: without the secrets of the site's variables and of addresses."""
        site = redacted_values(self.site)
        if env := self.site.get("env"):
            site["env"] = {**env, **{key: without_secret(value) for key, value in secrets_of(env).items()}}
        if self.site.get("tracking_uri"):
            site["tracking_uri"] = redacted_uri(self.site["tracking_uri"])
        return {**asdict(self), "site": site, "tracking_uri": redacted_uri(self.tracking_uri) if self.tracking_uri else None}

    def revealed(self) -> Settings:
        """These settings with the secrets that a stored sweep lacks, from the environment.

        Raises:
            ValueError: a variable is not there.
        """
        env = self.site.get("env")
        site = {**self.site, "env": with_environment(env)} if env else self.site
        return replace(self, site=site, tracking_uri=with_password(self.tracking_uri))

    def patience_s(self, estimate_s: float) -> float:
        """Seconds for which none of a cell's ranks may make progress before it counts as hung."""
        return min(max(self.hang["factor"] * estimate_s, self.hang["min_s"]), self.hang["max_s"])

    @property
    def max_minutes(self) -> int | None:
        """Time limit of a job at most."""
        limits = [m for m in (self.pack["max_minutes"], self.site.get("max_minutes")) if m is not None]
        return min(limits, default=None)


@dataclass(frozen=True)
class Pack:
    """The content of ``pack.json``: all that a job needs besides the code."""

    id: str
    sweep: str
    root: str  # results root, absolute
    launcher: str
    scale: str
    cells: tuple[str, ...]  # ids, in the order in which they run
    configs: dict[str, dict[str, Any]]  # cell id -> canonical config
    seconds: dict[str, float]  # cell id -> how long it is expected to take
    timeout_min: int
    settings: Settings
    job_name: str = ""  # of the scheduler's array it is an element of; unique, so that its job is found whoever died when
    index: int = 0  # in the array
    queue: str = ""  # the class that knows its job (``runs/queues.py``); empty: processes of the launching machine run it
    basis: dict[str, str] = field(default_factory=dict)  # cell id -> what its estimate rests on; packs of before do not say
    good: dict[str, int] = field(default_factory=dict)  # cell id -> ``newest_good`` when it was made; packs of before do not say

    @property
    def folder(self) -> Path:
        return Sweep(Path(self.root), self.sweep).pack_folder(self.id)

    @property
    def path(self) -> Path:
        return self.folder / "pack.json"

    @property
    def site(self) -> dict[str, Any]:
        return self.settings.site

    @property
    def stops_where_unwell(self) -> bool:
        """Whether a node that is not well ends the pack; else it is only recorded."""
        return bool(self.site.get("check", "stop") == "stop")

    def patience_s(self, cell_id: str) -> float:
        """Seconds for which none of a cell's ranks may make progress before it counts as hung, until it has a pace of its own."""
        return self.settings.patience_s(self.seconds[cell_id])

    def write(self) -> Path:
        """Write it, its secrets apart from what others may read."""
        public = self.settings.public()
        private = {"env": secrets_of(self.site.get("env")), "tracking_uri": self.settings.tracking_uri}
        if private["env"] or private["tracking_uri"] != public["tracking_uri"]:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # of an earlier try to submit it
                (self.folder / PRIVATE).unlink()
            with open(os.open(self.folder / PRIVATE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
                json.dump(private, file)
        write_json(self.path, {**asdict(self), "settings": public})
        return self.path

    def write_note(self, name: str, failure: Failure | None) -> None:
        """Leave word in one of the pack's files: ``stop.json``, for workers to end between cells, or ``end.json``, why it ended."""
        write_ending(self.folder, name, Ending(failure))

    def end_unhealthy(self, fallen: dict[str, str]) -> None:
        """End because nodes are not well; ``fallen`` says why, by node."""
        cause = "; ".join(f"{node}: {why}" for node, why in fallen.items())
        failure = Failure("node-fail", f"the check of its nodes: {cause}"[:CAUSE_LENGTH])
        write_ending(self.folder, END, Ending(failure, fallen=fallen))

    @classmethod
    def read(cls, path: Path) -> Pack:
        """A pack with its secrets, where they are still there and may be read."""
        data = read_json(path)
        with suppress(OSError):
            private = read_json(path.with_name(PRIVATE))
            settings = data["settings"]
            site = {**settings["site"], "env": {**(settings["site"].get("env") or {}), **private["env"]}}
            data["settings"] = {**settings, "site": site, "tracking_uri": private["tracking_uri"]}
        return cls.from_json(data)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Pack:
        return cls(**{**data, "cells": tuple(data["cells"]), "settings": Settings(**data["settings"])})


def forget_secrets(folder: Path) -> None:
    """Remove the secrets of a pack that has ended; ``folder`` is the pack's."""
    with suppress(OSError):
        (folder / PRIVATE).unlink(missing_ok=True)


@dataclass(frozen=True)
class Group:
    """Cells that will share a job, its time limit, and what is expected of each."""

    scale: Scale
    cells: tuple[Cell, ...]
    minutes: int
    seconds: dict[str, float]  # cell id -> estimate
    basis: dict[str, str]  # cell id -> what that rests on


def group(cells: Sequence[Cell], estimator: Estimator, *, max_cells: int | None, max_minutes: int | None) -> list[Group]:
    """Group cells by scale: the shortest first, so that a job that ends early has lost the fewest, and those last that are
    expected not to fit.

    ``max_minutes`` caps the time limit of a group and splits what would exceed it; a single cell that alone exceeds it keeps a
    group of its own at the cap.
    """
    estimates = {cell.id: estimator.estimate(cell) for cell in cells}
    fails = {cell.id: estimator.will_fail(cell) for cell in cells}
    by_scale: dict[Scale, list[Cell]] = {}
    for cell in sorted(cells, key=lambda c: (fails[c.id], estimates[c.id].seconds)):
        by_scale.setdefault(cell.scale, []).append(cell)
    groups: list[Group] = []

    def close(scale: Scale, members: list[Cell], total_s: float) -> None:
        minutes = _limit_min(scale, total_s)
        minutes = minutes if max_minutes is None else min(minutes, max_minutes)
        found = {c.id: estimates[c.id] for c in members}
        seconds, basis = ({i: getattr(estimate, what) for i, estimate in found.items()} for what in ("seconds", "basis"))
        groups.append(Group(scale, tuple(members), minutes, seconds, basis))

    for scale, members in by_scale.items():
        current: list[Cell] = []
        total_s = 0.0
        for cell in members:
            cell_s = max(SLACK * estimates[cell.id].seconds, estimates[cell.id].most_s)
            full = max_cells is not None and len(current) >= max_cells
            late = max_minutes is not None and _limit_min(scale, total_s + cell_s) > max_minutes
            if current and (full or late):
                close(scale, current, total_s)
                current, total_s = [], 0.0
            current.append(cell)
            total_s += cell_s
        close(scale, current, total_s)
    return groups


def _limit_min(scale: Scale, total_s: float) -> int:
    """The time limit of a group whose cells take ``total_s`` at most."""
    return math.ceil((STARTUP_S + STARTUP_PER_RANK_S * scale.world_size + total_s) / 60)


def given_up(attempts: Sequence[Attempt]) -> bool:
    """Whether a cell has killed its gang in its last two attempts, and is not worth a third."""
    last = [a.failure.kind for a in attempts[-KILLS:] if a.failure is not None]
    return len(last) == KILLS and all(kind in GANG_KILLERS for kind in last)


def later_blocks(attempts: Sequence[Attempt], pack_id: str) -> range:
    """Blocks of timings that a pack has still to measure of a cell, in this order: where its newest result is good and the pack's
    own, those that were not tried, unless the cell has lost too many already. A result of before there were blocks is complete.
    """
    last = attempts[-1] if attempts else None
    if last is None or last.status != "ok" or last.pack != pack_id or not last.blocks or len(last.lost_blocks) >= KILLS:
        return range(0)
    return range(last.blocks + len(last.lost_blocks) + 1, blocks_of(last.config.get("measure", {})) + 1)


def newest_good(attempts: Sequence[Attempt]) -> int:
    """Number of a cell's newest attempt that is well; 0 if there is none."""
    return max((a.number for a in attempts if a.status == "ok"), default=0)


def newer_result(attempts: Sequence[Attempt], pack_id: str, good: int | None) -> Attempt | None:
    """The good result that a cell has got from another pack since this one was made, so that this one leaves the cell out; None if
    there is none, or if it is not the cell's newest attempt.

    ``good``: ``newest_good`` of the cell when the pack was made; None of a pack that does not say.
    """
    last = attempts[-1] if attempts else None
    newer = last is not None and good is not None and last.status == "ok" and last.pack != pack_id and last.number > good
    return last if newer else None


def owes(attempts: Sequence[Attempt], pack_id: str, good: int | None) -> bool:
    """Whether a cell is still without a first attempt of a pack that is to try it, and not to leave it out (``newer_result``)."""
    return not any(a.pack == pack_id for a in attempts) and newer_result(attempts, pack_id, good) is None


def tries_again(attempts: Sequence[Attempt], retry: dict[str, int]) -> bool:
    """Whether a cell's last failure is one that is tried again by itself, and was not too often already."""
    if not attempts or attempts[-1].failure is None or given_up(attempts):
        return False
    kind, times = attempts[-1].failure.kind, 0
    for attempt in reversed(attempts):
        if attempt.failure is None or attempt.failure.kind != kind:
            break
        times += 1
    return times <= retry.get(kind, 0)
