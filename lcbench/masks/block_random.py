"""Random blocks: in every row of blocks the same number, drawn without replacement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcbench.masks.band import Ints
from lcbench.masks.block import BlockMap, Keep, Sharing, Sizes, drawn
from lcbench.problem import Heads


def block_random(
    seqlen: int, *, heads: Heads, seed: Sequence[int], density: float, block_size: int, sizes: Sizes, per: Sharing
) -> BlockMap:
    """``density``: share of the blocks of a row that is kept, rounded to whole blocks, at least one."""
    return drawn(seqlen, heads, seed, _pattern, density=density, block_size=block_size, sizes=sizes, per=per)


def _pattern(random: np.random.Generator, q: Ints, k: Ints, count: int) -> Keep:
    columns = len(k) - 1
    keep = np.full((len(q) - 1, columns), count == columns)
    if count < columns:
        for row in keep:  # row by row: a whole matrix of random keys would be eight times the map
            row[random.choice(columns, count, replace=False)] = True
    return keep
