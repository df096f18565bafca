"""Tells a gang that hangs from a slow one, by the marks of its ranks (``measure/progress.py``) and never by the clock alone.

Each node's agent sees the marks of its own ranks and reports them to node 0, whose agent judges. A gang hangs when none of its
ranks has made a mark for as long as the cell's patience. A gang that makes marks has until ``hang.max_s``.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lcbench.measure.progress import SLOT, VARIABLE, Mark

# Between cells, and before the first, ranks may stand still for this long: results wait for a full disk, and a gang comes up.
REST_S = 1200.0
# Ranks have this long to write where they stand before they are ended.
SETTLE_S = 5.0
# Nodes tell each other every so many seconds, less often where they are many.
EXCHANGE_S, EXCHANGE_S_PER_NODE = 2.0, 1 / 16
# An agent that was not scheduled for this long was stopped with its job, and so were its ranks.
STOPPED_S = 30.0
VERDICT = "lcbench/verdict"
STACKS_SIGNAL = signal.SIGUSR1


@dataclass(frozen=True)
class View:
    """What an agent sees of ranks: those of its node, or all.

    Attributes:
        total: marks of all of them.
        work: the attempt or block that they are at; empty between two.
        elapsed_s: how long they have been at it.
        limit_s: how long they may be; 0 for no limit.
        patience_s: how long none may make a mark, as they say.
        step: place of the rank that is furthest behind, or of one that is stopped.
        furthest: of the rank that is furthest ahead.
        rank: the one that is behind.
        place: its place in words.
        stopped: whether it is stopped (by SIGSTOP or a debugger).
    """

    total: int
    work: str
    elapsed_s: float
    limit_s: float
    patience_s: float
    step: tuple[int, int]
    furthest: tuple[int, int]
    rank: int
    place: str
    stopped: bool

    @classmethod
    def of(cls, marks: dict[int, Mark], stopped: set[int], now: float) -> View | None:
        """Of a node's ranks, by global rank; None while one of them has not come up."""
        if not marks or any(not mark.begun for mark in marks.values()):
            return None
        rank = min(marks, key=lambda r: (r not in stopped, marks[r].step))
        behind, first = marks[rank], min(marks.values(), key=lambda mark: mark.begun)
        return cls(
            sum(mark.count for mark in marks.values()), first.work, now - first.begun, first.limit_s,
            max(mark.patience_s for mark in marks.values()), behind.step, max(mark.step for mark in marks.values()), rank,
            behind.place, rank in stopped,
        )  # fmt: skip

    @classmethod
    def together(cls, own: View, others: list[View]) -> View:
        """Of the whole gang."""
        every = [own, *others]
        behind = min(every, key=lambda view: (not view.stopped, view.step))
        return cls(
            sum(view.total for view in every), own.work, own.elapsed_s, own.limit_s, max(view.patience_s for view in every),
            behind.step, max(view.furthest for view in every), behind.rank, behind.place, behind.stopped,
        )  # fmt: skip

    @property
    def apart(self) -> int | None:
        """The rank that the others wait for, where the marks show it."""
        return self.rank if self.stopped or self.step < self.furthest else None


@dataclass(frozen=True)
class Verdict:
    """The decision to end a gang, and why. ``rank``: the rank that the others wait for, if the marks show it."""

    work: str
    cause: str
    rank: int | None


class Judge:
    """Looks at a gang again and again. ``factor``: how many times as long as the longest stretch without a mark so far the next
    one may be; ``min_s``: what is too short to say anything.
    """

    def __init__(self, factor: float, min_s: float) -> None:
        self._factor, self._min_s = factor, min_s
        self._work: str | None = None
        self._total = 0
        self._last = self._changed = self._longest = self._stopped = 0.0

    def see(self, view: View, now: float) -> Verdict | None:
        """Look once more; a verdict as soon as, and as long as, the gang is to be ended."""
        gap, self._last = now - self._last, now
        if view.work != self._work:
            self._work, self._total, self._changed, self._longest, self._stopped = view.work, view.total, now, 0.0, 0.0
        elif gap > STOPPED_S:
            self._changed += gap
            self._stopped += gap
        if view.total != self._total:
            self._longest = max(self._longest, now - self._changed)
            self._total, self._changed = view.total, now
        idle_s = now - self._changed
        if view.limit_s and view.elapsed_s - self._stopped > view.limit_s:
            return Verdict(view.work, f"not at its end after hang.max_s={view.limit_s:g} s; it was at {view.place}", None)
        if idle_s > self._patience_s(view):
            who = f", rank {view.apart} {'is stopped' if view.stopped else 'behind the others'}" if view.apart is not None else ""
            return Verdict(view.work, f"no progress for {idle_s:.0f} s at {view.place}{who}", view.apart)
        return None

    def _patience_s(self, view: View) -> float:
        if not view.limit_s:
            return view.patience_s
        return min(max(view.patience_s, self._factor * self._longest, self._min_s), view.limit_s)


