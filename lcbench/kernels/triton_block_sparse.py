"""Block-sparse flash attention in Triton: uniform and variable blocks, a map for each head or for many, in one call.

Rows of tiles are cut where blocks end, so kept blocks are computed without a mask but for what whole tiles leave of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import Platform, Prepared, importable, only_blocks
from lcbench.kernels.triton_band import triton_limits
from lcbench.kernels.triton_shapes import Tiled
from lcbench.masks.block import BlockMap
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TritonBlockSparse(Tiled):
    """Any block map in one call: tiles have at most the rows and columns that ``Tiled`` says."""

    takes: ClassVar[str] = "blocks"
    largest: ClassVar[int] = 64  # blocks may be of 64 tokens, and tiles end where blocks do

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
        shapes = self.shapes(heads.dim, dtype.itemsize, Platform.of(device).capability)
        return PreparedTiles(lambda other, *tile: of_blocks(transposed if other else mask, *tile), shapes, heads, device)
