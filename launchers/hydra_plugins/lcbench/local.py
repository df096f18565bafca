"""Packs on this machine, one after the other: an agent process per node of the scale, its workers below it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from hydra_plugins.lcbench._plan import PackLauncher, write_down

from lcbench.grid.values import parse_scale
from lcbench.measure.blocks import blocks_of
from lcbench.runs.jobs import Watch, in_flight
from lcbench.runs.pack import Pack, later_blocks
from lcbench.runs.store import Sweep, write_json

POLL_S = 0.3
LOOK_EVERY_S = 5.0
LOOKING_SHARE = 100.0
GRACE_S = 10.0


class LocalLauncher(PackLauncher):
    name = "local"

    def submit(self, sweep: Sweep, packs: list[Pack]) -> None:
        for pack in packs:  # they run while this process stays
            write_down(pack)

    def follow(self, sweep: Sweep, packs: list[Pack]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns: list[Any] = [
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        ]  # fmt: skip
        watch, next_look = Watch(sweep), 0.0
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("starting", total=sum(len(pack.cells) for pack in packs), left="")
            before = 0
            for pack in packs:
                for done, text in _run_pack(sweep, pack):
                    progress.update(task, completed=before + done, description=text)
                    if time.monotonic() >= next_look:
                        begun = time.monotonic()
                        progress.update(task, left=str(watch.look().left()))
                        # Ranks measure on these cores: of a large sweep it is looked at seldom.
                        next_look = time.monotonic() + max(LOOK_EVERY_S, LOOKING_SHARE * (time.monotonic() - begun))
                before += len(pack.cells)


def _run_pack(sweep: Sweep, pack: Pack) -> Any:
    """Start a pack's agents and yield (cells done, what is going on) until they have ended."""
    nodes = parse_scale(pack.scale).nodes
    logs = pack.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    agents = []
    try:
        for node in range(nodes):
            command = [sys.executable, "-u", "-m", "lcbench.runs.agent", str(pack.path), "--node-rank", str(node)]
            with open(logs / f"agent-{node}.log", "ab") as log:
                # A group of its own, so that Ctrl-C reaches the agents through us, in order.
                agents.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True))
        write_json(
            pack.folder / "job.json",
            {"launcher": "local", "pid": agents[0].pid, "pids": [a.pid for a in agents], "host": socket.gethostname(),
             "started_at": time.time(), "timeout_min": pack.timeout_min},
        )  # fmt: skip
        while any(agent.poll() is None for agent in agents) and not any(agent.returncode for agent in agents):
            yield _progress(sweep, pack)
            time.sleep(POLL_S)
        yield _progress(sweep, pack)
    finally:
        _stop(agents)
    if any(agent.returncode for agent in agents):
        print(f"pack {pack.id}: an agent ended with an error; see {logs}", file=sys.stderr)


def _progress(sweep: Sweep, pack: Pack) -> tuple[int, str]:
    """How many cells of a pack it has tried, and what it does."""
    tried = {cell_id: sweep.attempts(cell_id) for cell_id in pack.cells}
    done = sum(any(a.pack == pack.id for a in attempts) for attempts in tried.values())
    current = next(iter(in_flight(sweep, pack)), None)
    if current is not None:
        config = pack.configs[current.cell_id]
        later = f"block {current.block} of {blocks_of(config['measure'])}: " if current.block > 1 else ""
        return done, f"{later}{config['cp']['name']} {current.cell_id}"
    if done < len(pack.cells):
        return done, "starting workers"
    due = {c: blocks.start for c, attempts in tried.items() if (blocks := later_blocks(attempts, pack.id))}
    if not due:
        return done, "finishing"
    cell_id, block = min(due.items(), key=lambda found: found[1])
    return done, f"block {block} of {blocks_of(pack.configs[cell_id]['measure'])}"


def _stop(agents: list[subprocess.Popen[bytes]]) -> None:
    """End agents that still run: TERM lets them end their workers, KILL follows."""
    for agent in agents:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for agent in agents:
        try:
            agent.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
