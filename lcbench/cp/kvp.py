"""KV parallelism: queries travel to the caches that they see, and partial results return (Medha, arXiv 2409.17264).

The cache of a request lies on as many ranks as it has tokens for: one more for every ``tokens_per_rank``, so that a group grows
with its context. A rank of the group owns the new token; it sends its query to the others, each computes it on the tokens that it
has, and the owner merges what returns by the LSE. New tokens are owned in turn, those of a chunk by all ranks of its group.

Bytes that are sent for each new token by all ranks together, whatever the context; R ranks have its cache, b of an input, r of a
partial result, s of an LSE, d and d' the widths of queries and values::

    (R - 1) Hq (d b + d' r + s)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.cp.split_cache import NO_TOKENS, query_runs, share
from lcbench.masks.band import BandMask, Ints, TokenSpan
from lcbench.masks.mask import Mask
from lcbench.problem import Batch, Problem
from lcbench.schedule.build import check_count, only_forward
from lcbench.schedule.layout import Layout, tile_areas
from lcbench.schedule.schedule import NO_ROWS, Move, Schedule, Side, Step, head_groups, rows, singles


@dataclass(frozen=True)
class KVP(Scheduled):
    """KV parallelism, forward only.

    Attributes:
        tokens_per_rank: tokens of a request that a rank holds before another one joins; None: every request has all ranks.
        interleave: tokens of a request that go to one rank before the next ones go to the next, in turn; None: each rank has one
            stretch of it.
    """

    tokens_per_rank: int | None = None
    interleave: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("tokens_per_rank", self.tokens_per_rank), ("interleave", self.interleave)):
            if value is not None:
                check_count(option, value)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return only_forward(problem)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        every = np.arange(ranks)
        q, owner, keys, reaches = self._dealt(ranks, problem.requests)
        if isinstance(mask, BandMask):
            reaches &= tile_areas(mask, q, keys) > 0
        shard, rank = np.nonzero(reaches)
        away = owner[shard] != rank
        sent = rows(owner[shard[away]], rank[away], shard[away], 0)
        # Of a rank's own queries that no other computes, of others' such, and of those that several compute, each a bundle.
        kinds = np.where(reaches.sum(axis=1)[shard] > 1, 2, away)
        tiles = np.unique(np.stack([rank, kinds], axis=1), axis=0)
        bundles = [tuple(shard[(rank == one) & (kinds == kind)].tolist()) for one, kind in tiles.tolist()]
        now, later = (rows(tiles[some, 0], 0, np.nonzero(some)[0], tiles[some, 0]) for some in (tiles[:, 1] == 0, tiles[:, 1] > 0))
        steps = [Step(now)]
        if len(sent):
            returned = sent[:, [1, 0, 2, 3]]
            steps = [Step(now, (Move("q", sent, kept=True),)), Step(later), Step(NO_ROWS, (), returned)]
        return Schedule(
            ranks, Side(q, owner, tuple(bundles) or singles(len(q))), Side(keys, every, singles(ranks)),
            head_groups(problem.heads, 1), tuple(steps),
        )  # fmt: skip

    def _dealt(self, ranks: int, batch: Batch) -> tuple[Layout, Ints, Layout, Ints]:
        """Shards of queries, the owner of each, a shard of keys per rank, and which ranks have keys of each (shards, ranks).

        Queries with the same owner and the same ranks are one shard.
        """
        held, owned = np.zeros(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64)
        keys: list[list[TokenSpan]] = [[] for _ in range(ranks)]
        queries: dict[tuple[int, tuple[int, ...]], list[TokenSpan]] = {}
        q_bounds, k_bounds = batch.q_bounds.tolist(), batch.k_bounds.tolist()
        for (q_begin, q_end), (begin, end) in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
            group = self._group(held, end - begin)
            for part, rank in enumerate(group):
                mine = share(begin, end, len(group), part, self.interleave)
                keys[rank] += mine
                held[rank] += sum(run.size for run in mine)
            # Those left over go to ranks that own the fewest.
            members = sorted(group, key=lambda rank: int(owned[rank]))
            for part, rank in enumerate(members):
                for run in share(q_begin, q_end, len(group), part, None):
                    own = queries.setdefault((rank, tuple(sorted(group))), [])
                    own += query_runs(run.start, run.start + run.size, len(group), self.interleave)
                    owned[rank] += run.size
        found = sorted(queries)
        reaches = np.zeros((len(found), ranks), dtype=bool)
        for shard, (_, group_of) in enumerate(found):
            reaches[shard, list(group_of)] = True
        layouts = Layout(tuple(tuple(queries[key]) for key in found)), Layout(tuple(tuple(each) or NO_TOKENS for each in keys))
        return layouts[0], np.array([rank for rank, _ in found], dtype=np.int64), layouts[1], reaches

    def _group(self, held: Ints, tokens: int) -> list[int]:
        """The ranks for a request, each with some of its tokens: neighbours that hold the fewest together; of several such groups,
        that whose first rank holds the fewest."""
        ranks = len(held)
        count = min(ranks, -(-tokens // (self.interleave or 1)))
        if self.tokens_per_rank is not None:
            count = min(count, -(-tokens // self.tokens_per_rank))
        sums = np.cumsum([0, *held, *held])
        together = sums[count : count + ranks] - sums[:ranks]
        start = int(np.lexsort((np.arange(ranks), held, together))[0])
        return [(start + place) % ranks for place in range(count)]
