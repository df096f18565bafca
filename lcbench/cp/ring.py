"""Ring attention: queries stay, keys and values travel once around all ranks (Liu et al., arXiv 2310.01889).

The zigzag order (chunks i and 2P-1-i on rank i) gives every rank the same share of a causal mask in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lcbench.cp.layout import Layout, contiguous, striped, zigzag
from lcbench.cp.schedule import Mesh, Schedule, ring_steps
from lcbench.masks.mask import Mask
from lcbench.problem import Problem

Order = Literal["auto", "zigzag", "striped", "contiguous"]
ORDERS = {"zigzag": zigzag, "striped": striped, "contiguous": contiguous}


@dataclass(frozen=True)
class Ring:
    """``order``: how tokens are dealt out; ``auto``: zigzag or contiguous, whichever is better balanced by exact area."""

    order: Order = "auto"

    def __post_init__(self) -> None:
        check_order(self.order)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return too_short(problem, problem.scale.world_size)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        mesh = Mesh.of(ring=problem.scale.world_size)
        layout = deal(mask, problem.seqlen, mesh.world_size, self.order)
        return Schedule(mesh, layout, layout, mesh.coordinate("ring"), ring_steps(mesh, "ring"))


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
