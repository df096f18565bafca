"""A sweep on the development cluster with a real MLflow server, things that go wrong, and what must hold afterwards.

The tests of faults and the soak (``make soak``) share it.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow

from lcbench.runs.forkserver import RANK_NAME, SERVER_NAME
from lcbench.runs.jobs import SweepStatus, Watch
from lcbench.runs.settle import settled
from lcbench.runs.store import Sweep

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "devcluster" / "devcluster"
CELLS = [
    "cp=ring,ulysses", "mask=full,causal", "seqlen=64", "scale=1x2", "heads=2x2x8", "dtype=float64",
    "measure.warmup=0", "measure.min_iterations=2", "measure.max_iterations=3", "measure.budget_s=0.2", "measure.precision=0.5",
    "measure.blocks=2",
]  # fmt: skip


def lcbench(command: str, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"lcbench.{command}", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def wait_until(condition: Callable[[], Any], seconds: float = 120, every: float = 0.1) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(every)
    return found


def processes(*words: str) -> list[int]:
    """Processes whose command line holds all of these words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words) and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def ranks(folder: Path) -> list[int]:
    """Ranks at work on a sweep, which have the command line of the agent that they were forked by."""
    return [pid for pid in processes(str(folder)) if _name_of(pid).startswith(RANK_NAME)]


def agents(folder: Path) -> list[int]:
    """Processes of the jobs of a sweep that are neither ranks nor fork them."""
    found = processes("submitit.core._submit", str(folder))
    return [pid for pid in found if not _name_of(pid).startswith((RANK_NAME, SERVER_NAME))]


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def kill(*pids: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def descendants(pid: int) -> list[int]:
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid, *(d for child in children for d in descendants(int(child)))]


