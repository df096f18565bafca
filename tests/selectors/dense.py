"""Selection as the papers have it, written down once more for small sequences: dense float64 matrices, and loops over queries
and blocks. It shares nothing with what it judges."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import BandMask

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def visible(mask: BandMask) -> Bools:
    """(queries, keys): whether a pair counts."""
    found = np.zeros((mask.num_q, mask.num_k), dtype=bool)
    q, k = np.arange(mask.num_q)[:, None], np.arange(mask.num_k)
    for q0, q1, k0, k1, lo, hi in mask.bands.tolist():
        found |= (q0 <= q) & (q < q1) & (k0 <= k) & (k < k1) & (lo <= k - q) & (k - q <= hi)
    return found


def softmax(scores: Floats, allowed: Bools) -> Floats:
    """Weights along the last axis, 0 for what is not allowed and for rows without anything."""
    found = np.zeros_like(scores)
    for at in np.ndindex(scores.shape[:-1]):
        own = np.broadcast_to(allowed, scores.shape)[at]
        if own.any():
            weights = np.exp(scores[at][own] - scores[at][own].max())
            found[at][own] = weights / weights.sum()
    return found


def weights(q: Floats, k: Floats, scale: float, allowed: Bools) -> Floats:
    """(Hq, queries, keys) softmax weights of q (T, Hq, D) and k (S, Hk, D)."""
    each = q.shape[1] // k.shape[1]
    return np.stack([softmax(scale * q[:, h] @ k[:, h // each].T, allowed) for h in range(q.shape[1])])


def blocks(tokens: int, size: int) -> list[range]:
    """The tokens of each block."""
    return [range(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)]


def pooled(pairs: Floats, q_block: int, k_block: int) -> Floats:
    """(heads, rows of blocks, columns of blocks): sums of (heads, queries, keys)."""
    rows, columns = blocks(pairs.shape[1], q_block), blocks(pairs.shape[2], k_block)
    return np.array([[[one[np.ix_(row, column)].sum() for column in columns] for row in rows] for one in pairs])


def moba(q: Floats, k: Floats, q_block: int, k_block: int) -> Floats:
    """MoBA, equation 6: products with mean keys, in the mean over a block's queries."""
    each = q.shape[1] // k.shape[1]
    return np.array([
        [[np.mean([q[t, h] @ k[column, h // each].mean(0) for t in row]) for column in blocks(len(k), k_block)]
         for row in blocks(len(q), q_block)] for h in range(q.shape[1])
    ])  # fmt: skip


def nsa(q: Floats, k: Floats, scale: float, allowed: Bools, q_block: int, k_block: int, compress: int, stride: int) -> Floats:
    """NSA, equations 7 to 9, with means as compressed keys: (Hq, rows of blocks, columns of blocks)."""
    each = q.shape[1] // k.shape[1]
    stretches = [range(0, min(compress, len(k)))]
    while stretches[-1].stop < len(k):
        begin = stretches[-1].start + stride
        stretches.append(range(begin, min(begin + compress, len(k))))
    keys = np.stack([k[own].mean(0) for own in stretches])
    whole = np.array([[allowed[t, own].all() for own in stretches] for t in range(len(q))])
    found = []
    for h in range(q.shape[1]):
        p = softmax(scale * q[:, h] @ keys[:, h // each].T, whole)
        of_block = np.zeros((len(q), len(blocks(len(k), k_block))))
        for number, column in enumerate(blocks(len(k), k_block)):
            for part in range(column.start, column.stop, stride):
                for i, own in enumerate(stretches):
                    of_block[:, number] += p[:, i] * (part in own)
        found.append([of_block[row].sum(0) for row in blocks(len(q), q_block)])
    return np.array(found)


def indexer(q: Floats, k: Floats, allowed: Bools, q_block: int, k_block: int, maps: int, pool: Callable[..., Floats]) -> Floats:
    """DeepSeek-V3.2, equation 1 with weights of 1: (maps, rows of blocks, columns of blocks)."""
    each = q.shape[1] // k.shape[1]
    heads = np.stack([np.maximum(0, q[:, h] @ k[:, h // each].T) for h in range(q.shape[1])])
    of_maps = heads.reshape(maps, -1, *heads.shape[1:]).sum(1) * allowed
    return np.array([
        [[pool(one[np.ix_(row, column)], axis=1).sum() for column in blocks(len(k), k_block)] for row in blocks(len(q), q_block)]
        for one in of_maps
    ])  # fmt: skip


def shared(scores: Floats, maps: int) -> Floats:
    """Scores of query heads, summed over those of a map."""
    return scores.reshape(maps, -1, *scores.shape[1:]).sum(1)


def best(scores: Floats, seen: Bools, count: Callable[[int], int], always: Bools) -> Bools:
    """Of each row of (maps, rows, columns): those ``always`` kept, then those of highest scores up to ``count`` of what is seen."""
    keep = np.zeros(scores.shape, dtype=bool)
    for m, i in np.ndindex(scores.shape[:2]):
        order = sorted(np.nonzero(seen[i])[0].tolist(), key=lambda j: (not always[i, j], -scores[m, i, j], j))
        forced = int((always[i] & seen[i]).sum())
        keep[m, i, order[: max(forced, count(len(order)))]] = True
    return keep
