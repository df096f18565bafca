"""Independent standard normal numbers, as benchmarks usually have them: no key matters more than another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.inputs.base import Inputs, Wanted

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gaussian(Inputs):
    """Standard normal; it has no options. Every step has the same."""

    def draw(self, wanted: Wanted) -> torch.Tensor:
        from lcbench.inputs.drawing import draw  # with torch, which planning does without

        w = wanted
        return draw(w.name, w.tokens, w.problem, w.seed, w.device, w.group, w.heads, w.layer)
