"""Ring attention: queries stay, keys and values travel once around all ranks (Liu et al., arXiv 2310.01889).

The zigzag order (chunks i and 2P-1-i on rank i) gives every rank the same share of a causal mask in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.layout import Layout, contiguous, striped, zigzag
from lcbench.schedule.schedule import Move, Schedule, Step, head_groups, rows, singles

Order = Literal["auto", "zigzag", "striped", "contiguous"]
ORDERS = {"zigzag": zigzag, "striped": striped, "contiguous": contiguous}


@dataclass(frozen=True)
class Ring(Scheduled):
    """``order``: how tokens are dealt out; ``auto``: zigzag or contiguous, whichever is better balanced by exact area."""

    order: Order = "auto"

    def __post_init__(self) -> None:
        check_order(self.order)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return too_short(problem, problem.scale.world_size)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        shards = deal(mask, problem.seqlen, ranks, self.order)
        return Schedule(ranks, shards, np.arange(ranks), head_groups(problem.heads, 1), singles(ranks), rings([ranks]))


def rings(sizes: Sequence[int]) -> tuple[Step, ...]:
    """A ring over each group of neighbouring ranks; rank r owns shard r. A smaller ring is done earlier."""
    ranks = np.arange(sum(sizes))
    size = np.repeat(sizes, sizes)
    first = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    place = ranks - first
    neighbour = first + (place + 1) % size
    steps = []
    for hop in range(max(sizes)):
        held = first + (place - hop) % size
        computes, sends = ranks[hop < size], ranks[hop < size - 1]
        moves = (Move("kv", rows(sends, neighbour[sends], held[sends], 0)),) if len(sends) else ()
        steps.append(Step(rows(computes, 0, computes, held[computes]), moves))
    return tuple(steps)


def deal(mask: Mask, seqlen: int, shards: int, order: Order) -> Layout:
    """The layout of ``order`` for this mask."""
    if order != "auto":
        return ORDERS[order](seqlen, shards)
    plain, balanced = contiguous(seqlen, shards), zigzag(seqlen, shards)
    # A gain below one percent is not worth a layout whose tiles fall into more pieces.
    return balanced if balanced.imbalance(mask) < 0.99 * plain.imbalance(mask) else plain


def too_short(problem: Problem, shards: int) -> str | None:
    if problem.seqlen < 2 * shards:
        return f"needs at least two tokens per rank: seqlen={problem.seqlen} over {shards} ranks"
    return None


def check_order(order: str) -> None:
    if order not in ("auto", *ORDERS):
        raise ValueError(f"cp.order={order} is not one of auto, {', '.join(ORDERS)}")
