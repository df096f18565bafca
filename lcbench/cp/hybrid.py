"""Hybrid data and context parallelism: each document on a sub-group of ranks of its own, a ring over each.

Planners for mixed lengths (ByteScale, arXiv 2502.21231; FlexSP, arXiv 2412.01523; Hydraulis, arXiv 2412.07894) decide which
sub-groups there are and which document goes to which; this strategy runs such an assignment. A document is a stretch of tokens that
sees, and is seen by, nothing outside of it. Each is dealt out in zigzag over its sub-group, and begins at another rank than the one
before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.band import Ints, spread
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import only_self_attention, rings, too_short
from lcbench.schedule.layout import Layout, documents
from lcbench.schedule.schedule import Schedule, head_groups, singles


@dataclass(frozen=True)
class Hybrid(Scheduled):
    """An assignment of documents to sub-groups of ranks.

    Attributes:
        groups: ranks of each sub-group, from rank 0 on; None: all ranks are one.
        documents: the sub-group of each document, in the order of the sequence; None: documents with the most work first, each to
            the sub-group that has the least of it per rank.
    """

    groups: tuple[int, ...] | list[int] | None = None
    documents: tuple[int, ...] | list[int] | None = None

    def __post_init__(self) -> None:
        for option in ("groups", "documents"):
            values = getattr(self, option)
            if values is None:
                continue
            least = 1 if option == "groups" else 0
            if not isinstance(values, list | tuple) or not values or not all(type(v) is int and v >= least for v in values):
                raise ValueError(f"cp.{option}={values} is no list of integers of at least {least}")
            object.__setattr__(self, option, tuple(values))  # from a config it comes as a list
        if self.documents is not None and max(self.documents) >= len(self.groups or (1,)):
            raise ValueError(f"cp.documents={list(self.documents)} names a sub-group that cp.groups={self.groups} does not have")

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if refused := only_self_attention(problem):
            return refused
        ranks = problem.scale.world_size
        groups = self.groups or (ranks,)
        if sum(groups) != ranks:
            return f"groups={list(groups)} are {sum(groups)} ranks, scale={problem.scale} has {ranks}"
        bounds, work = documents(mask)
        if self.documents is not None and len(self.documents) != len(bounds) - 1:
            return f"documents names {len(self.documents)} documents, the mask has {len(bounds) - 1}"
        if too_short(problem, ranks):
            return too_short(problem, ranks)
        held = np.bincount(self._dealt(groups, bounds, work)[0], minlength=ranks)
        empty = np.nonzero(held == 0)[0]
        return f"rank {empty[0]} gets no token of the {len(bounds) - 1} documents in groups={list(groups)}" if len(empty) else None

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        groups = self.groups or (problem.scale.world_size,)
        ranks = sum(groups)
        layout = self._layout(groups, *documents(mask))
        return Schedule.of(ranks, layout, np.arange(ranks), head_groups(problem.heads, 1), singles(ranks), rings(groups))

    def _layout(self, groups: Sequence[int], bounds: Ints, work: Ints) -> Layout:
        dealt = self._dealt(groups, bounds, work)
        order = np.argsort(dealt[0].astype(np.min_scalar_type(sum(groups))), kind="stable")  # small numbers are sorted in one pass
        rank, start, size = (each[order] for each in dealt)
        return Layout.of_stretches(rank, start, size, sum(groups))

    def _dealt(self, groups: Sequence[int], bounds: Ints, work: Ints) -> tuple[Ints, Ints, Ints]:
        """(rank, start, size) of every stretch of tokens, of each rank in the order of its tokens."""
        chosen = _least_loaded(work, groups) if self.documents is None else np.array(self.documents)
        parts = []
        for first, size, group in zip(np.cumsum([0, *groups]).tolist(), groups, range(len(groups)), strict=False):
            number, chunks = np.nonzero(chosen == group)[0], 2 * size
            length = np.diff(bounds)[number]
            # Chunks that hold a token. Of a document with fewer tokens than chunks these are as many as its tokens, one in each.
            place, token = spread(np.zeros_like(length), np.minimum(length, chunks))
            number, length = number[place], length[place]
            chunk = np.where(length < chunks, -(-chunks * (token + 1) // length) - 1, token)
            start, end = (length * each // chunks for each in (chunk, chunk + 1))
            # In zigzag. Short documents leave the first places empty, so they begin at another rank each time.
            rank = first + (np.minimum(chunk, chunks - 1 - chunk) + number) % size
            parts.append(np.stack([rank, bounds[number] + start, end - start]))
        rank, start, length = np.concatenate(parts, axis=1)
        return rank, start, length


def _least_loaded(work: Ints, groups: Sequence[int]) -> Ints:
    """The sub-group of each document: most work first, to the one that then has the least per rank."""
    chosen = np.zeros(len(work), dtype=np.int64)
    if len(groups) == 1:
        return chosen
    load = [0] * len(groups)
    for document in np.argsort(-work, kind="stable").tolist():
        extra = int(work[document])
        group = min(range(len(groups)), key=lambda g: ((load[g] + extra) / groups[g], g))
        chosen[document] = group
        load[group] += extra
    return chosen
