"""Causal blockwise mask: causal documents, the last of which sees everything before it as well.

Many-shot in-context learning: the shots are independent, the test example reads all (LongCA-bench, arXiv 2510.17896).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcbench.masks.band import OPEN, Band, BandMask
from lcbench.masks.document import squares
from lcbench.masks.lengths import Lengths, document_bounds


def causal_blockwise(seqlen: int, *, seed: Sequence[int], lengths: Lengths) -> BandMask:
    """Query q sees key k when k <= q and both are in the same document, or q is in the last one."""
    bounds = document_bounds(seqlen, lengths, seed)
    last = Band(int(bounds[-2]), seqlen, 0, seqlen, -OPEN, 0)
    return BandMask.of(seqlen, seqlen, np.concatenate([squares(bounds[:-1], hi=0), [last]]))
