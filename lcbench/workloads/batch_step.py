"""A training step of a few transformer layers on a batch of documents of mixed lengths, in micro-batches as planned.

The documents are those of the cell's mask. Phases: ``batch``, all micro-batches, each forward through the layers, through the head
and back; ``reduce``: sums of the weights' gradients over all ranks; ``optimizer``: its step, if any. The loss is the mean over all
labelled tokens of the batch, so that no result depends on the plan. What a batch takes is the time of the slowest rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel
from lcbench.masks.mask import Mask
from lcbench.problem import Mesh, Problem
from lcbench.workloads.base import Work, Workload
from lcbench.workloads.batch import Batch
from lcbench.workloads.block_parts import batch_made_of, layers_keep
from lcbench.workloads.parts import Made, Share
from lcbench.workloads.recompute.base import Recompute
from lcbench.workloads.trained import LABEL_BYTES, Trained

if TYPE_CHECKING:
    from lcbench.measure.session import Gang
    from lcbench.workloads.batch_stepping import BatchStepSession


@dataclass(frozen=True)
class BatchStep(Trained, Workload):
    """Layers of a model, and its head, trained as ``Trained`` says. Weights are not sharded (FSDP2): they would be gathered by all
    ranks together, and ranks have different numbers of micro-batches.

    Attributes:
        capacity: tokens that a rank may have in a micro-batch.

    Raises:
        ValueError: a capacity below 1.
    """

    takes: ClassVar[tuple[str, ...]] = ("recompute", "planner")
    in_groups: ClassVar[bool] = True

    capacity: int = 16384

    def __post_init__(self) -> None:
        super().__post_init__()
        self._attention  # noqa: B018 - refuses a capacity that is none

    @property
    def _attention(self) -> Batch:
        """The same batch of attention alone."""
        return Batch(self.capacity)

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Recompute) -> str | None:
        if not problem.backward:
            return (
                "direction=forward: a training step has a backward pass, so that workload=batch_step has "
                "direction=forward_backward only"
            )
        if (option := recompute.unsettled()) is not None:
            return (
                f"{option}=null is measured on the tokens of one pass, and micro-batches have different ones; write a share, such "
                f"as {option}=0.5"
            )
        return self.untrainable(problem) or self._attention.unsupported(problem, mask, kernel, strategy, recompute)

    def misfit(self, mesh: Mesh) -> str | None:
        return self._attention.misfit(mesh)

    def made(self, share: Share, recompute: Recompute) -> Made:
        """Of a rank's mean share, or of what it has of a micro-batch."""
        return batch_made_of(self, share, recompute)

    def layers_keep(self, share: Share) -> tuple[int, float]:
        return self.model.layers, layers_keep(self, share)

    def repeats(self, phases: Iterable[str]) -> dict[str, float]:
        """Nothing is scaled to a whole model: layers and head are timed together."""
        return {}

    def input_bytes(self, problem: Problem) -> float:
        """Of what the first layer gets, and of the labels. Weights are no inputs."""
        return problem.seqlen / problem.scale.world_size * (self.model.hidden * problem.itemsize + LABEL_BYTES)

    def start(self, work: Work, draw: int, gang: Gang) -> BatchStepSession:
        from lcbench.workloads.batch_stepping import BatchStepSession  # with torch, which planning does without

        return BatchStepSession(self, self.capacity, work, draw, gang)
