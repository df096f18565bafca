"""Full recomputation: each layer keeps its input, and runs once more in backward, attention and its messages included
(arXiv 1604.06174)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.cp.base import RankRun
from lcbench.workloads.recompute.base import Again, recomputed

if TYPE_CHECKING:
    import torch

    from lcbench.workloads.transformer import Stack


@dataclass(frozen=True)
class Full:
    """It has no options."""

    def forward(self, stack: Stack, x: torch.Tensor) -> torch.Tensor:
        for layer in stack.layers:
            x = recomputed(layer, x, stack.rope)
        return x

    def refuses(self, run: RankRun) -> str | None:
        return None

    def again(self) -> Again:
        return Again(token_wise=1.0, attention=1.0)
