"""A training step of a few transformer layers under context parallelism, with any strategy, kernel and mask of attention cells.

Phases: ``forward`` of the layers; ``head``: loss and its gradient, by chunks of tokens; ``backward`` of the layers; ``reduce``:
sums of the weights' gradients over the ranks that have the same weights, where these are not sharded; ``optimizer``: its step, if
any. With images ``reshard`` comes first and ``reshard_backward`` behind ``backward``. A model's step is these once, ``head``
and, as often as it has layers, a layer's share of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.workloads.base import Work, Workload
from lcbench.workloads.models import Model

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
        labelled: the share of a sequence's tokens that have a label, in contiguous answers (``lcbench.workloads.spans``).
        masked_logits: whether the head is computed only where a label is.
        vision: the share of a sequence's tokens that are of images, which begin on other ranks (``lcbench.workloads.reshard``).

    Raises:
        ValueError: an optimizer that there is not, or a share that is none.
    """

    takes: ClassVar[tuple[str, ...]] = ("recompute",)

    model: Model
    layers: int | None = None
    loss_chunk: int = 1024
    fsdp: bool = False
    optimizer: str = "none"
    # At their defaults they are no part of a cell, whose id is from before there was a choice.
    labelled: float = field(default=1.0, metadata={"left_out": True})
    masked_logits: bool = field(default=False, metadata={"left_out": True})
    vision: float = field(default=0.0, metadata={"left_out": True})

    def __post_init__(self) -> None:
        if not _is_number(self.vision) or not 0 <= self.vision <= 1:
            raise ValueError(f"workload.vision={self.vision} is no share of the tokens from 0 to 1, such as 0.5")
        if not _is_number(self.labelled) or not 0 < self.labelled <= 1:
            raise ValueError(f"workload.labelled={self.labelled} is no share of the tokens above 0 and up to 1, such as 0.25")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"workload.optimizer={self.optimizer} is none of {', '.join(OPTIMIZERS)}")

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Any) -> str | None:
        tp = self.model.heads_q // problem.heads.q  # the problem has one tensor-parallel rank's heads
        for name in ("ffn", "vocab"):
            if (size := getattr(self.model, name)) % tp:
                return f"mesh.tp={tp} does not divide model.{name}={size}, of which each tensor-parallel rank has an equal part"
        if self.masked_logits and self.labelled == 1:
            return "workload.masked_logits=true leaves nothing out where every token has a label (workload.labelled=1.0)"
        return None

    def start(self, work: Work, draw: int, gang: Gang) -> BlockSession:
        from lcbench.workloads.step import BlockSession  # with torch, which planning does without

        return BlockSession(self, work, draw, gang)


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
