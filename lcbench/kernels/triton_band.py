"""Flash attention over bands, in Triton: any static mask in one call, tiles without a pair skipped; no library needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lcbench.kernels.tiled import Tiled
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask

if TYPE_CHECKING:
    from lcbench.kernels.tile_tables import MakeTables


@dataclass(frozen=True)
class TritonBand(Tiled):
    """Any static mask in one call."""

    def tables(self, mask: Mask) -> MakeTables:
        from lcbench.kernels.tile_tables import of_bands

        assert isinstance(mask, BandMask)
        return partial(of_bands, mask)
