"""Causal document mask: documents packed back to back, each causal inside, blind to the others."""

from lcbench.masks.band import BandMask
from lcbench.masks.document import document_bounds, documents_mask


def causal_document(seqlen: int, *, seed: int, mean_length: int, lengths: list[int] | None = None) -> BandMask:
    """As ``document``, causal inside each document."""
    return documents_mask(seqlen, document_bounds(seqlen, seed=seed, mean_length=mean_length, lengths=lengths), hi=0)
