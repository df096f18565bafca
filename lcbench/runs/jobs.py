"""Where packs and cells stand: our own files first, then what Slurm or the process table says of their jobs."""

from __future__ import annotations

import math
import os
import shlex
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import Timeout

from lcbench.measure.blocks import blocks_of, share
from lcbench.runs.failure import first_failure, from_slurm_state, job_words, stacks, stem_of, tells_of_a_kill
from lcbench.runs.ownership import others, trusted_site
from lcbench.runs.pack import RESERVE, Pack, forget_secrets, later_blocks, tries_again
from lcbench.runs.queue import Job as QueuedJob
from lcbench.runs.queue import Key, ask, cluster_of, environment, has_ended, remedy, where, word_of
from lcbench.runs.store import CORRUPT, Attempt, Failure, Look, Record, Running, Sweep

# Nobody is still handing over a pack after this long.
SUBMITTING_S = 900.0
# A job has left its nodes this long after its pack has said how it ended.
GHOST_S = 60.0
NEVER_SUBMITTED = "NEVER_SUBMITTED"
LOCK_S = 30.0
# A job that squeue does not list though accounting calls it running is nobody's to wait for after this long.
UNLISTED_S = 600.0
# A result that was damaged is measured again so often by itself.
DAMAGED_TWICE = 2


