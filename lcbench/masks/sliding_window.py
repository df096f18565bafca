"""Sliding window: query q sees the keys from q - left to q + right, both included (left + right + 1 keys inside)."""

from lcbench.masks.band import Band, BandMask


def sliding_window(seqlen: int, *, left: int, right: int) -> BandMask:
    """The window as flash-attn's ``window_size=(left, right)`` has it; right=0 is the causal window.

    Raises:
        ValueError: a negative side.
    """
    if left < 0 or right < 0:
        raise ValueError(f"mask.left={left} and mask.right={right} must be token counts of at least 0")
    return BandMask.of(seqlen, seqlen, [Band(0, seqlen, 0, seqlen, -left, right)])
