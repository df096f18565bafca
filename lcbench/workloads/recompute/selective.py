"""LoongTrain's Selective Checkpoint++ (arXiv 2406.18485, section 5.2): a layer keeps its input and the results of its attention, so
backward computes all of the layer again but the attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.cp.base import RankRun
from lcbench.workloads.recompute.base import Again, OnDevice, needs_results, recomputed
from lcbench.workloads.recompute.sizes import Held, LayerBytes

if TYPE_CHECKING:
    import torch

    from lcbench.workloads.transformer import Kept, Layer, Rope, Stack


@dataclass(frozen=True)
class Selective(OnDevice):
    """It has no options."""

    def forward(self, stack: Stack, x: torch.Tensor) -> torch.Tensor:
        from lcbench.workloads.transformer import Kept  # with torch, which planning does without

        for layer in stack.layers:
            x = recomputed(_layer, layer, x, stack.rope, Kept())
        return x

    def refuses(self, run: RankRun) -> str | None:
        return needs_results(run)

    def again(self) -> Again:
        return Again(token_wise=1.0)

    def kept(self, layer: LayerBytes) -> Held:
        kept = layer.x.bytes + layer.results
        return Held(kept, working=layer.all - layer.saves_x * layer.x.bytes - layer.results, inputs=layer.x.bytes)


def _layer(layer: Layer, x: torch.Tensor, rope: Rope, kept: Kept) -> torch.Tensor:
    return layer.after(x, layer.attend(x, rope, kept))
