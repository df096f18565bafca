"""Where packs and cells stand: our own files first, then what their queue or the process table says of their jobs."""

from __future__ import annotations

import math
import os
import shlex
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lcbench.grid.labels import labels
from lcbench.measure.blocks import blocks_of, share
from lcbench.runs.attempt import Attempt
from lcbench.runs.notes import END, Job, read_ending, read_job
from lcbench.runs.ownership import others, trusted_site
from lcbench.runs.pack import later_blocks, owes, tries_again
from lcbench.runs.queues import SLURM, Patient, Queue, queue_of
from lcbench.runs.records import Look, Record
from lcbench.runs.squeue import Answer, has_ended, word_of
from lcbench.runs.store import Sweep

# Nobody is still handing over a pack after this long.
SUBMITTING_S = 900.0
# A job has left its nodes this long after its pack has said how it ended.
GHOST_S = 60.0
NEVER_SUBMITTED = "NEVER_SUBMITTED"
# A job that squeue does not list though accounting calls it running is nobody's to wait for after this long.
UNLISTED_S = 600.0


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
    job_name: str = ""  # of the scheduler's array that it is an element of
    host: str = ""
    pids: tuple[int, ...] = ()
    retry: dict[str, int] = field(default_factory=dict)  # how often what failed how is tried again in it
    seconds: dict[str, float] = field(default_factory=dict)  # how long each cell is expected to take
    good: dict[str, int] = field(default_factory=dict)  # newest good attempt at each cell when it was made
    remedy: str = ""  # the command that helps a job which does not go on by itself: one that Slurm holds, say
    queue: str = ""  # the class that knows its job; empty: processes run it

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs or will run."""
        return self.state == NEVER_SUBMITTED or has_ended(self.state)

    def owes(self, cell_id: str, attempts: Sequence[Attempt]) -> bool:
        """Whether it has still to try a cell that was tried so for the first time, and does not leave it out."""
        return owes(attempts, self.id, self.good.get(cell_id))

    @property
    def queued(self) -> bool:
        """Whether a scheduler has its job, under a name of its own; else processes of a machine run it."""
        return bool(self.job_name)

    @property
    def waits(self) -> bool:
        """Whether it is in the queue and not on its nodes."""
        return not self.ended and (bool(self.remedy) or word_of(self.state).startswith(("PENDING", "REQUEUE")))


@dataclass(frozen=True)
class _HandedOver:
    """A pack's files and what they say of it before anybody is asked."""

    pack: dict[str, Any]
    job: Job | None
    state: PackState


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
    """Looks at a sweep, and asks the queues of its packs.

    Args:
        patient: whether a queue is asked less and less often while nothing changes.
        queue_of: the queue that a pack names; raises ValueError where it may not be asked, or is not there.
    """

    def __init__(
        self, sweep: Sweep, *, patient: bool = False, queue_of: Callable[[str, Collection[str]], Queue] = queue_of
    ) -> None:
        self.sweep, self._queue_of, self._patiently = sweep, queue_of, patient
        self._queues: dict[str, Queue] = {}
        self._unlisted: dict[str, float] = {}  # since when squeue has not listed a pack's job

    def look(self) -> SweepStatus:
        """Where everything stands. Records nothing."""
        packs = self._packs(own=not others(self.sweep))
        return status_of(self.sweep.look(), packs)

    def _packs(self, own: bool) -> list[PackState]:
        """All packs, oldest first; a file that is none is left out."""
        handed = list(self._handed_over())
        queued: dict[str, list[_HandedOver]] = {}
        for h in handed:
            if h.state.queued:
                queued.setdefault(h.state.queue, []).append(h)
        states = {h.state.id: _local_state(h.state, h.job) for h in handed if not h.state.queued}
        for target, packs in queued.items():
            states |= {state.id: state for state in self._in_queue(target, packs, own)}
        return [states[h.state.id] for h in handed]

    def _in_queue(self, target: str, packs: list[_HandedOver], own: bool) -> Iterator[PackState]:
        """The packs of one queue, which is asked once."""
        try:
            asked = self.queue(target)
        except ValueError as error:
            yield from (self._heard(replace(h.state, reason=str(error))) for h in packs)
            return
        site = trusted_site(packs[-1].pack["settings"]["site"], own)
        answer = self._answer(asked, packs, site)
        yield from (self._patient(self._heard(_queued_state(h, asked, answer, site, own))) for h in packs)

    def queue(self, target: str) -> Queue:
        """The queue of a pack by the class that it names.

        Raises:
            ValueError: it may not be asked, or is not there.
        """
        if target not in self._queues:
            found = self._queue_of(target, self.sweep.allowed())
            self._queues[target] = Patient(found) if self._patiently else found
        return self._queues[target]

    def _handed_over(self) -> Iterator[_HandedOver]:
        for pack_id in self.sweep.packs():
            pack, job = self.sweep.pack_file(pack_id, "pack.json"), read_job(self.sweep.pack_folder(pack_id))
            with suppress(KeyError, TypeError, ValueError, AttributeError):
                yield _HandedOver(pack, job, _as_handed_over(pack_id, pack, job))

    def _answer(self, asked: Queue, packs: Sequence[_HandedOver], site: dict[str, Any]) -> Answer:
        """What a queue says of packs that it was given."""
        names = sorted({h.state.job_name for h in packs})
        # Earlier versions named jobs after their sweep; where that cannot be asked for, the ids are.
        ids = {h.job.job_id.partition("_")[0] for h in packs if h.job and "," in h.state.job_name}
        since = min((h.job.started_at for h in packs if h.job), default=time.time())
        return asked.ask(names, since, site, sorted(i for i in ids if i.isdigit()))

    def _heard(self, pack: PackState) -> PackState:
        """A pack that says itself that it has ended, where its queue does not know, or not yet."""
        said = read_ending(self.sweep.pack_folder(pack.id), END)
        # A slurmctld that was killed before it saved a job's end takes it for running, for minutes or for good.
        late = said is not None and pack.state == "RUNNING" and time.time() - said.time > GHOST_S
        if said is not None and (pack.state == "UNKNOWN" or late):
            return replace(pack, state="ENDED", reason="says so itself", remedy="")
        return pack

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
    waiting: int = 0  # cells that the queue had no room for

    @property
    def ended(self) -> bool:
        return not self.waiting and all(p.ended for p in self.packs)

    @property
    def held(self) -> list[PackState]:
        """Packs whose jobs wait until a person does something."""
        return [p for p in self.packs if p.remedy]

    @property
    def at_rest(self) -> bool:
        """Whether nothing goes on by itself: every job has ended, is held, or waits for a held one."""
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
        """The measuring time that is left: estimates, scaled by how long ended cells took against theirs."""
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
        in_turn = any(not p.queued for p in live)
        return TimeLeft((sum if in_turn else max)(running or [0.0]), len(waiting), max(waiting, default=0.0))

    @property
    def under_way(self) -> set[str]:
        """Cells that a live job runs or will run, for the first time or for more blocks of timings."""
        live = [p for p in self.packs if not p.ended and p.state != "UNKNOWN"]
        again = {c for p in live for c in p.cells if c in self.seen.records and later_blocks(self.seen.records[c].attempts, p.id)}
        return again | {c.id for c in self.cells if c.state in ("running", "pending")}


