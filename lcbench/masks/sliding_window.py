"""Sliding window: query q sees the keys from q - left to q + right, both included (left + right + 1 keys inside)."""

from __future__ import annotations

from lcbench.masks.band import Band, BandMask, NonNegative


def sliding_window(seqlen: int, *, left: NonNegative, right: NonNegative) -> BandMask:
    """The window as flash-attn's ``window_size=(left, right)`` has it; right=0 is the causal window."""
    return BandMask.of(seqlen, seqlen, [Band(0, seqlen, 0, seqlen, -left, right)])
