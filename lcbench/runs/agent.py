"""One node's agent: torch elastic starts a worker per GPU, and the whole gang again when one of them dies."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lcbench.grid.values import parse_scale
from lcbench.runs.pack import Pack
from lcbench.runs.store import Sweep, write_json

# A gang start-up without a cell in flight may fail this often before the agent gives up.
SPARE_RESTARTS = 1
FIRST_PORT, PORTS = 20000, 20000


def run_node(pack: Pack, *, node_rank: int, endpoint: str, run_id: str, local_addr: str | None = None) -> bool:
    """Run this node's workers until every cell was tried. Blocks; True if they all ended well.

    ``endpoint``: ``host:port`` of the c10d rendezvous, served by node 0. After node 0's workers have ended it closes what a
    dying gang left open and publishes to the tracking server.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from lcbench.runs.worker import close_interrupted

    # Otherwise a new gang meets the keys of the dead one in the shared store, and gloo connects to addresses that are gone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.update({key: str(value) for key, value in (pack.site.get("env") or {}).items()})
    scale = parse_scale(pack.scale)
    logs = pack.folder / "logs" / f"node-{node_rank}"
    logs.mkdir(parents=True, exist_ok=True)
    _record_exits(pack.folder / "failures", node_rank)
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
        # Each cell can end a gang once: its attempt is recorded, and the next gang goes on behind it.
        max_restarts=len(pack.cells) + SPARE_RESTARTS,
        monitor_interval=0.5,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
        local_addr=local_addr,
    )
    ended_well = True
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "lcbench.runs.worker", str(pack.path))
    except ChildFailedError as error:
        ended_well = False
        print(f"node {node_rank}: the gang failed too often: {error}", file=sys.stderr)
    if node_rank == 0:
        close_interrupted(Sweep(Path(pack.root), pack.sweep), pack)
        _publish(pack)
    return ended_well


def run_under_slurm(pack_path: str) -> None:
    """The task that submitit runs on every node of a job."""
    # Slurm's warning before the time limit, which submitit asks for, ends whoever does not expect it. A cell in flight may
    # still finish, and if it does not, the job ends as TIMEOUT and says so. Workers inherit this.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    pack = Pack.read(Path(pack_path))
    job, node_rank = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_NODEID"])
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True
    ).stdout.split()
    # Jobs that share a node get different ports; a requeued job gets a rendezvous of its own.
    endpoint = f"{nodes[0]}:{FIRST_PORT + int(job) % PORTS}"
    run_id = f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    if not run_node(pack, node_rank=node_rank, endpoint=endpoint, run_id=run_id, local_addr=nodes[node_rank]):
        raise SystemExit(1)


def _publish(pack: Pack) -> None:
    """Publish this pack's sweep; a tracking server that is away costs nothing but a line in the log."""
    if not pack.tracking_uri:
        return
    from lcbench.runs.tracking import TrackingUnavailable, publish

    try:
        publish(Sweep(Path(pack.root), pack.sweep), pack.tracking_uri)
    except TrackingUnavailable as error:
        print(f"not published: {error}; later: python -m lcbench.sync {pack.sweep}", file=sys.stderr)


def _record_exits(folder: Path, node_rank: int) -> None:
    """Make the agent keep how each of its workers died; elastic itself reports the first one it happens to look at."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api

    class RecordingAgent(LocalElasticAgent):
        gangs = 0

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)
            if result.failures:
                self.gangs += 1
            for rank, failure in result.failures.items():
                record = {"exitcode": failure.exitcode, "rank": rank, "pid": failure.pid, "time": time.time()}
                write_json(folder / f"exit.{node_rank}.{self.gangs}.{rank}.json", record)
            return result

    # elastic_launch offers no way to choose its agent's class.
    api.LocalElasticAgent = RecordingAgent  # type: ignore[attr-defined,misc]


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
