"""Requests whose context is cut into a block per rank: what Star Attention and APB share.

A *prompt* is a request all of whose tokens are new, at least one for each rank. Each rank computes its block of it, and before
that the *anchor*, the prompt's first tokens, which every rank but the first is given besides. Of any other request, each rank has a
block of the cache and is given all new queries; every rank merges what all of them found, so the result is exact. Keys of new
tokens lie on the last rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcbench.cp.base import Place
from lcbench.cp.one_call import OneCall
from lcbench.kernels.base import Kernel, OutLse
from lcbench.kernels.cache import Cache, CacheKind
from lcbench.masks.band import BandMask, Ints, TokenSpan, areas, cropped, spread
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import only_forward
from lcbench.schedule.held import Held, Part

if TYPE_CHECKING:
    import torch


ANCHOR, OWN = 0, 1  # the two stretches of a request that a rank is given, in this order


@dataclass(frozen=True, eq=False)
class Blocks:
    """Every request's context in a block per rank.

    Attributes:
        q_bounds, k_bounds: where each request begins among all queries, and among all keys, and the end, (requests + 1,).
        edges: keys ``edges[i, r]:edges[i, r + 1]`` are block r of request i, (requests, P + 1).
        prompts: which requests are prompts, bool (requests,).
        anchors: tokens of each request's anchor, (requests,); 0 of one that is no prompt.
    """

    q_bounds: Ints
    k_bounds: Ints
    edges: Ints
    prompts: NDArray[np.bool_]
    anchors: Ints

    @classmethod
    def of(cls, problem: Problem, anchor: int | None) -> Blocks:
        """The blocks of a problem; ``anchor``: tokens of each anchor, None: all of the first block."""
        ranks, (q_bounds, k_bounds) = problem.scale.world_size, (problem.requests.q_bounds, problem.requests.k_bounds)
        new, total = np.diff(q_bounds), np.diff(k_bounds)
        prompts = (new == total) & (total >= ranks)
        context = np.where(prompts, total, total - new)
        edges = k_bounds[:-1, None] + context[:, None] * np.arange(ranks + 1) // ranks
        edges[:, -1] = k_bounds[1:]
        first = edges[:, 1] - edges[:, 0]
        return cls(q_bounds, k_bounds, edges, prompts, np.where(prompts, first if anchor is None else anchor, 0))

    @property
    def ranks(self) -> int:
        return self.edges.shape[1] - 1

    @property
    def sizes(self) -> Ints:
        """Tokens of each block, (requests, P)."""
        return np.diff(self.edges, axis=1)

    def stretches(self, rank: int) -> tuple[Ints, Ints]:
        """(queries, keys) that a rank is given, each (requests, 2, 2): of each request the anchor and its own, begin and end."""
        start = self.k_bounds[:-1]
        anchor = np.stack([start, start + (self.anchors if rank else 0)], axis=1)
        keys = np.stack([anchor, self.edges[:, rank : rank + 2]], axis=1)
        prompt = keys + (self.q_bounds - self.k_bounds)[:-1, None, None]
        new = np.stack([self.q_bounds[:-1], self.q_bounds[1:]], axis=1)
        other = np.stack([np.repeat(new[:, :1], 2, axis=1), new], axis=1)
        return np.where(self.prompts[:, None, None], prompt, other), keys

    def _rectangles(self) -> tuple[Ints, Ints, Ints]:
        """(queries, keys of their own block, keys of their anchor), each (2, requests * P), begin and end; queries rise."""
        begin, end = self.q_bounds[:-1, None], self.q_bounds[1:, None]
        first = np.arange(self.ranks) == 0
        prompts, own = self.prompts[:, None], (self.edges[:, :-1], self.edges[:, 1:])
        shift = begin - self.k_bounds[:-1, None]
        # Of a request that is no prompt all queries see all keys: its first rectangle; its others are empty.
        q0, q1 = np.where(prompts, own[0] + shift, np.where(first, begin, end)), np.where(prompts, own[1] + shift, end)
        start, stop = self.k_bounds[:-1, None], self.k_bounds[1:, None]
        k0, k1 = np.where(prompts, own[0], start), np.where(prompts, own[1], stop)
        a0, a1 = np.broadcast_to(start, k0.shape), start + np.where(first, 0, self.anchors[:, None])
        return np.stack([q0.ravel(), q1.ravel()]), np.stack([k0.ravel(), k1.ravel()]), np.stack([a0.ravel(), a1.ravel()])

    def within(self, mask: BandMask) -> BandMask:
        """Of a mask, the pairs of a query with its own block and its anchor, and all of requests that are no prompts."""
        queries, keys, anchor = self._rectangles()
        band, at = _touching(mask.bands, queries)
        (q0, q1), bands = queries[:, at], mask.bands[band]
        parts = [cropped(bands, q0, q1, k0, k1)[0] for k0, k1 in (keys[:, at], anchor[:, at])]
        return BandMask(mask.num_q, mask.num_k, np.concatenate(parts)).merged()

    def hides(self, mask: BandMask) -> bool:
        """Whether a mask leaves out some key of a prompt before the block of a query."""
        queries, keys, _ = self._rectangles()
        start = np.repeat(self.k_bounds[:-1], self.ranks)
        wanted = np.where(np.repeat(self.prompts, self.ranks), (queries[1] - queries[0]) * (keys[0] - start), 0)
        band, at = _touching(mask.bands, queries)
        before, kept = cropped(mask.bands[band], queries[0, at], queries[1, at], start[at], keys[0, at])
        seen = np.zeros(len(wanted), dtype=np.int64)
        np.add.at(seen, at[kept], areas(before))
        return bool((seen < wanted).any())


def _touching(bands: Ints, queries: Ints) -> tuple[Ints, Ints]:
    """(band, stretch) of every band with every stretch of queries that it touches; stretches (2, n) rise."""
    return spread(np.searchsorted(queries[1], bands[:, 0], side="right"), np.searchsorted(queries[0], bands[:, 1], side="left"))


def refusal(problem: Problem, mask: Mask, anchor: int | None) -> str | None:
    """Why a problem cannot be cut into blocks with such anchors for inference, or None."""
    if reason := only_forward(problem):
        return reason
    if not isinstance(mask, BandMask):
        return "leaves out pairs of a static mask; a dynamic block mask has its own choice of them"
    blocks = Blocks.of(problem, anchor)
    first = blocks.sizes[blocks.prompts, 0]
    if anchor is not None and blocks.ranks > 1 and anchor > (least := int(first.min(initial=anchor))):
        return f"anchor={anchor} is longer than the first block of a prompt, which has {least} tokens"
    return None


def lengths(stretches: Ints) -> Ints:
    """Tokens of stretches (..., 2), begin and end."""
    return np.asarray(stretches[..., 1] - stretches[..., 0])


def spans(stretches: Ints) -> list[TokenSpan]:
    """Stretches (..., 2), begin and end, as runs of tokens."""
    return [TokenSpan(begin, end - begin) for begin, end in stretches.reshape(-1, 2).tolist() if begin < end]


def tokens(stretches: Ints) -> tuple[Ints, Ints]:
    """(number of the stretch, token) of every token of stretches (..., 2)."""
    flat = stretches.reshape(-1, 2)
    return spread(flat[:, 0], flat[:, 1])


class Answer(NamedTuple):
    """What a pass leaves: LSE (T, Hq) of the results that this rank gives, and the keys that it passed on, if any."""

    lse: torch.Tensor
    passed: torch.Tensor | None = None


class BlockRun(OneCall):
    """A rank's run over its blocks; ``operand`` may add to the keys that its queries see.

    Results that are given: those of this rank's blocks of prompts, and an even share of all others, which every rank has.

    Args:
        asked: queries, by index, that it is to be given too, after its own.

    Attributes:
        computed: the mask, without what an operand adds.
        queries, keys: stretches that it is given, as ``Blocks.stretches`` has them.
    """

    collectives = ("all_gather",)

    def __init__(
        self, problem: Problem, mask: BandMask, kernel: Kernel, place: Place, blocks: Blocks, asked: Sequence[int] | Ints = ()
    ) -> None:
        from lcbench.cp.exchange import Exchange  # with torch, which planning does without

        super().__init__(problem, place, Exchange.of(problem, place), problem.heads)
        self.blocks, self.computed = blocks, blocks.within(mask)
        queries, keys = blocks.stretches(place.rank)
        self.queries, self.keys = queries, keys
        number, given = tokens(queries)
        prompt, own = blocks.prompts[number // 2], number % 2 == OWN
        self._own, self._others = np.nonzero(prompt & own)[0], np.nonzero(~prompt & own)[0]
        self._own_at, self._others_at = _index(self._own, place.device), _index(self._others, place.device)
        count = len(self._others)
        self._share = slice(count * place.rank // blocks.ranks, count * (place.rank + 1) // blocks.ranks)
        self._rows = len(given)
        more = np.setdiff1d(np.asarray(asked, dtype=np.int64), given)
        self.tokens = np.concatenate([given[self._own], given[self._others[self._share]]])
        self._held = Held(Part(np.concatenate([given, more])), Part(tokens(keys)[1]), Part(self.tokens))
        # What anchors' own queries cost is in the time, and is no result.
        results = self.computed.tile(spans(queries[:, OWN]), spans(keys))
        pairs = (results.area + self.more_pairs()) * problem.heads.q
        self.get_ready(kernel, self.tile(self.computed.tile(spans(queries), spans(keys))).merged(), pairs)

    @property
    def held(self) -> Held:
        return self._held

    @property
    def communicates(self) -> bool:
        return self.blocks.ranks > 1 and len(self._others) > 0

    # -- what a subclass adds --------------------------------------------------------------------------------------

    def tile(self, tile: BandMask) -> BandMask:
        """The mask of the kernel's call, from that of the queries and keys that this rank is given."""
        return tile

    def more_pairs(self) -> int:
        """Pairs that ``operand`` adds for results that this rank gives, of each query head."""
        return 0

    def operand(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, compute: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values of the kernel's call, and what of this rank's keys it passed on. Collective."""
        return k, v, None

    # -- a pass ----------------------------------------------------------------------------------------------------

    def passed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Cache | None, sink: torch.Tensor | None, *, compute: bool
    ) -> tuple[torch.Tensor, Answer]:
        """out (T, Hq, Dv) of the results that this rank gives, from what it is given (``held``), and their LSE."""
        import torch

        k, v, passed = self.operand(q, k, v, compute=compute)
        out, lse = self.attend(q[: self._rows], k, v, cache, compute=compute)
        parts: list[OutLse] = []
        if len(self._own):
            parts.append(_with_sink((out[self._own_at], lse[self._own_at]), sink))
        if len(self._others):
            whole = _with_sink(self._everybodys(out[self._others_at], lse[self._others_at]), sink)
            parts.append((whole[0][self._share], whole[1][self._share]))
        if len(parts) == 1:
            ((out, lse),) = parts
        else:
            out, lse = (torch.cat(x) for x in zip(*parts, strict=True)) if parts else (out[:0], lse[:0])
        return out.to(q.dtype), Answer(lse, passed)

    def reads(self, kind: CacheKind) -> str | None:
        """Its one call takes all of this rank's keys, which of prompts are no cache."""
        return "the keys of a prompt are in no cache" if self.blocks.prompts.any() else super().reads(kind)

    def _everybodys(self, out: torch.Tensor, lse: torch.Tensor) -> OutLse:
        """Partial results merged over all ranks, the same on each."""
        from lcbench.kernels.merge import merge_into

        if self.blocks.ranks == 1:
            return out, lse
        outs, every = self.exchange.all_gather(out.to(self.reduced)), self.exchange.all_gather(lse)
        out, lse = outs[0].to(self.sums), every[0].clone()
        for other, of_other in zip(outs[1:], every[1:], strict=True):
            merge_into(out, lse, other, of_other)
        return out, lse

    def lse(self, saved: Any) -> torch.Tensor:
        found: torch.Tensor = saved.lse
        return found


def _with_sink(part: OutLse, sink: torch.Tensor | None) -> OutLse:
    from lcbench.kernels.sink import with_sink

    return part if sink is None else with_sink(*part, sink)


def _index(rows: Ints, device: torch.device) -> slice | torch.Tensor:
    """Rows by number, rising, as an index: a slice where they are one stretch, so that taking them copies nothing."""
    import torch

    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)
