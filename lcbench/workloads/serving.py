"""Attention of a batch of requests over what a serving engine's cache keeps of their keys and values.

The cache is where the strategy wants it before a pass begins, and stays: making it is no part of what is timed, moving it is only
where a strategy moves it. The one phase is ``forward``: a decode step, a chunk of a prompt, a whole prompt, or a mixture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel
from lcbench.kernels.cache import CacheKind
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.workloads.base import Work, Workload

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

    def start(self, work: Work, draw: int, gang: Gang) -> Session:
        from lcbench.workloads.cached import ServingSession  # with torch, which planning does without

        return ServingSession(self.kind, work, draw, gang)
