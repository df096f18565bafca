"""Keys at random, the same ones in every pass: what any compressor has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lcbench.cp.compressors.base import Block, Compressor, Scores
from lcbench.problem import Problem, check_whole

if TYPE_CHECKING:
    import torch

    from lcbench.cp.exchange import Exchange


@dataclass(frozen=True)
class Random(Compressor):
    """``seed``: of the draw, beside the place of the block."""

    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("compressor.seed", self.seed, 0)

    def start(self, problem: Problem, device: torch.device, exchange: Exchange) -> Scores:
        return self._scores

    def _scores(self, blocks: Sequence[Block]) -> list[torch.Tensor]:
        import torch

        found = []
        for block in blocks:
            number = np.random.SeedSequence([self.seed, *block.place]).generate_state(1, np.uint64)[0]
            generator = torch.Generator(block.k.device).manual_seed(int(number >> 1))
            found.append(torch.rand(block.k.shape[:2], generator=generator, device=block.k.device))
        return found
