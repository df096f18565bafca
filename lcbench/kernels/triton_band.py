"""Flash attention over bands, in Triton: any static mask in one call, tiles without a pair skipped; no library needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.kernels.base import Platform, Prepared, half_on_cuda, importable
from lcbench.kernels.triton_shapes import Tiled
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TritonBand(Tiled):
    """Any static mask in one call."""

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return triton_limits(problem, platform)

    def missing(self) -> str | None:
        return importable("triton")

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        from lcbench.kernels.tile_tables import of_bands
        from lcbench.kernels.triton_tiles import PreparedTiles

        assert isinstance(mask, BandMask)
        transposed = mask.transpose()
        shapes = self.shapes(heads.dim, dtype.itemsize, Platform.of(device).capability)
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
