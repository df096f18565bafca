"""Block-sparse flash attention in Triton: uniform and variable blocks, a map for each head or for many, in one call.

Rows of tiles end where blocks end. So kept blocks are computed without a mask, except for what whole tiles leave of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.block_maps import only_blocks
from lcbench.kernels.tiled import Tiled
from lcbench.masks.block import BlockMap
from lcbench.masks.mask import Mask
from lcbench.problem import Problem

if TYPE_CHECKING:
    from lcbench.kernels.tile_tables import MakeTables


@dataclass(frozen=True)
class TritonBlockSparse(Tiled):
    """Any block map in one call."""

    takes: ClassVar[str] = "blocks"
    largest: ClassVar[int] = 64  # blocks may be of 64 tokens, and tiles end where blocks do

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return super().unsupported(problem, mask) or only_blocks(mask)

    def tables(self, mask: Mask) -> MakeTables:
        from lcbench.kernels.tile_tables import of_blocks

        assert isinstance(mask, BlockMap)
        return partial(of_blocks, mask)
