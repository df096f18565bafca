"""Flash attention over bands, in Triton: any static mask in one call, tiles without a pair skipped; no library needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.kernels.base import Kernel, Platform, Prepared, half_on_cuda, importable
from lcbench.kernels.triton_shapes import Shape, Shapes
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TritonBand(Kernel):
    """``block_q`` x ``block_k`` tokens are a tile of forward and dq, ``block_dk`` keys x ``block_dq`` queries one of dk and dv."""

    block_q: int = 128
    block_k: int = 64
    block_dk: int = 128
    block_dq: int = 32

    def __post_init__(self) -> None:
        power_of_two_blocks(self.block_q, self.block_k, self.block_dk, self.block_dq)

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return triton_limits(problem, platform)

    def missing(self) -> str | None:
        return importable("triton")

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        from lcbench.kernels.tile_tables import of_bands
        from lcbench.kernels.triton_tiles import PreparedTiles

        assert isinstance(mask, BandMask)
        transposed = mask.transpose()
        shapes = Shapes(
            Shape(self.block_q, self.block_k, self.block_k, 8, 3),
            Shape(self.block_q, self.block_k, self.block_k, 8, 2),
            Shape(self.block_dk, self.block_dq, self.block_dq, 8, 2),
        )
        return PreparedTiles(lambda other, *tile: of_bands(transposed if other else mask, *tile), shapes, heads, device)


def triton_limits(problem: Problem, platform: Platform) -> str | None:
    """What our own Triton kernels run on."""
    if platform.type == "cuda":
        return half_on_cuda(problem, platform, "Triton", dtypes=("bfloat16", "float16", "float32"))
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on CUDA devices; on a CPU under TRITON_INTERPRET=1 only, which is for checks and not for speed"
    if problem.dtype == "bfloat16":
        return "Triton's interpreter on a CPU multiplies no bfloat16"
    return None


def power_of_two_blocks(*sizes: int) -> None:
    """Raises ValueError for a tile that Triton cannot have."""
    for size in sizes:
        if not isinstance(size, int) or size < 16 or size & (size - 1):
            raise ValueError(f"a tile of {size} tokens is no power of two from 16 on, such as 64")
