"""One node's agent: torch elastic starts a worker per GPU, and the whole gang again when one of them dies."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lcbench.grid.values import parse_scale
from lcbench.runs.attempt import CAUSE_LENGTH, Failure
from lcbench.runs.failure import SLURM_STATES, last_error
from lcbench.runs.files import write_json
from lcbench.runs.forkserver import ForkServer, ServerDied, forking
from lcbench.runs.machine import shown, signal_when_parent_dies
from lcbench.runs.notes import END, STOP, ended, forget, read_ending
from lcbench.runs.ownership import mine
from lcbench.runs.pack import RESERVE, Pack, forget_secrets
from lcbench.runs.rendezvous import NoRendezvous, innermost, meeting_of, use
from lcbench.runs.settle import close_all, in_flight
from lcbench.runs.squeue import environment, last_incarnation, site_variables
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.publish import PUBLISH_S, publish_or_say
from lcbench.runs.users import user_name

# Seconds ahead of the job's time limit at which Slurm warns (it may be a minute earlier), less for short jobs, and the share of
# it in which the cell in flight may still finish.
WARNING_S, WARNING_S_PER_MIN = 120, 15
WARNING_SHARE = 0.6


def run_node(pack: Pack, *, node_rank: int, hosts: list[str], incarnation: str, publishes: bool = True) -> bool:
    """Run this node's workers until every cell was tried. Blocks; True if they all ended well.

    Node 0 closes what an earlier run of the job left open, and after its workers have ended what a dying gang left, and publishes
    to the tracking server.

    Args:
        hosts: names of all nodes of the job, by which the others reach them.
        incarnation: names this run of the job; Slurm may requeue it.
        publishes: whether node 0 publishes at its end; not where the command stays with the pack and does.
    """
    os.environ.setdefault("LOGNAME", user_name())  # libraries ask for a name, and a uid may have none
    os.environ.update(site_variables(pack.site))
    sweep = Sweep(Path(pack.root), pack.sweep)
    scale = parse_scale(pack.scale)
    logs = pack.folder / "logs" / f"node-{node_rank}"
    logs.mkdir(parents=True, exist_ok=True)
    if node_rank == 0:
        begin_anew(sweep, pack)
    from lcbench.runs.worker import import_once, run_rank  # load torch, which launchers that submit this do without

    import_once(pack)
    with forking(run_rank) as server:  # before anybody looks at a GPU
        if not _node_is_well(pack, node_rank, scale.gpus_per_node):
            return False
        failure = _run_gangs(sweep, pack, server, logs, node_rank=node_rank, hosts=hosts, incarnation=incarnation)
    if node_rank == 0:
        _come_to_an_end(sweep, pack, failure)
        if publishes and pack.site.get("publish", "nodes") == "nodes":
            # What is left after a while, or a server that is away, is left to the collector.
            publish_or_say(sweep, pack.settings.tracking_uri, budget_s=PUBLISH_S)
        forget_secrets(pack.folder)
    return failure is None


def _run_gangs(
    sweep: Sweep, pack: Pack, server: ForkServer, logs: Path, *, node_rank: int, hosts: list[str], incarnation: str
) -> Failure | None:
    """Meet the other nodes and run the workers; why that came to nothing, or None."""
    # Elastic loads torch, which launchers that submit this do without.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    from lcbench.runs.gang import run_gang

    where = "any port"
    try:
        with meeting_of(pack.folder, incarnation, node=node_rank, hosts=hosts) as (meeting, listening):
            where = meeting.endpoint
            use(meeting, listening, node=node_rank, hosts=hosts)
            run_id = f"{incarnation}.{meeting.token('run id')}"
            run_gang(sweep, pack, server, node_rank=node_rank, run_id=run_id, endpoint=where, host=hosts[node_rank], logs=logs)
    except (NoRendezvous, RendezvousError, ServerDied) as error:
        cause = f"the rendezvous at {where}: {innermost(error)}" if isinstance(error, RendezvousError) else str(error)
        failure = Failure("crash" if isinstance(error, ServerDied) else "no-start", cause[:CAUSE_LENGTH])
        print(f"node {node_rank}: {cause}", file=sys.stderr)
        if node_rank and not ended(pack.folder):
            pack.write_note(END, failure)
        return failure
    except ChildFailedError as error:
        said = last_error(max(logs.rglob("stderr.log"), key=lambda p: p.stat().st_mtime, default=logs))
        print(f"node {node_rank}: the gang failed too often: {error}", file=sys.stderr)
        return Failure("no-start", f"the gang did not come up: {said or error}"[:CAUSE_LENGTH])
    return None


def _come_to_an_end(sweep: Sweep, pack: Pack, failure: Failure | None) -> None:
    """Close what a dying gang left open, and say how the pack ended."""
    close_all(sweep, pack)
    (pack.folder / RESERVE).unlink(missing_ok=True)
    if not ended(pack.folder):  # it may have said already why it stops
        pack.write_note(END, failure)


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
    # The command that it ends with publishes: a second process that loads MLflow takes longer than many a pack.
    done = run_node(pack, node_rank=arguments.node_rank, hosts=hosts, incarnation=pack.id, publishes=False)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
