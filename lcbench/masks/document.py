"""Document mask: documents packed back to back, each seeing itself only, in both directions."""

from __future__ import annotations

import numpy as np

from lcbench.masks.band import OPEN, BandMask, Ints


def document(seqlen: int, *, seed: int, mean_length: int, lengths: list[int] | None = None) -> BandMask:
    """Documents of the given ``lengths``, or, without them, of seeded lengths uniform in [1, 2 * mean_length)."""
    return documents_mask(seqlen, document_bounds(seqlen, seed=seed, mean_length=mean_length, lengths=lengths))


def documents_mask(seqlen: int, bounds: Ints, hi: int = OPEN) -> BandMask:
    """One square band per document; ``hi=0`` makes each causal."""
    start, end = bounds[:-1], bounds[1:]
    bound = np.full_like(start, OPEN)
    return BandMask.of(seqlen, seqlen, np.stack([start, end, start, end, -bound, np.full_like(start, hi)], axis=1))


def document_bounds(seqlen: int, *, seed: int, mean_length: int, lengths: list[int] | None) -> Ints:
    """Offsets 0 = b0 < b1 < ... = seqlen, in tokens; the last drawn document is cut at the end.

    Raises:
        ValueError: lengths that do not add up to seqlen, or a length below 1.
    """
    if lengths is not None:
        if min(lengths, default=0) < 1 or sum(lengths) != seqlen:
            raise ValueError(
                f"mask.lengths={lengths} must be counts of at least 1 that add up to seqlen={seqlen}, not {sum(lengths)}"
            )
        drawn = np.array(lengths, dtype=np.int64)
    else:
        if mean_length < 1:
            raise ValueError(f"mask.mean_length={mean_length} must be a token count of at least 1, such as 4k")
        random = np.random.default_rng(seed)
        # Enough to pass seqlen but for a chance far below any that matters; the loop makes it certain.
        drawn = np.empty(0, dtype=np.int64)
        while drawn.sum() < seqlen:
            drawn = np.concatenate([drawn, random.integers(1, 2 * mean_length, 16 + seqlen // mean_length)])
    ends = np.cumsum(drawn)
    return np.concatenate([[0], ends[ends < seqlen], [seqlen]]).astype(np.int64)
