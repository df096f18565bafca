"""Full mask: every query sees every key."""

from lcbench.masks.band import Band, BandMask


def full(seqlen: int) -> BandMask:
    """Query q sees every key k."""
    return BandMask.of(seqlen, seqlen, [Band(0, seqlen, 0, seqlen)])
