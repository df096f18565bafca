"""Attention of a batch of requests over what a serving engine's cache keeps of their keys and values.

The cache is where the strategy wants it before a pass begins, and stays: making it is no part of what is timed, moving it is only
where a strategy moves it. The one phase is ``forward``: a decode step, a chunk of a prompt, a whole prompt, or a mixture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel
from lcbench.kernels.cache import CacheKind
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.workloads.base import Work, Workload
from lcbench.workloads.parts import Attend, Copied, Made, Share

if TYPE_CHECKING:
    from lcbench.measure.session import Gang, Session


@dataclass(frozen=True)
class Serving(Workload):
    """A pass over a cache.

    Attributes:
        page: tokens of a page; None: a request's tokens are one stretch of memory.
        storage: ``input``: in the inputs' type; ``bfloat16``; ``float8``: float8_e4m3fn with a scale per key/value head.

    Raises:
        ValueError: a page without a token, or a storage that there is not.
    """

    any_inputs: ClassVar[bool] = True

    page: int | None = None
    storage: Literal["input", "bfloat16", "float8"] = "input"

    def __post_init__(self) -> None:
        try:
            CacheKind(self.page, self.storage)
        except ValueError as error:
            raise ValueError(f"workload=serving: {error}") from error

    @property
    def kind(self) -> CacheKind:
        """How the cache stores."""
        return CacheKind(self.page, self.storage)

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Any) -> str | None:
        if problem.backward:
            return "workload=serving has no backward: write direction=forward"
        return strategy.only_in_a_step()

    def made(self, share: Share, recompute: Any) -> Made:
        problem, kind, mesh = share.problem, self.kind, share.mesh
        copies = share.copies(kind)
        copied = kind.read_bytes(problem.dtype) * share.cached if copies else 0.0
        stored, tokens = kind.stored_bytes(problem.dtype), float(problem.queries * mesh.dp)
        every = problem.seqlen * problem.heads.kv * problem.heads.kv_width * share.replicas * mesh.count
        return Made(
            {"forward": (*([Copied(copied)] if copied else []), Attend("forward"))},
            metrics={
                "serving/new_tokens": tokens,
                "serving/tokens_per_gpu": tokens / (problem.scale.world_size * mesh.count),
                "serving/cache_bytes": stored * share.cached,
                "serving/cache_bytes_per_token": stored * every / tokens,
            },
            key_bytes=0.0 if copies else float(stored),
            held=problem.itemsize * share.cached if copied else 0.0,
        )

    def input_bytes(self, problem: Problem) -> float:
        """Of queries, keys and values, and of a cache that is not these."""
        kind, heads = self.kind, problem.heads
        apart = kind.page is not None or kind.stored_as(problem.dtype) != problem.dtype
        cached = problem.seqlen * heads.kv * heads.kv_width / problem.scale.world_size
        return problem.input_bytes + apart * kind.stored_bytes(problem.dtype) * cached

    def start(self, work: Work, draw: int, gang: Gang) -> Session:
        from lcbench.workloads.cached import ServingSession  # with torch, which planning does without

        return ServingSession(self.kind, work, draw, gang)
