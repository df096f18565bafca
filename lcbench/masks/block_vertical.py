"""Column-heavy blocks ("vertical" lines of MInference, arXiv 2407.02490): the same few columns of blocks for every query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcbench.masks.band import Ints
from lcbench.masks.block import BlockMap, Keep, Sharing, Sizes, drawn
from lcbench.problem import Heads


def block_vertical(
    seqlen: int, *, heads: Heads, seed: Sequence[int], density: float, block_size: int, sizes: Sizes, per: Sharing
) -> BlockMap:
    """``density``: share of the columns of blocks that is kept; each block on the diagonal is kept besides."""
    return drawn(seqlen, heads, seed, _pattern, density=density, block_size=block_size, sizes=sizes, per=per)


def _pattern(random: np.random.Generator, q: Ints, k: Ints, count: int) -> Keep:
    keep = _diagonal(q, k)
    keep[:, random.choice(len(k) - 1, count, replace=False)] = True
    return keep


def _diagonal(q: Ints, k: Ints) -> Keep:
    """Blocks that hold a pair of a token with itself."""
    return (q[:-1, None] < k[None, 1:]) & (k[None, :-1] < q[1:, None])
