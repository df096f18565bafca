"""Queues: what a scheduler knows of jobs. Slurm's is here; a launcher of a user's own names its own.

A queue is found by the class that a pack names. Of a file that may be somebody else's nothing decides what is imported, so that
class is lcbench's, or one that the person who calls has launched this sweep with (``Sweep.allow``).
"""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from importlib import import_module
from typing import Any, ClassVar

from lcbench.grid import own
from lcbench.runs import queue
from lcbench.runs.queue import Answer, Job

FIRST_S, MOST_S = 2.0, 30.0  # between two questions to a scheduler of which nothing changes


class Queue(ABC):
    """What a scheduler says of jobs, and ending them. States are Slurm's words (man squeue), into which others are translated;
    ``ENDED`` where no more is known than that.

    Attributes:
        name: of the scheduler, as people call it.
    """

    name: ClassVar[str]

    @abstractmethod
    def ask(self, names: Sequence[str], since: float, site: dict[str, Any], ids: Sequence[str] = ()) -> Answer:
        """The jobs of these names, or ids, that were there after ``since`` (seconds since the epoch), by name and index.

        Args:
            site: of the sweep, where it may be trusted; else the caller's own of that name.
        """

    @abstractmethod
    def cancel(self, job_ids: Sequence[str], site: dict[str, Any]) -> dict[str, str]:
        """End jobs; by id, what became of those that were not ended."""

    def remedy(self, job: Job) -> str:
        """The command that helps a job which will not start by itself; empty for every other job."""
        return ""

    def cluster(self, site: dict[str, Any]) -> str:
        """Name of the cluster that is asked; empty where there is but one, or nobody can tell."""
        return ""


class Slurm(Queue):
    """squeue, sacct and scancel (``runs/queue.py``)."""

    name = "Slurm"

    def ask(self, names: Sequence[str], since: float, site: dict[str, Any], ids: Sequence[str] = ()) -> Answer:
        return queue.ask(names, since, queue.environment(site), ids)

    def cancel(self, job_ids: Sequence[str], site: dict[str, Any]) -> dict[str, str]:
        return queue.cancel(job_ids, queue.environment(site))

    def remedy(self, job: Job) -> str:
        return queue.remedy(job.state, job.reason, job.id)

    def cluster(self, site: dict[str, Any]) -> str:
        return queue.cluster_of(queue.where(queue.environment(site)))


class Patient(Queue):
    """Another queue, asked less and less often while nothing changes; in between the last answer is repeated."""

    def __init__(self, asked: Queue) -> None:
        self._queue, self._pause_s, self._next = asked, FIRST_S, 0.0
        self._question: tuple[tuple[str, ...], tuple[str, ...]] = (), ()
        self._answer = Answer({}, True)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self._queue.name

    def ask(self, names: Sequence[str], since: float, site: dict[str, Any], ids: Sequence[str] = ()) -> Answer:
        question = tuple(names), tuple(ids)
        if question == self._question and time.monotonic() < self._next:
            return self._answer
        answer = self._queue.ask(names, since, site, ids)
        self._pause_s = min(1.5 * self._pause_s, MOST_S) if answer == self._answer else FIRST_S
        self._question, self._answer, self._next = question, answer, time.monotonic() + self._pause_s
        return answer

    def cancel(self, job_ids: Sequence[str], site: dict[str, Any]) -> dict[str, str]:
        return self._queue.cancel(job_ids, site)

    def remedy(self, job: Job) -> str:
        return self._queue.remedy(job)

    def cluster(self, site: dict[str, Any]) -> str:
        return self._queue.cluster(site)


def target_of(asked: Queue | None) -> str:
    """What a pack says of its queue; empty where it has none: processes of the launching machine run it."""
    return f"{type(asked).__module__}.{type(asked).__qualname__}" if asked is not None else ""


SLURM = target_of(Slurm())  # of packs that earlier versions wrote, too, which name none and have a job's name


def queue_of(target: str, allowed: Collection[str]) -> Queue:
    """The queue that a pack names.

    Args:
        allowed: the classes besides ours that may be imported.

    Raises:
        ValueError: it is not allowed, cannot be imported, or is no queue.
    """
    if target in ("", SLURM):
        return Slurm()
    if target not in allowed:
        raise ValueError(f"its queue {target} is not one that you have launched this sweep with")
    module, _, name = target.rpartition(".")
    try:
        found = vars(import_module(module)).get(name)
    except Exception as error:
        raise ValueError(f"its queue {target} cannot be imported: {own.where(error, [target])}: {own.in_words(error)}") from error
    if not (inspect.isclass(found) and issubclass(found, Queue)):
        raise ValueError(f"its queue {target} is no Queue (lcbench.runs.queues)")
    made: Queue = found()
    return made
