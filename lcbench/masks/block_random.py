"""Random blocks: in every row of blocks the same number, drawn without replacement."""

from __future__ import annotations

from collections.abc import Sequence

from lcbench.masks.block import BlockMap, Sharing, Sizes, chosen, drawn, share
from lcbench.problem import Heads


def block_random(
    seqlen: int, *, heads: Heads, seed: Sequence[int], density: float, block_size: int, sizes: Sizes, per: Sharing
) -> BlockMap:
    """``density``: share of the blocks of a row that is kept, rounded to whole blocks, at least one."""
    share(density, 1)
    return drawn(
        seqlen, heads, seed,
        lambda random, q, k: chosen(random, len(q) - 1, len(k) - 1, share(density, len(k) - 1)),
        block_size=block_size, sizes=sizes, per=per,
    )  # fmt: skip
