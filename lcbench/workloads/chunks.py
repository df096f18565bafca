"""A prompt as chunks that are computed one after the other: which tokens each has, and how large it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from lcbench.masks.band import Ints, TokenSpan
from lcbench.masks.mask import Mask
from lcbench.problem import Batch, Mesh, Problem, Requests


@dataclass(frozen=True)
class Chunk:
    """Adjacent tokens of each request of a prompt, which are computed together.

    Attributes:
        requests: of the whole prompt, which are equal.
        begin, end: its first token and the one behind its last, among all tokens of a request.
    """

    requests: Requests
    begin: int
    end: int

    def __str__(self) -> str:
        return f"the chunk of tokens {self.begin} to {self.end - 1}"

    def problem(self, whole: Problem) -> Problem:
        """What it computes: its tokens against all up to its end."""
        count = self.requests.count
        batch = Batch((Requests(count, self.end - self.begin, self.end),))
        return replace(whole, seqlen=count * self.end, batch=batch)

    @property
    def queries(self) -> Ints:
        """Which of the prompt's queries are its own, in their order."""
        requests, before = self.requests, self.requests.total - self.requests.new
        return _of_each(requests.count, requests.new, self.begin - before, self.end - before)

    @property
    def keys(self) -> Ints:
        """Which of the prompt's keys it sees, in their order: all up to its end."""
        return _of_each(self.requests.count, self.requests.total, 0, self.end)

    def _rows(self) -> list[TokenSpan]:
        requests = self.requests
        first = self.begin - (requests.total - requests.new)
        return [TokenSpan(number * requests.new + first, self.end - self.begin) for number in range(requests.count)]

    def mask(self, whole: Mask) -> Mask:
        """Its part of the prompt's mask."""
        keys = [TokenSpan(number * self.requests.total, self.end) for number in range(self.requests.count)]
        return whole.tile(self._rows(), keys)

    def pairs(self, whole: Mask) -> int:
        """Unmasked pairs of its queries with any key of the prompt, over the maps of the mask."""
        return whole.row_area(self._rows())

    def sees_ahead(self, whole: Mask) -> bool:
        """Whether a query sees a key behind its end, which is not in the cache yet."""
        own = self.mask(whole)
        return own.row_area([TokenSpan(0, own.num_q)]) != self.pairs(whole)


def _of_each(count: int, size: int, begin: int, end: int) -> Ints:
    """Indices ``begin ... end - 1`` of each of ``count`` stretches of ``size``."""
    found: Ints = (np.arange(count, dtype=np.int64)[:, None] * size + np.arange(begin, end, dtype=np.int64)).ravel()
    return found


@dataclass(frozen=True)
class Chunks:
    """How a prompt is cut into chunks: the options of ``workload=chunked_prefill``.

    Attributes:
        chunk: tokens of a request in a chunk; the last one has what is left.
        adaptive: each chunk has at most the pairs of the first one.
        least: tokens of the smallest adaptive chunk, of which the others but the first are multiples.
        layers: attention calls of each chunk, each with inputs and a cache of its own; over all stages.
        pipeline: the groups of ``mesh.dp`` are stages, each with its share of the layers, instead of replicas. What a stage's last
            layer gives is added to the queries of the next stage's first one.

    Raises:
        ValueError: a count below 1, or a smallest chunk above the first.
    """

    chunk: int = 4096
    adaptive: bool = False
    least: int = 256
    layers: int = 1
    pipeline: bool = False

    def __post_init__(self) -> None:
        for name, value in (("chunk", self.chunk), ("least", self.least), ("layers", self.layers)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                said = "all" if value is None else value
                raise ValueError(f"workload.{name}={said} is no number of at least 1")
        if self.adaptive and self.least > self.chunk:
            raise ValueError(f"workload.least={self.least} is above the first chunk's workload.chunk={self.chunk}")

    def chunks(self, problem: Problem, mask: Mask) -> list[Chunk]:
        """The chunks of a prompt, in their order; ``mask``: of the whole prompt."""
        return list(self._chunks(requests_of(problem), mask))

    def _chunks(self, requests: Requests, mask: Mask) -> Iterator[Chunk]:
        begin, work = requests.total - requests.new, 0
        while begin < requests.total:
            size = min(self.chunk, requests.total - begin)
            if self.adaptive and work:
                holds = partial(self._holds, requests, mask, work, begin)
                size = min(size, self.least * _largest(holds, size // self.least))
            found = Chunk(requests, begin, begin + size)
            work = work or found.pairs(mask)
            yield found
            begin = found.end

    def _holds(self, requests: Requests, mask: Mask, work: int, begin: int, number: int) -> bool:
        """Whether a chunk of so many times the smallest has no more pairs than ``work``."""
        return Chunk(requests, begin, begin + number * self.least).pairs(mask) <= work

    def stages(self, mesh: Mesh) -> int:
        """Of the pipeline; 1: there is none."""
        return mesh.dp if self.pipeline else 1


def requests_of(problem: Problem) -> Requests:
    """The requests of a prompt; a sequence is one."""
    if problem.batch is None:
        return Requests(1, problem.seqlen, problem.seqlen)
    (found,) = problem.batch.groups
    return found


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that holds, of those from 1 on; 1 where none does."""
    low, high = 1, max(1, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
