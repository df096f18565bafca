"""One node's workers of a gang under torch elastic: how each dies is kept, and what hangs or was cancelled is ended."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry

from lcbench.grid.values import parse_scale
from lcbench.runs.failure import stem_of
from lcbench.runs.files import write_json
from lcbench.runs.forkserver import RANK_NAME, ForkServer, ServerDied, Start
from lcbench.runs.hang import STACKS_SIGNAL, Watcher
from lcbench.runs.logs import last_words
from lcbench.runs.notes import cancelled_cells, ended
from lcbench.runs.pack import KILLS, Pack
from lcbench.runs.rendezvous import BACKEND
from lcbench.runs.settle import in_flight
from lcbench.runs.store import Sweep

# A gang may fail this often, one after the other, without having begun a cell or a later block of timings.
FRUITLESS = 2
WORKER = "lcbench.runs.worker"
LOOK_EVERY_S = 1.0
MONITOR_EVERY_S = 0.5
# The kernel counts a kill before the agent sees the death.
OOM_LAG_S = 15.0


def run_gang(
    sweep: Sweep, pack: Pack, server: ForkServer, *, node_rank: int, run_id: str, endpoint: str, host: str, logs: Path
) -> None:
    """Start this node's workers, and the whole gang again when one of them dies, until all have ended well.

    Args:
        server: forks the workers.
        run_id: names the gang; the same on all nodes.
        endpoint: where the nodes meet, as ``<address>:<port>``.
        host: the name of this node, by which the others reach it.
        logs: folder of what the workers print.

    Raises:
        ChildFailedError: the gang died more often than its cells explain.
        ServerDied: nobody is there to fork workers any more.
        RendezvousError: the nodes did not meet.
    """
    scale = parse_scale(pack.scale)
    meeting = RendezvousParameters(BACKEND, endpoint, run_id, min_nodes=scale.nodes, max_nodes=scale.nodes, local_addr=host)
    spec = WorkerSpec(
        role="default_role",
        local_world_size=scale.gpus_per_node,
        entrypoint=WORKER,
        args=(pack.path, node_rank),
        rdzv_handler=rendezvous_handler_registry.create_handler(meeting),
        # Each cell can end a gang so often, and so often again in later blocks of timings: its attempt or its lost block is
        # recorded, and the next gang goes on behind it.
        max_restarts=2 * KILLS * len(pack.cells) + FRUITLESS,
        monitor_interval=MONITOR_EVERY_S,
        local_addr=host,
    )
    agent = WatchingAgent(spec, SharedLogs(log_dir=str(logs), redirects=Std.ALL), server, sweep, pack, node_rank)
    try:
        result = agent.run()
    except SignalException:  # the other nodes may still meet there
        raise
    except BaseException:
        spec.rdzv_handler.shutdown()
        raise
    spec.rdzv_handler.shutdown()
    if not server.alive:
        raise ServerDied
    if result.is_failed():
        raise ChildFailedError(WORKER, result.failures)


class SharedLogs(DefaultLogsSpecs):
    """Elastic's folders of logs, whose modes follow the umask: elastic makes the outermost for its owner only."""

    def _make_log_dir(self, log_dir: str | None, rdzv_run_id: str) -> str:
        made = str(super()._make_log_dir(log_dir, rdzv_run_id))
        os.chmod(made, stat.S_IMODE(os.stat(os.path.dirname(made)).st_mode))  # that of the folder that we made around it
        return made


class Forks(SubprocessContext):
    """Elastic's workers, forked by a server where elastic starts programs.

    Args:
        envs: of each local rank, the variables that it has beside the agent's.
    """

    def __init__(
        self, server: ForkServer, arguments: tuple[Any, ...], envs: dict[int, dict[str, str]], logs: DefaultLogsSpecs
    ) -> None:
        super().__init__(WORKER, WORKER, dict.fromkeys(envs, arguments), envs, logs)
        self._server = server

    def _start(self) -> None:
        # What elastic asks of its handlers, a forked worker answers.
        self.subprocess_handlers = {local: self._server.start(self._asked(local)) for local in self.envs}  # type: ignore[misc]

    def _asked(self, local: int) -> Start:
        env = self.envs[local]
        name = f"{RANK_NAME} {env['RANK']}"
        return Start(self.args[local], {**os.environ, **env}, self.stdouts[local], self.stderrs[local], name)


