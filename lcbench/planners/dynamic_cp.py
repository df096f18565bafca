"""Any degree for each document, chosen by cost: the general form of what power-of-two planners approximate.

Assignments are built for several times within which every document is to be done: each document gets the degree that takes fewest
rank-seconds of those that keep the time, documents of one degree share groups, and those of one rank fill up what is left, the
longest first (two-phase scheduling of malleable tasks, Turek, Wolf and Yu, SPAA 1992). The best are improved by moves: another
degree, documents to other groups or groups of their own, documents exchanged, groups joined, another order. Where no move helps,
some groups are taken apart and their documents put back one by one where they cost least (ruin and recreate, Schrimpf et al., J.
Comput. Phys. 159, 2000). What ``fixed`` gives is one of the starts, and is returned where nothing better is found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np

from lcbench.masks.band import Ints
from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Floats, Infeasible, Planner, Say
from lcbench.planners.fixed import Fixed, shorter_than_fixed
from lcbench.planners.packing import Seconds, best_fit_decreasing, check_longest, in_order, level, longest_first
from lcbench.planners.placing import Timetable

EVERY = 32  # degrees up to it are all tried; above, multiples of a node
TIMES = 16  # within which assignments are built
STARTS = 3  # the best of them, which are improved
REBUILT = 8  # documents that are taken out at most
VAIN = 20  # times that this may help nothing, one after the other
WORSE = 1.1  # times the best: from what is longer, the search does not go on
EQUAL = 1e-9  # of a makespan: what is gained less is nothing


@dataclass(frozen=True)
class _Piece:
    """A group that is not placed yet."""

    documents: tuple[int, ...]
    degree: int


Pieces = tuple[_Piece, ...]  # in the order in which they are placed


@dataclass
class _Effort:
    """How many pieces may yet be placed."""

    left: int

    def spend(self, pieces: int) -> bool:
        """Whether so many may be placed, which are then gone."""
        self.left -= pieces
        return self.left >= 0


@dataclass(frozen=True)
class DynamicCp(Planner):
    """No worse than ``fixed`` by the cost.

    Attributes:
        effort: groups that are placed, at most, summed over all assignments that moves make: what planning may take.

    Raises:
        ValueError: an effort below 0.
    """

    effort: int = 60_000

    def __post_init__(self) -> None:
        if isinstance(self.effort, bool) or not isinstance(self.effort, int) or self.effort < 0:
            raise ValueError(f"planner.effort={self.effort} is no whole number of at least 0")

    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        degrees = [d for d in cost.degrees if d <= min(EVERY, fleet.ranks) or (d <= fleet.ranks and d % fleet.per_node == 0)]
        check_longest(documents, degrees, fleet)
        if not len(documents):
            return Assignment(())
        work = _Work(Seconds(documents, cost), fleet, degrees)
        starts = {work.built(time) for time in work.times()}
        with suppress(Infeasible):  # no one degree holds all
            starts.add(tuple(_Piece(g.documents, len(g.ranks)) for _, g in Fixed().plan(documents, fleet, cost).groups))
        ranked = sorted(starts, key=lambda pieces: (*work.score(pieces), [(p.degree, p.documents) for p in pieces]))[:STARTS]
        say(f"{len(starts)} assignments of {len(documents)} documents are built, the best takes {work.score(ranked[0])[0]:.4g} s")
        best = min((work.improved(pieces, _Effort(self.effort // (2 * len(ranked)))) for pieces in ranked), key=work.score)
        return shorter_than_fixed(work.placed(work.rebuilt(best, _Effort(self.effort // 2))), documents, fleet, cost)


@dataclass(frozen=True, eq=False)
class _Work:
    """Building and improving assignments of a batch."""

    seconds: Seconds
    fleet: Fleet
    degrees: list[int]
    _known: dict[_Piece, float] = field(default_factory=dict, init=False)

    @cached_property
    def _fastest(self) -> tuple[Floats, Floats]:
        """(degrees, documents): seconds of each alone in a group, infinite where it does not fit; and times ranks."""
        tokens = self.seconds.documents.tokens
        alone = np.stack([np.where(tokens <= d * self.fleet.capacity, self.seconds.alone(d), np.inf) for d in self.degrees])
        return alone, alone * np.array(self.degrees)[:, None]

    def times(self) -> list[float]:
        """Times within which documents are to be done: from what no assignment can beat, to that of one group after another."""
        alone, areas = self._fastest
        longest = float(alone.min(axis=0).max())
        low = max(longest, float(areas.min(axis=0).sum()) / self.fleet.ranks)
        high = max(float(alone.max(axis=0, where=np.isfinite(alone), initial=0.0).max()), low)
        return np.unique(np.append(np.geomspace(longest, max(2 * low, high), TIMES), low)).tolist()

    def built(self, time: float) -> Pieces:
        """Pieces of documents by the degree that takes fewest rank-seconds within a time, or is fastest where none keeps it."""
        alone, areas = self._fastest
        kept = np.where(alone <= time, areas, np.inf)
        chosen = np.where(np.isfinite(kept).any(axis=0), kept.argmin(axis=0), alone.argmin(axis=0))
        pieces: list[_Piece] = []
        for place in sorted(set(chosen.tolist()), reverse=True):
            own = np.nonzero(chosen == place)[0]
            pieces += self._narrow(own, pieces) if self.degrees[place] == 1 else self._wide(own, self.degrees[place], time)
        return self._sorted(pieces)

    def _sorted(self, pieces: list[_Piece]) -> Pieces:
        """The widest first, then the longest."""
        return tuple(sorted(pieces, key=lambda p: (-p.degree, -self._takes(p))))

    def _takes(self, piece: _Piece) -> float:
        if piece not in self._known:
            self._known[piece] = self.seconds.group(piece.documents, piece.degree)[0]
        return self._known[piece]

    def _wide(self, own: Ints, degree: int, time: float) -> list[_Piece]:
        """Documents of a degree in as few groups as hold their tokens, and of which each can be done within a time."""
        tokens, room = self.seconds.documents.tokens[own], degree * self.fleet.capacity
        took = float(self.seconds.by_method(degree)[:, own].sum(axis=1).min())
        fewest = -(-int(tokens.sum()) // room)
        parts = max(fewest, min(len(own), int(np.ceil(took / max(time - self.seconds.cost.overhead_s(degree), took / len(own))))))
        bins = level(tokens, parts, room) or best_fit_decreasing(tokens, room)
        return [_Piece(tuple(own[held].tolist()), degree) for held in bins if held]

    def _narrow(self, own: Ints, wider: list[_Piece]) -> list[_Piece]:
        """Documents of one rank, to the ranks that are free first beside wider groups, in as few micro-batches as hold them."""
        table = self._table(self._sorted(wider))
        took, pieces = self.seconds.by_method(1)[:, own].min(axis=0), list[_Piece]()
        for bin_ in longest_first(took, table.free()):
            tokens = self.seconds.documents.tokens[own[bin_]]
            pieces += [_Piece(tuple(own[bin_][b].tolist()), 1) for b in best_fit_decreasing(tokens, self.fleet.capacity)]
        return pieces

    def _table(self, pieces: Pieces) -> Timetable:
        table = Timetable(self.fleet)
        for piece in pieces:
            table.put(piece.degree, self._takes(piece))
        return table

    def score(self, pieces: Pieces) -> tuple[float, float]:
        """(makespan, sum of squares of the times at which ranks are done): the smaller, the better."""
        free = self._table(pieces).free()
        return float(free.max()), float(free @ free)

    def placed(self, pieces: Pieces) -> Assignment:
        """Pieces on their ranks."""
        table = Timetable(self.fleet)
        ranks = [table.put(piece.degree, self._takes(piece))[1] for piece in pieces]
        return in_order(self.seconds.made(r, p.documents, self.fleet) for r, p in zip(ranks, pieces, strict=True))

    def improved(self, pieces: Pieces, effort: _Effort) -> Pieces:
        """What moves make better, one after the other, until none does or the effort is spent."""
        best, moves = self.score(pieces), self._moves(pieces)
        while (moved := next(moves, None)) is not None and effort.spend(len(moved)):
            score = self.score(moved)
            if self._is_better(score, best):
                pieces, best, moves = moved, score, self._moves(moved)
        return pieces

    def _is_better(self, score: tuple[float, float], than: tuple[float, float]) -> bool:
        shorter = score[0] < than[0] * (1 - EQUAL)
        return shorter or (score[0] <= than[0] and score[1] < than[1] * (1 - EQUAL))

    def rebuilt(self, pieces: Pieces, effort: _Effort) -> Pieces:
        """The best that comes of taking pieces apart, putting them together again and improving them, from the last that was
        not much worse than the best (record-to-record travel, Dueck, J. Comput. Phys. 104, 1993), as long as it helps."""
        random, vain, now = np.random.default_rng(0), 0, pieces
        while vain < VAIN and effort.left > 0:
            other = self.improved(self._recreated(now, random, effort), effort)
            vain += 1
            if self._is_better(self.score(other), self.score(pieces)):
                pieces, vain = other, 0
            now = other if self.score(other)[0] <= WORSE * self.score(pieces)[0] else pieces
        return pieces

    def _recreated(self, pieces: Pieces, random: np.random.Generator, effort: _Effort) -> Pieces:
        """Pieces of which some lost documents, which were put back one by one where they cost least."""
        chosen = random.permutation(len(pieces))[: random.integers(1, REBUILT)]
        out = random.permutation([n for place in chosen for n in pieces[place].documents])[:REBUILT].tolist()
        left = (_Piece(tuple(n for n in piece.documents if n not in out), piece.degree) for piece in pieces)
        now: Pieces = tuple(piece for piece in left if piece.documents)
        for number in out:
            ways = []
            for way in self._ways(now, number):
                if not effort.spend(len(way)):
                    return pieces
                ways.append(way)
            now = min(ways, key=self.score)
        return now

    def _ways(self, pieces: Pieces, number: int) -> Iterator[Pieces]:
        """All ways to add a document to pieces: to one of them, or as a piece of its own."""
        for place, piece in enumerate(pieces):
            more = _Piece(tuple(sorted((*piece.documents, number))), piece.degree)
            if self._fits(more):
                yield self._with(pieces, {place: [more]})
        yield from (self._sorted([*pieces, one]) for one in self._degrees(_Piece((number,), 0)))

    def _moves(self, pieces: Pieces) -> Iterator[Pieces]:
        """Assignments that are one move away: of the piece that ends last first, and to those that end first."""
        table = Timetable(self.fleet)
        put = [table.put(piece.degree, self._takes(piece)) for piece in pieces]
        ends, ranks = [end for end, _ in put], [{*own} for _, own in put]
        late = sorted(range(len(pieces)), key=lambda place: -ends[place])
        for here in late:
            for one in self._degrees(pieces[here]):
                yield self._with(pieces, {here: [one]})
            for there in reversed(late):
                if there != here:
                    yield from (self._with(pieces, {here: a, there: b}) for a, b in self._between(pieces[here], pieces[there]))
            for number in pieces[here].documents if len(pieces[here].documents) > 1 else ():
                rest = _Piece(tuple(n for n in pieces[here].documents if n != number), pieces[here].degree)
                yield from (self._with(pieces, {here: [rest, one]}) for one in self._degrees(_Piece((number,), 0)))
            inside = {place for place in late if ranks[place] <= ranks[here]}
            joined = _Piece(tuple(sorted(n for place in inside for n in pieces[place].documents)), 0)
            gone: dict[int, list[_Piece]] = {place: [] for place in inside}
            yield from (self._with(pieces, {**gone, here: [one]}) for one in self._degrees(joined) if len(inside) > 1)
            others = [*pieces[:here], *pieces[here + 1 :]]
            yield from ((*others[:place], pieces[here], *others[place:]) for place in range(len(pieces)) if place != here)

    def _degrees(self, piece: _Piece) -> Iterator[_Piece]:
        """The piece at every other degree that it fits."""
        return (one for d in self.degrees if d != piece.degree and self._fits(one := _Piece(piece.documents, d)))

    def _between(self, here: _Piece, there: _Piece) -> Iterator[tuple[list[_Piece], list[_Piece]]]:
        """What two pieces may become: two of which one document moved, two that exchanged one for a shorter one, or one."""
        tokens = self.seconds.documents.tokens

        def made(*ways: tuple[_Piece, set[int], set[int]]) -> list[list[_Piece]] | None:
            """Pieces without some documents and with others; None where one does not fit."""
            new = [_Piece(tuple(sorted({*piece.documents} - out | into)), piece.degree) for piece, out, into in ways]
            return [[piece] if piece.documents else [] for piece in new] if all(map(self._fits, new)) else None

        for number in here.documents:
            if ways := made((here, {number}, set()), (there, set(), {number})):
                yield ways[0], ways[1]
            for other in there.documents:
                if tokens[other] < tokens[number] and (ways := made((here, {number}, {other}), (there, {other}, {number}))):
                    yield ways[0], ways[1]
        joined = _Piece(tuple(sorted((*here.documents, *there.documents))), 0)
        yield from (([], [one]) for one in self._degrees(joined))

    def _fits(self, piece: _Piece) -> bool:
        """Whether its ranks hold it and a method can run it; a piece of no documents is none, and fits."""
        tokens = int(self.seconds.documents.tokens[list(piece.documents)].sum())
        return tokens <= piece.degree * self.fleet.capacity and math.isfinite(self._takes(piece))

    def _with(self, pieces: Pieces, changed: dict[int, list[_Piece]]) -> Pieces:
        """Pieces of which some became others, in their places."""
        return tuple(chain.from_iterable(changed.get(place, [piece]) for place, piece in enumerate(pieces)))
