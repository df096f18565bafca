"""On a machine with a CUDA device: every kernel that runs there, checked on every mask and then timed. ``make gpu-check``.

Each kernel has a process of its own. First they work several at once: a pass of what will be timed, so that it is compiled
before the clock, then the checks. Then one process at a time uses the device: the first row of every kernel is timed, then the
second. Each timed row has the whole check of a sweep's cell; of first passes only the seconds are kept. A row is written as soon as
it is there. A process that dies, or says nothing for ``--hang`` seconds, costs one row, and a new process goes on with the next.
``--seconds`` is what all may take: a row that would not fit is left out, and named. Writes ``results/<gpu>/gpu-check.json`` and
``.md``; exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch

from lcbench.grid.paths import REPOSITORY
from lcbench.kernels.base import Kernel, refusal
from lcbench.measure.cores import usable_cores
from lcbench.measure.environment import describe
from lcbench.measure.peak import entry_of, measured_peak
from lcbench.problem import Problem, Scale
from lcbench.testing.gpu_rows import BOUNDS, Plan, Row, Task, check_tasks, devices, first_tasks, guarded, kernels, time_tasks

SECONDS = 540.0
HANG_S = 120.0
# How long a row may take beyond the time in which rows begin.
GRACE_S = 60.0
# What first passes and checks may take of all seconds; the rest is for timing.
CHECK_PART = 0.4
AT_ONCE = min(8, usable_cores())
# A process may be silent for longer before its first word: it imports torch and libraries, and others do the same.
IMPORT_S = 60.0
# Processes of one job that may die or hang before the rest of its rows is given up.
DEATHS = 8
NO_TIME = "no time left"


@dataclass
class Job:
    """What one process at a time works through: the rows of a kernel, or without one the device.

    Attributes:
        ends: when no further row of a part begins (``time.monotonic``).
        done: rows that are there; a new process of the job skips them.
        deaths: processes of it that did not come to their end.
    """

    name: str = ""
    kernel: Kernel | None = None
    ends: dict[str, float] = field(default_factory=dict)
    peak_tflops: float = 0.0
    done: int = 0
    deaths: int = 0

    def tasks(self, plan: Plan) -> Iterator[tuple[str, Task]]:
        """All its rows to be, each with its part."""
        assert self.kernel is not None
        for task in first_tasks(self.name, self.kernel, plan):
            yield "first", task
        for task in check_tasks(self.name, self.kernel, plan):
            yield "check", task
        for task in time_tasks(self.name, self.kernel, plan, self.peak_tflops):
            yield "time", task


@dataclass
class Child:
    """A process at work, as its parent sees it: what row of which part it is at, and since when. ``asks``: which row it wants the
    device alone for; None if it does not wait.
    """

    job: Job
    process: Any
    patience_s: float
    part: str = "first"
    doing: Row = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    asks: int | None = None
    ended: bool = False


class Pace:
    """How long rows of a kernel take: a part that no length changes, such as what the host does in a check, and one that grows with
    the work.
    """

    def __init__(self) -> None:
        self._seconds: dict[float, float] = {}  # the most of a size

    def learn(self, size: float, seconds: float) -> None:
        self._seconds[size] = max(seconds, self._seconds.get(size, 0.0))

    def expected(self, size: float) -> float:
        """On the line through the smallest and the largest row; 0 of a first row."""
        if not self._seconds:
            return 0.0
        small, large = min(self._seconds), max(self._seconds)
        if small == large:  # all of it may grow, and none of it may
            return self._seconds[large] * max(1.0, size / large)
        same, grown = self._seconds[small], max(self._seconds[large] - self._seconds[small], 0.0)
        return same + grown * size / large


class Report:
    """What was found, written whenever something is added."""

    def __init__(self, plan: Plan, out: Path | None, say: Callable[[str], None]) -> None:
        self._out, self._say, self._began = out, say, time.time()
        self.found: dict[str, Any] = {
            "provenance": {}, "measured_at": self._began, "seconds": 0.0, "settings": plan.settings, "measured_peak_tflops": 0.0,
            "bounds": BOUNDS, "absent": {}, "first_passes": [], "checks": [], "timings": [],
        }  # fmt: skip

    def add(self, job: Job, part: str, row: Row) -> None:
        found = self.found
        if job.kernel is None:
            found |= row
        elif "absent" in row:
            found["absent"][job.name] = row["absent"]
        elif part == "first":
            found["first_passes"].append(row)
        elif part == "check":
            found["checks"].append(row)
            if row["status"] in ("wrong", "failed"):
                self._say(f"{job.name}: {row['mask']} {row['heads']}: {row['status']}: {row.get('reason') or row['errors']}")
        else:
            found["timings"].append(row)
            self._say(_line(row))
        self.write()

    @property
    def folder(self) -> Path:
        return self._out or folder(self.found["provenance"]["device"])

    def write(self) -> None:
        found, out = self.found, self.folder
        found["seconds"] = time.time() - self._began
        out.mkdir(parents=True, exist_ok=True)
        for name, text in (("gpu-check.json", json.dumps(found, indent=1) + "\n"), ("gpu-check.md", markdown(found))):
            written = out / f".{name}"
            written.write_text(text)
            written.replace(out / name)


def check(plan: Plan, cast: dict[str, Kernel], report: Report, *, seconds: float, hang_s: float = HANG_S) -> None:
    """Check, then time, each kernel that runs here."""
    ends = time.monotonic() + seconds
    for found in work_through([Job()], plan, 1, hang_s):
        report.add(*found)
    peak = report.found["measured_peak_tflops"]
    checked = time.monotonic() + CHECK_PART * (ends - time.monotonic())
    by_part = {"first": checked, "check": checked, "time": ends}
    for found in work_through([Job(name, kernel, by_part, peak) for name, kernel in cast.items()], plan, AT_ONCE, hang_s):
        report.add(*found)


def work_through(jobs: list[Job], plan: Plan, at_once: int, hang_s: float) -> Iterator[tuple[Job, str, Row]]:
    """Rows of all jobs as they come, each with its part. A process that dies or hangs costs the row that it was at.

    At most ``at_once`` processes work. When all that are left ask for the device, one gets it: the one whose row is the earliest
    among those of its kernel.
    """
    context = get_context("spawn")
    waiting, running = list(reversed(jobs)), dict[Connection, Child]()
    try:
        while waiting or running:
            while waiting and sum(child.asks is None for child in running.values()) < at_once:
                job = waiting.pop()
                ours, theirs = context.Pipe()
                process = context.Process(target=_child, args=(job, plan, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = Child(job, process, patience_s=hang_s + IMPORT_S)
            for connection in wait(list(running), timeout=0.2):
                assert isinstance(connection, Connection)
                child = running[connection]
                child.heard, child.patience_s = time.monotonic(), hang_s
                try:
                    kind, what = connection.recv()
                except (EOFError, ConnectionResetError):
                    del running[connection]
                    yield from _ended(child, waiting)
                    continue
                if kind == "asks":
                    child.asks = what
                elif kind == "begins":
                    child.part, child.doing = what
                elif kind == "row":
                    child.job.done, child.doing = child.job.done + 1, {}
                    yield child.job, *what
                else:
                    child.ended = True
            for child in running.values():
                late = child.asks is None and time.monotonic() - child.heard > child.patience_s
                if late or (child.doing and time.monotonic() > child.job.ends[child.part] + GRACE_S):
                    child.process.kill()  # its end of the pipe closes
                    child.doing |= {
                        "hang": f"hang: nothing for {child.patience_s:.0f} s" if late else "hang: beyond the time of all rows"
                    }
            if running and not waiting and all(child.asks is not None for child in running.values()):
                connection = min(running, key=lambda c: (running[c].asks, jobs.index(running[c].job)))
                running[connection].asks, running[connection].heard = None, time.monotonic()
                with suppress(OSError):  # it has died; its end is seen above
                    connection.send("go")
    finally:
        for child in running.values():
            child.process.kill()


def _ended(child: Child, waiting: list[Job]) -> Iterator[tuple[Job, str, Row]]:
    """After a process has gone: a row for what it was at, and another process for the rest."""
    child.process.join()
    if child.ended:
        return
    doing, job = dict(child.doing), child.job
    reason = doing.pop("hang", f"the process ended with code {child.process.exitcode}")
    job.deaths += 1
    if job.kernel is None:
        raise RuntimeError(f"the device could not be looked at: {reason}")
    if not doing and not job.done:
        yield job, "first", {"absent": f"{reason} while it was imported"}
        return
    if doing:
        job.done += 1
        yield job, child.part, doing | {"status": "failed", "reason": reason}
    if job.deaths < DEATHS:
        waiting.append(job)
    else:
        rest = {"kernel": job.name, "mask": "the rest", "seqlen": 0, "heads": "", "dtype": ""}
        yield job, "time", rest | {"status": "not reached", "reason": f"{job.deaths} processes ended before their time"}


def _child(job: Job, plan: Plan, parent: Connection) -> None:
    """A process's work: the rows of a job from the first that is not done."""
    if job.kernel is None:
        peak = measured_peak(getattr(torch, plan.dtype), plan.device)
        parent.send(("row", ("device", {"provenance": describe(plan.device), "measured_peak_tflops": peak})))
        _leave(parent)
    problem = Problem(plan.tokens, plan.heads, Scale(1, 1), plan.dtype, "forward")
    if reason := refusal(job.kernel, problem, plan.device):
        parent.send(("row", ("first", {"absent": reason})))
        _leave(parent)
    pace = Pace()
    for number, (part, task) in islice(enumerate(job.tasks(plan)), job.done, None):
        if task.alone:
            parent.send(("asks", number))
            parent.recv()
        left, expected = job.ends[part] - time.monotonic(), pace.expected(task.size) if task.size else 0.0
        if left <= expected:
            reason = NO_TIME if left <= 0 else f"{left:.0f} s are left, and it would take {expected:.0f} s"
            parent.send(("row", (part, task.head | {"status": "not reached", "reason": reason})))
            continue
        parent.send(("begins", (part, task.head)))
        begun = time.monotonic()
        row = guarded(task.run)
        if task.size and row["status"] == "ok":  # what was compiled in it will not be again
            pace.learn(task.size, time.monotonic() - begun - row["metrics"]["time/first_pass_s"])
        parent.send(("row", (part, task.head | row)))
        if plan.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # an error that stays: what is left needs another process
                os._exit(1)
    _leave(parent)


