"""What a selector would leave of a mask, before there are queries and keys: as many blocks as it is asked for, in places drawn.

How many a block of queries keeps, and which always, the selector says (``asked``). Where the others are depends on the inputs, so
they are drawn, the same ones for the same mask. Selectors see to it that no query is left without a key; nobody does here.
"""

from __future__ import annotations

import numpy as np

from lcbench.masks.band import BandMask
from lcbench.masks.block import BlockMap, Keep, chosen
from lcbench.masks.convert import block_areas
from lcbench.problem import Problem
from lcbench.selectors.base import Rows, Selector, block_edges


def unforeseen(selector: Selector, problem: Problem) -> str | None:
    """Why nobody knows before what a selector leaves, or what it takes; None: that is known."""
    if selector.dense:
        return None
    one = Rows(0, np.empty((1, 0)), np.ones(1, dtype=np.int64), BandMask.of(1, 1, []))  # type: ignore[arg-type]
    if selector.asked(one, np.array([0, 1])) is None:
        return f"how many blocks {type(selector).__name__} keeps with these options depends on queries and keys"
    if selector.work(problem, 0.0) is None:
        return f"{type(selector).__name__} does not say what choosing takes (Selector.work), so nobody predicts it"
    return None


def foreseen(selector: Selector, problem: Problem, mask: BandMask) -> BlockMap:
    """A map as a selector may choose it within a mask, by head; of one that is not ``unforeseen``."""
    edges = block_edges(problem.queries, selector.q_block), block_edges(problem.seqlen, selector.k_block)
    pairs = np.zeros((len(edges[0]) - 1, len(edges[1]) - 1), dtype=np.int64)
    row, column, found = block_areas(mask, *edges)
    pairs[row, column] = found
    counts, always = [], []
    for number, of_row in enumerate(pairs):
        begin, end = edges[0][number : number + 2].tolist()
        asked = selector.asked(Rows(number, np.empty((end - begin, 0)), of_row, mask), edges[1])  # type: ignore[arg-type]
        assert asked is not None
        counts.append(asked[0])
        always.append(asked[1])
    maps = [_drawn(number, pairs > 0, np.stack(always), np.array(counts)) for number in range(selector.maps(problem.heads))]
    return chosen(np.stack(maps), *edges, mask)


def _drawn(number: int, seen: Keep, always: Keep, counts: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Keep:
    """A map that keeps ``counts`` blocks of each row, of those that are seen, (rows, columns): first those that it always keeps."""
    scores = np.random.default_rng([0, number]).random(seen.shape, dtype=np.float32)
    scores = np.where(always, 2, scores)
    scores[~seen] = -1
    least = np.take_along_axis(-np.sort(-scores, axis=1), np.maximum(counts - 1, 0)[:, None], axis=1)
    found: Keep = seen & ((scores >= least) & (counts > 0)[:, None] | always)
    return found
