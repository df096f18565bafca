"""Causal document mask: documents packed back to back, each causal inside, blind to the others."""

from __future__ import annotations

from collections.abc import Sequence

from lcbench.masks.band import BandMask
from lcbench.masks.document import squares
from lcbench.masks.lengths import Lengths, document_bounds


def causal_document(seqlen: int, *, seed: Sequence[int], lengths: Lengths) -> BandMask:
    return BandMask.of(seqlen, seqlen, squares(document_bounds(seqlen, lengths, seed), hi=0))
