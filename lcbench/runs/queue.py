"""What Slurm knows of jobs, by name: one squeue and one sacct for all of a sweep.

squeue speaks for what lives, a requeued job too. For a job that squeue does not list sacct's last word counts: a job that
accounting calls running or pending is never taken for ended. A controller that does not answer makes jobs unknown, never dead.

Slurm's commands run in an environment of ours (``environment``), so that neither the formats and filters of the person who calls
nor what a stored site names change what they do.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lcbench.redact import hidden

QUERY_TIMEOUT_S, CANCEL_TIMEOUT_S = 20, 60
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
    "REVOKED", "ENDED",
}  # fmt: skip
# Slurm may still requeue a job in one of these; it says so within seconds.
MAY_COME_BACK = {"PREEMPTED", "NODE_FAIL", "BOOT_FAIL"}
COMES_BACK_S = 45
NOT_LISTED = "accounting calls it {state}, squeue does not list it"
# Variables that change what Slurm's commands ask, show or submit, and those of them that say where and as whom.
SLURM_VARIABLES = ("SLURM", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_", "SINFO_", "SBATCH_", "SRUN_", "SALLOC_")
LOCATING = ("SLURM_CONF", "SLURM_CONF_SERVER")
KEPT = (*LOCATING, "SLURM_JWT")
# Why a job waits, where it waits for a person (man squeue, JOB REASON CODES): it is held until it is released, or can never start.
HELD = re.compile(r"\bheld\b|Held|JobHold|^ReservationDeleted$")
NEVER_STARTS = re.compile(
    r"NeverSatisfied|^BadConstraints$|^Partition(Node|Time)Limit$|^Invalid(Account|QOS)$|NotAllowed$|Max\w+PerJob"
)
# What commands say when nothing is wrong, or before or behind the line that says what is.
NOISE = re.compile(r"^(Try ['\"`]|Usage:|\w+: (warning|info|debug\d?):|\w+: lua:)", re.IGNORECASE)

Key = tuple[str, int]  # name of a job, index in its array


def word_of(state: str) -> str:
    """Slurm's one word for a state: ``CANCELLED by 0`` and ``CANCELLED+`` are both CANCELLED."""
    return state.split()[0].rstrip("+") if state.split() else ""


def has_ended(state: str) -> bool:
    return word_of(state) in ENDED


@dataclass(frozen=True)
class Job:
    """``state``: Slurm's word."""

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
    """The variables that a site sets in its jobs, but for those of a stored sweep whose secret was left out."""
    env = site.get("env") or {}
    left_out = hidden(env)
    return {key: str(value) for key, value in env.items() if value is not None and key not in left_out}


def environment(site: dict[str, Any]) -> dict[str, str]:
    """The environment of Slurm's commands: that of the person who calls, without variables that change what these commands do.
    Of the site it takes where Slurm is (``LOCATING``) and nothing else, above all no PATH.
    """
    own = {k: v for k, v in os.environ.items() if k in KEPT or not k.startswith(SLURM_VARIABLES)}
    return {**own, **{k: v for k, v in site_variables(site).items() if k in LOCATING}}


def remedy(state: str, reason: str, job_id: str) -> str:
    """The command that helps a job which will not start by itself; empty for every other job."""
    if has_ended(state) or word_of(state) == "RUNNING":
        return ""
    if HELD.search(reason) or word_of(state).endswith(("_HOLD", "SPECIAL_EXIT")):
        return f"scontrol release {job_id}"
    return f"scancel {job_id}" if NEVER_STARTS.search(reason) else ""


def reason_in(text: str) -> str:
    """The first line of a Slurm command's output that says what is wrong; empty if there is no output."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not NOISE.match(line)]
    return next(iter([*(line for line in said if "error:" in line.lower()), *said, *lines]), "")


def ask(names: Sequence[str], since: float, env: dict[str, str], ids: Sequence[str] = ()) -> Answer:
    """The states of all jobs of these names that existed after ``since`` (seconds since the epoch).

    ``ids``: of jobs whose names cannot be asked for, since commas separate names; earlier versions named jobs after their sweep.
    """
    listed = ",".join(name for name in names if "," not in name)
    wanted = [(f"--name={listed}",)] if listed else []
    if ids:
        wanted.append((f"--jobs={','.join(ids)}",))
    begun = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 60))
    jobs: dict[Key, Job] = {}
    living: dict[Key, Job] = {}
    answers = True
    for which in wanted:
        # --array: one line for each element, also for those that wait. --all: also in partitions that are hidden. The name comes
        # last: it may hold the bar that separates.
        queued = _squeue(["--array", "--all", "-h", "-t", "all", *which, "-o", "%F|%K|%T|%r|%e|%j"], env)
        counted = _lines(["sacct", "-a", "-X", "-n", "-P", "-S", begun, *which, "-o", "JobID,State,Reason,JobName%200"], env)
        for line in counted or ():
            job_id, state, reason, name = [*line.split("|", 3), "", "", ""][:4]
            for element in _elements(job_id):
                jobs[name, int(element.partition("_")[2] or 0)] = Job(state, _said(reason), element)
        for line in queued or ():
            master, element, state, reason, end, name = [*line.split("|", 5), *6 * [""]][:6]
            if state in MAY_COME_BACK and _age_s(end) < COMES_BACK_S:
                state, reason = "COMPLETING", f"{state}, may be requeued"
            number = int(element) if element.isdigit() else 0
            living[name, number] = Job(state, _said(reason), f"{master}_{element}" if element.isdigit() else master)
        answers = answers and queued is not None
    for key, job in jobs.items():
        if not answers:
            jobs[key] = Job("UNKNOWN", "slurmctld does not answer", job.id)
        elif not job.ended:  # squeue shows less than there is, or accounting is late
            jobs[key] = Job(job.state, NOT_LISTED.format(state=job.state), job.id)
    return Answer({**jobs, **living}, answers)


def last_incarnation(job_id: str, restarts: int, env: dict[str, str]) -> str:
    """How a job that was requeued ``restarts`` times ended the time before, in accounting's word; empty if it does not say."""
    lines = _lines(["sacct", "-X", "-D", "-n", "-P", "-j", job_id, "-o", "JobIDRaw,State"], env) or []
    # Asked for a whole array's id, which one of its elements has too, sacct answers for all of them.
    own = [word_of(state) for raw, _, state in (line.partition("|") for line in lines) if raw == job_id]
    # This one may be told to end before it asks.
    ended = [word for word in own[:restarts] if word in ENDED | {"REQUEUED"}]
    return ended[-1] if ended else ""


