"""Temporal-graph mask: thousands of short causal documents, each the suffix of a node's events.

TF-TGN (arXiv 2409.05477) turns the neighbourhoods of a temporal graph into causal sequences of a few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from lcbench.masks.band import BandMask
from lcbench.masks.document import squares
from lcbench.masks.lengths import Uniform, document_bounds


def temporal_graph(seqlen: int, *, seed: Sequence[int], low: int, high: int) -> BandMask:
    """Causal documents of ``low`` to ``high`` tokens, drawn with the seed.

    Raises:
        ValueError: ``low`` above ``high``.
    """
    if low > high:
        raise ValueError(f"mask.low={low} is above mask.high={high}")
    return BandMask.of(seqlen, seqlen, squares(document_bounds(seqlen, Uniform(low, high), seed), hi=0))
