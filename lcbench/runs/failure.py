"""Why an attempt failed: its class and the first cause in one line, from what its processes left behind.

A pack's ``failures`` folder holds, per attempt, what each rank said of itself before it ended; of a later block of timings
``.block-<b>`` follows the attempt::

    <cell id>.attempt-<n>.rank-<r>.json        an exception: {"kind", "cause", "rank", "time"}
    <cell id>.attempt-<n>.rank-<r>.hang.txt    the stacks of a rank of a gang that hung (empty: it did not)
    <cell id>.attempt-<n>.ended.json           from the agent, which ended the gang: {"kind", "cause", "rank", "time"}
    exit.<node>.<gang>.<rank>.json             from the agent: {"exitcode", "rank", "pid", "time", "oom", "said"}

When one rank dies, others see broken connections and are ended; those consequences never count as the cause while there is
an earlier one.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcbench.runs.attempt import CAUSE_LENGTH, Failure, Running
from lcbench.runs.files import read_or_set_aside
from lcbench.runs.squeue import NOISE as NOISE_OF_SLURM
from lcbench.runs.squeue import word_of

# Slurm's final states (man sacct) and our classes.
SLURM_STATES = {
    "OUT_OF_MEMORY": "oom", "TIMEOUT": "timeout", "DEADLINE": "timeout", "NODE_FAIL": "node-fail",
    "BOOT_FAIL": "node-fail", "PREEMPTED": "preempted", "CANCELLED": "cancelled", "FAILED": "crash",
    "REVOKED": "cancelled", "COMPLETED": "crash", "REQUEUED": "preempted",
}  # fmt: skip
# A job that ends so before any of its cells began has not started at all.
NO_START = ("FAILED", "COMPLETED", "ENDED")
OOM_TYPES = ("OutOfMemoryError", "MemoryError")
COMM_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
COMM_WORDS = ("NCCL", "gloo", "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
# Lines in which srun, slurmstepd, the shell or the kernel say that a process was killed.
DEATHS = [
    re.compile(pattern)
    for pattern in (
        r"tasks? [\d,-]+: (?!Exited|Terminated|running)[A-Z][\w ]+",
        r"line \d+: +\d+ (Killed|Aborted|Segmentation fault|Bus error)", r"^\S+ \(pid \d+\): \w+",
        r"[Dd]etected \d+ oom[-_ ]kill", r"OOM Killed", r"Out of memory: Killed process", r"was killed by SIG",
    )
]  # fmt: skip
OOM_DEATHS = re.compile(r"(?i)oom[-_ ]kill|out of memory: killed|: out of memory")
# Lines that follow from the end of something, and say nothing of why.
NOISE = [
    NOISE_OF_SLURM,
    *(re.compile(pattern)
    for pattern in (
        r"^srun: error: .*(Exited with exit code|Terminated)", r"^srun: (launch/|Force Terminated|Job step aborted|Terminating)",
        r"^slurmstepd.*\*\*\*.*CANCELLED", r"^submitit (INFO|WARNING)", r"^submitit ERROR .*triggered an exception",
        r"death signal, shutting down", r"closing signal SIG",
    )),
]  # fmt: skip
# Exceptions with which a process ends that was told to, or whose child failed.
FOLLOWING = ("SignalException", "SystemExit", "ChildFailedError", "KeyboardInterrupt", "FailedJobError")
CHAINED = ("The above exception was the direct cause", "During handling of the above exception")
ERROR_WORDS = ("error", "fail", "not found", "no such", "unrecognized")
OOM_WORDS = ("CUDA out of memory", "can't allocate memory", "Cannot allocate memory")


def classify_exception(error: BaseException) -> Failure:
    """Class and first cause of an exception. Types are compared by name, so torch need not be loaded."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    names = [c.__name__ for e in (error, first) for c in type(e).__mro__]
    message = str(first)
    if any(n in OOM_TYPES for n in names) or any(w in message for w in OOM_WORDS):
        kind = "oom"
    elif any(n in COMM_TYPES for n in names) or (isinstance(first, RuntimeError) and _is_communication(message)):
        kind = "nccl"
    elif isinstance(first, KeyboardInterrupt):
        kind = "cancelled"
    else:
        kind = "crash"
    line = message.strip().splitlines()[0] if message.strip() else ""
    return Failure(kind, f"{type(first).__name__}: {line}"[:CAUSE_LENGTH])


@dataclass(frozen=True)
class Found:
    """What an attempt's processes left behind. ``may_follow``: the end of their job may have caused it."""

    failure: Failure
    may_follow: bool = False


def stem_of(running: Running) -> str:
    """The beginning of the names of files about an attempt, or about a later block of it."""
    return f"{running.cell_id}.attempt-{running.number}" + (f".block-{running.block}" if running.block > 1 else "")


