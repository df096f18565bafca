"""Full recomputation: each layer keeps its input, and runs once more in backward, attention and its messages included
(arXiv 1604.06174)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.workloads.recompute.base import Again, OnDevice, recomputed
from lcbench.workloads.recompute.sizes import Held, LayerBytes

if TYPE_CHECKING:
    import torch

    from lcbench.workloads.transformer import Stack


@dataclass(frozen=True)
class Full(OnDevice):
    """It has no options."""

    def forward(self, stack: Stack, x: torch.Tensor) -> torch.Tensor:
        for layer in stack.layers:
            x = recomputed(layer, x, stack.rope)
        return x

    def again(self) -> Again:
        return Again(token_wise=1.0, attention=1.0)

    def kept(self, layer: LayerBytes) -> Held:
        return Held(layer.x.bytes, working=layer.all - layer.saves_x * layer.x.bytes, inputs=layer.x.bytes)
