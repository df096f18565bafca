"""What a mask is to the rest: static (bands) or dynamic block-sparse (a block map).

A pass may turn out to have computed another kind, bands that differ by head (``Computed``): no cell asks for it.
"""

from lcbench.masks.band import BandMask
from lcbench.masks.block import BlockMap
from lcbench.masks.by_head import BandsByHead

Mask = BandMask | BlockMap
Computed = Mask | BandsByHead


def maps_of(mask: Computed) -> int:
    """How many maps there are, of which query head h of n reads map ``h // (n // maps)``."""
    return 1 if isinstance(mask, BandMask) else mask.maps
