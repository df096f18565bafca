"""The mask of some of a sequence's documents, packed behind one another."""

from __future__ import annotations

import numpy as np

from lcbench.masks.band import BandMask, Ints, shifted, spread


def packed(mask: BandMask, bounds: Ints, numbers: Ints) -> BandMask:
    """What is left of a mask where documents lie in this order, and nothing else does.

    Args:
        bounds: document i is tokens ``bounds[i] ... bounds[i + 1] - 1``, and no pair of the mask connects two, (documents + 1,).
        numbers: of the documents that are left, each once.
    """
    size = np.diff(bounds)[numbers]
    start = np.cumsum(size) - size
    of = np.searchsorted(bounds, mask.bands[:, 0], side="right") - 1
    order = np.argsort(of, kind="stable")
    begins = np.searchsorted(of, np.arange(len(bounds)), sorter=order)
    place, band = spread(begins[numbers], begins[numbers + 1])
    moved = (start - bounds[numbers])[place]
    return BandMask(int(size.sum()), int(size.sum()), shifted(mask.bands[order[band]], moved, moved))
