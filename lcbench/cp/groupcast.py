"""Group-cast: chunks dealt out by exact area, keys sent only to the ranks that need them (MagiAttention, arXiv 2505.13211).

Every rank gets the same number of chunks of queries; a solver chooses them so that the busiest rank has little work. A rank
receives only the keys that its queries see, in ``stages`` parts. Each part travels while the part before it is computed; the rank's
own keys are computed first. Gradients go straight back to the owners.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.band import Ints, TokenSpan, distinct
from lcbench.masks.convert import needed_keys
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_choice, check_count
from lcbench.schedule.layout import Layout, contiguous
from lcbench.schedule.schedule import Move, Schedule, Side, Step, head_groups, rows

SOLVERS = ("greedy", "swap")
MAX_SWAPS = 1000
MOST_CUTS = 1 << 14  # of the sequence, at the ends of what ranks need; with more of them whole chunks are sent


@dataclass(frozen=True)
class GroupCast(Scheduled):
    """How finely work is dealt out, by which solver, and how finely the cast is overlapped.

    Attributes:
        chunks_per_rank: chunks of queries that each rank gets.
        stages: parts of the remote keys.
        solver: ``greedy``: largest chunk first, to the least loaded rank that has room; ``swap``: then chunks change places
            between the busiest rank and others as long as that helps.
    """

    chunks_per_rank: int = 8
    stages: int = 2
    solver: Literal["greedy", "swap"] = "greedy"

    def __post_init__(self) -> None:
        check_count("chunks_per_rank", self.chunks_per_rank)
        check_count("stages", self.stages)
        check_choice("solver", self.solver, SOLVERS)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if problem.queries < problem.scale.world_size:
            return f"needs at least a query per rank: {problem.queries} over {problem.scale.world_size} ranks"
        return None

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        chunks = contiguous(problem.queries, ranks * min(self.chunks_per_rank, problem.queries // ranks))
        owner_of_chunk = dispatch(np.array(chunks.areas(mask)), ranks, swap=self.solver == "swap")
        q_edges = _edges(chunks)
        chunk, begin, end = needed_keys(mask, q_edges)
        # Keys live where their queries do; those of a cache in equal stretches.
        edges, owner_of_stretch = q_edges, owner_of_chunk
        if problem.rectangular:
            edges, owner_of_stretch = _edges(contiguous(problem.seqlen, ranks)), np.arange(ranks)
        cuts = distinct(np.concatenate([edges, begin, end]))
        if len(cuts) > MOST_CUTS:
            cuts = edges
        # needed[r, i]: whether a query of rank r sees a key of stretch i
        marks = np.zeros((ranks, len(cuts)), dtype=np.int64)
        np.add.at(marks, (owner_of_chunk[chunk], np.searchsorted(cuts, begin, side="right") - 1), 1)
        np.add.at(marks, (owner_of_chunk[chunk], np.searchsorted(cuts, end)), -1)
        needed = np.cumsum(marks, axis=1)[:, :-1] > 0
        owner = owner_of_stretch[np.searchsorted(edges, cuts[:-1], side="right") - 1]
        shards = Layout(tuple((TokenSpan(a, b - a),) for a, b in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)))

        every = np.arange(ranks)
        bundles: list[tuple[int, ...]] = [tuple(np.nonzero(owner == rank)[0].tolist()) for rank in range(ranks)]
        tiles = [rows(every, 0, every, every)]
        moves: list[tuple[Move, ...]] = []
        remote = needed & (owner != every[:, None])
        # Stretches go to stages by the tokens before them, so that stages are equally long.
        before = np.cumsum(remote * np.diff(cuts), axis=1)
        stage_of = (before - 1) * self.stages // np.maximum(before[:, -1:], 1)
        for stage in range(self.stages):
            rank, shard = np.nonzero(remote & (stage_of == stage))
            if not len(rank):
                continue
            users, begins = np.unique(rank, return_index=True)
            first = len(bundles)
            bundles += [tuple(part.tolist()) for part in np.split(shard, begins[1:])]
            moves.append((Move("kv", rows(owner[shard], rank, shard, 0)),))
            tiles.append(rows(users, 0, users, first + np.arange(len(users))))
        steps = tuple(Step(*step) for step in zip(tiles, [*moves, ()], strict=True))
        k = q = Side(shards, owner, tuple(bundles))
        if problem.rectangular:
            queries = [tuple(np.nonzero(owner_of_chunk == rank)[0].tolist()) for rank in range(ranks)]
            q = Side(chunks, owner_of_chunk, tuple(queries))
        return Schedule(ranks, q, k, head_groups(problem.heads, 1), steps)


def _edges(layout: Layout) -> Ints:
    """Where each of the stretches of a contiguous layout begins, and where the last one ends."""
    first = [runs[0].start for runs in layout.shards]
    return np.array([*first, layout.shards[-1][0].start + layout.size(len(layout) - 1)])


def dispatch(areas: Ints, ranks: int, *, swap: bool) -> Ints:
    """The rank of each chunk: equally many for each rank, the largest sum of areas small."""
    room = len(areas) // ranks
    owner = np.zeros(len(areas), dtype=np.int64)
    heap = [(0, rank, 0) for rank in range(ranks)]
    for chunk in np.argsort(-areas, kind="stable").tolist():
        load, rank, count = heapq.heappop(heap)
        owner[chunk] = rank
        if count + 1 < room:
            heapq.heappush(heap, (load + int(areas[chunk]), rank, count + 1))
    if swap:
        _swap(areas, owner, ranks)
    return owner


def _swap(areas: Ints, owner: Ints, ranks: int) -> None:
    """Exchange a chunk of the busiest rank for one of another as long as the larger of both loads falls, the best pair first."""
    load = np.bincount(owner, weights=areas, minlength=ranks).astype(np.int64)
    for _ in range(MAX_SWAPS):
        busiest = int(np.argmax(load))
        own, others = np.nonzero(owner == busiest)[0], np.nonzero(owner != busiest)[0]
        if not len(others):
            return
        gain = areas[own][:, None] - areas[others][None]  # what the busiest rank gets rid of
        after = np.maximum(load[busiest] - gain, load[owner[others]][None] + gain)
        i, j = np.unravel_index(int(np.argmin(after)), after.shape)
        if after[i, j] >= load[busiest]:
            return
        mine, theirs = own[i], others[j]
        load[owner[theirs]] += gain[i, j]
        load[busiest] -= gain[i, j]
        owner[mine], owner[theirs] = owner[theirs], owner[mine]
