"""Records what ended without a result: attempts and blocks of timings in flight, and those that a job never began."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from filelock import Timeout

from lcbench.grid.cell import Cell
from lcbench.runs.attempt import Attempt, Failure, Running
from lcbench.runs.failure import first_failure, from_slurm_state, job_words, stacks, stem_of, tells_of_a_kill
from lcbench.runs.files import CORRUPT
from lcbench.runs.jobs import NEVER_SUBMITTED, PackState, SweepStatus, Watch, status_of
from lcbench.runs.notes import END, STOP, read_ending, read_job
from lcbench.runs.ownership import others
from lcbench.runs.pack import RESERVE, Pack, forget_secrets, later_blocks
from lcbench.runs.records import Look, Record
from lcbench.runs.store import Sweep

LOCK_S = 30.0
# A result that was damaged is measured again so often by itself.
DAMAGED_TWICE = 2


def settled(watch: Watch, *, as_mine: bool = False) -> SweepStatus:
    """Record what has ended of a sweep, then say where everything stands.

    Nothing is recorded for a sweep that is not the caller's own, unless ``as_mine``.
    """
    status, own = watch.look(), not others(watch.sweep)
    if own:
        for pack in (p for p in status.packs if p.ended):
            forget_secrets(watch.sweep.pack_folder(pack.id))
    if (own or as_mine) and settle(watch.sweep, status.seen, status.packs):
        return status_of(watch.sweep.look(), status.packs)
    return status


def settle(sweep: Sweep, seen: Look, packs: Sequence[PackState]) -> list[Attempt]:
    """Record as failed what has no result though its job has ended: attempts in flight, and cells that the job never began. Later
    blocks of timings that were in flight or never begun are recorded as lost; the result of their cell stays good.

    Several processes may call this, again and again. Nothing is recorded where the results belong to somebody else.
    """
    open_ends = OpenEnds.of(sweep, seen, packs)
    if open_ends.none() or not os.access(sweep.folder, os.W_OK):
        return []
    try:
        with sweep.lock().acquire(timeout=LOCK_S):
            return list(open_ends.close(sweep))
    except (Timeout, PermissionError):  # somebody else is at it, or owns what would be written
        return []


@dataclass(frozen=True)
class OpenEnds:
    """What jobs that have ended left without a result."""

    cells: list[tuple[PackState, Cell]]  # that a pack had begun, or never came to
    blocks: list[tuple[PackState, Running]]  # later blocks of timings in flight
    owed: list[tuple[PackState, str]]  # cells with a good result that the pack never came back to for all blocks
    stray: list[tuple[Running, Cell]]  # attempts whose pack's file is gone

    @classmethod
    def of(cls, sweep: Sweep, seen: Look, packs: Sequence[PackState]) -> OpenEnds:
        dead = [p for p in packs if p.ended and p.state != NEVER_SUBMITTED]
        known = {p.id for p in packs}
        records = seen.records
        return cls(
            [(p, records[c].entry.cell) for p in dead for c in p.cells if c in records and _is_open(records[c], p)],
            [(p, running) for p in dead for running in sweep.again(p.id)],
            [(p, c) for p in dead for c in p.cells if c in records and later_blocks(records[c].attempts, p.id)],
            [(r, record.entry.cell) for record in records.values() for r in record.running if r.pack not in known],
        )

    def none(self) -> bool:
        return not (self.cells or self.blocks or self.owed or self.stray)

    def close(self, sweep: Sweep) -> Iterator[Attempt]:
        """Record them, under the sweep's lock."""
        whys = {pack.id: _job_failure(sweep, pack) for pack, _ in (*self.cells, *self.blocks, *self.owed)}
        for pack_id in whys:
            (sweep.pack_folder(pack_id) / RESERVE).unlink(missing_ok=True)
        for pack, cell in self.cells:
            yield from _close_cell(sweep, pack, cell, whys[pack.id])
        for pack, running in self.blocks:
            if (lost := lose(sweep, running, whys[pack.id])) is not None:
                yield lost
        for pack, cell_id in self.owed:
            if attempts := sweep.attempts(cell_id):
                yield from _lose_the_rest(sweep, pack, attempts, whys[pack.id])
        for running, cell in self.stray:  # nobody can say whether its job lives; if it does, its result will replace this
            yield close(sweep, running, cell.config, Failure("crash", "the file of its pack is gone"))


def _close_cell(sweep: Sweep, pack: PackState, cell: Cell, why: Failure) -> Iterator[Attempt]:
    """Record that an ended pack left a cell in flight, or never began it."""
    begun = [r for r in sweep.running(cell.id) if r.pack == pack.id]
    for running in begun:
        yield close(sweep, running, cell.config, why)
    if not begun and pack.owes(cell.id, sweep.attempts(cell.id)) and (found := _damage(sweep, pack, cell.id, why)):
        yield record(sweep, sweep.begin(cell.id, pack.id), cell.config, found)


