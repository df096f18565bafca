"""Small changes that make an assignment better, which planners share that build one in some way of their own.

An assignment is a sequence of pieces: groups that are not placed yet. Each in turn is put on the ranks that can begin it first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np

from lcbench.planners.base import Assignment, Fleet, Infeasible
from lcbench.planners.fixed import Fixed, shorter_than_fixed
from lcbench.planners.packing import Seconds, in_order
from lcbench.planners.placing import Timetable

STARTS = 3  # the best of them, which are improved
REBUILT = 8  # documents that are taken out at most
VAIN = 20  # times that this may help nothing, one after the other
WORSE = 1.1  # times the best: from what is longer, the search does not go on
EQUAL = 1e-9  # of a makespan: what is gained less is nothing


class Piece(NamedTuple):
    """A group that is not placed yet."""

    documents: tuple[int, ...]
    degree: int


Pieces = tuple[Piece, ...]  # in the order in which they are placed


@dataclass
class _Effort:
    """How many pieces may yet be placed."""

    left: int

    def spend(self, pieces: int) -> bool:
        """Whether so many may be placed, which are then gone."""
        self.left -= pieces
        return self.left >= 0


@dataclass(frozen=True, eq=False)
class Moves:
    """Placing pieces of a batch, and improving them.

    Attributes:
        degrees: of groups that changes may make.
    """

    seconds: Seconds
    fleet: Fleet
    degrees: Sequence[int]
    _known: dict[Piece, float] = field(default_factory=dict, init=False)

    def best(self, starts: Iterable[Pieces], effort: int) -> Assignment:
        """The best that comes of some ways to cut a batch into pieces, and of what ``fixed`` gives, which is returned as it is
        where nothing better is found.

        Args:
            effort: pieces that are placed for it, at most.
        """
        known = list(starts)
        batch, cost = self.seconds.documents, self.seconds.cost
        with suppress(Infeasible):  # no one degree holds all
            known.append(
                tuple(Piece(group.documents, len(group.ranks)) for _, group in Fixed().plan(batch, self.fleet, cost).groups)
            )
        known = sorted(dict.fromkeys(known), key=lambda pieces: (*self.score(pieces), [(p.degree, p.documents) for p in pieces]))[
            :STARTS
        ]
        improved = min((self.improved(pieces, _Effort(effort // (2 * len(known)))) for pieces in known), key=self.score)
        placed = self.placed(self.rebuilt(improved, _Effort(effort // 2)))
        return shorter_than_fixed(placed, batch, self.fleet, cost)

    @cached_property
    def _tokens(self) -> list[int]:
        return self.seconds.documents.tokens.tolist()

    def ordered(self, pieces: Iterable[Piece]) -> Pieces:
        """The widest first, then the longest."""
        return tuple(sorted(pieces, key=lambda p: (-p.degree, -self.takes(p), p.documents)))

    def takes(self, piece: Piece) -> float:
        """Seconds of a piece by the method that is fastest for all of it."""
        if (known := self._known.get(piece)) is None:
            known = self._known[piece] = self.seconds.group(piece.documents, piece.degree)[0]
        return known

    def table(self, pieces: Iterable[Piece]) -> Timetable:
        """With these pieces on it."""
        table = Timetable(self.fleet)
        for piece in pieces:
            table.put(piece.degree, self.takes(piece))
        return table

    def score(self, pieces: Pieces, most: float = math.inf) -> tuple[float, float]:
        """(makespan, sum of squares of the times at which ranks are done): the smaller, the better. Infinite where a makespan is
        longer than ``most``: what comes after the piece that ends so late is not placed."""
        table = Timetable(self.fleet)
        for piece in pieces:
            if table.put(piece.degree, self.takes(piece))[0] > most:
                return math.inf, math.inf
        free = table.free()
        return float(free.max()), float(free @ free)

    def placed(self, pieces: Pieces) -> Assignment:
        """Pieces on their ranks."""
        table = Timetable(self.fleet)
        ranks = [table.put(piece.degree, self.takes(piece))[1] for piece in pieces]
        return in_order(self.seconds.made(r, p.documents, self.fleet) for r, p in zip(ranks, pieces, strict=True))

    def improved(self, pieces: Pieces, effort: _Effort) -> Pieces:
        """What moves make better, one after the other, until none does or the effort is spent."""
        best, moves = self.score(pieces), self._moves(pieces)
        while (moved := next(moves, None)) is not None and effort.spend(len(moved)):
            score = self.score(moved, best[0])
            if self._is_better(score, best):
                pieces, best, moves = moved, score, self._moves(moved)
        return pieces

    def _is_better(self, score: tuple[float, float], than: tuple[float, float]) -> bool:
        shorter = score[0] < than[0] * (1 - EQUAL)
        return shorter or (score[0] <= than[0] and score[1] < than[1] * (1 - EQUAL))

    def rebuilt(self, pieces: Pieces, effort: _Effort) -> Pieces:
        """The best that comes of taking pieces apart, putting them together again and improving them, from the last that was not
        much worse than the best (record-to-record travel, Dueck, J. Comput. Phys. 104, 1993), as long as that helps at times."""
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
        left = (Piece(tuple(n for n in piece.documents if n not in out), piece.degree) for piece in pieces)
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
            more = Piece(tuple(sorted((*piece.documents, number))), piece.degree)
            if self._fits(more):
                yield self._with(pieces, {place: [more]})
        yield from (self.ordered([*pieces, one]) for one in self._degrees(Piece((number,), 0)))

    def _moves(self, pieces: Pieces) -> Iterator[Pieces]:
        """Assignments that are one move away: of the piece that ends last first, and to those that end first."""
        table = Timetable(self.fleet)
        put = [table.put(piece.degree, self.takes(piece)) for piece in pieces]
        ends, ranks = [end for end, _ in put], [{*own} for _, own in put]
        late = sorted(range(len(pieces)), key=lambda place: -ends[place])
        for here in late:
            for one in self._degrees(pieces[here]):
                yield self._with(pieces, {here: [one]})
            for there in reversed(late):
                if there != here:
                    yield from (self._with(pieces, {here: a, there: b}) for a, b in self._between(pieces[here], pieces[there]))
            for number in pieces[here].documents if len(pieces[here].documents) > 1 else ():
                rest = Piece(tuple(n for n in pieces[here].documents if n != number), pieces[here].degree)
                for one in self._degrees(Piece((number,), 0)):
                    beside = Piece(rest.documents, rest.degree - one.degree)  # on the ranks that these leave of what there was
                    for other in (rest, beside) if beside.degree in self.degrees and self._fits(beside) else (rest,):
                        yield self._with(pieces, {here: [other, one]})
            inside = {place for place in late if ranks[place] <= ranks[here]}
            joined = Piece(tuple(sorted(n for place in inside for n in pieces[place].documents)), 0)
            gone: dict[int, list[Piece]] = {place: [] for place in inside}
            yield from (self._with(pieces, {**gone, here: [one]}) for one in self._degrees(joined) if len(inside) > 1)
            others = [*pieces[:here], *pieces[here + 1 :]]
            yield from ((*others[:place], pieces[here], *others[place:]) for place in range(len(pieces)) if place != here)

    def _degrees(self, piece: Piece) -> Iterator[Piece]:
        """The piece at every other degree that it fits."""
        return (one for d in self.degrees if d != piece.degree and self._fits(one := Piece(piece.documents, d)))

    def _between(self, here: Piece, there: Piece) -> Iterator[tuple[list[Piece], list[Piece]]]:
        """What two pieces may become: two of which one document moved, two that exchanged one for a shorter one, or one."""
        tokens = self._tokens

        def made(*ways: tuple[Piece, set[int], set[int]]) -> list[list[Piece]] | None:
            """Pieces without some documents and with others; None where one does not fit."""
            new = [Piece(tuple(sorted({*piece.documents} - out | into)), piece.degree) for piece, out, into in ways]
            return [[piece] if piece.documents else [] for piece in new] if all(map(self._fits, new)) else None

        for number in here.documents:
            if ways := made((here, {number}, set()), (there, set(), {number})):
                yield ways[0], ways[1]
            for other in there.documents:
                if tokens[other] < tokens[number] and (ways := made((here, {number}, {other}), (there, {other}, {number}))):
                    yield ways[0], ways[1]
        joined = Piece(tuple(sorted((*here.documents, *there.documents))), 0)
        yield from (([], [one]) for one in self._degrees(joined))

    def _fits(self, piece: Piece) -> bool:
        """Whether its ranks hold it and a method can run it; a piece of no documents is none, and fits."""
        tokens = sum(self._tokens[number] for number in piece.documents)
        return tokens <= piece.degree * self.fleet.capacity and math.isfinite(self.takes(piece))

    def _with(self, pieces: Pieces, changed: dict[int, list[Piece]]) -> Pieces:
        """Pieces of which some became others, in their places."""
        return tuple(chain.from_iterable(changed.get(place, [piece]) for place, piece in enumerate(pieces)))
