"""Dilated causal window (LongNet, arXiv 2307.02486; Sparse Transformers, arXiv 1904.10509): every d-th key of a window.

Each distance is a band of one diagonal, so a window may have few distances only.
"""

from __future__ import annotations

from lcbench.masks.band import Band, BandMask, NonNegative

MAX_DIAGONALS = 1024


def dilated_window(seqlen: int, *, left: NonNegative, dilation: int) -> BandMask:
    """Query q sees keys q, q - dilation, q - 2 * dilation, ... down to q - left.

    Raises:
        ValueError: more than ``MAX_DIAGONALS`` distances.
    """
    if left // dilation >= MAX_DIAGONALS:
        raise ValueError(
            f"mask.left={left} and mask.dilation={dilation} make {left // dilation + 1} diagonals; at most {MAX_DIAGONALS} are "
            "expressed as bands"
        )
    return BandMask.of(seqlen, seqlen, [Band(0, seqlen, 0, seqlen, -d, -d) for d in range(0, left + 1, dilation)])
