"""Sub-groups of ranks that share some documents of a sequence: each by itself, as a problem of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lcbench.masks.band import BandMask, Ints
from lcbench.masks.documents import packed
from lcbench.problem import Problem, Scale


def sub_problem(
    problem: Problem, mask: BandMask, bounds: Ints, ranks: Sequence[int], documents: Sequence[int]
) -> tuple[Problem, BandMask]:
    """The problem of some ranks that share some documents, packed behind one another, and its mask.

    Args:
        problem, mask: of the whole.
        bounds: document i is tokens ``bounds[i] ... bounds[i + 1] - 1`` of it, (documents + 1,).
    """
    tile = packed(mask, bounds, np.array(documents, dtype=np.int64))
    return replace(problem, seqlen=tile.num_q, scale=scale_of(ranks, problem.scale.gpus_per_node)), tile


def scale_of(ranks: Sequence[int], per_node: int) -> Scale:
    """The scale of some ranks by themselves: the most neighbours of which each node that they are on has a multiple."""
    counts = np.unique(np.array(ranks) // per_node, return_counts=True)[1]
    together = math.gcd(*counts.tolist())
    return Scale(len(ranks) // together, together)
