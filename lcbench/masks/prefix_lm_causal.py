"""Prefix LM: the first tokens see each other in both directions, all later ones are causal (T5, arXiv 1910.10683, fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcbench.masks.band import OPEN, Band, BandMask, DoesNotFit


def prefix_lm_causal(seqlen: int, *, seed: Sequence[int], prefix: int | None = None) -> BandMask:
    """``prefix`` tokens: query q sees key k when k < prefix or k <= q; drawn from 1 to seqlen if not given.

    Raises:
        DoesNotFit: a prefix longer than the sequence.
    """
    if prefix is None:
        prefix = int(np.random.default_rng(seed).integers(1, seqlen + 1))
    if prefix > seqlen:
        raise DoesNotFit(f"prefix={prefix} is longer than seqlen={seqlen}")
    return BandMask.of(seqlen, seqlen, [Band(0, prefix, 0, prefix), Band(prefix, seqlen, 0, seqlen, -OPEN, 0)])