@dataclass(frozen=True)
class _Left:
    """The files about an attempt or a later block: what agents and ranks said of it, and how ranks of its time died."""

    ended: list[dict[str, Any]]  # by agents, which ended the gang
    said: list[dict[str, Any]]  # by ranks, the earliest first
    hung: list[Path]  # stacks, by rank
    died: list[dict[str, Any]]  # exits of ranks that nobody ended, the earliest first

    @classmethod
    def of(cls, folder: Path, stem: str, since: float) -> _Left:
        exits = [e for e in _records(folder, "exit.*.json") if e["time"] >= since and not _is_consequence(e)]
        return cls(
            _records(folder, f"{stem}.ended.json"),
            sorted(_records(folder, f"{stem}.rank-*.json"), key=_time),
            sorted((p for p in folder.glob(f"{stem}.rank-*.hang.txt") if p.stat().st_size), key=_rank),
            sorted(exits, key=_time),
        )


def first_failure(folder: Path, stem: str, since: float) -> Found | None:
    """The first cause of an attempt or of a later block that never ended, from the files of its ranks and agents, whose names
    begin with ``stem``; None if they left none.

    ``since``: when it began, in seconds since the epoch; earlier deaths belong to others.
    """
    left = _Left.of(folder, stem, since)
    # From the surest to what may only have followed from something else.
    return _ended_by_agent(left) or _said_by_rank(left) or _died_in_silence(left) or _hung(left) or _lost_connection(left)


def _ended_by_agent(left: _Left) -> Found | None:
    for ended in left.ended[:1]:
        rank, place = _where(left.hung, ended.get("rank")) if ended["kind"] == "hang" else (None, "")
        return Found(Failure(ended["kind"], f"{ended['cause']}{place}"[:CAUSE_LENGTH], rank))
    return None


def _said_by_rank(left: _Left) -> Found | None:
    """The first exception that is not just a broken connection to a rank that had died before."""
    return next((Found(_failure(said)) for said in left.said if said["kind"] != "nccl"), None)


def _died_in_silence(left: _Left) -> Found | None:
    # A rank that hung, or said why it ends, exits with a code of its own, which the agent saw too.
    spoke = {said["rank"] for said in left.said} | {_rank(path) for path in left.hung}
    silent = [exit_ for exit_ in left.died if exit_["rank"] not in spoke]
    if not silent:
        return None
    first = next((exit_ for exit_ in silent if exit_.get("oom")), silent[0])
    code = int(first["exitcode"])
    why = first.get("oom") or first.get("said") or ""
    # A communication library's own watchdog ends the process, with a word on stderr.
    kind = "oom" if first.get("oom") else "nccl" if code == -signal.SIGABRT and _is_communication(why) else "crash"
    cause = f"rank {first['rank']} {_exit_text(code)}{f': {why}' if why else ''}"[:CAUSE_LENGTH]
    return Found(Failure(kind, cause, first["rank"]), may_follow=kind != "oom" and code < 0)


def _hung(left: _Left) -> Found | None:
    """Stacks of a rank whose own timer ended it."""
    if not left.hung:
        return None
    rank, place = _where(left.hung, None)
    return Found(Failure("hang", f"not at its end after hang.max_s{place}"[:CAUSE_LENGTH], rank))


def _lost_connection(left: _Left) -> Found | None:
    return Found(_failure(left.said[0]), may_follow=True) if left.said else None


def stacks(folder: Path, stem: str) -> Iterator[str]:
    """The stacks of all threads of all ranks of a gang that hung, by rank."""
    for path in sorted(folder.glob(f"{stem}.rank-*.hang.txt"), key=_rank):
        yield f"--- stacks of rank {_rank(path)} when it was ended\n{path.read_text().rstrip() or '(it left none)'}\n"


def from_slurm_state(state: str, began: bool, words: str) -> Failure:
    """Class of a cell that its job left without a result, when the job ended in this state (``CANCELLED by 0`` and the like
    included). ``began``: whether any cell of the job did. ``words``: the job's own last ones.
    """
    word = word_of(state)
    said = f": {words}" if words and word in NO_START else ""
    if word in NO_START and OOM_DEATHS.search(words):
        return Failure("oom", f"its job ended as {state}{said}"[:CAUSE_LENGTH])
    if word in NO_START and not began:
        return Failure("no-start", f"its job ended as {state} before any cell began{said}"[:CAUSE_LENGTH])
    return Failure(SLURM_STATES.get(word, "crash"), f"its job ended as {state}{said}"[:CAUSE_LENGTH])


def job_words(folder: Path, job_id: str) -> str:
    """The line, of all that the nodes of a job wrote, that says most about why the job ended."""
    logs = [
        path for path in folder.glob(f"{job_id}_*_log.*") if re.fullmatch(rf"{re.escape(job_id)}_\d+_log\.(err|out)", path.name)
    ]
    # What is on stderr says more, and node 0's, in which srun's words are.
    logs.sort(key=lambda path: (path.suffix != ".err", int(path.name.removeprefix(f"{job_id}_").partition("_")[0])))
    return _best(said for path in logs for said in _weighed(_read(path)))


