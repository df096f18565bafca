"""Local + sink + random blocks: near the diagonal, the first ones, and some more (as in BigBird, arXiv 2007.14062)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcbench.masks.band import Ints, NonNegative
from lcbench.masks.block import BlockMap, Keep, Sharing, Sizes, drawn
from lcbench.problem import Heads


def block_local_sink(
    seqlen: int,
    *,
    heads: Heads,
    seed: Sequence[int],
    density: float,
    local: NonNegative,
    sink: NonNegative,
    block_size: int,
    sizes: Sizes,
    per: Sharing,
) -> BlockMap:
    """In every row of blocks: the ``local`` ones nearest the diagonal, the first ``sink`` ones, random ones up to ``density``.

    The local ones are as many before the block on the diagonal as after it, one more before it where ``local`` is even; what would
    lie outside of the sequence is left out.
    """

    def pattern(random: np.random.Generator, q: Ints, k: Ints, count: int) -> Keep:
        rows, columns = len(q) - 1, len(k) - 1
        # The block of keys at the middle of each block of queries.
        middle = np.searchsorted(k, (q[:-1] + q[1:] - 1) // 2, side="right") - 1
        distance = np.arange(columns) - middle[:, None]
        keep = (-(local // 2) <= distance) & (distance <= (local - 1) // 2)
        keep[:, :sink] = True
        for row in range(rows):
            free = np.nonzero(~keep[row])[0]
            missing = min(len(free), count - (columns - len(free)))
            if missing > 0:
                keep[row, random.choice(free, missing, replace=False)] = True
        return keep

    return drawn(seqlen, heads, seed, pattern, density=density, block_size=block_size, sizes=sizes, per=per)
