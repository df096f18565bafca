"""What a training step is a step of, and how it is trained: the options of ``workload=block``. Plans read them without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lcbench.workloads.models import Model

OPTIMIZERS = ("none", "adamw")


@dataclass(frozen=True)
class Trained:
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
        ValueError: layers that the model has not, an optimizer that there is not, or a share that is none.
    """

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
        if self.layers is not None and not 1 <= self.layers <= self.model.layers:
            raise ValueError(
                f"workload.layers={self.layers} is none of the model's 1 to {self.model.layers} layers; all of them: layers=all"
            )
        if not _is_number(self.vision) or not 0 <= self.vision <= 1:
            raise ValueError(f"workload.vision={self.vision} is no share of the tokens from 0 to 1, such as 0.5")
        if not _is_number(self.labelled) or not 0 < self.labelled <= 1:
            raise ValueError(f"workload.labelled={self.labelled} is no share of the tokens above 0 and up to 1, such as 0.25")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"workload.optimizer={self.optimizer} is none of {', '.join(OPTIMIZERS)}")

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


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