def last_error(log: Path) -> str:
    """The line of a log that says most about why its process ended."""
    return error_in(_read(log))


def error_in(text: str) -> str:
    """The line of a text that says most about why a process ended: who was killed, else the first exception of the last traceback
    that follows from no other, else the last line that speaks of an error, else the last line.
    """
    return _best(_weighed(text))


def tells_of_a_kill(cause: str) -> bool:
    """Whether a cause says that a process was killed. Such a death breaks the connections of others."""
    return any(pattern.search(cause) for pattern in DEATHS)


def _best(said: Iterable[tuple[int, str]]) -> str:
    """Of lines with their weights, the first of those that weigh most."""
    found = list(said)
    return min(found, key=lambda weighed: weighed[0])[1] if found else ""


def _weighed(text: str) -> list[tuple[int, str]]:
    """The lines of a text that are worth showing, as (weight, line), the weightiest of which is 0; of one weight the one to show
    comes first.
    """
    lines, exceptions = _without_tracebacks(text)
    # The shell repeats the whole command that was killed.
    deaths = [
        re.sub(r"^.*line \d+: +(\d+) (.*?) {2,}(\S+).*$", r"\3 (pid \1): \2", line) for line in lines if tells_of_a_kill(line)
    ]
    own = [line for line in exceptions if not line.split(":")[0].endswith(FOLLOWING)]
    plain = [line for line in lines if not any(pattern.search(line) for pattern in NOISE)]
    errors = [line for line in plain if any(word in line.lower() for word in ERROR_WORDS)]
    order = [deaths[:1], own[-1:], errors[-1:], exceptions[-1:], plain[-1:], lines[-1:]]
    return [(weight, line) for weight, found in enumerate(order) for line in found]


def _without_tracebacks(text: str) -> tuple[list[str], list[str]]:
    """(lines outside of Python's tracebacks, what each traceback ends with: of a chain the first, which caused the others)."""
    lines, exceptions, inside, follows = list[str](), list[str](), False, False
    for raw in text.splitlines():
        # Ranks and loggers may put a word before each line.
        bare = re.sub(r"^\[\w+\d*\]:\s?", "", raw)
        line = bare.strip()
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and (not line or bare[:1].isspace() or line.startswith(("|", "+"))):
            continue
        elif inside:
            inside = False
            if not follows:
                exceptions.append(line)
            follows = False
        elif line.startswith(CHAINED):
            follows = True
        elif line:
            lines.append(line)
    return lines, exceptions


def _read(log: Path) -> str:
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""


def _records(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """The records of that pattern."""
    found = (read_or_set_aside(path, dict) for path in folder.glob(pattern))
    return [record for record in found if record is not None]


def _time(record: dict[str, Any]) -> float:
    return float(record["time"])


def _is_communication(words: str) -> bool:
    return any(word in words for word in COMM_WORDS)


def _failure(record: dict[str, Any]) -> Failure:
    return Failure(record["kind"], f"rank {record['rank']}: {record['cause']}", record["rank"])


def _is_consequence(record: dict[str, Any]) -> bool:
    """The agent ends the ranks of a broken gang with SIGTERM."""
    return int(record["exitcode"]) == -signal.SIGTERM


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}"


def _rank(path: Path) -> int:
    return int(path.name.split(".rank-")[1].split(".")[0])


def _where(dumps: list[Path], rank: int | None) -> tuple[int | None, str]:
    """(rank, where it stood in words) of the rank that the others waited for: the one that the marks show, else by the stacks."""
    places = {_rank(path): _stuck(path.read_text()) for path in dumps}
    if rank is None and places:
        # Ranks that wait in a collective hang as well; the one that waits elsewhere is the cause.
        rank = next((r for r, (_, waits) in places.items() if not waits), min(places))
    if rank is None:
        return None, ""
    return rank, f"; rank {rank} stood at {places[rank][0]}" if rank in places else f"; rank {rank} left no stack"


def _stuck(dump: str) -> tuple[str, bool]:
    """Where a faulthandler dump's main thread stood: the innermost line of lcbench, and whether it waits for other ranks.

    The main thread is written last, its innermost frame first.
    """
    last = re.split(r"^(?:Current thread|Thread) ", dump, flags=re.M)[-1]
    frames = [line.strip() for line in last.splitlines() if line.strip().startswith("File ")]
    own = next((f for f in frames if "lcbench" in f), frames[0] if frames else "an unknown place")
    # Either inside torch.distributed, or in the function in which the engine waits for messages, whose frames are not Python's.
    waits = own.endswith(" in wait_all") or any(
        "distributed" in f and "lcbench" not in f for f in frames[: frames.index(own)] if own in frames
    )
    path, _, rest = own.removeprefix('File "').partition('", ')
    return f"{'/'.join(Path(path).parts[-2:])}, {rest}" if rest else own, waits
