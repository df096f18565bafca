"""Block causal mask: a block sees itself in both directions and every block before it.

Diffusion language models and video generation by chunks (Block Diffusion, arXiv 2503.09573; MAGI-1, arXiv 2505.13211).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from lcbench.masks.band import BandMask, Ints
from lcbench.masks.document import squares


def block_causal(seqlen: int, *, block_size: int) -> BandMask:
    """Query q sees key k when ``k // block_size <= q // block_size``; the last block may be short."""
    bounds = np.array([0, seqlen])
    return BandMask.of(seqlen, seqlen, block_causal_bands(bounds, block_size))


def block_causal_bands(bounds: Ints, block_size: int) -> Ints:
    """Documents ``bounds[i]:bounds[i+1]``, block causal inside.

    One causal band per document and one strict upper triangle per block: two varlen calls, however many blocks there are,
    where a staircase of rectangles would take one call a step.
    """
    blocks = [np.arange(a, b, block_size) for a, b in pairwise(bounds)]
    edges = np.concatenate([*blocks, bounds[-1:]])
    return np.concatenate([squares(bounds, hi=0), squares(edges, lo=1)])
