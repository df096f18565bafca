"""One node's agent: torch elastic starts a worker per GPU, and the whole gang again when one of them dies."""

from __future__ import annotations

import argparse
import os
import signal
import stat
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from lcbench.grid.values import parse_scale
from lcbench.runs.failure import SLURM_STATES, last_error, stem_of
from lcbench.runs.hang import STACKS_SIGNAL, Watcher
from lcbench.runs.logs import last_words
from lcbench.runs.machine import shown, signal_when_parent_dies
from lcbench.runs.notes import END, STOP, cancelled_cells, ended, forget, read_ending
from lcbench.runs.ownership import mine
from lcbench.runs.pack import KILLS, RESERVE, Pack, forget_secrets
from lcbench.runs.queue import environment, last_incarnation, site_variables
from lcbench.runs.rendezvous import BACKEND, NoRendezvous, innermost, meeting_of, use
from lcbench.runs.settle import close_all, in_flight
from lcbench.runs.store import CAUSE_LENGTH, Failure, Sweep, user_name, write_json
from lcbench.runs.tracking import publish_or_say

# A gang may fail this often, one after the other, without having begun a cell or a later block of timings.
FRUITLESS = 2
# Seconds ahead of the job's time limit at which Slurm warns (it may be a minute earlier), less for short jobs, and the share of
# it in which the cell in flight may still finish.
WARNING_S, WARNING_S_PER_MIN = 120, 15
WARNING_SHARE = 0.6
LOOK_EVERY_S = 1.0
# The kernel counts a kill before the agent sees the death.
OOM_LAG_S = 15.0
PUBLISH_S = 30.0


def run_node(pack: Pack, *, node_rank: int, hosts: list[str], incarnation: str) -> bool:
    """Run this node's workers until every cell was tried. Blocks; True if they all ended well.

    Node 0 closes what an earlier run of the job left open, and after its workers have ended what a dying gang left, and publishes
    to the tracking server.

    Args:
        hosts: names of all nodes of the job, by which the others reach them.
        incarnation: names this run of the job; Slurm may requeue it.
    """
    from torch.distributed.elastic.multiprocessing import Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("LOGNAME", user_name())  # libraries ask for a name, and a uid may have none
    os.environ.update(site_variables(pack.site))
    sweep = Sweep(Path(pack.root), pack.sweep)
    scale = parse_scale(pack.scale)
    logs = pack.folder / "logs" / f"node-{node_rank}"
    logs.mkdir(parents=True, exist_ok=True)
    if node_rank == 0:
        begin_anew(sweep, pack)
    if not _node_is_well(pack, node_rank, scale.gpus_per_node):
        return False
    _watch_workers(sweep, pack, node_rank)
    failure, where = None, "any port"
    try:
        with meeting_of(pack.folder, incarnation, node=node_rank, hosts=hosts) as (meeting, listening):
            where = meeting.endpoint
            use(meeting, listening, node=node_rank, hosts=hosts)
            config = LaunchConfig(
                min_nodes=scale.nodes,
                max_nodes=scale.nodes,
                nproc_per_node=scale.gpus_per_node,
                run_id=f"{incarnation}.{meeting.token('run id')}",
                rdzv_backend=BACKEND,
                rdzv_endpoint=where,
                # Each cell can end a gang so often, and so often again in later blocks of timings: its attempt or its lost block is
                # recorded, and the next gang goes on behind it.
                max_restarts=2 * KILLS * len(pack.cells) + FRUITLESS,
                monitor_interval=0.5,
                logs_specs=_shared_logs(log_dir=str(logs), redirects=Std.ALL),
                local_addr=hosts[node_rank],
            )
            elastic_launch(config, sys.executable)("-u", "-m", "lcbench.runs.worker", str(pack.path), str(node_rank))
    except (NoRendezvous, RendezvousError) as error:
        cause = str(error) if isinstance(error, NoRendezvous) else f"the rendezvous at {where}: {innermost(error)}"
        failure = Failure("no-start", cause[:CAUSE_LENGTH])
        print(f"node {node_rank}: {cause}", file=sys.stderr)
        if node_rank and not ended(pack.folder):
            pack.write_note(END, failure)
    except ChildFailedError as error:
        said = last_error(max(logs.rglob("stderr.log"), key=lambda p: p.stat().st_mtime, default=logs))
        failure = Failure("no-start", f"the gang did not come up: {said or error}"[:CAUSE_LENGTH])
        print(f"node {node_rank}: the gang failed too often: {error}", file=sys.stderr)
    if node_rank == 0:
        close_all(sweep, pack)
        (pack.folder / RESERVE).unlink(missing_ok=True)
        if not ended(pack.folder):  # it may have said already why it stops
            pack.write_note(END, failure)
        if pack.site.get("publish", "nodes") == "nodes":
            # What is left after a while, or a server that is away, is left to the collector.
            publish_or_say(sweep, pack.settings.tracking_uri, budget_s=PUBLISH_S)
        forget_secrets(pack.folder)
    return failure is None


