"""Where in a sequence its answers and images lie: contiguous spans, drawn as a whole and the same on every rank. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import Ints
from lcbench.masks.lengths import LogNormal, document_bounds

ANSWERS = LogNormal(median=256, sigma=1.0, high=4096)


def answers(seqlen: int, share: float, seed: Sequence[int]) -> Ints:
    """(n, 2): begin and end of the answers of a conversation, which together have a ``share`` of the tokens, at least one.

    Their lengths are log-normal, with a median of 256 tokens; the last one is cut so that the sum is right.
    """
    bounds = document_bounds(max(1, round(share * seqlen)), ANSWERS, [*seed, 0])
    return scattered(np.diff(bounds), seqlen, [*seed, 1])


def scattered(lengths: Ints, seqlen: int, seed: Sequence[int]) -> Ints:
    """(n, 2): spans of these lengths, in this order, with what is left of the sequence dealt out at random around them."""
    gaps = np.sort(np.random.default_rng(seed).integers(0, seqlen - int(lengths.sum()) + 1, len(lengths)))
    ends = gaps + np.cumsum(lengths)
    return np.stack([ends - lengths, ends], axis=1)


def within(tokens: Ints, spans: Ints) -> NDArray[np.bool_]:
    """(T,): whether each token is in one of the spans (n, 2), which are in ascending order and apart from each other."""
    at = np.searchsorted(spans[:, 1], tokens, side="right")  # the first that ends behind it
    begins = np.append(spans[:, 0], np.iinfo(np.int64).max)
    return np.asarray(tokens >= begins[at])