def status_of(seen: Look, packs: Sequence[PackState]) -> SweepStatus:
    """Where a sweep stands, from its store and from the state of its jobs."""
    with_progress = [_with_progress(seen, pack) for pack in packs]
    return SweepStatus(seen, with_progress, _cells(seen, with_progress))


def _cells(seen: Look, packs: list[PackState]) -> list[CellState]:
    """All cells of a sweep, in the order in which they were asked for."""
    by_id = {p.id: p for p in packs}
    newest_of = {cell_id: pack for pack in packs for cell_id in pack.cells}
    named = labels(record.entry.cell for record in seen.records.values())
    found = []
    for cell_id, seen_cell in seen.records.items():
        last, marked, newest = seen_cell.last, seen_cell.running, newest_of.get(cell_id)
        pack = by_id.get(marked[-1].pack if marked else last.pack if last else "") or newest
        state = CellState(cell_id, named[cell_id], "missing", last.number if last else 0)
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
    """Whether a live pack will still run a cell, for the first time or again."""
    return pack.owes(record.entry.cell.id, record.attempts) or tries_again(record.attempts, pack.retry)


def _with_progress(seen: Look, pack: PackState) -> PackState:
    """A pack with the number of cells that it has tried and, if it has tried all, what it still does."""
    records = [seen.records[c] for c in pack.cells if c in seen.records]
    done = sum(r.has_attempt_of(pack.id) for r in records)
    again = sum(len(later_blocks(r.attempts, pack.id)) for r in records)
    left = sum(not (pack.owes(r.entry.cell.id, r.attempts) or r.has_attempt_of(pack.id)) for r in records)
    at_the_end = pack.state == "RUNNING" and done + left == len(records) and again
    reasons = [f"{again} more blocks of timings" if at_the_end else pack.reason]
    if left and (pack.ended or pack.state == "RUNNING"):
        reasons.append(f"{left} left out, with a newer result of another pack")
    return replace(pack, done=done, reason="; ".join(filter(None, reasons)))


