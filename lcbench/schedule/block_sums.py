"""What bundles of queries have of a block map with units of keys: exact sums over its kept blocks, in the time of reading it once.

A sum is (tokens of each bundle in each row of blocks) x (kept blocks) x (tokens of each unit in each column of blocks). Both outer
matrices are sparse, or differ little from row to row: a stripe has tokens in nearly every block, and nearly as many as the stripe
beside it. The map in the middle has up to a billion entries, so it is read some rows of blocks at a time, which fit into a cache.
There those that count alike are added up as bytes, and these sums multiplied in float32, in which whole numbers of this size are
exact. No BLAS takes part: its threads would cost more than the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import DTypeLike
from scipy import sparse

from lcbench.masks.band import Ints, distinct, spread
from lcbench.masks.block import Keep
from lcbench.schedule.machine import Floats

PORTION = 1 << 22  # entries of a matrix that are worked out together
STEP = 64  # rows of blocks that are read together, below 256
EXACT = 1 << 24  # whole numbers below it are exact in float32


def cut_evenly(weights: Ints, portion: int | None = None) -> Iterator[tuple[int, int]]:
    """(first, last) of stretches of about ``portion`` each (None: ``PORTION``), or of one entry, ``last`` not included."""
    cuts = np.nonzero(np.diff(np.cumsum(weights) // (portion or PORTION)))[0] + 1
    yield from zip([0, *cuts.tolist()], [*cuts.tolist(), len(weights)], strict=True)


@dataclass(frozen=True)
class _Factor:
    """A sparse matrix as it is multiplied: itself, or, with ``running``, what each row has more than the one before it."""

    entries: sparse.csr_array
    running: bool

    @classmethod
    def of(cls, matrix: sparse.csr_array) -> _Factor:
        before = sparse.vstack([sparse.csr_array((1, matrix.shape[1])), matrix[:-1]], format="csr")
        changes = (matrix - before).tocsr()
        changes.eliminate_zeros()
        return cls(changes, True) if 2 * changes.nnz < matrix.nnz else cls(matrix, False)

    def summed(self, found: Floats) -> Floats:
        """The product from that with ``entries``, rows first."""
        return np.cumsum(found, axis=0) if self.running else found


@dataclass(frozen=True)
class _Alike:
    """Rows of blocks for one sum, in stretches that count alike.

    Attributes:
        starts: where stretches begin, and where the last one ends.
        places: the rows of the result that they count for.
        weights: how much each stretch does, (places, stretches).
    """

    starts: list[int]
    places: Ints
    weights: sparse.csr_array

    def added(self, kept: Keep, into: Floats) -> None:
        """Add what is kept, (blocks, columns), to a result."""
        sums = np.empty((len(self.starts) - 1, kept.shape[1]), dtype=np.uint8)
        for number, (first, last) in enumerate(pairwise(self.starts)):
            np.add.reduce(kept[first:last].view(np.uint8), axis=0, out=sums[number])
        into[self.places] += self.weights @ sums.astype(self.weights.dtype)


@dataclass(frozen=True)
class _Read:
    """Rows of blocks that are read together, and what they are for each sum."""

    blocks: Ints
    sums: tuple[_Alike, ...]


@dataclass(frozen=True)
class _Group:
    """What is read before columns are summed up; ``rows``: of each sum those that get something, which ``reads`` are about."""

    rows: tuple[Ints, ...]
    reads: tuple[_Read, ...]


class BlockSums:
    """Pairs, covered pairs and pieces of bundles of queries with units of keys, of any map with the same edges.

    Args:
        inside: how often each bundle has each unit of queries, (bundles, units).
        queries, keys: how many tokens each unit has in each row or column of blocks, (units, blocks).
        block: up to a multiple of how many tokens a kernel fills up what a unit has in a block.
    """

    def __init__(self, inside: sparse.csr_array, queries: sparse.csr_array, keys: sparse.csr_array, block: int) -> None:
        whole = all((side.data % block == 0).all() for side in (queries, keys))
        counts = [_tokens, _any] if whole else [_tokens, lambda side: _tokens(side, block), _any]
        self._rows = [(inside @ count(queries)).tocsr() for count in counts]
        self._columns = [_Factor.of(count(keys)) for count in counts]
        self._whole, self._blocks = whole, keys.shape[1]
        self.shape = inside.shape[0], keys.shape[0]
        self._planned = cache(self._plan)  # every map is read alike

    def of(self, first: int, last: int, keep: Keep) -> Floats:
        """(3, bundles first to last, units of keys) of the map that keeps these blocks. Pieces are stretches in a row of blocks."""
        factors, groups = self._planned(first, last)
        found = [np.zeros((last - first, self.shape[1])) for _ in factors]
        for group in groups:
            sums = [np.zeros((len(rows), self._blocks)) for rows in group.rows]
            for read in group.reads:
                kept = keep[read.blocks]
                begins = kept.copy()
                np.greater(kept[:, 1:], kept[:, :-1], out=begins[:, 1:])
                for number, alike in enumerate(read.sums):
                    alike.added(begins if number == len(sums) - 1 else kept, sums[number])
            for each, rows, total, column in zip(found, group.rows, sums, self._columns, strict=True):
                each[rows] += column.summed(column.entries @ total.T).T
        values = [factor.summed(each) for factor, each in zip(factors, found, strict=True)]
        return np.stack([values[0], *values] if self._whole else values)

    def _plan(self, first: int, last: int) -> tuple[list[_Factor], list[_Group]]:
        """How rows of blocks are read for these bundles: those that count for the same ones together."""
        factors = [_Factor.of(rows[first:last]) for rows in self._rows]
        columns = [factor.entries.tocsc() for factor in factors]
        for each in columns:
            each.sort_indices()
        ends = columns[0].indptr[1:]
        used = distinct(self._rows[0][first:last].indices)
        order = used[np.argsort(columns[0].indices[ends[used] - 1], kind="stable")]
        together = STEP if (last - first) * self._blocks > PORTION else max(1, len(order))
        most = max((float(np.abs(each.data).max(initial=0)) for each in columns), default=0.0)
        dtype: DTypeLike = np.float32 if STEP * most < EXACT else np.float64
        groups = []
        for begin in range(0, len(order), together):
            group = order[begin : begin + together]
            rows = tuple(distinct(each.indices[spread(each.indptr[group], each.indptr[group + 1])[1]]) for each in columns)
            reads = []
            for blocks in (group[i : i + STEP] for i in range(0, len(group), STEP)):
                sums = tuple(_alike(each, among, blocks, dtype) for each, among in zip(columns, rows, strict=True))
                reads.append(_Read(blocks, sums))
            groups.append(_Group(rows, tuple(reads)))
        return factors, groups


def _alike(matrix: sparse.csc_array, among: Ints, blocks: Ints, dtype: DTypeLike) -> _Alike:
    """How blocks count for the rows ``among`` those of a factor."""
    number, entry = spread(matrix.indptr[blocks], matrix.indptr[blocks + 1])
    places, at = np.unique(np.searchsorted(among, matrix.indices[entry]), return_inverse=True)
    weights = np.zeros((len(places), len(blocks)), dtype=dtype)
    weights[at, number] = matrix.data[entry]
    starts = np.concatenate([[0], np.nonzero((weights[:, 1:] != weights[:, :-1]).any(axis=0))[0] + 1])
    return _Alike([*starts.tolist(), len(blocks)], places, sparse.csr_array(weights[:, starts]))


def _tokens(side: sparse.csr_array, filled: int = 1) -> sparse.csr_array:
    """Tokens of units in blocks, each up to a multiple of ``filled``."""
    return sparse.csr_array((np.ceil(side.data / filled) * filled, side.indices, side.indptr), shape=side.shape)


def _any(side: sparse.csr_array) -> sparse.csr_array:
    """1 where a unit has tokens in a block."""
    return sparse.csr_array((np.ones_like(side.data), side.indices, side.indptr), shape=side.shape)
