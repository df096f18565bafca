"""Block causal documents: inside a document, a block sees the document up to the block's own end, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from lcbench.masks.band import BandMask
from lcbench.masks.block_causal import block_causal_bands
from lcbench.masks.lengths import Lengths, document_bounds


def block_causal_document(seqlen: int, *, seed: Sequence[int], lengths: Lengths, block_size: int) -> BandMask:
    """Query q sees key k of the same document when k's block is not after q's; blocks of ``block_size`` begin with the document."""
    return BandMask.of(seqlen, seqlen, block_causal_bands(document_bounds(seqlen, lengths, seed), block_size))
