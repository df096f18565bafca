"""A global batch of documents of mixed lengths: attention forward and backward in micro-batches, as a planner shares it out.

The documents are those of the cell's mask. Phases: ``batch``, all micro-batches, forward and backward of each, and ``reduce``, sums
of gradients of a given size over all ranks, where there are any. What a batch takes is the time of the slowest rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.workloads.base import Work, Workload
from lcbench.workloads.parts import REDUCED, Exchange, Made, Share, attention_alone

if TYPE_CHECKING:
    from lcbench.measure.session import Gang, Session


@dataclass(frozen=True)
class Batch(Workload):
    """Attention alone, of all documents.

    Attributes:
        capacity: tokens that a rank may have in a micro-batch.
        gradient_bytes: of gradients that all ranks sum at the end; 0: none are.

    Raises:
        ValueError: a capacity below 1, or a negative size.
    """

    takes: ClassVar[tuple[str, ...]] = ("planner",)

    capacity: int = 16384
    gradient_bytes: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("capacity", self.capacity, 1), ("gradient_bytes", self.gradient_bytes, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"workload.{name}={value} is no whole number of at least {least}")

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Any) -> str | None:
        if not strategy.inside:
            return "a planner's groups share documents by schedules, and this strategy has none"
        return None

    def made(self, share: Share, recompute: Any) -> Made:
        reduced = {"reduce": (Exchange(REDUCED, ("cp",), self.gradient_bytes),)} if self.gradient_bytes else {}
        return Made({"batch": tuple(part for parts in attention_alone(share).phases.values() for part in parts), **reduced})

    def start(self, work: Work, draw: int, gang: Gang) -> Session:
        from lcbench.workloads.batching import BatchSession  # with torch, which planning does without

        return BatchSession(self, work, draw, gang)
