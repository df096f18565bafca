"""Causal mask: a query sees the keys up to and including its own position."""

from lcbench.masks.band import Band, BandMask


def causal(seqlen: int) -> BandMask:
    """Query q sees key k when k <= q."""
    return BandMask.of(seqlen, seqlen, [Band(0, seqlen, 0, seqlen, hi=0)])