def _leave(parent: Connection) -> NoReturn:
    parent.send(("end", None))
    parent.close()
    os._exit(0)  # a library's own clean-up may hang


def _line(row: Row) -> str:
    head = f"{row['kernel']:<20}{row['mask']:<18}{row['seqlen']:>7}  "
    if row["status"] != "ok":
        return f"{head}{row['status']}: {str(row['reason'])[:90]}"
    metrics = row["metrics"]
    for phase, rate in row["tflops"].items():
        part = row[f"{phase}_of_measured_peak"]
        head += f"{phase} {metrics[f'time/{phase}/median_s'] * 1e3:9.3f} ms {rate:6.1f} TFLOP/s {part:4.0%}  "
    peak = metrics.get("memory/peak_bytes")
    return head if peak is None else f"{head}peak {peak / 2**20:8.1f} MiB"


def markdown(found: dict[str, Any]) -> str:
    """The report as tables."""
    provenance = found["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    lines = [
        f"# Kernels on {provenance['device']}", "",
        f"Commit {provenance['git']['commit']}{' with changes' if provenance['git']['dirty'] else ''}; {versions}. "
        f"Matrix product measured at {found['measured_peak_tflops']:.0f} TFLOP/s. {found['seconds']:.0f} s in all.", "",
        "| kernel | mask | tokens | forward TFLOP/s | of peak | backward TFLOP/s | of peak | peak MiB | check s | |",
        "| --- " * 10 + "|",
    ]  # fmt: skip
    for row in found["timings"]:
        cells = ["", "", "", "", "", ""]
        if row["status"] == "ok":
            for i, phase in enumerate(("forward", "backward")):
                if phase in row["tflops"]:
                    cells[2 * i : 2 * i + 2] = [f"{row['tflops'][phase]:.1f}", f"{row[f'{phase}_of_measured_peak']:.0%}"]
            peak = row["metrics"].get("memory/peak_bytes")
            cells[4:] = ["" if peak is None else f"{peak / 2**20:.0f}", f"{row['metrics']['time/check_s']:.1f}"]
        why = "" if row["status"] == "ok" else f"{row['status']}: {str(row['reason']).splitlines()[0][:120]}"
        lines.append(f"| {' | '.join([row['kernel'], row['mask'], str(row['seqlen']), *cells, why])} |")
    lines += [
        "",
        "Every rate is of a row that passed the whole check of a sweep's cell. Small masks against the reference:",
        "",
    ]
    lines += ["| kernel | masks checked | wrong | failed | not reached | first passes s |", "| --- " * 6 + "|"]
    for name in dict.fromkeys(row["kernel"] for row in found["checks"]):
        own = [row["status"] for row in found["checks"] if row["kernel"] == name]
        counts = " | ".join(str(own.count(status)) for status in ("ok", "wrong", "failed", "not reached"))
        compiled = sum(row.get("seconds", 0.0) for row in found["first_passes"] if row["kernel"] == name)
        lines.append(f"| {name} | {counts} | {compiled:.0f} |")
    lines += ["", "Not here:", "", *(f"- {name}: {reason}" for name, reason in found["absent"].items())]
    return "\n".join(lines) + "\n"