def _as_handed_over(pack_id: str, pack: dict[str, Any], job: Job | None) -> PackState:
    """A pack as its files have it.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: they hold something else.
    """
    job, settings = job or Job(), pack["settings"]
    settings["site"].get("name"), int(pack["index"])
    return PackState(
        pack_id, str(pack["launcher"]), job.job_id or str(job.pid or ""), "UNKNOWN", "",
        tuple(map(str, pack["cells"])), 0, str(pack["job_name"]), job.host,
        job.pids or (), dict(settings["retry"]), dict(pack["seconds"]), {c: int(n) for c, n in pack.get("good", {}).items()},
        queue=_queue_named(pack),
    )  # fmt: skip


def _queue_named(pack: dict[str, Any]) -> str:
    """The class that knows a pack's job; packs of earlier versions name none, and are Slurm's where they have a job's name."""
    return str(pack.get("queue", "")) or (SLURM if pack["job_name"] else "")


def _queued_state(handed: _HandedOver, queue: Queue, answer: Answer, site: dict[str, Any], own: bool) -> PackState:
    """A pack of a queue by what it answers on a site. ``own``: whether the sweep is the caller's."""
    pack, told = handed.state, handed.job or Job()
    job = answer.jobs.get((pack.job_name, int(handed.pack["index"])))
    if job is not None:
        return replace(pack, state=job.state, reason=job.reason, job_id=job.id, remedy=queue.remedy(job))
    if not answer.controller:
        return replace(pack, reason=f"{queue.name} does not answer")
    if told.cluster and (asked := queue.cluster(site)) and asked != told.cluster:
        return replace(pack, reason=f"its cluster is {told.cluster}, and {queue.name}'s commands here ask {asked}")
    if told.job_id and not own:
        return replace(pack, reason=f"{queue.name} shows you nothing of it")
    if told.job_id:
        return replace(pack, state="ENDED", reason=f"{queue.name} does not know the job any more")
    # No job of this name, and nobody was told its number: it is being submitted, or never was.
    at_home = told.pid is not None and told.host == socket.gethostname()
    alive = _alive(told.pid, told.started_at) if at_home and told.pid else time.time() - told.started_at < SUBMITTING_S
    if alive:
        return replace(pack, state="PENDING", reason="being submitted")
    return replace(pack, state=NEVER_SUBMITTED, reason="the launcher ended before it could")


def _duration(seconds: float) -> str:
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _local_state(pack: PackState, job: Job | None) -> PackState:
    """A pack that processes run, by the process table of their machine."""
    if job is None:
        return replace(pack, reason="not started yet, or the launcher ended before it could")
    if job.host != socket.gethostname():
        return replace(pack, reason=f"runs on {job.host}")
    handing_over = () if job.pid is None else (job.pid,)
    if any(_alive(pid, job.started_at) for pid in (handing_over if job.pids is None else job.pids)):
        return replace(pack, state="RUNNING")
    if job.pids is None:
        return replace(pack, state=NEVER_SUBMITTED, reason="the launcher ended before it could")
    return replace(pack, state="ENDED")


def _alive(pid: int, started_at: float) -> bool:
    """Whether a process lives and was started then; a later process may have its number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    if fields[0] == "Z":
        return False
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    begun = time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return begun <= started_at + 5
