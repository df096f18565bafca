"""Static masks that differ by head: what a strategy computed that chose keys of each key/value head by itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcbench.masks.band import BandMask, Ints


@dataclass(frozen=True, eq=False)
class BandsByHead:
    """Band masks of one shape; query head h of n has mask ``h // (n // maps)``, as of a block map.

    Attributes:
        masks: of adjacent query heads, equally many each.
    """

    masks: tuple[BandMask, ...]

    @property
    def maps(self) -> int:
        """How many masks there are."""
        return len(self.masks)

    @property
    def num_q(self) -> int:
        """Queries."""
        return self.masks[0].num_q

    @property
    def num_k(self) -> int:
        """Keys."""
        return self.masks[0].num_k

    def bands(self, number: int) -> BandMask:
        """One of the masks."""
        return self.masks[number]

    def pairs(self, q_heads: int) -> int:
        """Unmasked pairs over all query heads."""
        return sum(mask.area for mask in self.masks) * (q_heads // self.maps)

    @property
    def density(self) -> float:
        """Share of the planes' pairs that count, over all masks, 0 to 1."""
        return float(np.mean([mask.density for mask in self.masks]))

    def transpose(self) -> BandsByHead:
        """Queries and keys change places."""
        return BandsByHead(tuple(mask.transpose() for mask in self.masks))

    def corners(self, side: str) -> Ints:
        """First and last rows (``side="q"``) or columns (``"k"``) of the bands, sorted."""
        return np.unique(np.concatenate([mask.corners(side) for mask in self.masks]))
