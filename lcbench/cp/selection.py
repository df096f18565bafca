"""How the ranks of a context-parallel group choose blocks together (``lcbench.selectors``), whatever rows each of them holds.

A block of keys is looked at by the rank that has most of its rows, a block of queries too; rows of it that lie elsewhere are sent
there. What ranks work out of their blocks is gathered by all of them, round after round, and at the end the blocks that each has
chosen are. Every block is looked at by itself, wherever that is, so ranks choose what one rank alone chooses, bit for bit.

Bytes that a rank sends: rows of q (of the LSE too) and of k whose block another rank looks at, once; P - 1 times its features, and
its share of the map, a bit for each map and block. Gathered parts are as long as the longest rank's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np

from lcbench.cp.base import Place
from lcbench.cp.exchange import Exchange
from lcbench.masks.band import BandMask, Ints, spread
from lcbench.masks.block import BlockMap, Keep, chosen
from lcbench.problem import Problem
from lcbench.schedule.held import Held
from lcbench.schedule.messages import wait_all
from lcbench.selectors.base import Features, Round, Rows, Selector, block_edges, pairs_of

if TYPE_CHECKING:
    import torch


def lookers(tokens: Sequence[Ints], edges: Ints) -> Ints:
    """The rank that looks at each block, (blocks,): that with most of its rows; of several, that with the fewest blocks so far.

    Args:
        tokens: of each rank.
        edges: of the blocks, (blocks + 1,).
    """
    blocks = len(edges) - 1
    counts = np.stack([np.bincount(np.searchsorted(edges, own, side="right") - 1, minlength=blocks) for own in tokens])
    most = counts.max(0)
    if len(tokens) == 1:
        return np.zeros(blocks, dtype=np.int64)
    has, found = [0] * len(tokens), []
    for column, top in zip(counts.T.tolist(), most.tolist(), strict=True):
        best = min((rank for rank, count in enumerate(column) if count == top), key=lambda rank: (has[rank], rank))
        has[best] += 1
        found.append(best)
    return np.array(found, dtype=np.int64)


class Blocks:
    """The blocks of one side, and which rank looks at which.

    Attributes:
        edges: (blocks + 1,).
        looker: the rank that looks at each, (blocks,).
        own: the blocks of this rank, rising; ``bounds``: where each of them begins among their rows, (own + 1,).
    """

    def __init__(self, tokens: Sequence[Ints], total: int, size: int, exchange: Exchange, device: torch.device) -> None:
        """
        Args:
            tokens: those that each rank holds, in the order of its tensors.
            total: how many there are.
            size: tokens of a block.
        """
        self.edges, self._exchange, self._device = block_edges(total, size), exchange, device
        self.looker, rank = lookers(tokens, self.edges), exchange.place
        self.sizes = np.diff(self.edges)
        self.own = np.nonzero(self.looker == rank)[0]
        self.bounds = np.array([0, *accumulate(self.sizes[self.own].tolist())], dtype=np.int64)
        ranks = range(len(tokens))
        to = [self.looker[np.searchsorted(self.edges, own, side="right") - 1] for own in tokens]
        # By the rank that they go to, then as they follow one another.
        self._order = self._index(np.lexsort((tokens[rank], to[rank])), len(tokens[rank]))
        self._sent = [int((to[rank] == other).sum()) for other in ranks]
        arriving = [np.sort(tokens[other][to[other] == rank]) for other in ranks]
        self._received = [len(each) for each in arriving]
        self._placed = self._index(np.argsort(np.concatenate(arriving), kind="stable"), sum(self._received))
        self._known: dict[bytes | None, _Places] = {}
        self._moves = any((whom != other).any() for other, whom in enumerate(to))

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """All rows of this rank's blocks, of a tensor (T, ...) of the rows that it holds. Collective."""
        ordered = _taken(x, self._order)
        if not self._moves:
            return ordered
        packed = _as_bytes(ordered)
        found = packed.new_empty((sum(self._received), packed.shape[1]))
        wait_all(self._exchange.to_each(found, packed, self._received, self._sent))
        return _from_bytes(_taken(found, self._placed), x)

    def gathered(self, x: torch.Tensor, some: Ints | None = None) -> torch.Tensor:
        """Of every rank, in the order of blocks, what it has found of its own: a row for each, or for each of their tokens.
        Collective.

        Args:
            x: (this rank's blocks, ...), or (their tokens, ...).
            some: the blocks that have a row, rising; None: a row for each token of every block.
        """
        shared = self._exchange.size
        if shared == 1:
            return x
        places = self._places(some)
        packed = _as_bytes(x)
        longest = packed.new_zeros((places.most, packed.shape[1]))
        longest[: len(packed)] = packed
        every = self._exchange.all_gather(longest).flatten(0, 1)
        return _from_bytes(_taken(every, places.index), x)

    def _places(self, some: Ints | None) -> _Places:
        """Where the rows of blocks lie in what is gathered: each rank's own, one block behind the other, up to the longest."""
        key = None if some is None else some.tobytes()
        if key not in self._known:
            blocks = np.arange(len(self.sizes)) if some is None else some
            lengths = self.sizes if some is None else np.ones(len(some), dtype=np.int64)
            looker = self.looker[blocks]
            totals = np.bincount(looker, weights=lengths, minlength=self._exchange.size).astype(np.int64)
            most = int(totals.max(initial=0))
            # Blocks sorted by rank follow one another within each.
            order = np.argsort(looker, kind="stable")
            start = np.empty(len(blocks), dtype=np.int64)
            start[order] = np.cumsum(lengths[order]) - lengths[order]
            start += (most * np.arange(len(totals)) - (np.cumsum(totals) - totals))[looker]
            self._known[key] = _Places(most, self._index(spread(start, start + lengths)[1], most * len(totals)))
        return self._known[key]

    def _index(self, values: Ints, rows: int) -> torch.Tensor | None:
        """An index of so many rows, on the device; None: all of them, as they are."""
        import torch

        if len(values) == rows and np.array_equal(values, np.arange(rows)):
            return None
        return torch.from_numpy(values).to(self._device)


