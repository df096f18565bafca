"""One node's agent: torch elastic starts a worker per GPU, and the whole gang again when one of them dies."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from lcbench.grid.values import parse_scale
from lcbench.runs.failure import SLURM_STATES, last_error, stem_of
from lcbench.runs.jobs import close_all, in_flight
from lcbench.runs.logs import last_words
from lcbench.runs.pack import KILLS, RESERVE, Pack, forget_secrets
from lcbench.runs.queue import environment, last_incarnation, site_variables
from lcbench.runs.store import CAUSE_LENGTH, Failure, Sweep, write_json
from lcbench.runs.tracking import publish_or_say

# A gang may fail this often, one after the other, without having begun a cell or a later block of timings.
FRUITLESS = 2
FIRST_PORT, PORTS = 20000, 20000
# Seconds ahead of the job's time limit at which Slurm warns (it may be a minute earlier), less for short jobs, and the share of
# it in which the cell in flight may still finish.
WARNING_S, WARNING_S_PER_MIN = 120, 15
WARNING_SHARE = 0.6
# A worker that its own hang timer could not end is ended this long after the deadline.
OVERDUE_S = 30.0
OVERDUE_EVERY_S, CANCEL_EVERY_S = 10.0, 1.0
# The kernel counts a kill before the agent sees the death.
OOM_LAG_S = 15.0
PUBLISH_S = 30.0


def run_node(pack: Pack, *, node_rank: int, endpoint: str, run_id: str, local_addr: str | None = None) -> bool:
    """Run this node's workers until every cell was tried. Blocks; True if they all ended well.

    ``endpoint``: ``host:port`` of the c10d rendezvous, served by node 0. Node 0 closes what an earlier run of the job left open,
    and after its workers have ended what a dying gang left, and publishes to the tracking server.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Otherwise a new gang meets the keys of the dead one in the shared store, and gloo connects to addresses that are gone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
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
    config = LaunchConfig(
        min_nodes=scale.nodes,
        max_nodes=scale.nodes,
        nproc_per_node=scale.gpus_per_node,
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        # Nodes of a busy or oversubscribed machine answer late; a lost node is Slurm's to tell.
        rdzv_configs={
            "is_host": node_rank == 0,
            "timeout": 900,
            "read_timeout": 600,
            "keep_alive_interval": 10,
            "keep_alive_max_attempt": 30,
        },
        # Each cell can end a gang so often, and so often again in later blocks of timings: its attempt or its lost block is
        # recorded, and the next gang goes on behind it.
        max_restarts=2 * KILLS * len(pack.cells) + FRUITLESS,
        monitor_interval=0.5,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
        local_addr=local_addr,
    )
    failure = None
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "lcbench.runs.worker", str(pack.path), str(node_rank))
    except ChildFailedError as error:
        said = last_error(max(logs.rglob("stderr.log"), key=lambda p: p.stat().st_mtime, default=logs))
        failure = Failure("no-start", f"the gang did not come up: {said or error}"[:CAUSE_LENGTH])
        print(f"node {node_rank}: the gang failed too often: {error}", file=sys.stderr)
    if node_rank == 0:
        close_all(sweep, pack)
        (pack.folder / RESERVE).unlink(missing_ok=True)
        if not (pack.folder / "end.json").exists():  # it may have said already why it stops
            pack.say("end.json", failure)
        if pack.site.get("publish", "nodes") == "nodes":
            # What is left after a while, or a server that is away, is left to the collector.
            publish_or_say(sweep, pack.settings.tracking_uri, budget_s=PUBLISH_S)
        forget_secrets(pack.folder)
    return failure is None


