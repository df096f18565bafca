"""Where packs and cells stand: our own files first, then what Slurm or the process table says of their jobs.

Slurm is asked once for all jobs of a sweep (squeue, then sacct). A job that neither knows is ``unknown``: accounting lags,
and a purged record must mean neither "running" nor "done".
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcbench.runs.failure import first_failure, from_slurm_state
from lcbench.runs.store import Attempt, Failure, Running, Sweep, read_json

QUERY_TIMEOUT_S = 15
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
    "REVOKED", "ENDED",
}  # fmt: skip


@dataclass(frozen=True)
class PackState:
    """One job. ``state``: Slurm's word, or RUNNING, ENDED for a local one; UNKNOWN where nobody can tell."""

    id: str
    launcher: str
    job_id: str
    state: str
    reason: str
    cells: int
    done: int

    @property
    def ended(self) -> bool:
        return self.state.split()[0] in ENDED


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


def pack_states(sweep: Sweep) -> list[PackState]:
    """All packs of a sweep, oldest first."""
    packs = {pack: read_json(sweep.pack_folder(pack) / "pack.json") for pack in sweep.packs()}
    jobs = {pack: _job(sweep.pack_folder(pack)) for pack in packs}
    slurm = {pack: job for pack, job in jobs.items() if "job_id" in job}
    known = _slurm_states([str(j["job_id"]) for j in slurm.values()], _environment(packs, slurm)) if slurm else {}
    states = []
    for pack, content in packs.items():
        job = jobs[pack]
        if "job_id" in job:
            state, reason = known.get(str(job["job_id"]), ("UNKNOWN", "neither squeue nor sacct knows the job"))
        else:
            state, reason = _local_state(job)
        done = sum(sweep.has_attempt_of(cell_id, pack) for cell_id in content["cells"])
        job_id = str(job.get("job_id") or job.get("pid") or "")
        states.append(PackState(pack, job.get("launcher", ""), job_id, state, reason, len(content["cells"]), done))
    return states


def cell_states(sweep: Sweep, packs: list[PackState] | None = None) -> list[CellState]:
    """All cells of a sweep, in the order in which they were asked for."""
    by_id = {p.id: p for p in (pack_states(sweep) if packs is None else packs)}
    waiting: dict[str, PackState] = {}
    for one in by_id.values():
        for cell_id in read_json(sweep.pack_folder(one.id) / "pack.json")["cells"]:
            waiting[cell_id] = one  # the newest pack wins
    found = []
    for cell_id, entry in sweep.entries().items():
        attempts, running = sweep.attempts(cell_id), sweep.running(cell_id)
        last = attempts[-1] if attempts else None
        pack = by_id.get(running[-1].pack if running else last.pack if last else "") or waiting.get(cell_id)
        state = CellState(cell_id, entry.cell.label, "missing", last.number if last else 0)
        if pack is not None:
            state = replace(state, pack=pack.id, job_id=pack.job_id, job_state=pack.state)
        newest = waiting.get(cell_id)
        if running:
            alive = pack is not None and not pack.ended
            state = replace(
                state, state="running" if alive else "lost", attempt=running[-1].number,
                elapsed_s=time.time() - running[-1].started_at,
            )  # fmt: skip
        elif newest is not None and not newest.ended and not sweep.has_attempt_of(cell_id, newest.id):
            state = replace(state, state="pending", pack=newest.id, job_id=newest.job_id, job_state=newest.state)
        elif last is not None:
            state = replace(state, state=last.status, elapsed_s=last.finished_at - last.started_at)
            if last.failure:
                state = replace(state, failure=last.failure.kind, cause=last.failure.cause)
        found.append(state)
    return found


def settle(sweep: Sweep) -> list[Attempt]:
    """Record, as failed, attempts in flight whose job has ended; safe to call again and from several processes."""
    states = {p.id: p for p in pack_states(sweep)}
    settled = []
    for cell_id in sweep.entries():
        for running in sweep.running(cell_id):
            pack = states.get(running.pack)
            if pack is not None and pack.ended:
                settled.append(close(sweep, running, _job_failure(pack)))
    return settled


def close(sweep: Sweep, running: Running, otherwise: Failure | None = None) -> Attempt:
    """Record an attempt that began and never ended, with the class and cause that its processes left behind.

    ``otherwise``: what its job's end says. It counts where no process left a word, and where all they saw were the
    connections that the job's end broke.
    """
    failure = first_failure(sweep.pack_folder(running.pack) / "failures", running.cell_id, running.number, running.started_at)
    if failure is None or (failure.kind == "nccl" and otherwise is not None and otherwise.kind != "crash"):
        failure = otherwise or Failure("crash", "the workers ended without a word; see the logs of the pack")
    attempt = Attempt(
        cell_id=running.cell_id,
        sweep=sweep.name,
        number=running.number,
        status="failed",
        failure=failure,
        pack=running.pack,
        started_at=running.started_at,
        finished_at=time.time(),
    )
    sweep.finish(attempt)
    return attempt


def _job_failure(pack: PackState) -> Failure | None:
    if pack.launcher == "slurm" and pack.state != "ENDED":
        return from_slurm_state(pack.state)
    return Failure("cancelled", "the launching command and its agents ended while the cell was in flight")


def _job(folder: Path) -> dict[str, Any]:
    try:
        job: dict[str, Any] = read_json(folder / "job.json")
    except FileNotFoundError:
        return {}
    return job


def _environment(packs: dict[str, dict[str, Any]], slurm: dict[str, Any]) -> dict[str, str]:
    """The environment of Slurm commands, as the site of the newest Slurm pack wants it."""
    site = packs[sorted(slurm)[-1]]["site"]
    return {**os.environ, **{k: str(v) for k, v in (site.get("env") or {}).items()}}


def _slurm_states(job_ids: list[str], environment: dict[str, str]) -> dict[str, tuple[str, str]]:
    """(state, reason) by job id: squeue speaks for jobs that live (a requeued one too), sacct for the rest."""
    listed = ",".join(job_ids)
    states: dict[str, tuple[str, str]] = {}
    for line in _lines(["sacct", "-X", "-n", "-P", "-j", listed, "-o", "JobIDRaw,State,Reason"], environment):
        job_id, state, reason = [*line.split("|"), "", ""][:3]
        states[job_id] = (state, reason if reason != "None" else "")
    for line in _lines(["squeue", "-h", "-t", "all", "-j", listed, "-o", "%A|%T|%r"], environment):
        job_id, state, reason = [*line.split("|"), "", ""][:3]
        # squeue forgets ended jobs after a while and sacct lags behind it: the live one is right while it speaks.
        states[job_id] = (state, reason if reason != "None" else "")
    return states


def _lines(command: list[str], environment: dict[str, str]) -> list[str]:
    """Output lines; none where the command is missing, fails (squeue does for jobs it has forgotten) or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _local_state(job: dict[str, Any]) -> tuple[str, str]:
    if not job:
        return "UNKNOWN", "not started yet, or the launcher ended before it could"
    if job["host"] != socket.gethostname():
        return "UNKNOWN", f"runs on {job['host']}"
    alive = any(_alive(pid, job["started_at"]) for pid in job.get("pids", [job["pid"]]))
    return ("RUNNING", "") if alive else ("ENDED", "")


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
