"""What a rank holds of a problem's tensors."""

from __future__ import annotations

from dataclasses import dataclass

from lcbench.masks.band import Ints


@dataclass(frozen=True)
class Part:
    """Rows and heads of a tensor that a rank holds.

    Attributes:
        tokens: their indices among all queries, or among all keys, in the order of the rank's tensor.
        heads: their numbers, adjacent; None: all heads.
    """

    tokens: Ints
    heads: range | None = None


@dataclass(frozen=True)
class Held:
    """What a rank is given, and what it gives.

    Attributes:
        q: queries that it is given; others may be given the same, where a model computes them on several ranks.
        kv: keys and values that it is given; others may be given the same.
        out: results that it gives, of which each is given by exactly one rank.
    """

    q: Part
    kv: Part
    out: Part
