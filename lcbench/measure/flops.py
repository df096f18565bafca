"""FLOPs of attention, from the exact pairs of the mask over all query heads.

Forward has two products per pair, of a query with a key (2 D FLOPs) and of a weight with a value (2 Dv). Backward has five: the
scores again, dq and dk, each as long as a key, and two as long as a value, of dout with a value and of a weight with dout. Where
dims are equal that is 4 D forward and 2.5 times as much backward.
"""

from __future__ import annotations

from lcbench.problem import Heads


def forward_flops(pairs: float, heads: Heads) -> float:
    return 2.0 * pairs * (heads.dim + heads.v)


def backward_flops(pairs: float, heads: Heads) -> float:
    return 2.0 * pairs * (3 * heads.dim + 2 * heads.v)
