"""What a training step is a step of, and how it is trained: the options of ``workload=block``. No torch, so that plans read them."""

from __future__ import annotations

from dataclasses import dataclass

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

    Raises:
        ValueError: an optimizer that there is not.
    """

    model: Model
    layers: int | None = None
    loss_chunk: int = 1024
    fsdp: bool = False
    optimizer: str = "none"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"workload.optimizer={self.optimizer} is none of {', '.join(OPTIMIZERS)}")
