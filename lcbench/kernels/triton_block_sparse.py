"""Block-sparse flash attention in Triton: uniform and variable blocks, a map for each head or for many, in one call.

Rows of tiles are cut where blocks end, so a kept block is computed whole and without a mask, and nothing else is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import Kernel, Platform, Prepared, importable, only_blocks
from lcbench.kernels.triton_band import power_of_two_blocks, triton_limits
from lcbench.kernels.triton_shapes import Shape, Shapes
from lcbench.masks.block import BlockMap
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TritonBlockSparse(Kernel):
    """Tiles have at most ``block_q`` rows and ``block_k`` columns in forward and dq, ``block_dk`` and ``block_dq`` in dk and dv."""

    block_q: int = 64
    block_k: int = 64
    block_dk: int = 64
    block_dq: int = 32
    takes: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        power_of_two_blocks(self.block_q, self.block_k, self.block_dk, self.block_dq)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return only_blocks(mask)

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return triton_limits(problem, platform)

    def missing(self) -> str | None:
        return importable("triton")

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        from lcbench.kernels.tile_tables import of_blocks
        from lcbench.kernels.triton_tiles import PreparedTiles

        assert isinstance(mask, BlockMap)
        transposed = mask.transpose()
        shapes = Shapes(
            Shape(self.block_q, self.block_k, self.block_k, 8, 3),
            Shape(self.block_q, self.block_k, self.block_k, 8, 2),
            Shape(self.block_dk, self.block_dq, self.block_dq, 8, 2),
        )
        return PreparedTiles(lambda other, *tile: of_blocks(transposed if other else mask, *tile), shapes, heads, device)