@dataclass(frozen=True)
class _Places:
    """``most``: rows of the rank with most; ``index``: which rows of the gathered ones are wanted, in their order."""

    most: int
    index: torch.Tensor | None


class Selection:
    """How ranks choose by one selector within one mask, where their tokens lie one way. Collective over all ranks.

    Attributes:
        queries, keys: their blocks.
        mask: within which blocks are chosen.
    """

    def __init__(
        self, selector: Selector, problem: Problem, mask: BandMask, held: Held, tokens: Sequence[Held], place: Place
    ) -> None:
        """
        Args:
            held: what this rank holds, all heads of its tokens; ``tokens``: what every rank of the group holds.
        """
        self.selector, self.mask, self._problem, self._device = selector, mask, problem, place.device
        self._exchange = Exchange.of(problem, place)
        sides = ([each.q.tokens for each in tokens], problem.queries, selector.q_block), (
            [each.kv.tokens for each in tokens], problem.seqlen, selector.k_block,
        )  # fmt: skip
        self.queries, self.keys = (Blocks(*side, self._exchange, place.device) for side in sides)
        self._sees = [self._of_mask(number) for number in self.queries.own.tolist()]
        self._pairs = [pairs_of(own, self.keys.edges) for own in self._sees]

    def _of_mask(self, number: int) -> BandMask:
        """What a block of queries may see."""
        begin, end = self.queries.edges[number : number + 2].tolist()
        return self.mask.crop(begin, end, 0, self.mask.num_k)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Maps, rows and columns of blocks."""
        return self.selector.maps(self._problem.heads), len(self.queries.sizes), len(self.keys.sizes)

    @property
    def edges(self) -> tuple[Ints, Ints]:
        """Those of the blocks of queries and of keys."""
        return self.queries.edges, self.keys.edges

    def pairs(self, choice: BlockMap) -> Ints:
        """Pairs of the blocks of queries that this rank looks at which are in a choice, by map, (maps,)."""
        found = np.zeros(choice.maps, dtype=np.int64)
        for number, pairs in zip(self.queries.own.tolist(), self._pairs, strict=True):
            found += np.array([pairs[choice.keep(one)[number]].sum() for one in range(choice.maps)])
        return found

    @property
    def bytes_sent(self) -> int:
        """By this rank in the last ``choose``."""
        return self._exchange.bytes_sent

    @property
    def bytes_between_nodes(self) -> int:
        """Those of them that went to other nodes."""
        return self._exchange.bytes_between_nodes

    def choose(self, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None = None) -> BlockMap:
        """The chosen mask, the same on every rank. Collective.

        Args:
            q: (T, Hq, D), k: (T, Hk, D): what this rank holds.
            lse: (T, Hq) of this rank's queries, of an earlier step; only where the selector needs it.

        Raises:
            ValueError: the selector gives no choice of this mask.
        """
        self._exchange.begin()
        every_q, every_k = self.queries.rows(q), self.keys.rows(k)
        every_lse = None if lse is None else self.queries.rows(lse)
        blocks = [
            Rows(number, every_q[begin:end], pairs, sees, None if every_lse is None else every_lse[begin:end])
            for number, (begin, end), pairs, sees in zip(
                self.queries.own.tolist(), pairwise(self.queries.bounds.tolist()), self._pairs, self._sees, strict=True
            )
        ]
        known: Features = {}
        for one in self.selector.rounds(self._problem):
            told = self._of_keys(one, every_k, known) | self._of_queries(one, blocks, every_q, known)
            known = one.all(known | told, self.keys.edges)
        return self._chosen([kept(self.selector, rows, known, self.keys.edges, self._problem) for rows in blocks])

    def _of_keys(self, one: Round, k: torch.Tensor, known: Features) -> Features:
        """What all blocks of keys are found to be in a round. Collective."""
        if one.keys is None:
            return {}
        of_keys, bounds = one.keys, self.keys.bounds.tolist()
        parts = [of_keys(k[begin:end], np.array([end - begin]), known) for begin, end in pairwise(bounds)]
        # A rank without blocks has to know what is gathered all the same.
        some = parts or [of_keys(k.new_zeros((1, *k.shape[1:])), np.array([1]), known)]
        every = np.arange(len(self.keys.sizes))
        return {
            name: self.keys.gathered(_joined(parts, name, some), every if name in one.by_block else None)
            for name in sorted(some[0])
        }

    def _of_queries(self, one: Round, blocks: Sequence[Rows], q: torch.Tensor, known: Features) -> Features:
        """What those blocks of queries that a round looks at are found to be. Collective."""
        if one.queries is None:
            return {}
        wanted = one.blocks(len(self.queries.sizes))
        looked_at = set(wanted.tolist())
        parts = [one.queries(rows, known) for rows in blocks if rows.number in looked_at]
        some = parts or [one.queries(self._empty(q), known)]
        return {name: self.queries.gathered(_joined(parts, name, some), wanted) for name in sorted(some[0])}

    def _empty(self, q: torch.Tensor) -> Rows:
        """A query that sees nothing."""
        import torch

        lse = q.new_zeros(1, q.shape[1], dtype=torch.float32) if self.selector.needs_lse else None
        nothing = BandMask.of(1, self.mask.num_k, [])
        return Rows(0, q.new_zeros((1, *q.shape[1:])), np.zeros(len(self.keys.sizes), dtype=np.int64), nothing, lse)

    def _chosen(self, keeps: list[Keep]) -> BlockMap:
        """The map of which this rank has chosen some rows. Collective."""
        import torch

        maps, _, columns = self.shape
        own = np.stack(keeps) if keeps else np.zeros((0, maps, columns), dtype=bool)
        bits = np.packbits(own.reshape(len(own), maps * columns), axis=1)
        every = self.queries.gathered(torch.from_numpy(bits).to(self._device), np.arange(len(self.queries.sizes)))
        keep = np.unpackbits(every.cpu().numpy(), axis=1, count=maps * columns).view(bool).reshape(-1, maps, columns)
        return chosen(np.ascontiguousarray(keep.swapaxes(0, 1)), *self.edges, self.mask)


def kept(selector: Selector, rows: Rows, known: Features, edges: Ints, problem: Problem) -> Keep:
    """What a selector keeps for a block of queries, bool (maps, columns).

    Raises:
        ValueError: it is no choice of that block.
    """
    found = selector.keep(rows, known, edges, problem)
    shape, who = (selector.maps(problem.heads), len(edges) - 1), f"{type(selector).__name__}, block {rows.number} of queries"
    if found.dtype != np.bool_ or found.shape != shape:
        raise ValueError(f"{who}: keeps an array of {found.dtype} and shape {found.shape}, not of bool and {shape}")
    if found[:, rows.pairs == 0].any():
        raise ValueError(f"{who}: keeps a block of keys that the mask has no pair of")
    if rows.pairs.any() and not found.any(1).all():
        raise ValueError(f"{who}: keeps no key for some head, and its queries see some")
    return found


def _joined(parts: Sequence[Features], name: str, some: Sequence[Features]) -> torch.Tensor:
    """A feature of all of a rank's blocks; ``some``: of any block, where it has none."""
    import torch

    return torch.cat([part[name] for part in parts]) if parts else some[0][name][:0]


def _taken(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return x if index is None else x[index]


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    """(n, bytes of a row): any type as backends send it."""
    import torch

    return x.reshape(len(x), math.prod(x.shape[1:])).contiguous().view(torch.uint8)


def _from_bytes(packed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor, of the type and shape of those of another."""
    return packed.contiguous().view(like.dtype).view(len(packed), *like.shape[1:])
