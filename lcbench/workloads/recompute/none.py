"""Nothing is computed again: all that backward needs is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.cp.base import RankRun
from lcbench.workloads.recompute.base import Again

if TYPE_CHECKING:
    import torch

    from lcbench.workloads.transformer import Stack


@dataclass(frozen=True)
class NoRecompute:
    """It has no options."""

    def forward(self, stack: Stack, x: torch.Tensor) -> torch.Tensor:
        for layer in stack.layers:
            x = layer(x, stack.rope)
        return x

    def refuses(self, run: RankRun) -> str | None:
        return None

    def again(self) -> Again:
        return Again()