class Watcher:
    """The marks of this node's ranks, and of the other nodes' as they say; made by the agent before its first worker."""

    def __init__(self, node: int, nodes: int, ranks_per_node: int, hang: dict[str, float]) -> None:
        self._node, self._nodes = node, nodes
        self._memory, self._judge = _shared(SLOT.size * ranks_per_node), Judge(hang["factor"], hang["min_s"])
        self._next = self._ends_at = 0.0
        self._started = time.monotonic()
        self._others: dict[int, View] = {}
        self._asked = False
        self.verdict: Verdict | None = None

    def forget(self) -> None:
        """A new gang is about to start."""
        self._memory[:] = bytes(len(self._memory))
        self._others, self._next, self._asked, self.verdict = {}, 0.0, False, None
        self._started = time.monotonic()

    def look(self, ranks: dict[int, int], pids: dict[int, int], store: Any) -> tuple[Verdict | None, Verdict | None]:
        """(why this node's ranks are to write where they stand, said once; why they are to be ended).

        Args:
            ranks: of each local rank, its rank in the gang.
            pids: of each local rank, its process.
            store: what all agents of the gang share.
        """
        now = time.monotonic()
        marks = {rank: Mark.read(self._memory, local) for local, rank in ranks.items()}
        stopped = {rank for local, rank in ranks.items() if _is_stopped(pids.get(local))}
        view = View.of(marks, stopped, now)
        if self._nodes > 1 and now >= self._next:
            self._next = now + max(EXCHANGE_S, EXCHANGE_S_PER_NODE * self._nodes)
            with suppress(RuntimeError, ValueError):  # a store that is gone ends the gang by itself
                self._exchange(view, store)
        if self._node == 0:
            if view and len(self._others) == self._nodes - 1:
                found = self._judge.see(View.together(view, list(self._others.values())), now)
            else:
                found = Verdict("", f"not all ranks came up in {REST_S:g} s", None) if now - self._started > REST_S else None
            if found is None:  # it goes on, or it went on again
                self.verdict = None
            elif self.verdict is None:
                self.verdict, self._ends_at, self._next = found, now + SETTLE_S, 0.0
        verdict = self.verdict
        asks = verdict if verdict and not self._asked else None
        self._asked = verdict is not None
        return asks, verdict if self._node == 0 and now >= self._ends_at else None

    def _exchange(self, view: View | None, store: Any) -> None:
        if self._node:
            if view is not None:
                store.set(f"lcbench/progress/{self._node}", json.dumps(asdict(view)))
            said = json.loads(store.get(VERDICT)) if store.check([VERDICT]) else None
            self.verdict = Verdict(**said) if said else None
            return
        store.set(VERDICT, json.dumps(asdict(self.verdict) if self.verdict else None))
        for node in range(1, self._nodes):
            key = f"lcbench/progress/{node}"
            if node in self._others or store.check([key]):
                data = json.loads(store.get(key))
                self._others[node] = View(**data | {name: tuple(data[name]) for name in ("step", "furthest")})


def _shared(size: int) -> mmap.mmap:
    """Memory that the workers of this process find by an environment variable. It is freed with the last of them."""
    descriptor = os.memfd_create("lcbench-progress")
    os.ftruncate(descriptor, size)
    os.environ[VARIABLE] = f"/proc/{os.getpid()}/fd/{descriptor}"
    return mmap.mmap(descriptor, size)


def _is_stopped(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False
