"""A global batch of documents of mixed lengths: attention forward and backward in micro-batches, as a planner shares it out.

The documents are those of the cell's mask. Phases: ``batch``, all micro-batches, forward and backward of each, and ``reduce``, sums
of gradients of a given size over all ranks, where there are any. What a batch takes is the time of the slowest rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.problem import Mesh, Problem, Scale, check_whole
from lcbench.schedule.layout import documents
from lcbench.workloads.base import Work, Workload
from lcbench.workloads.parts import BATCH, REDUCED, Attend, Exchange, Made, Part, Share

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

    any_inputs: ClassVar[bool] = True
    imports: ClassVar[tuple[str, ...]] = ("torch.distributed.fsdp", "torch._dynamo")
    takes: ClassVar[tuple[str, ...]] = ("planner",)
    in_groups: ClassVar[bool] = True

    capacity: int = 16384
    gradient_bytes: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("capacity", self.capacity, 1), ("gradient_bytes", self.gradient_bytes, 0)):
            check_whole(f"workload.{name}", value, least)

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Any) -> str | None:
        if not problem.backward:
            return "direction=forward: a batch is trained on, so that workload=batch has direction=forward_backward only"
        if problem.batch is not None:
            return f"batch={problem.batch}: the documents of workload=batch are those of a mask; write seqlen=... and lengths=..."
        if not isinstance(mask, BandMask):
            return "a mask of blocks, or of each head's own, has no documents; mask=causal_document and mask=document have"
        if not strategy.inside:
            return "a planner's groups share documents by schedules, and this strategy has none"
        if any(inner.approximates(problem, mask) for inner in strategy.inside.values()):
            return "this strategy computes another mask, so that no document is whole"
        ranks = problem.scale.world_size
        if (reason := _no_group(problem, mask, strategy)) is not None:
            return reason
        tokens = np.diff(documents(mask)[0])
        if tokens.max() > (room := ranks * self.capacity):
            longest = int(tokens.argmax())
            return (
                f"document {longest} has {tokens[longest]} tokens, and {ranks} ranks with workload.capacity={self.capacity} each "
                f"hold {room}"
            )
        return None

    def misfit(self, mesh: Mesh) -> str | None:
        if mesh.dp > 1:
            return f"mesh.dp={mesh.dp}: a planner shares documents out among all ranks, replicas included; write mesh.dp=1"
        return None

    def made(self, share: Share, recompute: Any) -> Made:
        """Of a rank's mean share: which sub-groups share what is the planner's business."""
        phases: dict[str, tuple[Part, ...]] = {BATCH: (Attend("forward"), Attend("backward"))}
        if self.gradient_bytes:
            phases["reduce"] = (Exchange(REDUCED, ("dp", "cp"), float(self.gradient_bytes)),)
        return Made(phases, metrics={"batch/tokens": float(share.problem.seqlen)})

    def input_bytes(self, problem: Problem) -> float:
        return problem.input_bytes + self.gradient_bytes

    def start(self, work: Work, draw: int, gang: Gang) -> Session:
        from lcbench.workloads.batching import BatchSession  # with torch, which planning does without

        return BatchSession(work, draw, gang, capacity=self.capacity, gradient_bytes=self.gradient_bytes)


def _no_group(problem: Problem, mask: BandMask, strategy: Strategy) -> str | None:
    """Why no sub-group of ranks can share documents by a strategy; None: some can."""
    ranks = problem.scale.world_size
    sizes = [replace(problem, scale=Scale(1, size)) for size in range(1, ranks + 1)]
    if any(inner.unsupported(own, mask) is None for inner in strategy.inside.values() for own in sizes):
        return None
    return f"no sub-group of up to {ranks} ranks can share documents; of one rank: {strategy.unsupported(sizes[0], mask)}"