def _shared_logs(**options: Any) -> Any:
    """Elastic's folders of logs, whose modes follow the umask: elastic makes the outermost for its owner only."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    class SharedLogs(DefaultLogsSpecs):
        def _make_log_dir(self, log_dir: str | None, rdzv_run_id: str) -> str:
            made = str(super()._make_log_dir(log_dir, rdzv_run_id))
            os.chmod(made, stat.S_IMODE(os.stat(os.path.dirname(made)).st_mode))  # that of the folder that we made around it
            return made

    return SharedLogs(**options)


def begin_anew(sweep: Sweep, pack: Pack) -> None:
    """Close what a run of this job before this one left open (Slurm requeued it), and forget how it ended."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if not restarts:
        return
    told = read_ending(pack.folder, STOP)
    failure = told.failure if told else None
    if failure is None:
        word = last_incarnation(os.environ["SLURM_JOB_ID"], restarts, environment(pack.site)) or "REQUEUED"
        failure = Failure(SLURM_STATES.get(word, "preempted"), f"Slurm requeued its job, which had ended as {word}")
        if failure.kind in ("crash", "cancelled"):  # nobody requeues what ended so by itself
            failure = Failure("preempted", failure.cause)
    close_all(sweep, pack, failure)
    forget(pack.folder)


def end_with_parent(number: signal.Signals, parent: int) -> None:
    """Have Linux send this process a signal when its parent dies, however it does."""
    signal_when_parent_dies(number)
    if os.getppid() != parent:  # it is dead already
        os.kill(os.getpid(), number)


def warned_s(timeout_min: int) -> int:
    """How long before its time limit a job is warned, in seconds."""
    return min(WARNING_S, WARNING_S_PER_MIN * timeout_min)


class RunPack:
    """What submitit runs on every node of a job; the pack's content comes from its file."""

    def __init__(self, pack_path: str) -> None:
        self.pack_path = pack_path

    def __call__(self) -> None:
        import submitit

        self.begun = time.time()
        if not mine(Path(self.pack_path)):  # its settings reach the environment of what runs here
            raise SystemExit(f"error: {self.pack_path} belongs to somebody else than its job")
        pack = Pack.read(Path(self.pack_path))
        job, node_rank = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_NODEID"])
        nodes = list(submitit.JobEnvironment().hostnames)
        incarnation = f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        with shown(pack):
            done = run_node(pack, node_rank=node_rank, hosts=nodes, incarnation=incarnation)
        if not done:
            raise SystemExit(1)

    def checkpoint(self) -> Any:
        """Called by submitit on node 0 when Slurm warns: let the cell in flight finish if it can, and have the job requeued."""
        from submitit.helpers import DelayedSubmission

        pack = Pack.read(Path(self.pack_path))
        sweep = Sweep(Path(pack.root), pack.sweep)
        warning_s = warned_s(pack.timeout_min)
        late = time.time() - self.begun > 60 * (pack.timeout_min - 1) - warning_s
        kind, why = ("timeout", "the time limit of its job came") if late else ("preempted", "Slurm took its job off the nodes")
        with suppress(OSError):
            pack.write_note(STOP, Failure(kind, why))
        end = time.monotonic() + WARNING_SHARE * warning_s
        while time.monotonic() < end and in_flight(sweep, pack):
            time.sleep(0.5)
        return DelayedSubmission(RunPack(self.pack_path))


def _node_is_well(pack: Pack, node_rank: int, gpus: int) -> bool:
    """Look at this node before a worker starts; a node that falls out is named in the pack's end."""
    from lcbench.measure.nodes import node_facts, too_few

    promised = pack.site.get("device")
    needed = 1 if pack.site.get("share_gpu") else gpus
    facts, problems = node_facts(next((d for d in pack.settings.devices if d["name"] == promised), None), needed)
    if promised is None and (problem := too_few(needed)):
        problems.append(problem)
    write_json(pack.folder / "check" / f"node-{node_rank}.json", {**facts, "problems": problems})
    if problems:
        print(f"{facts['node']}: {'; '.join(problems)}", file=sys.stderr)
    if problems and pack.stops_where_unwell:
        pack.end_unhealthy({facts["node"]: "; ".join(problems)})
        return False
    return True


