"""Layouts: which token indices each shard owns, in which order. Every token is in exactly one shard; no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import overload

import numpy as np

from lcbench.masks.band import BandMask, Ints, TokenSpan, distinct, spread
from lcbench.masks.convert import block_areas
from lcbench.masks.mask import Mask


@dataclass(frozen=True, eq=False)
class Spans(Sequence[tuple[TokenSpan, ...]]):
    """The runs of all shards in an array, for layouts of up to a run per token: as objects, millions take seconds and a gigabyte.

    Attributes:
        every: (start, size, stride) of all runs, shard after shard, (runs, 3).
        begins: where the runs of each shard begin, and where the last one's end, (shards + 1,).
    """

    every: Ints
    begins: Ints

    def __len__(self) -> int:
        return len(self.begins) - 1

    @overload
    def __getitem__(self, shard: int) -> tuple[TokenSpan, ...]: ...

    @overload
    def __getitem__(self, shard: slice) -> tuple[tuple[TokenSpan, ...], ...]: ...

    def __getitem__(self, shard: int | slice) -> tuple[TokenSpan, ...] | tuple[tuple[TokenSpan, ...], ...]:
        """The runs of a shard; one that has no token has one run of none."""
        if isinstance(shard, slice):
            return tuple(self[i] for i in range(*shard.indices(len(self))))
        place = range(len(self))[shard]
        return tuple(map(TokenSpan._make, self.every[self.begins[place] : self.begins[place + 1]].tolist())) or (TokenSpan(0, 0),)


@dataclass(frozen=True)
class Layout:
    """``shards[i]``: the runs of tokens of shard i, in the order in which its tensors hold them."""

    shards: Sequence[tuple[TokenSpan, ...]]

    @classmethod
    def of_stretches(cls, shard: Ints, start: Ints, size: Ints, shards: int) -> Layout:
        """Stretches of tokens, (n,) each, that lie in the order of their shards and of each shard's tensors; none is empty."""
        every = np.stack([start, size, np.ones_like(size)], axis=1)
        return cls(Spans(every, np.searchsorted(shard, np.arange(shards + 1))))

    def __len__(self) -> int:
        return len(self.shards)

    @cached_property
    def _flat(self) -> Spans:
        if isinstance(self.shards, Spans):
            return self.shards
        every = np.fromiter(chain.from_iterable(chain.from_iterable(self.shards)), dtype=np.int64).reshape(-1, 3)
        return Spans(every, np.cumsum([0, *map(len, self.shards)]))

    @property
    def spans(self) -> Ints:
        """(start, size, stride) of all runs, shard after shard, (runs, 3)."""
        return self._flat.every

    @property
    def begins(self) -> Ints:
        """Where the runs of each shard begin in ``spans``, and where the last one's end, (shards + 1,)."""
        return self._flat.begins

    def size(self, shard: int) -> int:
        """Tokens of a shard."""
        return sum(run.size for run in self.shards[shard])

    def tokens(self, shard: int) -> Ints:
        """Global token indices of a shard, in its local order."""
        runs = self.shards[shard]
        return np.concatenate([run.start + run.stride * np.arange(run.size, dtype=np.int64) for run in runs])

    def tile(self, mask: Mask, q_shard: int, k_shard: int) -> Mask:
        """The part of ``mask`` where the queries of one shard meet the keys of another, in local positions."""
        return mask.tile(self.shards[q_shard], self.shards[k_shard])

    def imbalance(self, mask: Mask) -> float:
        """Work of the busiest shard over the mean: 1.0 is perfect."""
        areas = self.areas(mask)
        return max(areas) * len(areas) / sum(areas) if sum(areas) else 1.0

    def areas(self, mask: Mask) -> list[int]:
        """Unmasked pairs of the queries of each shard (of a block map: over all its maps)."""
        return [mask.row_area(runs) for runs in self.shards]

    @property
    def striped(self) -> bool:
        """Whether tokens of a run lie apart."""
        _, size, stride = self.spans.T
        return bool(((stride > 1) & (size > 1)).any())

    @property
    def stretches(self) -> tuple[Ints, Ints]:
        """Where runs that are not striped begin, and where the last one ends, (runs + 1,); and the shard of each."""
        start, size, _ = self.spans.T
        shard = np.repeat(np.arange(len(self)), np.diff(self.begins))
        order = np.argsort(start, kind="stable")
        order = order[size[order] > 0]
        return np.append(start[order], start[order[-1:]] + size[order[-1:]]), shard[order]

    def split(self, parts: int) -> Layout:
        """Each shard cut into ``parts`` pieces of its local order: shard i becomes shards i*parts ... i*parts+parts-1."""
        pieces = []
        for shard, runs in enumerate(self.shards):
            cuts = _cuts(self.size(shard), parts)
            pieces += [_slice(runs, a, b) for a, b in pairwise(cuts)]
        return Layout(tuple(pieces))


