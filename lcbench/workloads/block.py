"""A training step of a few transformer layers under context parallelism, with any strategy, kernel and mask of attention cells.

Phases: ``forward`` of the layers; ``head``: loss and its gradient, by chunks of tokens; ``backward`` of the layers; ``reduce``:
sums of the weights' gradients over the ranks that have the same weights, where these are not sharded; ``optimizer``: its step, if
any. A model's step is ``head`` and, as often as it has layers, a layer's share of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.workloads.base import Work, Workload
from lcbench.workloads.block_parts import Options, made_of
from lcbench.workloads.models import Model
from lcbench.workloads.parts import Made, Share
from lcbench.workloads.recompute.base import Recompute

if TYPE_CHECKING:
    from lcbench.measure.session import Gang
    from lcbench.workloads.step import BlockSession

OPTIMIZERS = ("none", "adamw")


@dataclass(frozen=True)
class Block(Workload):
    """Layers of a model, and its head.

    Attributes:
        model: sizes.
        layers: how many layers are run; None: all of the model's.
        loss_chunk: tokens whose logits exist at once.
        fsdp: whether weights, gradients and the optimizer's states are sharded over all ranks that have the same weights (FSDP2).
        optimizer: ``none``, or what takes a step after each backward: ``adamw``, with a learning rate of 0, so that weights stay.

    Raises:
        ValueError: an optimizer that there is not.
    """

    takes: ClassVar[tuple[str, ...]] = ("recompute",)

    model: Model
    layers: int | None = None
    loss_chunk: int = 1024
    fsdp: bool = False
    optimizer: str = "none"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"workload.optimizer={self.optimizer} is none of {', '.join(OPTIMIZERS)}")

    def made(self, share: Share, recompute: Recompute) -> Made:
        layers = self.layers or self.model.layers
        return made_of(Options(self.model, layers, self.loss_chunk, self.fsdp, self.optimizer), share, recompute)

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Any) -> str | None:
        tp = self.model.heads_q // problem.heads.q  # the problem has one tensor-parallel rank's heads
        for name in ("ffn", "vocab"):
            if (size := getattr(self.model, name)) % tp:
                return f"mesh.tp={tp} does not divide model.{name}={size}, of which each tensor-parallel rank has an equal part"
        return None

    def start(self, work: Work, draw: int, gang: Gang) -> BlockSession:
        from lcbench.workloads.step import BlockSession  # with torch, which planning does without

        return BlockSession(self, work, draw, gang)
