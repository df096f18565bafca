"""Group-cast: chunks dealt out by exact area, keys sent only to the ranks that need them (MagiAttention, arXiv 2505.13211).

Every rank gets the same number of chunks of queries; a solver chooses them so that the busiest rank has little work. A rank
receives only the keys that its queries see, in ``stages`` parts. Each part travels while the part before it is computed; the rank's
own keys are computed first. Gradients go straight back to the owners.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.band import Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_choice, check_count, too_few_queries
from lcbench.schedule.layout import contiguous
from lcbench.schedule.schedule import Schedule, Side
from lcbench.schedule.sparse import Demand, edges_of, fetching

SOLVERS = ("greedy", "swap")
MAX_SWAPS = 1000


@dataclass(frozen=True)
class GroupCast(Scheduled):
    """How finely work is dealt out, by which solver, and how finely the cast is overlapped.

    Attributes:
        chunks_per_rank: chunks of queries that each rank gets.
        stages: parts of the remote keys.
        solver: ``greedy``: largest chunk first, to the least loaded rank that has room; ``swap``: then chunks change places
            between the busiest rank and others as long as that helps.
        by_head: whether keys go to a rank for those heads alone whose map needs them, where heads have maps of their own: fewer
            bytes, in more messages and more kernel calls. Else what some head needs goes for all of them.
    """

    chunks_per_rank: int = 8
    stages: int = 2
    solver: Literal["greedy", "swap"] = "greedy"
    # At its default it is no part of a cell, whose id is from before there was a choice.
    by_head: bool = field(default=False, metadata={"left_out": True})

    def __post_init__(self) -> None:
        check_count("chunks_per_rank", self.chunks_per_rank)
        check_count("stages", self.stages)
        check_choice("solver", self.solver, SOLVERS)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return too_few_queries(problem)

    def weighed(self, mask: Mask) -> Mask:
        """The mask by whose areas chunks are dealt out."""
        return mask

    def settled(self, problem: Problem, mask: Mask) -> SettledCast:
        return SettledCast(**{each.name: getattr(self, each.name) for each in fields(self)}, dealt=mask)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        chunks = contiguous(problem.queries, ranks * min(self.chunks_per_rank, problem.queries // ranks))
        owner_of_chunk = dispatch(np.array(chunks.areas(self.weighed(mask))), ranks, swap=self.solver == "swap")
        q_edges = edges_of(chunks)
        # Keys live where their queries do; those of a cache in equal stretches.
        k_edges, owner_of_stretch = q_edges, owner_of_chunk
        if problem.rectangular:
            k_edges, owner_of_stretch = edges_of(contiguous(problem.seqlen, ranks)), np.arange(ranks)
        demand = Demand.of(mask, q_edges, k_edges, owner_of_chunk)
        demand = demand if self.by_head else demand.all_heads()
        return fetching(problem, demand, Side(chunks, owner_of_chunk, ()), owner_of_stretch[demand.stretch], self.stages)


@dataclass(frozen=True)
class SettledCast(GroupCast):
    """A group-cast of a part of a mask, with chunks dealt out by the areas of all of it (``dealt``): ranks are sent the keys that
    the part needs."""

    dealt: Mask = field(kw_only=True)

    def weighed(self, mask: Mask) -> Mask:
        return self.dealt


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
