"""Hybrid data and context parallelism: each document on a sub-group of ranks of its own.

Planners for mixed lengths (ByteScale, arXiv 2502.21231; FlexSP, arXiv 2412.01523; Hydraulis, arXiv 2412.07894) decide which
sub-groups there are and which document goes to which; this strategy runs such an assignment. A document is a stretch of tokens that
sees, and is seen by, nothing outside of it. A sub-group is a ring, over which each document is dealt out in zigzag and begins at
another rank than the one before it; or it shares its documents by the first of the strategies given that can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.cp.ring import Ring
from lcbench.cp.sub_groups import sub_problem
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.usp import USP
from lcbench.masks.band import BandMask, Ints, spread
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.beside import Member, beside
from lcbench.schedule.build import only_self_attention, rings, too_short
from lcbench.schedule.layout import Layout, documents
from lcbench.schedule.lowering import Lowering
from lcbench.schedule.schedule import Schedule, head_groups, singles

# What a sub-group may share documents by: each document by itself as evenly as can be.
WITHIN: dict[str, Callable[[Lowering], Scheduled]] = {
    "ring": lambda lowering: Ring("documents", lowering=lowering),
    "ulysses": lambda lowering: Ulysses(lowering=lowering),
    "usp": lambda lowering: USP(layout="documents", lowering=lowering),
}


@dataclass(frozen=True)
class Hybrid(Scheduled):
    """An assignment of documents to sub-groups of ranks.

    Attributes:
        groups: ranks of each sub-group, from rank 0 on; None: all ranks are one.
        documents: the sub-group of each document, in the order of the sequence; None: documents with the most work first, each to
            the sub-group that has the least of it per rank.
        ranks: those of the sub-groups, one sub-group's behind another's; None: neighbours.
        within: by which strategies a sub-group may share its documents, the first that can run them; in a batch the planner chooses
            among them. None: by a ring.
    """

    by_mask: ClassVar[bool] = True

    groups: tuple[int, ...] | list[int] | None = None
    documents: tuple[int, ...] | list[int] | None = None
    # At their defaults they are no part of a cell, whose id is from before there was a choice.
    ranks: tuple[int, ...] | list[int] | None = field(default=None, metadata={"left_out": True})
    within: tuple[str, ...] | list[str] | None = field(default=None, metadata={"left_out": True})

    def __post_init__(self) -> None:
        if self.within is not None:
            names = self.within if isinstance(self.within, list | tuple) else []
            if not names or not all(isinstance(name, str) and name in WITHIN for name in names):
                raise ValueError(f"cp.within={self.within} is no list of some of {', '.join(WITHIN)}")
            if len(set(names)) < len(names):
                raise ValueError(f"cp.within={self.within} names a strategy twice; name each once")
            object.__setattr__(self, "within", tuple(self.within))  # from a config it comes as a list
        for option in ("groups", "documents", "ranks"):
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
        if self.ranks is not None and sorted(self.ranks) != list(range(ranks)):
            return f"ranks={list(self.ranks)} are not each of the ranks 0 to {ranks - 1} of scale={problem.scale} once"
        bounds, work = documents(mask)
        if self.documents is not None and len(self.documents) != len(bounds) - 1:
            return f"documents names {len(self.documents)} documents, the mask has {len(bounds) - 1}"
        if too_short(problem, ranks):
            return too_short(problem, ranks)
        if self.within is not None:
            return self._unshared(problem, mask, bounds, work)
        held = np.bincount(self._dealt(groups, bounds, work)[0], minlength=ranks)
        empty = np.nonzero(held == 0)[0]
        return f"rank {empty[0]} gets no token of the {len(bounds) - 1} documents in groups={list(groups)}" if len(empty) else None

    def _unshared(self, problem: Problem, mask: Mask, bounds: Ints, work: Ints) -> str | None:
        """Why some sub-group shares its documents by none of ``within``; None: all do."""
        if not isinstance(mask, BandMask):
            return f"within={list(self.within or ())} needs a mask of bands"
        for number, (_, _, own, tile) in enumerate(self._apart(problem, mask, bounds, work)):
            refused = {name: each.unsupported(own, tile) for name, each in self.inside.items()}
            if all(refused.values()):
                return f"sub-group {number}: " + "; ".join(f"{name}: {why}" for name, why in refused.items())
        return None

    @property
    def inside(self) -> dict[str, Scheduled]:
        return {name: WITHIN[name](self.lowering) for name in self.within or ("ring",)}

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        if self.within is not None:
            assert isinstance(mask, BandMask)
            return beside(list(self._members(problem, mask)), problem.scale.world_size)
        groups = self.groups or (problem.scale.world_size,)
        ranks = sum(groups)
        layout = self._layout(groups, *documents(mask))
        found = Schedule.of(ranks, layout, np.arange(ranks), head_groups(problem.heads, 1), singles(ranks), rings(groups))
        if self.ranks is None:
            return found
        return beside([Member(found, np.array(self.ranks), np.array([[0, problem.seqlen]]))], ranks)

    def _apart(
        self, problem: Problem, mask: BandMask, bounds: Ints, work: Ints
    ) -> Iterator[tuple[Ints, Ints, Problem, BandMask]]:  # fmt: skip
        """(ranks, documents, problem, mask) of each sub-group by itself."""
        groups = self.groups or (problem.scale.world_size,)
        chosen, first = self._chosen(groups, work), 0
        every = np.arange(sum(groups)) if self.ranks is None else np.array(self.ranks)
        for number, size in enumerate(groups):
            ranks, own = every[first : first + size], np.nonzero(chosen == number)[0]
            yield ranks, own, *sub_problem(problem, mask, bounds, ranks.tolist(), own.tolist())
            first += size

    def _members(self, problem: Problem, mask: BandMask) -> Iterator[Member]:
        bounds, work = documents(mask)
        for ranks, own, of_group, tile in self._apart(problem, mask, bounds, work):
            strategy = next(each for each in self.inside.values() if each.unsupported(of_group, tile) is None)
            stretches = np.stack([bounds[own], np.diff(bounds)[own]], axis=1)
            yield Member(strategy.schedule(of_group, tile), ranks, stretches)

    def _chosen(self, groups: Sequence[int], work: Ints) -> Ints:
        """The sub-group of each document."""
        return _least_loaded(work, groups) if self.documents is None else np.array(self.documents)

    def _layout(self, groups: Sequence[int], bounds: Ints, work: Ints) -> Layout:
        dealt = self._dealt(groups, bounds, work)
        order = np.argsort(dealt[0].astype(np.min_scalar_type(sum(groups))), kind="stable")  # small numbers are sorted in one pass
        rank, start, size = (each[order] for each in dealt)
        return Layout.of_stretches(rank, start, size, sum(groups))

    def _dealt(self, groups: Sequence[int], bounds: Ints, work: Ints) -> tuple[Ints, Ints, Ints]:
        """(rank, start, size) of every stretch of tokens, of each rank in the order of its tokens."""
        chosen = self._chosen(groups, work)
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
