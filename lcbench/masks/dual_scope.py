"""Dual-scope attention (Video-Infinity, arXiv 2406.16260): a window on both sides, and global keys spread over the sequence."""

from __future__ import annotations

import numpy as np

from lcbench.masks.band import OPEN, BandMask, NonNegative


def dual_scope(seqlen: int, *, left: NonNegative, right: NonNegative, every: int, global_size: NonNegative) -> BandMask:
    """Query q sees key k when -left <= k - q <= right, or when ``k % every < global_size``.

    Raises:
        ValueError: global keys that leave nothing between them.
    """
    if global_size >= every:
        raise ValueError(f"mask.global_size={global_size} must be below mask.every={every}, else every key is global")
    begin = np.arange(0, seqlen, every)
    end = np.minimum(begin + global_size, seqlen)
    following = np.append(begin[1:], seqlen)
    q0, q1, bound = np.zeros_like(begin), np.full_like(begin, seqlen), np.full_like(begin, OPEN)
    shared = np.stack([q0, q1, begin, end, -bound, bound], axis=1)
    between = np.stack([q0, q1, end, following, np.full_like(begin, -left), np.full_like(begin, right)], axis=1)
    return BandMask.of(seqlen, seqlen, np.concatenate([shared, between]))