def _damage(sweep: Sweep, pack: PackState, cell_id: str, otherwise: Failure) -> Failure | None:
    """Why a cell has no result of a pack that has ended: ``otherwise``, unless its result was there and is damaged. Then None
    the first time, since a cell without an attempt is run again by whoever brings its sweep to the end.
    """
    job = read_job(sweep.pack_folder(pack.id))
    since = job.started_at if job else math.inf
    aside = {int(p.name.split("-")[1].split(".")[0]): p for p in (sweep.folder / cell_id).glob(f"attempt-*[0-9].json{CORRUPT}")}
    own = [number for number, path in aside.items() if path.stat().st_mtime >= since]
    if not own:
        return otherwise
    attempts = sweep.attempts(cell_id)
    if attempts[-1].number > max(own) if attempts else len(aside) < DAMAGED_TWICE:
        return None
    return Failure("crash", f"its result was damaged after it was written, and set aside: {aside[max(own)].name}")


def _lose_the_rest(sweep: Sweep, pack: PackState, attempts: Sequence[Attempt], why: Failure) -> Iterator[Attempt]:
    """Record, with the good result that stays, the later blocks that an ended pack never began."""
    if never := later_blocks(attempts, pack.id):
        attempt = attempts[-1]
        for block in never:
            attempt = with_lost_block(attempt, block, why)
        sweep.finish(attempt)
        yield attempt


def close(sweep: Sweep, running: Running, config: dict[str, Any], otherwise: Failure | None = None) -> Attempt:
    """Record an attempt that began and never ended, with the class and cause that its processes left behind.

    ``otherwise``: what its job's end says. It counts where no process left a word, and where all they saw was what the job's
    end did to them: broken connections and signals.
    """
    return record(sweep, running, config, _why_it_ended(sweep, running, otherwise))


def lose(sweep: Sweep, running: Running, otherwise: Failure | None = None) -> Attempt | None:
    """Record, with the good result that stays, that a later block of timings began and never ended, and why (as ``close`` does).

    None if there is nothing to record: death came after the block was written and before its marker was dropped.
    """
    attempt = next((a for a in sweep.attempts(running.cell_id) if a.number == running.number), None)
    lost = None
    if attempt is not None and running.block in later_blocks([attempt], running.pack):
        failure = _why_it_ended(sweep, running, otherwise)
        lost = with_lost_block(attempt, running.block, failure)
        sweep.finish(lost)
    sweep.end_again(running)
    return lost


def with_lost_block(attempt: Attempt, block: int, failure: Failure) -> Attempt:
    """A good result that says which block of timings it lacks, and why."""
    lost = [*attempt.lost_blocks, {"block": block, "cause": f"{failure.kind}: {failure.cause}"}]
    return replace(attempt, provenance={**attempt.provenance, "lost_blocks": lost})


def close_all(sweep: Sweep, pack: Pack, otherwise: Failure | None = None) -> None:
    """Record what a gang of this pack that is gone left open."""
    for running in in_flight(sweep, pack):
        if running.block > 1:
            lose(sweep, running, otherwise)
        else:
            close(sweep, running, pack.configs[running.cell_id], otherwise)


def _why_it_ended(sweep: Sweep, running: Running, otherwise: Failure | None) -> Failure:
    folder, stem = sweep.pack_folder(running.pack) / "failures", stem_of(running)
    found = first_failure(folder, stem, running.started_at)
    failure = found.failure if found else None
    says = otherwise is not None and (otherwise.kind not in ("crash", "no-start") or tells_of_a_kill(otherwise.cause))
    if failure is None or (found and found.may_follow and says):
        failure = otherwise or Failure("crash", "the workers ended without a word; see the logs of the pack")
    if failure.kind == "hang":
        with open(sweep.attempt_path(running.cell_id, running.number, "log"), "a") as log:
            log.writelines(stacks(folder, stem))
    return failure


def record(sweep: Sweep, running: Running, config: dict[str, Any], failure: Failure) -> Attempt:
    """Write down that an attempt failed."""
    attempt = Attempt(
        cell_id=running.cell_id,
        sweep=sweep.name,
        number=running.number,
        status="failed",
        failure=failure,
        config=config,
        pack=running.pack,
        started_at=running.started_at,
        finished_at=time.time(),
    )
    sweep.finish(attempt)
    return attempt


def in_flight(sweep: Sweep, pack: Pack, cells: Sequence[str] | None = None) -> list[Running]:
    """Attempts of this pack, at all its cells or at some, that began and have not ended, and later blocks of timings."""
    chosen = pack.cells if cells is None else cells
    first = [r for c in chosen for r in sweep.running(c) if r.pack == pack.id]
    return first + [r for r in sweep.again(pack.id) if r.cell_id in chosen]


def _is_open(record: Record, pack: PackState) -> bool:
    return any(r.pack == pack.id for r in record.running) or pack.owes(record.entry.cell.id, record.attempts)


def _job_failure(sweep: Sweep, pack: PackState) -> Failure:
    """Why a pack's job left cells without a result, by how the job ended."""
    for name in (END, STOP):  # the pack itself may know why it stopped
        said = read_ending(sweep.pack_folder(pack.id), name)
        if said and said.failure:
            return said.failure
    if not pack.queued:
        return Failure("cancelled", "the launching command and its agents ended before the pack did")
    began = pack.done > 0 or any(r.pack == pack.id for cell_id in pack.cells for r in sweep.running(cell_id))
    return from_slurm_state(pack.state, began, job_words(sweep.folder / "jobs" / pack.job_name, pack.job_id))
