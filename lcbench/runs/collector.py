"""The collector: it brings a sweep to its end without the command that began it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lcbench.grid import build
from lcbench.grid.cell import Cell
from lcbench.grid.paths import REPOSITORY
from lcbench.runs.jobs import SweepStatus, Watch
from lcbench.runs.launch import Launches, Todo, hand_over
from lcbench.runs.ownership import here_instead, only_shown, others
from lcbench.runs.pack import Settings, tries_again
from lcbench.runs.settle import settled
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.links import tracked_at
from lcbench.runs.tracking.publish import Counts, publish_or_say

REFUSED_PAUSE_S = 10.0
LOOKING_SHARE = 5.0  # a collector sleeps so many times as long as it looks


class Collector:
    """Brings a sweep to its end, whatever became of the command that began it. It records what has ended, runs again what the
    failure class allows, and submits what was never submitted.

    The collector only looks at a sweep that is not wholly the caller's own, unless ``as_mine``: running it would run, in the
    caller's name, what somebody else has written down.

    ``launcher_named``: the launcher of a name; raises ValueError where there is none.
    """

    def __init__(self, sweep: Sweep, launcher_named: Callable[[str], Launches], *, as_mine: bool = False) -> None:
        self._sweep, self._as_mine = sweep, as_mine
        self._launcher_named = cache(launcher_named)  # asked in every round
        self._watch = Watch(sweep, patient=True)
        self._next, self._said, self._pause_s = 0.0, "", 1.0
        self._left_out: set[str] = set()

    def advance(self) -> SweepStatus:
        """One round; where it stands now."""
        begun = time.monotonic()
        standing = self._settled()
        self._pause_s = max(1.0, LOOKING_SHARE * (time.monotonic() - begun))
        launch = standing.seen.launch
        if not launch or launch.get("cancelled") or (launcher := self._launcher(launch["launcher"])) is None:
            return standing
        people = others(self._sweep)
        if people and not self._as_mine:
            self._say(only_shown(self._sweep, people))
            return standing
        settings = Settings(**launch["settings"])
        if people:
            settings = replace(settings, site=here_instead(settings.site))

        def wanted(now: SweepStatus) -> Todo:
            records = {i: r for i, r in now.seen.records.items() if i not in now.under_way and not r.entry.skip}
            due = [
                r.entry.cell
                for r in records.values()
                if (tries_again(r.attempts, settings.retry) if r.attempts else not r.entry.predicted)
            ]
            return Todo([cell for cell in due if self._can_be_built(cell)])

        if wanted(standing).cells and time.monotonic() >= self._next:
            # Looked at again under the lock: somebody else may have done it.
            _, _, refusal = hand_over(launcher, self._sweep, lambda: wanted(self._settled()), settings)
            if refusal is not None:
                self._next = time.monotonic() + REFUSED_PAUSE_S
                self._say(str(refusal))
            standing = self._settled()
        return replace(standing, waiting=len(wanted(standing).cells))

    def _settled(self) -> SweepStatus:
        return settled(self._watch, as_mine=self._as_mine)

    def _launcher(self, name: str) -> Launches | None:
        """The sweep's launcher, if its packs run on without the command; else None, because nobody else may submit them again."""
        try:
            launcher = self._launcher_named(name)
        except ValueError as error:
            self._say(str(error))
            return None
        launcher.output = "json"  # whoever collects may be asked for JSON: what is submitted is said on stderr
        return launcher if launcher.queue is not None else None

    def _can_be_built(self, cell: Cell) -> bool:
        """Whether the classes of a cell are known here. A cell with unknown classes is left out, and reported once."""
        build.allow(self._sweep.allowed())
        try:
            build.check_targets(cell.config)
        except ValueError as error:
            if cell.id not in self._left_out:
                print(f"left out: cell {cell.id}: {error}", file=sys.stderr)
            self._left_out.add(cell.id)
            return False
        return True

    def pause(self) -> None:
        """Sleep until it is time for the next round: longer where looking takes long."""
        time.sleep(self._pause_s)

    def _say(self, text: str) -> None:
        """On stderr, once."""
        if text != self._said:
            print(text, file=sys.stderr)
        self._said = text


@dataclass(frozen=True)
class Collect:
    """The collector as a job, behind those that ``launcher`` has submitted.

    ``publish``: how a sweep gets to its tracking server.
    """

    root: str
    name: str
    launcher: Launches
    publish: Callable[[Sweep, str], Counts]

    def __call__(self) -> None:
        os.chdir(REPOSITORY)
        sweep = Sweep(Path(self.root), self.name)
        collect(sweep, self.only, self.publish, wait=False, on_a_node=True)

    def only(self, name: str) -> Launches:
        """The launcher, if it is of this name.

        Raises:
            ValueError: it is not: the sweep has been launched in another way since.
        """
        if name != self.launcher.name:
            raise ValueError(f"the sweep is launched by {name} now, and this is a collector of {self.launcher.name}")
        return self.launcher

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def collect(
    sweep: Sweep,
    launcher_named: Callable[[str], Launches],
    publish: Callable[[Sweep, str], Counts],
    *,
    wait: bool,
    on_a_node: bool = False,
    as_mine: bool = False,
) -> int:
    """Advance the sweep and ``publish`` it; with ``wait``, stay until all of its jobs have ended.

    Cells that run again have a collector of their own behind them.

    Returns: the number of cells without a good end, plus the number of held jobs.
    """
    collector = Collector(sweep, launcher_named, as_mine=as_mine)
    while not (standing := collector.advance()).at_rest and wait:
        collector.pause()
    launch = standing.seen.launch if as_mine or not others(sweep) else None
    # A node may have no way to the tracking server; then whoever looks from a login node publishes.
    if launch and not (on_a_node and launch["settings"]["site"].get("publish", "nodes") != "nodes"):
        publish_or_say(sweep, tracked_at(launch), publish)
    counts = standing.counts()
    print(", ".join(f"{count} {state}" for state, count in counts.most_common()))
    for line in standing.held_words():
        print(line, file=sys.stderr)
    return counts["failed"] + counts["lost"] + counts["missing"] + len(standing.held)
