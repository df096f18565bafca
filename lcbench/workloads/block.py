"""A training step of a few transformer layers under context parallelism, with any strategy, kernel and mask of attention cells.

Phases: ``forward`` of the layers; ``head``: loss and its gradient, by chunks of tokens; ``backward`` of the layers; ``reduce``:
sums of the weights' gradients over ranks. A model's step is ``head`` and, as often as it has layers, a layer's share of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.problem import Problem
from lcbench.workloads.base import Work, Workload
from lcbench.workloads.models import Model

if TYPE_CHECKING:
    from lcbench.measure.session import Gang
    from lcbench.workloads.step import BlockSession

LABEL_BYTES = 8


@dataclass(frozen=True)
class Block(Workload):
    """Layers of a model, and its head.

    Attributes:
        model: sizes.
        layers: how many layers are run; None: all of the model's.
        loss_chunk: tokens whose logits exist at once.
    """

    takes: ClassVar[tuple[str, ...]] = ("recompute",)

    model: Model
    layers: int | None = None
    loss_chunk: int = 1024

    def input_bytes(self, problem: Problem) -> float:
        """Of what the first layer gets, and of the labels. Weights are no inputs."""
        return problem.seqlen / problem.scale.world_size * (self.model.hidden * problem.itemsize + LABEL_BYTES)

    def start(self, work: Work, draw: int, gang: Gang) -> BlockSession:
        from lcbench.workloads.step import BlockSession  # with torch, which planning does without

        return BlockSession(self, work, draw, gang)