def tile_areas(mask: BandMask, queries: Layout, keys: Layout) -> Ints:
    """Unmasked pairs of every tile of a shard of queries and one of keys, (shards, shards); all tokens are in some shard."""
    areas = np.zeros((len(queries), len(keys)), dtype=np.int64)
    if queries.striped or keys.striped:
        every = list(chain.from_iterable(keys.shards))
        begins = np.cumsum([0, *map(keys.size, range(len(keys) - 1))])
        for q, runs in enumerate(queries.shards):
            tile = mask.tile(runs, every)  # each of its bands is of one run of keys
            np.add.at(areas[q], np.searchsorted(begins, tile.bands[:, 2], side="right") - 1, tile.areas)
        return areas
    (q_edges, q_shard), (k_edges, k_shard) = queries.stretches, keys.stretches
    row, column, area = block_areas(mask, q_edges, k_edges)
    np.add.at(areas, (q_shard[row], k_shard[column]), area)
    return areas


def contiguous(seqlen: int, shards: int) -> Layout:
    """Shard i owns the i-th stretch of the sequence; lengths differ by at most one."""
    cuts = _cuts(seqlen, shards)
    return Layout(tuple((TokenSpan(a, b - a),) for a, b in pairwise(cuts)))


def zigzag(seqlen: int, shards: int) -> Layout:
    """Shard i owns chunks i and 2n-1-i of 2n, so that every shard has the same share of a causal mask."""
    cuts = _cuts(seqlen, 2 * shards)
    chunks = [TokenSpan(a, b - a) for a, b in pairwise(cuts)]
    return Layout(tuple((chunks[i], chunks[-1 - i]) for i in range(shards)))


def striped(seqlen: int, shards: int) -> Layout:
    """Shard i owns every n-th token from i on (Striped Attention, arXiv 2311.09431)."""
    return Layout(tuple((TokenSpan(i, max(0, -((i - seqlen) // shards)), shards),) for i in range(shards)))


def by_document(bounds: Ints, shards: int, *, folded: bool) -> Layout:
    """Of every document ``bounds[i]:bounds[i+1]`` each shard owns the same share.

    The tokens that are left over where a document cannot be divided go to one shard after the other, so shards are of one size
    wherever their number divides the sequence.

    Args:
        folded: a document is cut into 2n chunks, of which shard i owns chunks i and 2n-1-i, so that a causal one is shared evenly
            too; False: into n, of which each is one stretch.
    """
    count = 2 * shards if folded else shards
    lengths = np.diff(bounds)
    left = lengths % count
    first = np.cumsum(left) - left  # of the shards' turns to take one
    number, turn = spread(np.zeros_like(left), left)
    shard, again = (first[number] + turn) % shards, turn >= shards
    sizes = np.repeat((lengths // count)[:, None], count, axis=1)
    np.add.at(sizes, (number, np.where(again, count - 1 - shard, shard)), 1)
    starts = bounds[:-1, None] + np.cumsum(sizes, axis=1) - sizes
    every = np.arange(shards)[:, None]
    owned = np.concatenate([every, count - 1 - every], axis=1) if folded else every
    owner = np.repeat(np.arange(shards), len(lengths) * owned.shape[1])
    start, size = (each[:, owned].swapaxes(0, 1).ravel() for each in (starts, sizes))
    some = size > 0
    return Layout.of_stretches(owner[some], start[some], size[some], shards)


def documents(mask: Mask) -> tuple[Ints, Ints]:
    """Bounds of the stretches of tokens that no pair connects, (documents + 1,), and the pairs in each."""
    if not isinstance(mask, BandMask):
        return np.array([0, mask.num_q]), np.array([0])  # one document, whose blocks need not be drawn to know it
    q0, q1, k0, k1, _, _ = mask.bands.T
    begin, end = np.minimum(q0, k0), np.maximum(q1, k1)
    order = np.argsort(begin)
    begin, reach = begin[order], np.maximum.accumulate(np.concatenate([[0], end[order]]))
    starts = begin[begin >= reach[:-1]]  # nothing before reaches this far
    ends = np.append(reach[:-1][begin >= reach[:-1]][1:], reach[-1])
    bounds = distinct(np.concatenate([[0, mask.num_q], starts, ends]))
    work = np.zeros(len(bounds) - 1, dtype=np.int64)
    np.add.at(work, np.searchsorted(bounds, np.minimum(q0, k0), side="right") - 1, mask.areas)
    return bounds, work


def _cuts(length: int, parts: int) -> list[int]:
    return [length * i // parts for i in range(parts + 1)]


def _slice(runs: Sequence[TokenSpan], begin: int, end: int) -> tuple[TokenSpan, ...]:
    """Local positions [begin, end) of a shard, as runs."""
    kept, offset = [], 0
    for run in runs:
        a, b = max(begin - offset, 0), min(end - offset, run.size)
        if a < b:
            kept.append(TokenSpan(run.start + a * run.stride, b - a, run.stride))
        offset += run.size
    return tuple(kept) or (TokenSpan(0, 0),)
