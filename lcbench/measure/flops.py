"""FLOPs of attention, from the exact area of the mask: forward 4 * area * Hq * D, backward 2.5 times that."""

from __future__ import annotations

from lcbench.problem import Heads

BACKWARD_FACTOR = 2.5  # five matrix products instead of two


def forward_flops(area: int, heads: Heads) -> float:
    return 4.0 * area * heads.q * heads.dim


def backward_flops(area: int, heads: Heads) -> float:
    return BACKWARD_FACTOR * forward_flops(area, heads)
