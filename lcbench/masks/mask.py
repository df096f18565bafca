"""What a mask is to the rest: static (bands) or dynamic block-sparse (a block map)."""

from lcbench.masks.band import BandMask
from lcbench.masks.block import BlockMap

Mask = BandMask | BlockMap