@dataclass(frozen=True)
class PackState:
    """One job. ``state``: Slurm's word, or RUNNING, ENDED for a local one; UNKNOWN where nobody can tell."""

    id: str
    launcher: str
    job_id: str
    state: str
    reason: str
    cells: tuple[str, ...]
    done: int
    job_name: str = ""
    host: str = ""
    pids: tuple[int, ...] = ()
    retry: dict[str, int] = field(default_factory=dict)  # how often what failed how is tried again in it
    seconds: dict[str, float] = field(default_factory=dict)  # how long each cell is expected to take
    remedy: str = ""  # the command that helps a job which does not go on by itself: one that Slurm holds, say

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs or will run."""
        return self.state == NEVER_SUBMITTED or has_ended(self.state)

    @property
    def waits(self) -> bool:
        """Whether it is in the queue and not on its nodes."""
        return not self.ended and (bool(self.remedy) or word_of(self.state).startswith(("PENDING", "REQUEUE")))


@dataclass(frozen=True)
class CellState:
    """One cell. ``state``: ok, failed, skipped, running, pending (its job waits), lost (its job is gone) or missing."""

    id: str
    label: str
    state: str
    attempt: int
    pack: str = ""
    job_id: str = ""
    job_state: str = ""
    failure: str = ""
    cause: str = ""
    elapsed_s: float = 0.0


class Watch:
    """Looks at a sweep; ``asking`` replaces the question to Slurm (one that waits between questions, say)."""

    def __init__(self, sweep: Sweep, asking: Callable[..., Any] = ask) -> None:
        self.sweep, self._ask = sweep, asking
        self._unlisted: dict[str, float] = {}  # since when squeue has not listed a pack's job

    def look(self) -> SweepStatus:
        """Where everything stands. Records nothing."""
        packs = self._packs(own=not others(self.sweep))
        return _status(self.sweep.look(), packs)

    def settle(self, *, as_mine: bool = False) -> SweepStatus:
        """Record what has ended, then say where everything stands.

        Of a sweep that is not the caller's own nothing is recorded, unless ``as_mine``.
        """
        own = not others(self.sweep)
        packs, seen = self._packs(own), self.sweep.look()
        if own:
            for pack in (p for p in packs if p.ended):
                forget_secrets(self.sweep.pack_folder(pack.id))
        status = _status(seen, packs)
        recorded = (own or as_mine) and settle(self.sweep, seen, status.packs)
        return _status(self.sweep.look(), packs) if recorded else status

    def _packs(self, own: bool) -> list[PackState]:
        """All packs, oldest first; a file that is none is left out."""
        made = []
        for pack_id in self.sweep.packs():
            pack, job = self.sweep.pack_file(pack_id, "pack.json"), self.sweep.pack_file(pack_id, "job.json")
            try:
                made.append((pack, job, _as_handed_over(pack_id, pack, job)))
            except (KeyError, TypeError, ValueError, AttributeError):
                continue
        slurm = [(pack, job) for pack, job, state in made if state.launcher == "slurm"]
        answer = env = None
        if slurm:
            env = environment(trusted_site(slurm[-1][0]["settings"]["site"], own))
            names = sorted({str(pack["job_name"]) for pack, _ in slurm} - {""})
            ids = {str(job.get("job_id", "")).partition("_")[0] for pack, job in slurm if "," in str(pack["job_name"])}
            since = min((job["started_at"] for _, job in slurm if job), default=time.time())
            answer = self._ask(names, since, env, sorted(i for i in ids if i.isdigit()))
        states = []
        for pack, job, state in made:
            if answer is not None and env is not None and state.launcher == "slurm":
                key = str(pack["job_name"]), int(pack["index"])
                state = _slurm_state(state, answer.jobs, answer.controller, key, job, where(env), own)
                said = self.sweep.pack_file(state.id, "end.json")
                # A slurmctld that was killed before it saved a job's end takes it for running, for minutes or for good.
                late = state.state == "RUNNING" and time.time() - said.get("time", math.inf) > GHOST_S
                if said and (state.state == "UNKNOWN" or late):
                    state = replace(state, state="ENDED", reason="says so itself", remedy="")
                state = self._patient(state)
            else:
                word, reason = _local_state(job)
                state = replace(state, state=word, reason=reason)
            states.append(state)
        return states

    def _patient(self, pack: PackState) -> PackState:
        """A pack whose job squeue has not listed for long says what to do about it."""
        if "squeue does not list it" not in pack.reason:
            self._unlisted.pop(pack.id, None)
            return pack
        if time.monotonic() - self._unlisted.setdefault(pack.id, time.monotonic()) < UNLISTED_S:
            return pack
        return replace(pack, remedy=f"python -m lcbench.cancel {shlex.quote(self.sweep.name)}")


@dataclass(frozen=True)
class TimeLeft:
    """Estimated seconds of measuring: in the jobs that run, until the last of them ends; in the longest of ``waiting`` jobs."""

    running_s: float
    waiting: int
    waiting_s: float

    def __str__(self) -> str:
        said = [f"about {_duration(self.running_s)} left"] if self.running_s else []
        said += [f"{self.waiting} jobs wait, the longest with about {_duration(self.waiting_s)} to measure"] if self.waiting else []
        return "; ".join(said)


@dataclass(frozen=True)
class SweepStatus:
    """Where a sweep stands: everything read once."""

    seen: Look
    packs: list[PackState]
    cells: list[CellState]
    waiting: int = 0  # cells that Slurm had no room for

    @property
    def ended(self) -> bool:
        return not self.waiting and all(p.ended for p in self.packs)

    @property
    def held(self) -> list[PackState]:
        """Packs whose jobs do not go on before a person does something."""
        return [p for p in self.packs if p.remedy]

    @property
    def at_rest(self) -> bool:
        """Whether nothing goes on by itself: all has ended, or what has not is held, or waits for a job that is."""
        live = [p for p in self.packs if not p.ended]
        return self.ended or (bool(self.held) and all(p.remedy or p.reason == "Dependency" for p in live))

    def held_words(self) -> list[str]:
        """A line for each job that is held: why, how many cells wait for it, and the command that helps."""
        jobs: dict[tuple[str, str], list[PackState]] = {}
        for pack in self.held:
            jobs.setdefault((pack.job_id.partition("_")[0], pack.reason), []).append(pack)
        lines = []
        for (master, reason), packs in jobs.items():
            job_id = packs[0].job_id if len(packs) == 1 else master
            cells = sum(c.pack in {p.id for p in packs} and c.state == "pending" for c in self.cells)
            help_ = packs[0].remedy.replace(packs[0].job_id, job_id)
            lines.append(f"job {job_id} does not go on by itself ({reason}), and {cells} cells wait for it: {help_}")
        return lines

    def counts(self) -> Counter[str]:
        """Cells by state."""
        return Counter(c.state for c in self.cells)

    def left(self) -> TimeLeft:
        """What there is still to measure, by the estimates, corrected by how those that have ended went."""
        live = [p for p in self.packs if not p.ended]

        def records_of(pack: PackState) -> Iterator[tuple[str, Record]]:
            return ((c, self.seen.records[c]) for c in pack.cells if c in self.seen.records)

        expected = taken = 0.0
        for pack in self.packs:
            for cell_id, record in records_of(pack):
                blocks = blocks_of(record.entry.cell.config["measure"])
                for attempt in (a for a in record.attempts if a.pack == pack.id and a.status == "ok"):
                    expected += pack.seconds.get(cell_id, 0.0) * share(attempt.blocks or blocks, blocks)
                    taken += attempt.finished_at - attempt.started_at
                    taken += sum(later["finished_at"] - later["started_at"] for later in attempt.again)
        pace = taken / expected if expected else 1.0
        now = time.time()

        def left_s(pack: PackState) -> float:
            total = 0.0
            for cell_id, record in records_of(pack):
                since = next((now - r.started_at for r in record.running if r.pack == pack.id), 0.0)
                if _will_come_to(pack, record):
                    total += max(0.0, pace * pack.seconds.get(cell_id, 0.0) - since)
                elif blocks := later_blocks(record.attempts, pack.id):
                    total += pace * pack.seconds.get(cell_id, 0.0) * (1.0 - share(blocks.start - 1, blocks.stop - 1))
            return total

        running = [left_s(p) for p in live if p.state == "RUNNING"]
        waiting = [left_s(p) for p in live if p.state != "RUNNING"]
        in_turn = any(p.launcher == "local" for p in live)
        return TimeLeft((sum if in_turn else max)(running or [0.0]), len(waiting), max(waiting, default=0.0))

    @property
    def under_way(self) -> set[str]:
        """Cells that a live job has or will come to, for a first time or for more blocks of timings."""
        live = [p for p in self.packs if not p.ended and p.state != "UNKNOWN"]
        again = {c for p in live for c in p.cells if c in self.seen.records and later_blocks(self.seen.records[c].attempts, p.id)}
        return again | {c.id for c in self.cells if c.state in ("running", "pending")}


def _status(seen: Look, packs: Sequence[PackState]) -> SweepStatus:
    with_progress = [_with_progress(seen, pack) for pack in packs]
    return SweepStatus(seen, with_progress, _cells(seen, with_progress))


def settle(sweep: Sweep, seen: Look, packs: Sequence[PackState]) -> list[Attempt]:
    """Record, as failed, what has no result though its job has ended: attempts in flight, and cells that it never came to; and
    the later blocks of timings that were in flight, of results that stay good.

    Safe to call again and from several processes; where the results belong to somebody else, nothing is recorded.
    """
    dead = [p for p in packs if p.ended and p.state != NEVER_SUBMITTED]
    open_ends = [(p, c) for p in dead for c in p.cells if c in seen.records and _is_open(seen.records[c], p.id)]
    blocks = [(p, running) for p in dead for running in sweep.again(p.id)]
    known = {p.id for p in packs}
    stray = [(r, record.entry) for record in seen.records.values() for r in record.running if r.pack not in known]
    if not (open_ends or blocks or stray) or not os.access(sweep.folder, os.W_OK):
        return []
    settled = []
    try:
        with sweep.lock().acquire(timeout=LOCK_S):
            whys = {pack.id: _job_failure(sweep, pack) for pack, _ in (*open_ends, *blocks)}
            for pack_id in whys:
                (sweep.pack_folder(pack_id) / RESERVE).unlink(missing_ok=True)
            for pack, cell_id in open_ends:
                config = seen.records[cell_id].entry.cell.config
                begun = [r for r in sweep.running(cell_id) if r.pack == pack.id]
                if begun:
                    settled += [close(sweep, running, config, whys[pack.id]) for running in begun]
                elif not sweep.has_attempt_of(cell_id, pack.id) and (why := _damage(sweep, pack, cell_id, whys[pack.id])):
                    settled.append(record(sweep, sweep.begin(cell_id, pack.id), config, why))
            settled += [lost for pack, running in blocks if (lost := lose(sweep, running, whys[pack.id]))]
            for running, entry in stray:  # nobody can say whether its job lives; if it does, its result will replace this
                settled.append(close(sweep, running, entry.cell.config, Failure("crash", "the file of its pack is gone")))
    except (Timeout, PermissionError):  # somebody else is at it, or owns what would be written
        return []
    return settled


def _damage(sweep: Sweep, pack: PackState, cell_id: str, otherwise: Failure) -> Failure | None:
    """Why a cell has no result of a pack that has ended: ``otherwise``, unless its result was there and is damaged. Then None
    the first time, since a cell without an attempt is run again by whoever brings its sweep to the end.
    """
    since = sweep.pack_file(pack.id, "job.json").get("started_at", math.inf)
    aside = {int(p.name.split("-")[1].split(".")[0]): p for p in (sweep.folder / cell_id).glob(f"attempt-*[0-9].json{CORRUPT}")}
    own = [number for number, path in aside.items() if path.stat().st_mtime >= since]
    if not own:
        return otherwise
    attempts = sweep.attempts(cell_id)
    if attempts[-1].number > max(own) if attempts else len(aside) < DAMAGED_TWICE:
        return None
    return Failure("crash", f"its result was damaged after it was written, and set aside: {aside[max(own)].name}")


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
    """A good result with word of a block of timings that it has not."""
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


def _cells(seen: Look, packs: list[PackState]) -> list[CellState]:
    """All cells of a sweep, in the order in which they were asked for."""
    by_id = {p.id: p for p in packs}
    newest_of = {cell_id: pack for pack in packs for cell_id in pack.cells}
    found = []
    for cell_id, seen_cell in seen.records.items():
        last, marked, newest = seen_cell.last, seen_cell.running, newest_of.get(cell_id)
        pack = by_id.get(marked[-1].pack if marked else last.pack if last else "") or newest
        state = CellState(cell_id, seen_cell.entry.cell.label, "missing", last.number if last else 0)
        if pack is not None:
            state = replace(state, pack=pack.id, job_id=pack.job_id, job_state=pack.state)
        if marked:
            alive = pack is not None and not pack.ended
            state = replace(
                state, state=("pending" if pack and pack.waits else "running") if alive else "lost", attempt=marked[-1].number,
                elapsed_s=time.time() - marked[-1].started_at,
            )  # fmt: skip
        elif newest is not None and not newest.ended and _will_come_to(newest, seen_cell):
            state = replace(state, state="pending", pack=newest.id, job_id=newest.job_id, job_state=newest.state)
        else:
            state = replace(state, state=seen_cell.status, elapsed_s=last.finished_at - last.started_at if last else 0.0)
            if why := seen_cell.failure:
                state = replace(state, failure=why.kind, cause=why.cause)
        if state.state == "pending" and (holder := by_id.get(state.pack)) and holder.remedy:
            state = replace(state, cause=f"{holder.reason}: {holder.remedy}")
        found.append(state)
    return found


def _will_come_to(pack: PackState, record: Record) -> bool:
    """Whether a live pack has a cell before it: it has not tried it, or will try it again."""
    return not record.has_attempt_of(pack.id) or tries_again(record.attempts, pack.retry)


def _is_open(record: Record, pack_id: str) -> bool:
    return any(r.pack == pack_id for r in record.running) or not record.has_attempt_of(pack_id)


def _with_progress(seen: Look, pack: PackState) -> PackState:
    """A pack with how many of its cells it has tried, and, where these are all, what it is still at."""
    records = [seen.records[c] for c in pack.cells if c in seen.records]
    done = sum(r.has_attempt_of(pack.id) for r in records)
    again = sum(len(later_blocks(r.attempts, pack.id)) for r in records)
    reason = f"{again} more blocks of timings" if pack.state == "RUNNING" and done == len(records) and again else pack.reason
    return replace(pack, done=done, reason=reason)


def _job_failure(sweep: Sweep, pack: PackState) -> Failure:
    """What the end of a pack's job says of the cells that it left without a result."""
    for name in ("end.json", "stop.json"):  # the pack itself may know why it stopped
        said = sweep.pack_file(pack.id, name).get("failure")
        if said:
            return Failure(**said)
    if pack.launcher != "slurm":
        return Failure("cancelled", "the launching command and its agents ended while the cell was in flight")
    began = pack.done > 0 or any(r.pack == pack.id for cell_id in pack.cells for r in sweep.running(cell_id))
    return from_slurm_state(pack.state, began, job_words(sweep.folder / "jobs" / pack.job_name, pack.job_id))


