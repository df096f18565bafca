"""LightSeq, also DistFlashAttn: a causal mask balanced by helpers, with tokens in order (arXiv 2310.03294).

Rank r has r + 1 tiles of a causal mask. In round t a rank r >= t is a worker: it fetches the keys and values of rank r - t. A rank
r < t has no tile of its own left and is a helper: it fetches the queries of rank r - t + P, computes them on its own keys, and
returns the result. There are floor(P / 2) + 1 rounds; for even P half of the ranks are idle in the last one. A mask with keys after
their queries gets the mirrored rounds too. Tiles without a pair are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.band import BandMask, Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import only_self_attention, too_short
from lcbench.schedule.layout import contiguous, tile_areas
from lcbench.schedule.schedule import NO_ROWS, Move, Schedule, Step, head_groups, rows, singles


@dataclass(frozen=True)
class LightSeq(Scheduled):
    """Workers and helpers; there is nothing to choose but ``lowering``."""

    by_mask: ClassVar[bool] = True

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return only_self_attention(problem) or too_short(problem, problem.scale.world_size)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        every = np.arange(ranks)
        shards = contiguous(problem.seqlen, ranks)
        pairs = tile_areas(mask, shards, shards) if isinstance(mask, BandMask) else np.ones((ranks, ranks), dtype=np.int64)
        rounds = [(every, every, every), *_rounds(pairs, 1), *_rounds(pairs, -1)]
        steps = []
        for time in range(len(rounds) + 1):
            tiles = returns = NO_ROWS
            moves: list[Move] = []
            if time < len(rounds):
                rank, q, k = rounds[time]
                tiles = rows(rank, 0, q, k)
            if time + 1 < len(rounds):
                rank, q, k = rounds[time + 1]
                helps = q != rank
                moves = [
                    Move("kv", rows(k[~helps], rank[~helps], k[~helps], 0)),
                    Move("q", rows(q[helps], rank[helps], q[helps], 0)),
                ]
            if time:
                rank, q, _ = rounds[time - 1]
                helps = q != rank
                returns = rows(rank[helps], q[helps], q[helps], 0)
            steps.append(Step(tiles, tuple(m for m in moves if len(m.rows)), returns))
        if not len(steps[-1].returns):
            steps.pop()
        return Schedule.of(ranks, shards, every, head_groups(problem.heads, 1), singles(ranks), tuple(steps))


def _rounds(pairs: Ints, sign: int) -> list[tuple[Ints, Ints, Ints]]:
    """(rank, q shard, k shard) of every round over keys before (1) or after (-1) their queries, but for tiles without a pair."""
    ranks = len(pairs)
    every = np.arange(ranks)
    found = []
    for distance in range(1, ranks // 2 + 1):
        other = every - sign * distance
        works = (other >= 0) & (other < ranks)
        other %= ranks
        # A worker fetches the other's keys; a helper is the one whose keys the other's queries need.
        q, k = np.where(works, every, other), np.where(works, other, every)
        busy = (pairs[q, k] > 0) & (works | (2 * distance != ranks))
        if busy.any():
            found.append((every[busy], q[busy], k[busy]))
    return found
