"""Keys of the smallest length, which needs no training and no query (Devoto et al., arXiv 2406.11430: such keys get most weight).

It is no stand-in for APB's trained heads in quality; it costs about what reading the keys once costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.cp.compressors.base import Block, Compressor, Scores
from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch

    from lcbench.cp.exchange import Exchange


@dataclass(frozen=True)
class KeyNorm(Compressor):
    """Scores are minus the Euclidean norms of keys, in the type of sums."""

    def start(self, problem: Problem, device: torch.device, exchange: Exchange) -> Scores:
        return _scores


def _scores(blocks: Sequence[Block]) -> list[torch.Tensor]:
    import torch

    from lcbench.kernels.base import accumulation_dtype

    return [-torch.linalg.vector_norm(block.k, dim=-1, dtype=accumulation_dtype(block.k.dtype)) for block in blocks]
