"""What Slurm knows of jobs, by name: one squeue and one sacct for all of a sweep.

squeue speaks for what lives, a requeued job too; a job that a controller which answers does not list has left the queue. Only
then sacct's last word counts, since for a requeued job it may be that of the run before. A controller that does not answer
makes jobs unknown, never dead.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lcbench.redact import hidden

QUERY_TIMEOUT_S = 20
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
    "REVOKED", "ENDED",
}  # fmt: skip
# Slurm may still requeue a job in one of these; it says so within seconds.
MAY_COME_BACK = {"PREEMPTED", "NODE_FAIL", "BOOT_FAIL"}
COMES_BACK_S = 45
LEFT_THE_QUEUE = "it has left the queue, and accounting does not say how"

Key = tuple[str, int]  # name of a job, index in its array


def word_of(state: str) -> str:
    """Slurm's one word for a state: ``CANCELLED by 0`` and ``CANCELLED+`` are both CANCELLED."""
    return state.split()[0].rstrip("+") if state.split() else ""


def has_ended(state: str) -> bool:
    return word_of(state) in ENDED


@dataclass(frozen=True)
class Job:
    """``state``: Slurm's word; ENDED for a job that left the queue and that accounting does not know."""

    state: str
    reason: str
    id: str  # as scancel takes it

    @property
    def ended(self) -> bool:
        return has_ended(self.state)


@dataclass(frozen=True)
class Answer:
    """``jobs`` are those that Slurm has heard of. ``controller``: whether slurmctld answered, so that silence means something."""

    jobs: dict[Key, Job]
    controller: bool


def site_variables(site: dict[str, Any]) -> dict[str, str]:
    """The variables that a site sets, but for those of a stored sweep whose secret was left out."""
    env = site.get("env") or {}
    left_out = hidden(env)
    return {key: str(value) for key, value in env.items() if key not in left_out}


def environment(site: dict[str, Any]) -> dict[str, str]:
    """The environment of Slurm's commands on a site."""
    return {**os.environ, **site_variables(site)}


def ask(names: Sequence[str], since: float, env: dict[str, str]) -> Answer:
    """States of all jobs of these names that were there after ``since`` (seconds since the epoch)."""
    if not names:
        return Answer({}, True)
    listed = ",".join(names)
    # --array: one line for each element, also for those that wait.
    queued = _lines(["squeue", "--array", "-h", "-t", "all", "-n", listed, "-o", "%j|%F|%K|%T|%r|%e"], env)
    begun = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 60))
    wanted = "JobName%200,JobID,State%40,Reason"
    counted = _lines(["sacct", "-X", "-n", "-P", "-S", begun, f"--name={listed}", "-o", wanted], env)
    jobs: dict[Key, Job] = {}
    for line in counted or ():
        name, job_id, state, reason = [*line.split("|"), "", ""][:4]
        master, _, element = job_id.partition("_")
        if element.isdigit() or not element:
            jobs[name, int(element or 0)] = Job(state, _said(reason), job_id)
    living: dict[Key, Job] = {}
    for line in queued or ():
        name, master, element, state, reason, end = [*line.split("|"), *6 * [""]][:6]
        if state in MAY_COME_BACK and _age_s(end) < COMES_BACK_S:
            state, reason = "COMPLETING", f"{state}, may be requeued"
        number = int(element) if element.isdigit() else 0
        living[name, number] = Job(state, _said(reason), f"{master}_{element}" if element.isdigit() else master)
    if queued is not None:
        for key, job in jobs.items():
            if key not in living and not job.ended:
                jobs[key] = Job("ENDED", LEFT_THE_QUEUE, job.id)
    else:
        jobs = {key: Job("UNKNOWN", "slurmctld does not answer", job.id) for key, job in jobs.items()}
    return Answer({**jobs, **living}, queued is not None)


def last_incarnation(job_id: str, restarts: int, env: dict[str, str]) -> str:
    """How a job that was requeued ``restarts`` times ended the time before, in accounting's word; empty if it does not say."""
    lines = _lines(["sacct", "-X", "-D", "-n", "-P", "-j", job_id, "-o", "JobIDRaw,State"], env) or []
    # Asked for a whole array's id, which one of its elements has too, sacct answers for all of them.
    own = [word_of(state) for raw, _, state in (line.partition("|") for line in lines) if raw == job_id]
    # This one may be told to end before it asks.
    ended = [word for word in own[:restarts] if word in ENDED | {"REQUEUED"}]
    return ended[-1] if ended else ""


class Patient:
    """Asks less and less often while nothing changes; in between it repeats the last answer."""

    def __init__(self, first_s: float = 2.0, most_s: float = 30.0) -> None:
        self._first_s, self._most_s, self._pause_s = first_s, most_s, first_s
        self._next, self._names = 0.0, tuple[str, ...]()
        self._answer = Answer({}, True)

    def __call__(self, names: Sequence[str], since: float, env: dict[str, str]) -> Answer:
        if tuple(names) == self._names and time.monotonic() < self._next:
            return self._answer
        answer = ask(names, since, env)
        same = answer == self._answer
        self._pause_s = min(1.5 * self._pause_s, self._most_s) if same else self._first_s
        self._names, self._answer, self._next = tuple(names), answer, time.monotonic() + self._pause_s
        return answer


def cancel_named(names: Sequence[str], env: dict[str, str]) -> str | None:
    """Cancel all jobs of these names; what Slurm says if it will not."""
    ids = _lines(["squeue", "-h", "-n", ",".join(names), "-o", "%A"], env) if names else []
    if ids is None:
        return "slurmctld does not answer"
    return cancel(sorted(set(ids)), env) if ids else None


def cancel(job_ids: Sequence[str], env: dict[str, str]) -> str | None:
    """Cancel jobs; what Slurm says if it will not."""
    try:
        subprocess.run(["scancel", *job_ids], capture_output=True, text=True, timeout=60, env=env, check=True)
    except subprocess.CalledProcessError as error:
        return " ".join(str(error.stderr).split())
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None


def _age_s(moment: str) -> float:
    """Seconds since Slurm's local time; 0 where it names none."""
    try:
        return time.time() - time.mktime(time.strptime(moment, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return 0.0


def _said(reason: str) -> str:
    return "" if reason == "None" else reason


def _lines(command: list[str], env: dict[str, str]) -> list[str] | None:
    """Output lines; None where the command is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else None
