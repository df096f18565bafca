"""Packs on this machine, one after the other: an agent process per node of the scale, its workers below it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

from hydra_plugins.lcbench.base import PackLauncher

from lcbench.grid.values import parse_scale
from lcbench.measure.blocks import blocks_of
from lcbench.runs.attempt import CAUSE_LENGTH, Failure
from lcbench.runs.failure import last_error
from lcbench.runs.jobs import Watch
from lcbench.runs.launch import write_down
from lcbench.runs.machine import PAUSE_S, SHARE, Claim, shares
from lcbench.runs.notes import END, ended, job_here, write_job
from lcbench.runs.pack import Pack, later_blocks, owes
from lcbench.runs.settle import in_flight, settled
from lcbench.runs.squeue import site_variables
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.publish import PUBLISH_S, publish
from lcbench.runs.tracking.server import TrackingUnavailable

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
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
        ]  # fmt: skip
        watch, next_look = Watch(sweep), 0.0
        with _told_to_end(), Progress(*columns, console=self.console) as progress:
            task = progress.add_task("starting", total=sum(len(pack.cells) for pack in packs), left="")
            before, server = 0, True
            for number, pack in enumerate(packs):
                if number and server:  # what the last one measured is published at the command's end
                    progress.update(task, description="publishing")
                    server = _published(sweep, pack.settings.tracking_uri)
                with closing(_run_pack(sweep, pack)) as steps:
                    for done, text in steps:
                        progress.update(task, completed=before + done, description=text)
                        if time.monotonic() >= next_look:
                            begun = time.monotonic()
                            progress.update(task, left=str(settled(watch).left()))
                            # Ranks measure on these cores: of a large sweep it is looked at seldom.
                            next_look = time.monotonic() + max(LOOK_EVERY_S, LOOKING_SHARE * (time.monotonic() - begun))
                before += len(pack.cells)


def _published(sweep: Sweep, uri: str | None) -> bool:
    """Publish what is there so far; False where there is no server, or one that is away, which the command's end says."""
    if not uri:
        return False
    try:
        publish(sweep, uri, budget_s=PUBLISH_S)
    except TrackingUnavailable:
        return False
    return True


@contextmanager
def _told_to_end() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that was closed, end this command as Ctrl-C does, with its agents. What it was started to
    ignore (``nohup``) stays ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_pack(sweep: Sweep, pack: Pack) -> Generator[tuple[int, str]]:
    """Start a pack's agents, once nobody else measures here, and yield (cells done, what is going on) until they have ended."""
    nodes = parse_scale(pack.scale).nodes
    logs = pack.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    claim = Claim(pack)
    agents: list[subprocess.Popen[bytes]] = []
    try:
        yield from _wait_for_the_machine(claim)
        for node in range(nodes):
            command = [
                sys.executable, "-u", "-m", "lcbench.runs.agent", str(pack.path), "--node-rank", str(node),
                "--of", str(os.getpid()),
            ]  # fmt: skip
            with open(logs / f"agent-{node}.log", "ab") as log:
                # A group of its own, so that Ctrl-C reaches the agents through us, in order.
                agents.append(
                    subprocess.Popen(
                        command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                        pass_fds=claim.descriptors, env={**os.environ, **site_variables(pack.site), **claim.environment},
                    )
                )  # fmt: skip
        pids = tuple(agent.pid for agent in agents)
        write_job(pack.folder, replace(job_here(pack.launcher), pid=pids[0], pids=pids, timeout_min=pack.timeout_min))
        # Each is asked in each round: one that dies does so while the others wait for it.
        while None in (codes := [agent.poll() for agent in agents]) and not any(codes):
            yield _progress(sweep, pack)
            time.sleep(POLL_S)
        failed = [node for node, agent in enumerate(agents) if agent.returncode]
        if failed:
            _say_why(sweep, pack, failed[0], agents[failed[0]].returncode)
        yield _progress(sweep, pack)
    finally:
        _stop(agents)
        claim.drop()


def _wait_for_the_machine(claim: Claim) -> Iterator[tuple[int, str]]:
    said = None
    while found := claim.take(share=shares()):
        who = "; ".join(str(other) for other in found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        if shares():
            print(f"measures beside {who}; the results say so", file=sys.stderr)
            return
        if who != said:
            print(f"waits for {who}; {SHARE}=1 measures beside it, and the results say so", file=sys.stderr, flush=True)
            said = who
        yield 0, f"waits for {who}"
        time.sleep(PAUSE_S)


def _say_why(sweep: Sweep, pack: Pack, node: int, code: int) -> None:
    """Leave word why an agent ended with an error, if it did not itself."""
    logs = pack.folder / "logs"
    print(f"pack {pack.id}: an agent ended with an error; see {logs}", file=sys.stderr)
    if ended(pack.folder):
        return
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    said = last_error(logs / f"agent-{node}.log") if code > 0 else ""
    began = any(sweep.running(cell) or any(a.pack == pack.id for a in sweep.attempts(cell)) for cell in pack.cells)
    cause = f"the agent of node {node} {how}{f': {said}' if said else ''}"[:CAUSE_LENGTH]
    pack.write_note(END, Failure("crash" if began else "no-start", cause))


def _progress(sweep: Sweep, pack: Pack) -> tuple[int, str]:
    """How many cells of a pack it has tried or leaves out, and what it does."""
    tried = {cell_id: sweep.attempts(cell_id) for cell_id in pack.cells}
    done = sum(not owes(attempts, pack.id, pack.good.get(cell_id)) for cell_id, attempts in tried.items())
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
