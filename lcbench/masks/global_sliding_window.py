"""Global + sliding window (Longformer, arXiv 2004.05150; BigBird): a window, and tokens that see and are seen by all."""

from __future__ import annotations

from lcbench.masks.band import Band, BandMask, NonNegative


def global_sliding_window(seqlen: int, *, global_tokens: NonNegative, left: NonNegative, right: NonNegative) -> BandMask:
    """Query q sees key k when q < global_tokens, k < global_tokens, or -left <= k - q <= right."""
    first = min(global_tokens, seqlen)
    return BandMask.of(
        seqlen,
        seqlen,
        [Band(0, first, 0, seqlen), Band(first, seqlen, 0, first), Band(first, seqlen, first, seqlen, -left, right)],
    )
