"""FLOPs of attention, from the exact pairs of the mask over all query heads: forward 4 * pairs * D, backward 2.5 times that."""

from __future__ import annotations

from lcbench.problem import Heads

BACKWARD_FACTOR = 2.5  # five matrix products instead of two


def forward_flops(pairs: float, heads: Heads) -> float:
    return 4.0 * pairs * heads.dim


def backward_flops(pairs: float, heads: Heads) -> float:
    return BACKWARD_FACTOR * forward_flops(pairs, heads)
