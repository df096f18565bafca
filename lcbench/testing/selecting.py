"""Selection on one rank, block by block, for tests of selectors: what ranks must choose together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from lcbench.masks.band import BandMask, Ints
from lcbench.masks.block import Keep
from lcbench.problem import Problem
from lcbench.selectors.base import Features, Round, Rows, Selector, block_edges, pairs_of


def rows_of(number: int, q: torch.Tensor, mask: BandMask, q_edges: Ints, k_edges: Ints, lse: torch.Tensor | None = None) -> Rows:
    """Block ``number`` of the queries q (T, Hq, D), with what ``mask`` lets it see."""
    begin, end = int(q_edges[number]), int(q_edges[number + 1])
    own = mask.crop(begin, end, 0, mask.num_k)
    return Rows(number, q[begin:end], pairs_of(own, k_edges), own, None if lse is None else lse[begin:end])


def choose(
    selector: Selector, problem: Problem, mask: BandMask, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None = None
) -> Keep:
    """What ``selector`` keeps of all blocks, bool (maps, rows of blocks, columns of blocks)."""
    q_edges, k_edges = block_edges(len(q), selector.q_block), block_edges(len(k), selector.k_block)
    rows = [rows_of(number, q, mask, q_edges, k_edges, lse) for number in range(len(q_edges) - 1)]
    known: Features = {}
    for one in selector.rounds(problem):
        known = one.all(known | told(one, rows, k, k_edges, known), k_edges)
    return np.stack([selector.keep(row, known, k_edges, problem) for row in rows], axis=1)


def told(one: Round, rows: Sequence[Rows], k: torch.Tensor, k_edges: Ints, known: Features) -> Features:
    """What ranks tell one another in a round: here each block by itself."""
    parts: list[list[Features]] = [[], []]
    if one.keys is not None:
        for begin, end in pairwise(k_edges.tolist()):
            parts[0].append(one.keys(k[begin:end], np.array([end - begin]), known))
    if one.queries is not None:
        parts[1] = [one.queries(rows[number], known) for number in one.blocks(len(rows)).tolist()]
    return {name: torch.cat([part[name] for part in side]) for side in parts if side for name in side[0]}