@lru_cache
def cluster_of(locating: tuple[str | None, ...]) -> str:
    """Name of the cluster that Slurm's commands ask; empty where they do not say. ``locating``: ``where(env)``."""
    found = {k: v for k, v in zip(LOCATING, locating, strict=True) if v is not None}
    lines = _lines(["scontrol", "show", "config"], {**environment({}), **found}) or []
    return next((line.partition("=")[2].strip() for line in lines if line.split("=")[0].strip() == "ClusterName"), "")


def where(env: dict[str, str]) -> tuple[str | None, ...]:
    """What locates the Slurm that an environment leads to."""
    return tuple(env.get(key) for key in LOCATING)


def cancel_named(names: Sequence[str], env: dict[str, str]) -> str | None:
    """Cancel all jobs of these names. Returns Slurm's words if it refuses, else None."""
    answer = ask(names, time.time(), env)
    if not answer.controller:
        return "slurmctld does not answer"
    return "; ".join(cancel([job.id for job in answer.jobs.values() if not job.ended], env).values()) or None


def cancel(job_ids: Sequence[str], env: dict[str, str]) -> dict[str, str]:
    """Cancel jobs; by id, what became of those that Slurm did not cancel."""
    asked = list(dict.fromkeys(i for i in job_ids if re.fullmatch(r"\d+(_\d+)?", i)))
    if not asked:
        return {}
    # scancel says nothing of jobs that it does not know unless asked for words.
    done = _call(["scancel", "-v", *asked], env, CANCEL_TIMEOUT_S)
    if isinstance(done, str):
        return dict.fromkeys(asked, done)
    refused: dict[str, str] = {}
    for line in done.stderr.splitlines():
        found = re.search(r"error on job id (\d+(?:_\d+)?)\W+(.*)", line)
        if found and "already completing" not in line.lower():
            refused[found[1]] = found[2].strip()
    if done.returncode and not refused:
        return dict.fromkeys(asked, reason_in(done.stderr) or f"scancel ended with code {done.returncode}")
    return {i: refused[i] for i in asked if i in refused}


def _elements(job_id: str) -> Iterator[str]:
    """The jobs that one line of sacct is about: ``7``, ``7_2``, and of those that wait ``7_[0-3,5%2]``."""
    found = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", job_id)
    if not found:
        if re.fullmatch(r"\d+(_\d+)?", job_id):
            yield job_id
        return
    for part in found[2].split(","):
        first, _, last = part.partition("-")
        for element in range(int(first), int(last or first) + 1):
            yield f"{found[1]}_{element}"


def _age_s(moment: str) -> float:
    """Seconds since Slurm's local time; 0 where it names none."""
    try:
        return time.time() - time.mktime(time.strptime(moment, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return 0.0


def _said(reason: str) -> str:
    return "" if reason == "None" else reason


def _squeue(options: list[str], env: dict[str, str]) -> list[str] | None:
    """Lines of squeue; None where it does not answer. That it knows none of the jobs is an answer."""
    done = _call(["squeue", *options], env)
    if isinstance(done, str) or (done.returncode and "Invalid job id" not in done.stderr):
        return None
    return _nonempty(done.stdout)


def _lines(command: list[str], env: dict[str, str]) -> list[str] | None:
    """Output lines; None where the command is missing, fails or takes too long."""
    done = _call(command, env)
    return None if isinstance(done, str) or done.returncode else _nonempty(done.stdout)


def _call(command: list[str], env: dict[str, str], timeout_s: float = QUERY_TIMEOUT_S) -> subprocess.CompletedProcess[str] | str:
    """A finished command, or why it could not be run."""
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_s, env=env,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"{command[0]} does not answer within {timeout_s:.0f} s"
    except OSError as error:
        return f"{command[0]}: {error.strerror or error}"


def _nonempty(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]
