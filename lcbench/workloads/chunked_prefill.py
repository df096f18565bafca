"""A prompt that is computed in chunks, each over the cache that the chunks before it left (Sarathi, arXiv 2308.16369, section 4.1).

A chunk is a rectangular problem: its tokens have queries, and all tokens up to its end have keys. Adaptive chunks shrink as the
cache grows, so that each has the pairs of the first one, exact by the mask, and takes about as long (Medha, arXiv 2409.17264,
"adaptive chunking"). With ``pipeline`` the groups of ``mesh.dp`` are stages of layers instead of replicas: a chunk enters the
first stage as soon as the one before has left it, since a chunk needs of earlier ones their keys and values alone (sequence
pipeline parallelism, SPP, in the same paper). S stages and N equal chunks then take (N + S - 1) / N of the work of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel
from lcbench.masks.band import Ints, TokenSpan
from lcbench.masks.mask import Mask
from lcbench.problem import Batch, Mesh, Problem, Requests
from lcbench.workloads.base import Work, Workload
from lcbench.workloads.parts import Attend, Made, Share

if TYPE_CHECKING:
    from lcbench.measure.session import Gang, Session


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
class ChunkedPrefill(Workload):
    """A prompt in chunks.

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

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Any) -> str | None:
        if problem.backward:
            return "a prompt is prefilled without backward: write direction=forward"
        if problem.batch is not None and len(problem.batch.groups) > 1:
            return f"batch={problem.batch}: the requests of a chunk are as long as one another, as in batch=2q64k"
        for chunk in self.chunks(problem, mask):
            if chunk.sees_ahead(mask):
                return f"{chunk} sees keys behind it, which are not in the cache yet: the mask does not go by chunks"
            own, part = chunk.problem(problem), chunk.mask(mask)
            for chosen in (kernel, strategy):
                if reason := chosen.unsupported(own, part):
                    return f"{chunk}: {reason}"
        return None

    def misfit(self, mesh: Mesh) -> str | None:
        if not self.pipeline:
            return None
        if mesh.dp == 1:
            return "workload.pipeline=true: mesh.dp=1 is one stage, and a pipeline has several"
        if self.layers % mesh.dp:
            return f"workload.layers={self.layers} cannot be dealt out evenly to the mesh.dp={mesh.dp} stages of a pipeline"
        return None

    def unforeseen(self) -> str | None:
        return "chunks over a growing cache are not simulated: workload=chunked_prefill is measured only"

    def made(self, share: Share, recompute: Any) -> Made:
        return Made({"forward": (Attend("forward", self.layers / self.stages(share.mesh)),)})

    def input_bytes(self, problem: Problem) -> float:
        return self.layers * problem.input_bytes

    def start(self, work: Work, draw: int, gang: Gang) -> Session:
        from lcbench.workloads.prefilling import PrefillSession  # with torch, which planning does without

        return PrefillSession(self, work, draw, gang)


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
