"""Blocks with the keys that an indexer of few numbers scores highest, after DeepSeek-V3.2's lightning indexer.

There (arXiv 2512.02556, section 2.1, equation 1) a query t scores a key s by ``sum_j w_tj ReLU(qI_tj . kI_s)`` over a few index
heads j of a small dimension, and attends to the keys of highest scores. Here an index head is a query head, of which the indexer
reads ``dim`` numbers: a seeded choice of those of a seeded rotation (signs, then a Hadamard transform, by which DeepSeek's own code
turns its index vectors before it rounds them). Products of what is read are those of the whole heads but for an error that falls
with ``dim``, whatever the inputs are; at the head's own dimension, a power of two, there is none.

The paper's projections and weights ``w`` are trained to follow the attention. These are not, and weights are 1: this is what an
indexer of this size can do before it is trained, in the time that a trained one takes. In the paper all query heads share a choice
(``per=all_heads``); their scores are summed. Attention runs on blocks: a query's score of a block is the highest of its keys'
(``pool=max``) or their sum, and the queries of a block are summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from lcbench.masks.band import Ints
from lcbench.problem import Problem
from lcbench.selectors.base import Effort, Features, Rows, blocks_of, check_whole
from lcbench.selectors.choosing import Budgeted, by_head, by_head_effort, each_block, of_columns, products, reach, steady
from lcbench.selectors.partial import at_once, hide, runs

if TYPE_CHECKING:
    import torch

POOLED, POOLING = 8, 10  # numbers read and written per pair, and operations per block of queries and map
Pool = Literal["max", "sum"]


@dataclass(frozen=True)
class TopK(Budgeted):
    """A selector by an indexer.

    Attributes:
        dim: numbers of an index head, at most the head's.
        pool: what a query's score of a block is of those of its keys.
        seed: of the rotation.

    Raises:
        ValueError: ``dim`` below 1, ``seed`` below 0, or another ``pool``.
    """

    dim: int = 32
    pool: Pool = "max"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("dim", self.dim, 1)
        check_whole("seed", self.seed, 0)
        if self.pool not in get_args(Pool):
            raise ValueError(f"selector.pool={self.pool} is not one of {', '.join(get_args(Pool))}")

    def unsupported(self, problem: Problem) -> str | None:
        if self.dim > problem.heads.dim:
            return f"selector.dim={self.dim} is more than the {problem.heads.dim} numbers of a head of heads={problem.heads}"
        return None

    def of_keys(self, k: torch.Tensor, sizes: Ints, problem: Problem) -> Features:
        return {"index": each_block(lambda own: self._index(own), k, sizes)}

    def of_all(self, features: Features, edges: Ints, problem: Problem) -> Features:
        return {"index": by_head(features["index"])}

    def scoring(self, problem: Problem, pairs: float) -> Effort:
        (rows, columns), heads, size = blocks_of(self, problem), problem.heads, problem.sum_itemsize
        every, tokens = heads.q * pairs, problem.seqlen * heads.kv + problem.queries * heads.q
        moved = (POOLED * every + tokens * (2 * heads.dim + 3 * self.dim)) * size
        kernels = columns + POOLING * rows * max(heads.kv, self.maps(heads))
        return by_head_effort(problem, self.dim / heads.dim) + Effort(2.0 * self.dim * (every + tokens * heads.dim), moved, kernels)

    def score(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> torch.Tensor:
        import torch

        (first, last), q, maps = reach(rows), by_head(self._index(rows.q)), self.maps(problem.heads)
        per_kv = len(q) // len(keys["index"])
        found = q.new_zeros((maps, last - first))
        for number, own in enumerate(np.arange(len(q)).reshape(maps, -1).tolist()):
            groups = [(kv, list(heads)) for kv, heads in groupby(own, key=lambda head: head // per_kv)]
            for columns in runs(rows.pairs > 0, at_once(rows, len(groups[0][1]), self.k_block)):
                k = keys["index"][:, edges[columns.start] : edges[columns.stop]]
                total = q.new_zeros((len(rows.q), k.shape[1]))
                for kv, heads in groups:
                    total += torch.relu_(products(q[heads[0] : heads[-1] + 1], k[kv : kv + 1])).sum(0)
                of_blocks = of_columns(hide(total, rows, edges, columns, 0.0), self.k_block, 0.0)
                best = of_blocks.amax(-1) if self.pool == "max" else of_blocks.sum(-1)
                found[number, columns.start - first : columns.stop - first] = best.sum(0)
        return found

    def _index(self, x: torch.Tensor) -> torch.Tensor:
        """(T, H, dim): what the indexer reads of (T, H, D), in the type of sums."""
        import torch

        from lcbench.kernels.base import accumulation_dtype

        dtype = accumulation_dtype(x.dtype)
        with steady(x.device):
            return x.to(dtype, copy=True) @ torch.from_numpy(rotation(x.shape[-1], self.dim, self.seed)).to(x.device, dtype)


def rotation(numbers: int, dim: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """(numbers, dim): signs, a Hadamard matrix of the next power of two, and a choice of its columns; entries of 1 and -1 over the
    root of ``dim``, so that products keep their size. Columns are at right angles where ``numbers`` is a power of two.
    """
    size = 1 << (numbers - 1).bit_length()
    random = np.random.default_rng(seed)
    signs, columns = random.choice([-1.0, 1.0], numbers), random.permutation(size)[:dim]
    common = np.bitwise_count(np.arange(numbers)[:, None] & columns)
    return signs[:, None] * np.where(common % 2, -1.0, 1.0) / np.sqrt(dim)
