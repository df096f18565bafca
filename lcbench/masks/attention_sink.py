"""Attention sinks: the first keys and a causal window (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from lcbench.masks.band import OPEN, Band, BandMask, NonNegative


def attention_sink(seqlen: int, *, sink: NonNegative, left: NonNegative) -> BandMask:
    """Query q sees key k <= q when k < sink or k >= q - left."""
    first = min(sink, seqlen)
    return BandMask.of(seqlen, seqlen, [Band(0, seqlen, 0, first, -OPEN, 0), Band(0, seqlen, first, seqlen, -left, 0)])
