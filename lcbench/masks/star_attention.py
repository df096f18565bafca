"""Star Attention (arXiv 2411.17116): context blocks see themselves and the anchor, the query sees everything."""

from __future__ import annotations

import numpy as np

from lcbench.masks.band import OPEN, Band, BandMask, DoesNotFit, NonNegative
from lcbench.masks.document import squares


def star_attention(seqlen: int, *, block_size: int, anchor: NonNegative, query: NonNegative) -> BandMask:
    """Both phases as one mask: causal blocks of the context, each with the first ``anchor`` tokens, and ``query`` causal tokens.

    Raises:
        ValueError: an anchor that is longer than a block.
        DoesNotFit: a query that is longer than the sequence.
    """
    if anchor > block_size:
        raise ValueError(f"mask.anchor={anchor} is longer than mask.block_size={block_size}; the anchor is part of the first block")
    context = seqlen - query
    if context < 0:
        raise DoesNotFit(f"query={query} is longer than seqlen={seqlen}")
    blocks = np.append(np.arange(0, context, block_size), context)
    first = min(block_size, context)
    rest = [Band(first, context, 0, min(anchor, first)), Band(context, seqlen, 0, seqlen, -OPEN, 0)]
    return BandMask.of(seqlen, seqlen, np.concatenate([squares(blocks, hi=0), rest]))
