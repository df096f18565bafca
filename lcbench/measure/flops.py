"""FLOPs of attention, from the exact pairs of the mask over all query heads.

Forward has two products per pair, of a query with a key (2 D FLOPs) and of a weight with a value (2 Dv). Backward has five: the
scores again, dq and dk, each as long as a key, and two as long as a value, of dout with a value and of a weight with dout. Where
dims are equal that is 4 D forward and 2.5 times as much backward.

Linear attention has those of its recurrence, the fewest that compute it (``kernels.linear``). A token adds k u^T to the state of
each key/value head (2 Dk Dv FLOPs), and each query head reads it (2 Dk Dv); the delta rule first reads what the state says of the
key (2 Dk Dv of each key/value head). Products of a number with a state, its decay, are none. Backward has two products for each of
these. Kernels work by chunks and compute more, which is not counted: as products within chunks they are faster all the same.
"""

from __future__ import annotations

from typing import Literal

from lcbench.problem import Heads, Problem, Rule
from lcbench.schedule.states import products


def forward_flops(pairs: float, heads: Heads) -> float:
    return 2.0 * pairs * (heads.dim + heads.v)


def backward_flops(pairs: float, heads: Heads) -> float:
    return 2.0 * pairs * (3 * heads.dim + 2 * heads.v)


def linear_flops(tokens: float, heads: Heads, rule: Rule) -> float:
    """Of forward of linear attention; backward has twice as many."""
    return float(2 * tokens * products(heads.q, heads.kv, rule) * heads.dim * heads.v)


def pass_flops(direction: Literal["forward", "backward"], pairs: float, problem: Problem) -> float:
    """Of a pass of the attention of a problem, whichever that is; ``pairs``: unmasked ones over all query heads, of one sequence or
    of several."""
    if problem.rule is None:
        return (forward_flops if direction == "forward" else backward_flops)(pairs, problem.heads)
    whole = problem.heads.q * problem.seqlen * (problem.seqlen + 1) / 2  # pairs of one sequence, whose mask is causal
    forward = linear_flops(pairs / whole * problem.seqlen, problem.heads, problem.rule)
    return forward if direction == "forward" else 2 * forward
