"""Diagonal blocks ("slash" lines of MInference, arXiv 2407.02490): the same few distances in blocks for every query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcbench.masks.band import Ints
from lcbench.masks.block import BlockMap, Keep, Sharing, Sizes, drawn
from lcbench.problem import Heads


def block_slash(
    seqlen: int, *, heads: Heads, seed: Sequence[int], density: float, block_size: int, sizes: Sizes, per: Sharing
) -> BlockMap:
    """``density``: share of the distances (column - row, modulo the columns, so that every row has as many); 0 always is one."""
    return drawn(seqlen, heads, seed, _pattern, density=density, block_size=block_size, sizes=sizes, per=per)


def _pattern(random: np.random.Generator, q: Ints, k: Ints, count: int) -> Keep:
    rows, columns = len(q) - 1, len(k) - 1
    kept = np.zeros(columns, dtype=bool)
    kept[0] = True
    kept[1 + random.permutation(columns - 1)[: count - 1]] = True
    keep: Keep = kept[(np.arange(columns) - np.arange(rows)[:, None]) % columns]
    return keep
