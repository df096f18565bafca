"""Blocks with most softmax weight on compressed keys: the selection of Native Sparse Attention (arXiv 2502.11089, section 3.3).

A compressed key stands for ``compress`` adjacent keys, and the next one for those ``stride`` tokens on (equation 7). A query's
softmax over the compressed keys that lie wholly before it (equation 8) gives each a weight; a block of keys has the weights of the
compressed keys that it shares tokens with, each as often as it shares a stretch of ``stride`` tokens (equation 9), summed over the
query heads that share a key/value head (equation 10, ``per=kv_head``). The blocks of highest scores are kept, and always the first
and those next to the query (``sink``, ``local``).

What differs: the paper's keys are compressed by a trained network with a position inside of the block; here they are means, which
need no training. And the queries of a block attend to the same blocks: scores are summed over them. ``q_block=1`` is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lcbench.masks.band import Ints
from lcbench.problem import Problem
from lcbench.selectors.base import Effort, Features, Rows, blocks_of, check_whole
from lcbench.selectors.choosing import SUMMING, Budgeted, block_sums, by_head, of_maps, reach, scores, seen_whole
from lcbench.selectors.oracle import WEIGHED

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Nsa(Budgeted):
    """A selector by compressed keys.

    Attributes:
        compress: keys that a compressed key is the mean of, a multiple of ``stride``.
        stride: tokens from one compressed key to the next; it divides ``k_block``.

    Raises:
        ValueError: sizes that do not divide each other.
    """

    compress: int = 32
    stride: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("compress", self.compress, 1)
        check_whole("stride", self.stride, 1)
        for name in ("compress", "k_block"):
            if getattr(self, name) % self.stride:
                raise ValueError(f"selector.{name}={getattr(self, name)} is no multiple of selector.stride={self.stride}")

    def of_keys(self, k: torch.Tensor, sizes: Ints, problem: Problem) -> Features:
        of_block = np.arange(0, self.k_block, self.stride)
        parts = np.clip(sizes[:, None] - of_block, 0, self.stride)
        return {"sums": block_sums(k, parts.reshape(-1)).unflatten(0, parts.shape)}

    def by_block(self) -> tuple[str, ...]:
        return ("sums",)

    def of_all(self, features: Features, edges: Ints, problem: Problem) -> Features:
        import torch

        begins, ends = self._compressed(edges)
        sums = features["sums"].flatten(0, 1)
        overlap = self.compress // self.stride
        padded = torch.cat([sums, sums.new_zeros((overlap, *sums.shape[1:]))])
        keys = padded[: len(begins)].clone()
        for part in range(1, overlap):
            keys += padded[part : part + len(begins)]
        sizes = torch.from_numpy(ends - begins).to(keys)
        return {"keys": by_head(keys / sizes[:, None, None])}

    def scoring(self, problem: Problem, pairs: float) -> Effort:
        (rows, columns), heads, size = blocks_of(self, problem), problem.heads, problem.sum_itemsize
        keys, weights = problem.seqlen // self.stride * heads.kv * heads.dim, heads.q * pairs / self.stride
        moved = 4 * size * heads.dim * (problem.seqlen * heads.kv + problem.queries * heads.q / 2)
        moved += (WEIGHED + 3 * self.compress // self.stride) * size * weights
        shared = (2 + 3 * self.compress // self.stride) * size * keys
        kernels = SUMMING * (rows + columns)
        return Effort(2 * heads.dim * weights, moved, float(kernels), float(shared), float(size * keys))

    def score(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> torch.Tensor:
        import torch

        first, last = reach(rows)
        visible = seen_whole(rows, *self._compressed(edges))
        some = np.nonzero(visible.any(0))[0]
        heads, maps = problem.heads.q, self.maps(problem.heads)
        per, overlap = self.k_block // self.stride, self.compress // self.stride
        of_parts = rows.q.new_zeros((heads, (len(edges) - 1) * per + overlap - 1), dtype=keys["keys"].dtype)
        if len(some):
            begin, end = int(some[0]), int(some[-1]) + 1
            sees = torch.from_numpy(visible[:, begin:end]).to(rows.q.device)
            found = scores(by_head(rows.q), keys["keys"][:, begin:end], problem)
            weights = torch.softmax(found.masked_fill(~sees, -torch.inf), -1).masked_fill(~sees, 0.0).sum(1)
            for part in range(overlap):
                of_parts[:, begin + part : end + part] += weights
        of_blocks = of_parts[:, : (len(edges) - 1) * per].unflatten(-1, (-1, per)).sum(-1)
        return of_maps(of_blocks[:, first:last], maps)

    def _compressed(self, edges: Ints) -> tuple[Ints, Ints]:
        """Where the keys of each compressed key begin and end, (compressed,). The last may be of fewer: none is left out."""
        tokens = int(edges[-1])
        begins = self.stride * np.arange(1 + max(0, -(-(tokens - self.compress) // self.stride)))
        return begins, np.minimum(begins + self.compress, tokens)
