"""Costs of documents by a formula, for tests of planners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lcbench.planners.base import Cost, Documents, Floats


@dataclass(frozen=True)
class Quadratic(Cost):
    """``(pair_s * pairs + token_s * tokens) / p + (p > 1) * exchange_s * tokens * (p - 1) / p``, four times the last term beyond a
    node, and an overhead that grows with p.

    Attributes:
        pair_s, token_s, exchange_s: seconds of a pair, a token, and a token that is exchanged.
        start_s: of a group of one rank; each doubling adds as much.
        per_node: ranks of a node.
    """

    degrees: tuple[int, ...]
    pair_s: float = 1e-9
    token_s: float = 2e-7
    exchange_s: float = 1e-7
    start_s: float = 1e-4
    per_node: int = 8
    reduce_s: float = 0.0
    methods: tuple[str, ...] = ("ring",)
    basis: str = "a formula"

    def documents_s(self, documents: Documents, degree: int, method: str | None = None) -> Floats:
        if degree not in self.degrees:
            return np.full(len(documents), np.inf)
        return self._spread_s(documents, degree, -(-degree // self.per_node))

    def _spread_s(self, documents: Documents, degree: int, nodes: int) -> Floats:
        own = (self.pair_s * documents.pairs + self.token_s * documents.tokens) / degree
        sent = self.exchange_s * documents.tokens * (degree - 1) / degree * (1 if nodes == 1 else 4)
        return np.asarray(own + sent, dtype=np.float64)

    def overhead_s(self, degree: int) -> float:
        return self.start_s * (1 + float(np.log2(degree)))

    def group(self, documents: Documents, ranks: Sequence[int]) -> tuple[float, str]:
        nodes = len({rank // self.per_node for rank in ranks})
        return float(self._spread_s(documents, len(ranks), nodes).sum()) + self.overhead_s(len(ranks)), self.methods[0]
