"""Prefix LM inside each document: its first tokens see each other in both directions, its later ones are causal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcbench.masks.band import OPEN, BandMask
from lcbench.masks.lengths import Lengths, document_bounds


def prefix_lm_document(seqlen: int, *, seed: Sequence[int], lengths: Lengths, prefix: int | None = None) -> BandMask:
    """The same ``prefix`` for all documents, the whole of a shorter one; drawn from 1 to the first one's length if not given."""
    bounds = document_bounds(seqlen, lengths, seed)
    if prefix is None:
        prefix = int(np.random.default_rng([*seed, 1]).integers(1, bounds[1] + 1))
    start, end = bounds[:-1], bounds[1:]
    middle = np.minimum(start + prefix, end)
    bound = np.full_like(start, OPEN)
    prefixes = np.stack([start, middle, start, middle, -bound, bound], axis=1)
    rest = np.stack([middle, end, start, end, -bound, np.zeros_like(start)], axis=1)
    return BandMask.of(seqlen, seqlen, np.concatenate([prefixes, rest]))