class Server:
    """A real MLflow server, as ``make mlflow`` starts it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {**os.environ, "LCBENCH_MLFLOW_DIR": str(self.folder), "LCBENCH_MLFLOW_PORT": str(self.port)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen([ROOT / "slurm" / "mlflow.sh"], env=environment, stdout=log, stderr=log)
        wait_until(self._answers, 180)  # on a machine that is busy with everything else

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self.process is not None:
            kill(*descendants(self.process.pid))
            self.process.wait()
            self.process = None


class TooLate(AssertionError):
    """The sweep ended before what was waited for came."""


class Stage:
    """One sweep in two jobs.

    Args:
        server: where it publishes.
        cells: how many it has, a multiple of 4.
    """

    def __init__(self, results: Path, server: Server, environment: dict[str, str], seed: int, *more: str, cells: int = 24) -> None:
        self.sweep, self.server, self.environment, self.cells = Sweep(results, "faults"), server, environment, cells
        self.random = random.Random(seed)
        self.command = [
            *CELLS, f"seed=range({cells // 4})", f"pack.max_cells={cells // 2}", "sweep=faults", f"results={results}",
            "site=devcluster", f"tracking_uri={server.uri}", *more,
        ]  # fmt: skip

    def run(self, *more: str) -> subprocess.CompletedProcess[str]:
        return lcbench("sweep", *self.command, *more, environment=self.environment)

    def begin(self, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "lcbench.sweep", *self.command, *more], cwd=ROOT, env=self.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def measured(self) -> dict[str, float]:
        """When each cell got its good result."""
        if not self.sweep.exists():
            return {}
        found = ((i, a) for i in self.sweep.entries() for a in self.sweep.attempts(i))
        return {i: a.finished_at for i, a in found if a.status == "ok"}

    def reach_a_random_moment(self, after: int = 0) -> None:
        """Wait until a random number of cells, more than ``after``, is done and a random while has passed."""
        last = self.cells - self.cells // 8
        count = self.random.randint(min(after + 1, last), max(self.cells * 5 // 8, min(after + self.cells // 5, last)))
        self._before_the_end(lambda: len(self.measured()) >= count)
        time.sleep(self.random.random())

    def _before_the_end(self, condition: Callable[[], Any], seconds: float = 480) -> Any:
        """Wait for something that a sweep which has ended cannot give any more; longer than a job's time limit."""

        def found() -> Any:
            seen = condition()
            standing = None if seen or not self.sweep.exists() else self.standing()
            if standing is not None and standing.packs and standing.ended and not condition():
                raise TooLate
            return seen

        return wait_until(found, seconds, every=0.3)

    def standing(self) -> SweepStatus:
        saved = dict(os.environ)
        os.environ.update(self.environment)
        try:
            return settled(Watch(self.sweep))
        finally:
            os.environ.clear()
            os.environ.update(saved)

    def bring_to_its_end(self, tries: int = 4) -> int:
        """The same command, until it says that all is well; how often it took."""
        said = ""
        for number in range(1, tries + 1):
            done = self.run("wait=true")
            said = done.stdout[-3000:] + done.stderr[-3000:]
            if done.returncode == 0 and self.standing().ended and len(self.measured()) == len(self.sweep.entries()):
                return number
            self.do_as_told(done.stderr)
        raise AssertionError(f"not at its end after {tries} times the same command:\n{said}")

    def do_as_told(self, said: str) -> None:
        """Release jobs that the command names as held, and take drained nodes back.

        A controller that was killed before it had saved that a job runs starts it a second time; then Slurm drains the node for a
        duplicate job and holds the job, until a person helps.
        """
        for job in re.findall(r"scontrol release (\S+)", said):
            drained = subprocess.run(
                ["sinfo", "-h", "-t", "drain", "-o", "%N"], env=self.environment, capture_output=True, text=True
            )
            for command in (f"scontrol update NodeName={drained.stdout.strip()} State=RESUME", f"scontrol release {job}"):
                subprocess.run(command.split(), env=self.environment, capture_output=True)

    def check(self, before: dict[str, float], allowed: set[str]) -> None:
        """Each cell has one current result, nothing that was measured is lost or measured again, MLflow agrees, and what failed on
        the way is of an ``allowed`` class.
        """
        entries = self.sweep.entries()
        assert len(entries) == self.cells
        for cell_id in entries:
            attempts = self.sweep.attempts(cell_id)
            assert [a.status for a in attempts].count("ok") == 1, [(a.number, a.status, a.failure) for a in attempts]
            assert attempts[-1].status == "ok"
            assert not self.sweep.running(cell_id)
            assert max(attempts[-1].checks["errors"].values()) <= 1e-12
            if cell_id in before:
                assert attempts[-1].finished_at == before[cell_id]
        classes = {a.failure.kind for i in entries for a in self.sweep.attempts(i) if a.failure}
        assert classes <= allowed, classes
        assert not self.sweep.look().damaged
        # The command that brought it to its end has published it.
        again = lcbench("sync", self.sweep.name, "--results", str(self.sweep.root), environment=self.environment)
        assert again.stdout.startswith("0 cells published"), again.stdout + again.stderr
        client = mlflow.MlflowClient(tracking_uri=self.server.uri)
        experiment = client.get_experiment_by_name("lcbench")
        assert experiment is not None
        where = f"tags.`lcbench.sweep_id` = '{self.sweep.manifest()['id']}'"
        runs = client.search_runs([experiment.experiment_id], where, max_results=1000)
        children = {r.data.tags["lcbench.cell_id"]: r for r in runs if "lcbench.cell_id" in r.data.tags}
        assert len(runs) == len(entries) + 1
        assert set(children) == set(entries)
        for cell_id, run in children.items():
            newest = self.sweep.attempts(cell_id)[-1]
            assert run.data.tags["lcbench.attempt"] == str(newest.number)
            assert run.data.metrics["time/forward/median_ms"] == newest.metrics["time/forward/median_s"] * 1e3
            assert run.info.status == "FINISHED"
        (parent,) = (r for r in runs if "lcbench.cell_id" not in r.data.tags)
        assert parent.data.tags["lcbench.cells.ok"] == str(self.cells)

    # -- what goes wrong ------------------------------------------------------------------------------------------------

    def kill_a_worker(self) -> None:
        kill(self.random.choice(self._before_the_end(lambda: ranks(self.sweep.folder))))

    def kill_an_agent(self) -> None:
        kill(self.random.choice(self._before_the_end(lambda: agents(self.sweep.folder))))

    def kill_slurmd(self) -> None:
        """A node dies with all that runs on it; a health check says so (Slurm by itself takes minutes), and it is back later."""
        nodes = self._before_the_end(self.nodes_in_use)
        node = self.random.choice(nodes)
        pids = {self._daemon(node), *processes(f"slurmstepd: [{self.job_on(node)}.")}
        kill(*(d for pid in pids for d in descendants(pid)))
        update = ["scontrol", "update", f"NodeName={node}"]
        subprocess.run([*update, "State=DOWN", "Reason=dead"], env=self.environment, check=True)
        time.sleep(2)
        self.restart_daemons()
        subprocess.run([*update, "State=RESUME"], env=self.environment, capture_output=True)  # it may have come back by itself

    def kill_slurmctld(self) -> None:
        kill(self._daemon("slurmctld"))
        time.sleep(3)
        self.restart_daemons()

    def kill_slurmdbd(self) -> None:
        kill(self._daemon("slurmdbd"))
        time.sleep(3)
        self.restart_daemons()

    def kill_the_server(self) -> None:
        self.server.kill()
        time.sleep(2)
        self.server.start()

    def requeue(self) -> None:
        job = self.random.choice(self.jobs())
        subprocess.run(["scontrol", "requeue", job], env=self.environment, check=True)

    def scancel(self) -> None:
        subprocess.run(["scancel", self.random.choice(self.jobs())], env=self.environment, check=True)

    def jobs(self) -> list[str]:
        """Jobs of the sweep that run."""
        return list(self._before_the_end(lambda: [p.job_id for p in self.standing().packs if p.state == "RUNNING"]))

    def nodes_in_use(self) -> list[str]:
        return self._squeue("%N", *self.jobs())

    def job_on(self, node: str) -> str:
        return self._squeue("%A", "--nodelist", node)[0]

    def _squeue(self, form: str, *which: str) -> list[str]:
        chosen = list(which) if which and which[0].startswith("-") else ["-j", ",".join(which)]
        text = subprocess.run(
            ["squeue", "-h", "-t", "R", "-o", form, *chosen], env=self.environment, capture_output=True, text=True
        )
        return text.stdout.split()

    def preempt(self) -> None:
        """Somebody's urgent job takes a node."""
        node = self.random.choice(self._before_the_end(self.nodes_in_use))
        command = ["sbatch", "-p", "urgent", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    @property
    def cluster(self) -> Path:
        """The folder of the cluster."""
        return Path(self.environment["SLURM_CONF"]).parent

    def _daemon(self, name: str) -> int:
        """Pid of slurmctld, of slurmdbd, or of a node's slurmd; of this cluster, not of another beside it."""
        return int((self.cluster / "run" / f"{name}.pid").read_text())

    def restart_daemons(self) -> None:
        environment = {**self.environment, "LCBENCH_DEVCLUSTER_DIR": str(self.cluster)}
        subprocess.run([SCRIPT, "start"], env=environment, check=True, capture_output=True)


# What may go wrong, and how the attempts in flight may be classed then.
FAULTS: dict[str, set[str]] = {
    "kill_a_worker": {"crash"}, "kill_an_agent": {"crash"}, "kill_slurmd": {"node-fail"},
    "kill_slurmctld": {"preempted"},  # of a job that Slurm, which forgot that it runs, starts again
    "kill_slurmdbd": set(), "kill_the_server": set(), "requeue": {"preempted"}, "preempt": {"preempted"}, "scancel": {"cancelled"},
}  # fmt: skip