def begin_anew(sweep: Sweep, pack: Pack) -> None:
    """Close what a run of this job before this one left open (Slurm requeued it), and forget how it ended."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if not restarts:
        return
    why = sweep.pack_file(pack.id, "stop.json").get("failure")
    failure = Failure(**why) if why else None
    if failure is None:
        word = last_incarnation(os.environ["SLURM_JOB_ID"], restarts, environment(pack.site)) or "REQUEUED"
        failure = Failure(SLURM_STATES.get(word, "preempted"), f"Slurm requeued its job, which had ended as {word}")
        if failure.kind in ("crash", "cancelled"):  # nobody requeues what ended so by itself
            failure = Failure("preempted", failure.cause)
    close_all(sweep, pack, failure)
    for name in ("stop.json", "end.json", "check.json"):
        (pack.folder / name).unlink(missing_ok=True)


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
        pack = Pack.read(Path(self.pack_path))
        job, node_rank = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_NODEID"])
        nodes = submitit.JobEnvironment().hostnames
        # Jobs that share a node get different ports; a requeued job gets a rendezvous of its own.
        endpoint = f"{nodes[0]}:{FIRST_PORT + int(job) % PORTS}"
        run_id = f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        if not run_node(pack, node_rank=node_rank, endpoint=endpoint, run_id=run_id, local_addr=nodes[node_rank]):
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
            pack.say("stop.json", Failure(kind, why))
        end = time.monotonic() + WARNING_SHARE * warning_s
        while time.monotonic() < end and in_flight(sweep, pack):
            time.sleep(0.5)
        return DelayedSubmission(RunPack(self.pack_path))


def _node_is_well(pack: Pack, node_rank: int, gpus: int) -> bool:
    """Look at this node before a worker starts; a node that falls out is named in the pack's end."""
    from lcbench.measure.nodes import node_facts

    device = next((d for d in pack.settings.devices if d["name"] == pack.site.get("device")), None)
    facts, problems = node_facts(device, gpus)
    write_json(pack.folder / "check" / f"node-{node_rank}.json", {**facts, "problems": problems})
    if problems:
        print(f"{facts['node']}: {'; '.join(problems)}", file=sys.stderr)
    if problems and pack.stops_where_unwell:
        pack.fall_out({facts["node"]: "; ".join(problems)})
        return False
    return True


def _watch_workers(sweep: Sweep, pack: Pack, node_rank: int) -> None:
    """Have elastic's agent keep how each of its workers died (elastic itself reports the first one it happens to look at), end
    cells that were cancelled or are overdue, and give up where a gang comes to nothing.
    """
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api

    folder = pack.folder / "failures"

    class WatchingAgent(LocalElasticAgent):
        gangs = fruitless = 0
        begun = -1
        next_cancel = next_overdue = 0.0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.kills: deque[tuple[float, int]] = deque()

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            if node_rank == 0:
                self._end_cells()
            now = time.monotonic()
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
            if self.fruitless >= FRUITLESS or (pack.folder / "end.json").exists():
                self._remaining_restarts = 0

        def _end_cells(self) -> None:
            now = time.monotonic()
            if now < self.next_cancel:
                return
            self.next_cancel = now + CANCEL_EVERY_S
            cancelled = [p.name for p in (pack.folder / "cancel").glob("*")]
            candidates: tuple[str, ...] = tuple(cancelled)
            if now >= self.next_overdue:
                self.next_overdue, candidates = now + OVERDUE_EVERY_S, pack.cells
            for running in in_flight(sweep, pack, candidates) if candidates else ():
                was_cancelled = running.cell_id in cancelled
                late = time.time() - running.started_at - pack.deadline_s(running.cell_id)
                if not was_cancelled and late < OVERDUE_S:
                    continue
                kind, why = ("cancelled", "python -m lcbench.cancel") if was_cancelled else (
                    "hang", f"{late:.0f} s over its deadline, and its ranks did not end themselves")  # fmt: skip
                word = folder / f"{stem_of(running)}.ended.json"
                if not word.exists():
                    write_json(word, {"kind": kind, "cause": why, "time": time.time()})
                    for pid in (self._pcontext.pids() if self._pcontext else {}).values():
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)

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
    parser.add_argument("pack", type=Path, help="path of a pack.json")
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--rdzv", required=True, metavar="HOST:PORT", help="rendezvous, served by node 0")
    parser.add_argument("--run-id", required=True)
    arguments = parser.parse_args()
    pack = Pack.read(arguments.pack)
    host = arguments.rdzv.rpartition(":")[0]
    done = run_node(pack, node_rank=arguments.node_rank, endpoint=arguments.rdzv, run_id=arguments.run_id, local_addr=host)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
