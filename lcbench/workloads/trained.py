"""What a training step is a step of, and how it is trained: options of workloads that train. Plans read them without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from lcbench.problem import Problem
from lcbench.workloads.models import Model, not_of_layers

OPTIMIZERS = ("none", "adamw")
LABEL_BYTES = 8


@dataclass(frozen=True)
class Trained:
    """Layers of a model, and its head.

    Attributes:
        model: sizes.
        layers: how many layers are run; None: all of the model's.
        loss_chunk: tokens whose logits exist at once.
        optimizer: ``none``, or what takes a step after each backward: ``adamw``, with a learning rate of 0, so that weights stay.
        labelled: the share of a sequence's tokens that have a label, in contiguous answers (``lcbench.workloads.spans``).
        masked_logits: whether the head is computed only where a label is.

    Raises:
        ValueError: layers that the model has not, no tokens at once, an optimizer that there is not, or a share that is none.
    """

    imports: ClassVar[tuple[str, ...]] = ("torch.distributed.fsdp", "torch._dynamo", "scipy.optimize")

    model: Model
    layers: int | None = None
    loss_chunk: int = 1024
    optimizer: str = "none"
    # At their defaults they are no part of a cell, whose id is from before there was a choice.
    labelled: float = field(default=1.0, metadata={"left_out": True})
    masked_logits: bool = field(default=False, metadata={"left_out": True})

    def __post_init__(self) -> None:
        self.model.check_layers(self.layers)
        if self.loss_chunk < 1:
            raise ValueError(f"workload.loss_chunk={self.loss_chunk} is no whole number of at least 1")
        if not is_number(self.labelled) or not 0 < self.labelled <= 1:
            raise ValueError(f"workload.labelled={self.labelled} is no share of the tokens above 0 and up to 1, such as 0.25")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"workload.optimizer={self.optimizer} is none of {', '.join(OPTIMIZERS)}")

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients and the optimizer's states are sharded over all ranks that have the same weights (FSDP2)."""
        return False

    @property
    def shown(self) -> float:
        """The share of a sequence's tokens that are of images, which begin on other ranks (``lcbench.workloads.reshard``)."""
        return 0.0

    def untrainable(self, problem: Problem) -> str | None:
        """Why such a model does not train on a problem, or None; the problem has one tensor-parallel rank's heads."""
        batch = "a training step is of one sequence, all of whose tokens are computed"
        float16 = "gradients of a mean loss are below what float16 holds, and there is no loss scaling here"
        if reason := not_of_layers(problem, batch, float16):
            return reason
        tp = self.model.heads_q // problem.heads.q
        for name in ("ffn", "vocab"):
            if (size := getattr(self.model, name)) % tp:
                return f"mesh.tp={tp} does not divide model.{name}={size}, of which each tensor-parallel rank has an equal part"
        if self.masked_logits and self.labelled == 1:
            return "workload.masked_logits=true leaves nothing out where every token has a label (workload.labelled=1.0)"
        return None

    @property
    def depth(self) -> int:
        """Layers that are run."""
        return self.layers or self.model.layers

    def repeats(self, phases: Iterable[str]) -> dict[str, float]:
        """How often the whole model has what each phase is of: passes of layers by layers, what goes by weights by these, all else
        once."""
        weights = self.depth * self.model.layer_parameters(), self.model.layers * self.model.layer_parameters()
        measured, whole = (own + self.model.head_parameters() for own in weights)
        by_weight, by_layer = whole / measured, self.model.layers / self.depth
        found = {"forward": by_layer, "backward": by_layer, "reduce": by_weight, "optimizer": by_weight}
        return {phase: found.get(phase, 1.0) for phase in phases}


def is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