class WatchingAgent(LocalElasticAgent):
    """Elastic's agent, which has its workers forked, also keeps how each of them died (elastic itself reports the first one that it
    happens to look at), ends cells that were cancelled and gangs that hang, and gives up where a gang comes to nothing.
    """

    def __init__(
        self, spec: WorkerSpec, logs: DefaultLogsSpecs, server: ForkServer, sweep: Sweep, pack: Pack, node_rank: int
    ) -> None:
        super().__init__(spec, logs)
        self._logs, self._server = logs, server
        scale = parse_scale(pack.scale)
        self._sweep, self._pack, self._node_rank = sweep, pack, node_rank
        self._failures = pack.folder / "failures"
        self._watcher = Watcher(node_rank, scale.nodes, scale.gpus_per_node, pack.settings.hang)
        self._kills: deque[tuple[float, int]] = deque()  # (when, the kernel's count of kills for want of memory)
        self._gangs = self._fruitless = 0
        self._begun = -1  # cells and blocks, when the last gang died
        self._next_look = 0.0

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._watcher.forget()
        spec = worker_group.spec
        envs = {
            worker.local_rank: self._environment(worker_group) | {
                "LOCAL_RANK": str(worker.local_rank), "RANK": str(worker.global_rank), "WORLD_SIZE": str(worker.world_size),
                "ROLE_RANK": str(worker.role_rank), "ROLE_WORLD_SIZE": str(worker.role_world_size),
            }
            for worker in worker_group.workers
        }  # fmt: skip
        self._pcontext = Forks(self._server, spec.args, envs, self._logs)
        self._pcontext.start()
        return self._pcontext.pids()

    def _environment(self, group: WorkerGroup) -> dict[str, str]:
        """What torchrun tells all workers of a node."""
        spec = group.spec
        return {
            "MASTER_ADDR": str(group.master_addr), "MASTER_PORT": str(group.master_port),
            "LOCAL_WORLD_SIZE": str(spec.local_world_size), "ROLE_NAME": spec.role,
            "GROUP_RANK": str(group.group_rank), "GROUP_WORLD_SIZE": str(group.group_world_size),
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(), "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
            "TORCHELASTIC_RESTART_COUNT": str(spec.max_restarts - self._remaining_restarts),
            "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }  # fmt: skip

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_EVERY_S
            self._end_what_hangs(worker_group)
            if self._node_rank == 0:
                self._end_what_was_cancelled()
        self._kills.append((now, oom_kills()))
        while now - self._kills[0][0] > OOM_LAG_S:
            self._kills.popleft()
        result = super()._monitor_workers(worker_group)
        if result.failures:
            self._gangs += 1
            self._write_down(result)
            self._give_up_in_vain()
        return result

    def _write_down(self, result: RunResult) -> None:
        """Keep how each worker died."""
        oom = self._kills[-1][1] > self._kills[0][1] or oom_kills() > self._kills[0][1]
        for rank, failure in result.failures.items():
            logs = self._pack.folder / "logs" / f"node-{self._node_rank}"
            killed = oom and failure.exitcode == -signal.SIGKILL
            record = {
                "exitcode": failure.exitcode, "rank": rank, "pid": failure.pid, "time": time.time(),
                "oom": "the kernel's out-of-memory killer was at work" if killed else "",
                "said": last_words(logs, failure.local_rank) if self._server.alive else str(ServerDied()),
            }  # fmt: skip
            with suppress(OSError):
                write_json(self._failures / f"exit.{self._node_rank}.{self._gangs}.{rank}.json", record)

    def _give_up_in_vain(self) -> None:
        """Start no other gang where several came to nothing, the pack has ended, or nobody is there to fork one."""
        if self._node_rank == 0:
            begun = begun_of(self._sweep, self._pack)
            self._fruitless = self._fruitless + 1 if begun == self._begun else 0
            self._begun = begun
        if self._fruitless >= FRUITLESS or ended(self._pack.folder) or not self._server.alive:
            self._remaining_restarts = 0

    def _end_what_hangs(self, worker_group: WorkerGroup) -> None:
        ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
        asks, ends = self._watcher.look(ranks, self._pids(), self._store)
        if asks:
            self._signal(STACKS_SIGNAL)
        if ends:
            self._end(ends.work, {"kind": "hang", "cause": ends.cause, "rank": ends.rank})

    def _end_what_was_cancelled(self) -> None:
        cancelled = cancelled_cells(self._pack.folder)
        for running in in_flight(self._sweep, self._pack, cancelled) if cancelled else ():
            self._end(stem_of(running), {"kind": "cancelled", "cause": "python -m lcbench.cancel"})

    def _end(self, stem: str, word: dict[str, Any]) -> None:
        """End this node's ranks, and leave word why the attempt or block that they are at did not go on."""
        path = self._failures / f"{stem}.ended.json"
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


def begun_of(sweep: Sweep, pack: Pack) -> int:
    """How many attempts at cells of a pack, and later blocks of timings, have begun: a number that only grows."""
    attempts = [a for c in pack.cells for a in sweep.attempts(c)]
    return len(attempts) + sum(len(a.again) + len(a.lost_blocks) for a in attempts) + len(in_flight(sweep, pack))


def oom_kills() -> int:
    """How often the kernel has killed for want of memory since it started, on this node; 0 where it does not count."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
