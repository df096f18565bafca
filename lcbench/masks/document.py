"""Document mask: documents packed back to back, each seeing itself only, in both directions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcbench.masks.band import OPEN, BandMask, Ints
from lcbench.masks.lengths import Lengths, document_bounds


def document(seqlen: int, *, seed: Sequence[int], lengths: Lengths) -> BandMask:
    """Query q sees key k when both are in the same document."""
    return BandMask.of(seqlen, seqlen, squares(document_bounds(seqlen, lengths, seed)))


def squares(bounds: Ints, lo: int = -OPEN, hi: int = OPEN) -> Ints:
    """One square band per stretch ``bounds[i]:bounds[i+1]``, with the same diagonal bounds; ``hi=0`` makes each causal."""
    start, end = bounds[:-1], bounds[1:]
    return np.stack([start, end, start, end, np.full_like(start, lo), np.full_like(start, hi)], axis=1)