def _as_handed_over(pack_id: str, pack: dict[str, Any], job: dict[str, Any]) -> PackState:
    """A pack as its files have it.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: they hold something else.
    """
    settings, started_at = pack["settings"], job.get("started_at", 0.0)
    settings["site"].get("name"), int(pack["index"]), float(started_at)
    return PackState(
        pack_id, str(pack["launcher"]), str(job.get("job_id") or job.get("pid") or ""), "UNKNOWN", "",
        tuple(map(str, pack["cells"])), 0, str(pack["job_name"]), str(job.get("host", "")),
        tuple(map(int, job.get("pids", ()))), dict(settings["retry"]), dict(pack["seconds"]),
    )  # fmt: skip


def _slurm_state(
    pack: PackState, jobs: dict[Key, QueuedJob], controller: bool, key: Key, handed: dict[str, Any],
    here: tuple[str | None, ...], own: bool,
) -> PackState:  # fmt: skip
    job = jobs.get(key)
    if job is not None:
        helps = remedy(job.state, job.reason, job.id)
        return replace(pack, state=job.state, reason=job.reason, job_id=job.id, remedy=helps)
    if not controller:
        return replace(pack, reason="slurmctld does not answer")
    if handed.get("cluster") and (asked := cluster_of(here)) and asked != handed["cluster"]:
        return replace(pack, reason=f"its cluster is {handed['cluster']}, and Slurm's commands here ask {asked}")
    if handed.get("job_id"):
        if not own:
            return replace(pack, reason="squeue and sacct show you nothing of it")
        return replace(pack, state="ENDED", reason="neither squeue nor sacct knows the job any more")
    # No job of this name, and nobody was told its number: it is being submitted, or never was.
    at_home = handed.get("host") == socket.gethostname()
    alive = _alive(handed["pid"], handed["started_at"]) if at_home else time.time() - handed.get("started_at", 0.0) < SUBMITTING_S
    if alive:
        return replace(pack, state="PENDING", reason="being submitted")
    return replace(pack, state=NEVER_SUBMITTED, reason="the launcher ended before it could")


def _duration(seconds: float) -> str:
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _local_state(job: dict[str, Any]) -> tuple[str, str]:
    if not job:
        return "UNKNOWN", "not started yet, or the launcher ended before it could"
    if job["host"] != socket.gethostname():
        return "UNKNOWN", f"runs on {job['host']}"
    alive = any(_alive(pid, job["started_at"]) for pid in job.get("pids", [job["pid"]]))
    if alive:
        return "RUNNING", ""
    return ("ENDED", "") if "pids" in job else (NEVER_SUBMITTED, "the launcher ended before it could")


def _alive(pid: int, started_at: float) -> bool:
    """Whether a process lives and is the one that was started then, not a later one with its number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    if fields[0] == "Z":
        return False
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    begun = time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return begun <= started_at + 5
