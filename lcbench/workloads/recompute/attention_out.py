"""LightSeq's rematerialisation-aware checkpoints (arXiv 2310.03294, section 3.3): the boundary lies behind the attention.

What is computed again at a time goes from behind one layer's attention to behind the next one's: the second half of a layer and the
first half of the one after it. The attention of that is known, since its results are the boundary, so backward runs one attention
forward less per layer than ``full``.
"""

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
class AttentionOut(OnDevice):
    """It has no options."""

    def forward(self, stack: Stack, x: torch.Tensor) -> torch.Tensor:
        from lcbench.workloads.transformer import Kept  # with torch, which planning does without

        first, *others = stack.layers
        out = recomputed(_attend, first, x, stack.rope, Kept())
        before = first
        for layer in others:
            x, out = recomputed(_between, before, layer, x, out, stack.rope, Kept())
            before = layer
        return recomputed(before.after, x, out)

    def refuses(self, run: RankRun) -> str | None:
        return needs_results(run)

    def again(self) -> Again:
        return Again(token_wise=1.0)

    def kept(self, layer: LayerBytes) -> Held:
        # What backward computes again at a time begins with an attention's backward. In that of the MLP before it, what the half
        # with the attention had saved is gone.
        again = layer.before.bytes + layer.after.bytes + sum(layer.buffers)
        return Held(layer.x.bytes + layer.results, working=layer.after.bytes, attending=again, inputs=layer.x.bytes)


def _attend(layer: Layer, x: torch.Tensor, rope: Rope, kept: Kept) -> torch.Tensor:
    return layer.attend(x, rope, kept)


def _between(
    one: Layer, other: Layer, x: torch.Tensor, out: torch.Tensor, rope: Rope, kept: Kept
) -> tuple[torch.Tensor, torch.Tensor]:
    """From behind the attention of one layer to behind that of the next."""
    x = one.after(x, out)
    return x, _attend(other, x, rope, kept)
