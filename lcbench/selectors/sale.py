"""Blocks with a pair whose weight, estimated from 4-bit queries and keys, is not small beside that of sink and local blocks:
SALE (arXiv 2505.24179).

A query's relative attention score of a key is ``exp(s_ij) / sum over the region of exp(s_i)``. The region is what is always kept:
the sequence's first block and those around the query's own. A block is kept where any query has a score of at least the head's
threshold for any key of it. As in the authors' code:

- **4 bits.** The means over all tokens are taken away from queries and keys. What is left is rounded, a half to the even one, to
  -7 ... 7 times a scale: the largest number of its rows over 7. Products are whole numbers, and exact.
- **Smoothed queries.** The mean query's product with a key is worked out before the key is rounded, and added as a multiple of
  both scales. The mean key's product is the same for all keys, so it is left out.
- **Thresholds per head.** There, a model's are found once, by halving 0.008 until outputs are near enough. Here one is given for
  all heads (``threshold``), or each map's is worked out anew, so that ``sample`` blocks of queries, evenly apart, keep the share
  ``density`` of the blocks that they see. Other blocks of queries then keep about that.

Other than there: queries have a scale per 16 rows, those of a warp, and keys one per block; there each thread of a warp has its
own. The region's scores are of 4 bits too, so that ranks need tell one another only 4 bits of each number of a key. A map of
several heads takes the highest of their scores. There, everything is attended to up to 1024 tokens; here it is as at any length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from lcbench.masks.band import Ints
from lcbench.masks.block import Keep
from lcbench.problem import Problem
from lcbench.selectors.base import Effort, Features, Round, Rows, Selector, block_edges, blocks_of, check_whole
from lcbench.selectors.choosing import (
    SUMMING,
    block_sums,
    by_head,
    check_share,
    covering,
    each_block,
    ordering,
    own_blocks,
    products,
    share_of,
    sinks,
    steady,
)
from lcbench.selectors.partial import at_once, hide, runs

if TYPE_CHECKING:
    import torch

WARP = 16  # queries that share a scale
LARGEST = 7  # of 4 bits with a sign
EIGHT = 8  # of what products of bytes on a GPU want multiples, in both dimensions of keys
FEWEST = 32  # rows of such a product
LIMIT = 1 << 30  # of a product with the mean query, so that sums fit 32 bits
UNSEEN = -(1 << 31)  # less than any sum
# Numbers of 4 bytes that are read and written per pair, and per number of q and k; operations per block of queries and head.
SCORED, QUANTISED, SCORING = 8, 12, 40


@dataclass(frozen=True)
class Sale(Selector):
    """A selector by relative attention scores.

    Attributes:
        threshold: of all heads, above 0.
        density: share of the blocks that a block of queries sees, above 0 and up to 1, that thresholds are worked out for.
        sample: blocks of queries that they are worked out from.
        sink: the first so many blocks that a block of queries sees are always kept.
        local: the blocks with the queries' own tokens and ``local - 1`` on either side are always kept.

    Raises:
        ValueError: not exactly one of ``threshold`` and ``density``, no region, or a number that an option may not be.
    """

    q_block: int = field(default=64, kw_only=True)
    k_block: int = field(default=32, kw_only=True)
    threshold: float | None = None
    density: float | None = None
    sample: int = 32
    sink: int = 1
    local: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.threshold is None) == (self.density is None):
            raise ValueError(
                f"selector.threshold={_shown(self.threshold)} and selector.density={_shown(self.density)}: "
                "set one of them, and the other one to null"
            )
        if self.density is not None:
            check_share("density", self.density)
        elif isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float) or not 0 < self.threshold < math.inf:
            raise ValueError(f"selector.threshold={self.threshold} is no number above 0, such as 0.004")
        check_whole("sample", self.sample, 1)
        check_whole("sink", self.sink, 0)
        check_whole("local", self.local, 0)
        if not self.sink + self.local:
            raise ValueError("selector.sink=0 and selector.local=0 leave no blocks to compare with; set one of them to 1 or more")

    def rounds(self, problem: Problem) -> Sequence[Round]:
        means = Round(
            keys=lambda k, sizes, known: {"k_sum": block_sums(k.float(), sizes)},
            by_block=("k_sum",),
            queries=lambda rows, known: {"q_sum": block_sums(rows.q.float(), np.array([len(rows.q)]))},
            all=lambda found, edges: {
                "k_mean": found["k_sum"].double().sum(0).div(problem.seqlen).float(),
                "q_mean": found["q_sum"].double().sum(0).div(problem.queries).float(),
            },
        )
        quantised = Round(
            keys=quantised_keys,
            by_block=("k_scale",),
            all=lambda found, edges: unpacked(found, (len(edges) - 1) * self.k_block, problem.heads.dim),
        )
        if self.density is None:
            return means, quantised
        thresholds = Round(
            queries=lambda rows, known: self._sampled(rows, known, problem),
            blocks=lambda blocks: np.unique((np.arange(self.sample) + 0.5) * blocks // self.sample).astype(np.int64),
            all=lambda found, edges: calibrated(found),
        )
        return means, quantised, thresholds

    def asked(self, rows: Rows, edges: Ints) -> tuple[int, Keep] | None:
        if self.density is None:
            return None
        seen = int((rows.pairs > 0).sum())
        return share_of(seen, self.density) if seen else 0, self._always(rows, edges)

    def work(self, problem: Problem, pairs: float) -> Effort:
        (rows, columns), heads = blocks_of(self, problem), problem.heads
        every, numbers = heads.q * pairs, problem.seqlen * heads.kv * heads.dim
        again = min(self.sample / rows, 1.0) if self.density is not None else 0.0  # blocks that thresholds are worked out from
        moved = SCORED * 4.0 * every * (1 + again) + QUANTISED * 4.0 * (numbers + problem.queries * heads.q * heads.dim)
        kernels = SCORING * rows * heads.kv * (1 + again) + SUMMING * columns
        scoring = Effort(2.0 * heads.dim * every * (1 + again), moved, kernels, 4.0 * numbers, numbers / 2)
        return scoring + ordering(self, problem, pairs)

    def keep(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> Keep:
        with steady(rows.q.device):
            always, found = self._always(rows, edges), self.score(rows, keys, edges, problem)
        least = keys["threshold"][:, None] if self.threshold is None else math.log(self.threshold)
        counts = ((found >= least).cpu().numpy() | always).sum(1)
        return covering(found, counts, always, rows, edges)

    def score(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> torch.Tensor:
        """The logarithm of the highest relative attention score in each block, (maps, columns), float32: -inf in blocks without
        pairs, inf in those that a query sees which sees nothing of the region."""
        import torch

        heads, device, always = problem.heads, rows.q.device, self._always(rows, edges)
        each = heads.q // heads.kv
        together = at_once(rows, each, self.k_block)
        found = torch.full((heads.q, len(rows.pairs)), -torch.inf, device=device)
        for head in range(heads.kv):
            tile = Tile(rows, edges, self.k_block, keys, head, each, problem)
            region = torch.full((each, len(rows.q)), -torch.inf, device=device)
            for columns in runs(always, together):
                region = torch.logaddexp(region, tile.scores(tile.products(columns), columns, self.k_block).logsumexp(-1))
            for columns in runs(rows.pairs > 0, together):
                highest = tile.products(columns).unflatten(-1, (len(columns), self.k_block)).amax(-1)
                relative = tile.scores(highest, columns, 1) - region[..., None]
                relative = relative.masked_fill_(highest == UNSEEN, -torch.inf).amax(1)
                found[tile.group, columns.start : columns.stop] = relative
        return found.unflatten(0, (self.maps(heads), -1)).amax(1)

    def _always(self, rows: Rows, edges: Ints) -> Keep:
        """The region, bool (columns,)."""
        return sinks(rows, self.sink) | own_blocks(rows, edges, rows.number * self.q_block, self.local)

    def _sampled(self, rows: Rows, known: Features, problem: Problem) -> Features:
        """Scores of a block of queries, inf in the region, and how many blocks it is to keep."""
        import torch

        edges = block_edges(problem.seqlen, self.k_block)
        with steady(rows.q.device):
            found, seen = self.score(rows, known, edges, problem), int((rows.pairs > 0).sum())
        found[:, torch.from_numpy(self._always(rows, edges)).to(found.device)] = torch.inf
        return {"sampled": found[None], "count": torch.tensor([share_of(seen, self.density) if seen else 0], device=found.device)}


@dataclass(frozen=True)
class Tile:
    """A block of queries, of the ``each`` heads that share the key/value head ``head``, and blocks of keys."""

    rows: Rows
    edges: Ints
    k_block: int
    keys: Features
    head: int
    each: int
    problem: Problem

    @property
    def group(self) -> slice:
        """The query heads."""
        return slice(self.head * self.each, (self.head + 1) * self.each)

    @cached_property
    def queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``quantised_queries``."""
        return quantised_queries(self.rows.q[:, self.group], self.keys["q_mean"][self.group])

    def products(self, columns: range) -> torch.Tensor:
        """(each, T, n): of queries with the keys of adjacent blocks, as multiples of both scales, int32; ``UNSEEN`` where a query
        does not see a key, and where there is none."""
        import torch

        (q, scale), size = self.queries, len(columns) * self.k_block
        begin = columns.start * self.k_block
        own = torch.nn.functional.pad(q.flatten(0, 1), (0, 0, 0, max(0, FEWEST - q.shape[0] * q.shape[1])))
        found = exact_products(own, self.keys["k4"][self.head, begin : begin + -(-size // EIGHT) * EIGHT])
        found = found[: q.shape[0] * q.shape[1], :size].unflatten(0, (*scale.shape, WARP))
        unit = scale[..., None] * self._key_scale(columns, self.k_block)
        shift = self.keys["shift"][self.group, None, begin : begin + size] / unit
        found += shift.round_().clamp_(-LIMIT, LIMIT).int()[:, :, None]
        found = found.flatten(1, 2)[:, : len(self.rows.q)]
        there = int(self.edges[columns.stop] - begin)
        found[..., there:] = UNSEEN
        hide(found[..., :there], self.rows, self.edges, columns, UNSEEN)
        return found

    def scores(self, found: torch.Tensor, columns: range, size: int) -> torch.Tensor:
        """What the softmax is of, float32, of such products (each, T, n), ``size`` of each block; -inf where they are unseen."""
        import torch

        scale = self.queries[1].repeat_interleave(WARP, 1)[:, : found.shape[1], None] * self._key_scale(columns, size)
        score, cap = found * scale * self.problem.softmax_scale, self.problem.softmax.softcap
        score = cap * torch.tanh(score / cap) if cap else score
        return score.masked_fill_(found == UNSEEN, -torch.inf)

    def _key_scale(self, columns: range, size: int) -> torch.Tensor:
        return self.keys["k_scale"][self.head, columns.start : columns.stop].repeat_interleave(size)


def exact_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of rows (m, D) and (n, D), int8 numbers of 4 bits, the products (m, n), int32."""
    import torch

    if a.is_cuda:
        return torch._int_mm(a, b.T)
    # torch multiplies bytes on a CPU in a plain loop. Float32 has these sums exactly: 64 D is far below 2^24.
    return (a.float() @ b.float().T).int()


def quantised_keys(k: torch.Tensor, sizes: Ints, known: Features) -> Features:
    """Of keys (T, Hk, D): two numbers of 4 bits in a byte, (T, Hk, D / 2); a scale per block, (blocks, Hk); products of the mean
    query with what the mean key leaves of them, (T, Hq)."""
    import torch

    rest, lengths = k.float() - known["k_mean"], torch.from_numpy(sizes).to(k.device)
    scale = scale_of(torch.segment_reduce(rest.abs().amax(-1), "max", lengths=lengths))
    whole = (rest / scale.repeat_interleave(lengths, 0)[..., None]).round_().to(torch.int8)
    pairs = torch.nn.functional.pad(whole, (0, whole.shape[-1] % 2)).unflatten(-1, (-1, 2)) & 15
    mean = known["q_mean"][:, None]
    shift = each_block(lambda own: products(mean, by_head(own))[:, 0].T, rest, sizes)
    return {"k4": (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8), "k_scale": scale, "shift": shift}


def unpacked(found: Features, tokens: int, dim: int) -> Features:
    """All keys as products want them: bytes (Hk, S', D'), filled up with zeros; scales (Hk, blocks), shifts (Hq, S')."""
    import torch

    packed = found["k4"].transpose(0, 1)
    both = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :dim].to(torch.int8)
    more = tokens + EIGHT - both.shape[1]
    k4 = torch.nn.functional.pad((both ^ 8) - 8, (0, -dim % EIGHT, 0, more))
    shift = torch.nn.functional.pad(found["shift"].T, (0, more))
    return {"k4": k4, "k_scale": found["k_scale"].T.contiguous(), "shift": shift, "q_mean": found["q_mean"]}


def quantised_queries(q: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of queries (T, H, D): bytes (H, T', D'), filled up with zeros, and a scale per warp, (H, T' / 16)."""
    import torch

    rest = (q.float() - mean).transpose(0, 1)
    rest = torch.nn.functional.pad(rest, (0, -q.shape[-1] % EIGHT, 0, -len(q) % WARP)).unflatten(1, (-1, WARP))
    scale = scale_of(rest.abs().amax((2, 3)))
    return (rest / scale[..., None, None]).round_().to(torch.int8).flatten(1, 2), scale


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    """What whole numbers are multiples of, where the largest is so much; 1 where all are 0."""
    scale = largest / LARGEST
    return scale.masked_fill_(scale == 0, 1.0)


def calibrated(found: Features) -> Features:
    """The threshold of each map, its logarithm (maps,): as many blocks of all samples have at least that as are to be kept of them
    together."""
    scores, count = found["sampled"].transpose(0, 1).flatten(1), int(found["count"].sum())
    threshold = scores.sort(dim=1, descending=True).values[:, max(0, count - 1)]
    return {name: found[name] for name in ("k4", "k_scale", "shift", "q_mean")} | {"threshold": threshold}


def _shown(value: float | None) -> str:
    return "null" if value is None else str(value)
