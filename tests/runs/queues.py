"""Schedulers for tests: what they answer is said beforehand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lcbench.runs.jobs import Watch
from lcbench.runs.queue import Answer, Job, Key
from lcbench.runs.queues import Slurm
from lcbench.runs.store import Sweep

Watching = Callable[[Sweep], Watch]


class Says(Slurm):
    """A Slurm that gives one answer."""

    def __init__(self, answer: Answer, cluster: str) -> None:
        self._answer, self._cluster = answer, cluster

    def ask(self, *_: Any) -> Answer:
        return self._answer

    def cluster(self, site: dict[str, Any]) -> str:
        return self._cluster


def says(jobs: dict[Key, Job], *, controller: bool = True, cluster: str = "") -> Watching:
    """Looks at sweeps whose scheduler knows these jobs."""
    return partial(Watch, queue_of=lambda *_: Says(Answer(jobs, controller), cluster))