def folder(device: str) -> Path:
    """results/<gpu>: by the name of its conf/device entry, else its own."""
    entry = entry_of(devices(), device)
    return REPOSITORY / "results" / (entry["name"] if entry else "".join(c if c.isalnum() else "-" for c in device.lower()))


def failed(found: dict[str, Any]) -> bool:
    return any(
        row["status"] in ("wrong", "failed") and "oom" not in str(row.get("reason"))
        for row in found["first_passes"] + found["checks"] + found["timings"]
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcbench.testing.gpu_check", description=__doc__)
    parser.add_argument("kernels", nargs="*", help="names of kernels; all there are if not said")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"what all may take (default: {SECONDS:.0f})")
    parser.add_argument("--hang", type=float, default=HANG_S, help=f"a row may take so many seconds (default: {HANG_S:.0f})")
    parser.add_argument("--folder", action="store_true", help="only print where results of this machine's GPU belong")
    parser.add_argument("--out", type=Path, help="folder of the report (default: results/<gpu>)")
    options = parser.parse_args(arguments)
    if unknown := set(options.kernels) - set(kernels()):
        print(f"error: {', '.join(sorted(unknown))} is not one of {', '.join(kernels())}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device; torch sees none", file=sys.stderr)
        return 2
    if options.folder:
        print(folder(torch.cuda.get_device_name(0)))
        return 0
    plan = Plan(torch.device("cuda", 0))
    report = Report(plan, options.out, partial(print, flush=True))
    check(plan, kernels(options.kernels or None), report, seconds=options.seconds, hang_s=options.hang)
    found = report.found
    print("\n".join(["", *(_line(row) for row in found["timings"] if row["status"] == "ok"), "", f"written to {report.folder}"]))
    return 1 if failed(found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
