"""Nothing is computed again: all that backward needs is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.workloads.recompute.base import Again, OnDevice
from lcbench.workloads.recompute.sizes import Held, LayerBytes

if TYPE_CHECKING:
    import torch

    from lcbench.workloads.transformer import Stack


@dataclass(frozen=True)
class NoRecompute(OnDevice):
    """It has no options."""

    def forward(self, stack: Stack, x: torch.Tensor) -> torch.Tensor:
        for layer in stack.layers:
            x = layer(x, stack.rope)
        return x

    def again(self) -> Again:
        return Again()

    def kept(self, layer: LayerBytes) -> Held:
        return Held(layer.all, inputs=layer.saves_x * layer.x.bytes)