def _watch_workers(sweep: Sweep, pack: Pack, node_rank: int) -> None:
    """Have elastic's agent keep how each of its workers died (elastic itself reports the first one it happens to look at), end
    cells that were cancelled and gangs that hang, and give up where a gang comes to nothing.
    """
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api

    folder = pack.folder / "failures"
    scale = parse_scale(pack.scale)
    watcher = Watcher(node_rank, scale.nodes, scale.gpus_per_node, pack.settings.hang)

    class WatchingAgent(LocalElasticAgent):
        gangs = fruitless = 0
        begun = -1
        next_look = 0.0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.kills: deque[tuple[float, int]] = deque()

        def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
            watcher.forget()
            return super()._start_workers(worker_group)

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            now = time.monotonic()
            if now >= self.next_look:
                self.next_look = now + LOOK_EVERY_S
                self._end_what_hangs(worker_group)
                if node_rank == 0:
                    self._end_what_was_cancelled()
            self.kills.append((now, _oom_kills()))
            while now - self.kills[0][0] > OOM_LAG_S:
                self.kills.popleft()
            result = super()._monitor_workers(worker_group)
            if result.failures:
                self._write_down(result)
            return result

        def _write_down(self, result: RunResult) -> None:
            self.gangs += 1
            oom = self.kills[-1][1] > self.kills[0][1] or _oom_kills() > self.kills[0][1]
            for rank, failure in result.failures.items():
                killed = oom and failure.exitcode == -signal.SIGKILL
                word = "the kernel's out-of-memory killer was at work" if killed else ""
                record = {
                    "exitcode": failure.exitcode, "rank": rank, "pid": failure.pid, "time": time.time(), "oom": word,
                    "said": last_words(pack.folder / "logs" / f"node-{node_rank}", failure.local_rank),
                }  # fmt: skip
                with suppress(OSError):
                    write_json(folder / f"exit.{node_rank}.{self.gangs}.{rank}.json", record)
            if node_rank == 0:
                begun = _begun(sweep, pack)
                self.fruitless = self.fruitless + 1 if begun == self.begun else 0
                self.begun = begun
            if self.fruitless >= FRUITLESS or ended(pack.folder):
                self._remaining_restarts = 0

        def _end_what_hangs(self, worker_group: WorkerGroup) -> None:
            ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
            asks, ends = watcher.look(ranks, self._pids(), self._store)
            if asks:
                self._signal(STACKS_SIGNAL)
            if ends:
                self._end(ends.work, {"kind": "hang", "cause": ends.cause, "rank": ends.rank})

        def _end_what_was_cancelled(self) -> None:
            cancelled = cancelled_cells(pack.folder)
            for running in in_flight(sweep, pack, cancelled) if cancelled else ():
                self._end(stem_of(running), {"kind": "cancelled", "cause": "python -m lcbench.cancel"})

        def _end(self, stem: str, word: dict[str, Any]) -> None:
            """End this node's ranks, and leave word why the attempt or block that they are at did not go on."""
            path = folder / f"{stem}.ended.json"
            if stem and path.exists():
                return
            if stem:
                write_json(path, {**word, "time": time.time()})
            else:
                print(f"between cells: {word['cause']}", file=sys.stderr, flush=True)
            self._signal(signal.SIGKILL)

        def _signal(self, number: signal.Signals) -> None:
            for pid in self._pids().values():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

        def _pids(self) -> dict[int, int]:
            return dict(self._pcontext.pids()) if self._pcontext else {}

    # elastic_launch offers no way to choose its agent's class.
    api.LocalElasticAgent = WatchingAgent  # type: ignore[attr-defined,misc]


def _begun(sweep: Sweep, pack: Pack) -> int:
    """How many attempts at cells of a pack, and later blocks of timings, have begun: a number that only grows."""
    attempts = [a for c in pack.cells for a in sweep.attempts(c)]
    return len(attempts) + sum(len(a.again) + len(a.lost_blocks) for a in attempts) + len(in_flight(sweep, pack))


def _oom_kills() -> int:
    """How often the kernel has killed for want of memory since it started, on this node; 0 where it does not count."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lcbench.runs.agent", description=__doc__)
    parser.add_argument("pack", type=Path, help="path of a pack.json, all of whose nodes are this machine")
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument(
        "--of", type=int, required=True, metavar="PID", help="of the command that started it, and with which it ends"
    )
    arguments = parser.parse_args()
    end_with_parent(signal.SIGTERM, arguments.of)
    pack = Pack.read(arguments.pack)
    hosts = parse_scale(pack.scale).nodes * ["127.0.0.1"]
    done = run_node(pack, node_rank=arguments.node_rank, hosts=hosts, incarnation=pack.id)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
