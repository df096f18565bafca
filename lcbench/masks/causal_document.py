"""Causal document mask: documents are packed back to back; each is causal and sees no other."""

from __future__ import annotations

from collections.abc import Sequence

from lcbench.masks.band import BandMask
from lcbench.masks.document import squares
from lcbench.masks.lengths import Lengths, document_bounds


def causal_document(seqlen: int, *, seed: Sequence[int], lengths: Lengths) -> BandMask:
    """Query q sees key k when both are in the same document and k <= q."""
    return BandMask.of(seqlen, seqlen, squares(document_bounds(seqlen, lengths, seed), hi=0))
