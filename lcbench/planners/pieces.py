"""Pieces: documents that so many ranks share in a micro-batch, before it is said which ranks; and when and where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Floats, Infeasible
from lcbench.planners.fixed import Fixed
from lcbench.planners.packing import Seconds, in_order
from lcbench.planners.placing import Timetable

Score = tuple[float, float]  # when the last rank is done, and the sum of squares of when all are; less is better
FEW = 8  # degrees, of which all are looked at
TIE = 1e-9  # relative difference of two times that are the same


@dataclass(frozen=True)
class Piece:
    """``documents`` that ``degree`` ranks share in a micro-batch, in so many seconds by the method that is fastest for all."""

    degree: int
    documents: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, eq=False)
class Table:
    """What documents take at each degree that a planner looks at.

    Attributes:
        degrees: ascending.
        each_s: of each degree, (n,), by the method that is fastest for each document; infinite where so many ranks cannot share or
            hold it.
        overhead_s: of a group of each degree.
    """

    fleet: Fleet
    known: Seconds
    degrees: tuple[int, ...]
    each_s: dict[int, Floats] = field(repr=False)
    overhead_s: dict[int, float]

    @classmethod
    def of(cls, documents: Documents, fleet: Fleet, cost: Cost) -> Table:
        """With all degrees that the cost knows, or, where these are more than ``FEW``, with the powers of two and, where those do not hold
        a document, the fewest ranks that do.

        Raises:
            Infeasible: a document that no degree holds.
        """
        known = Seconds(documents, cost)
        possible = [degree for degree in cost.degrees if degree <= fleet.ranks]
        usual = possible if len(possible) <= FEW else [degree for degree in possible if not degree & (degree - 1)]
        table: dict[int, Floats] = {}
        homeless = np.ones(len(documents), dtype=np.bool_)
        for degree in [*usual, *(one for one in possible if one not in usual)]:
            if degree not in usual and not homeless.any():
                break
            held = documents.tokens <= degree * fleet.capacity
            seconds = np.where(held, known.by_method(degree).min(axis=0), np.inf)
            if np.isfinite(seconds[homeless] if degree not in usual else seconds).any():
                table[degree] = seconds
                homeless &= ~np.isfinite(seconds)
        if homeless.any():
            number = int(np.where(homeless, documents.tokens, -1).argmax())
            raise Infeasible(
                f"document {number} has {documents.tokens[number]} tokens: no method shares it among at most {fleet.ranks} ranks "
                f"that hold {fleet.capacity} each"
            )
        degrees = tuple(sorted(table))
        return cls(fleet, known, degrees, table, {degree: cost.overhead_s(degree) for degree in degrees})

    @property
    def documents(self) -> Documents:
        return self.known.documents

    def piece(self, degree: int, documents: Iterable[int]) -> Piece:
        """So many ranks with these documents."""
        own = tuple(documents)
        return Piece(degree, own, self.known.group(own, degree)[0])

    def of_fixed(self) -> list[Piece]:
        """Those of one degree for all documents, as ``fixed`` has it; none where there is no such degree."""
        try:
            same = Fixed().plan(self.documents, self.fleet, self.known.cost)
        except Infeasible:
            return []
        return [self.piece(len(group.ranks), group.documents) for _, group in same.groups]

    def tried(self, degree: int, documents: Iterable[int]) -> Piece | None:
        """The same; None where so many ranks cannot share or hold them."""
        own = tuple(documents)
        if int(self.documents.tokens[list(own)].sum()) > degree * self.fleet.capacity:
            return None
        piece = self.piece(degree, own)
        return piece if np.isfinite(piece.seconds) else None


def better(one: Score, other: Score) -> bool:
    """Whether a timeline is better than another by more than rounding."""
    if abs(one[0] - other[0]) > TIE * other[0]:
        return one[0] < other[0]
    return one[1] < other[1] * (1 - TIE)


@dataclass(frozen=True)
class Laid:
    """Pieces on ranks.

    Attributes:
        pieces: in the order in which they were laid.
        ranks: of each.
        ends: of each, seconds.
    """

    score: Score
    pieces: list[Piece]
    ranks: list[tuple[int, ...]]
    ends: list[float]

    @classmethod
    def of(cls, pieces: Sequence[Piece], fleet: Fleet) -> Laid:
        """Each on the ranks that can begin it first: those of many ranks first, or those that take longest first, whichever is
        better."""

        def tried(order: list[Piece]) -> Laid:
            timetable = Timetable(fleet)
            taken = [timetable.put(piece.degree, piece.seconds) for piece in order]
            free = timetable.free()
            return cls((timetable.end, float(free @ free)), order, [ranks for _, ranks in taken], [end for end, _ in taken])

        return min(
            tried(sorted(pieces, key=lambda piece: (-piece.degree, -piece.seconds, piece.documents))),
            tried(sorted(pieces, key=lambda piece: (-piece.seconds, -piece.degree, piece.documents))),
            key=lambda one: one.score,
        )

    def assigned(self, table: Table) -> Assignment:
        """A rank's first piece is in its first micro-batch; a piece is in the first one in which all of its ranks are without one."""
        return in_order(
            table.known.made(own, piece.documents, table.fleet) for own, piece in zip(self.ranks, self.pieces, strict=True)
        )


def improved(laid: Laid, table: Table, effort: int) -> Laid:
    """After small changes, as long as one makes it better: another degree, a document into another piece or one of its own, two
    documents change places, two pieces become one. What ends last is changed first.

    Args:
        effort: changes looked at and pieces laid, at most.
    """
    left = effort
    while True:
        for change in _changes(laid, table):
            left -= 1
            if change is not None:
                without, new = change
                left -= len(laid.pieces)
                changed = Laid.of([piece for piece in laid.pieces if piece not in without] + new, table.fleet)
                if better(changed.score, laid.score):
                    laid = changed
                    break
            if left < 0:
                return laid
        else:
            return laid


def _changes(laid: Laid, table: Table) -> Iterator[tuple[list[Piece], list[Piece]] | None]:
    """(pieces, those in their place) of whatever is one small change away; None of one that is not worth laying: where the ranks stayed
    the same, something of it would end no sooner than now."""
    order = sorted(zip(laid.ends, laid.pieces, strict=True), key=lambda one: (-one[0], -one[1].seconds, one[1].documents))

    def sooner(end: float, *changes: tuple[float, Piece, Piece]) -> bool:
        return all(was + new.seconds - old.seconds < end for was, old, new in changes)

    for end, piece in order:
        for degree in table.degrees:
            if degree != piece.degree and (other := table.tried(degree, piece.documents)):
                yield [piece], [other]
        kept = (
            {one: table.piece(piece.degree, [other for other in piece.documents if other != one]) for one in piece.documents}
            if len(piece.documents) > 1
            else {}
        )
        for document, rest in kept.items():
            for degree in table.degrees:
                if own := table.tried(degree, [document]):
                    yield [piece], [rest, own]
        for until, other in reversed(order):
            if other is piece:
                continue
            for degree in table.degrees:
                if both := table.tried(degree, [*piece.documents, *other.documents]):
                    yield [piece, other], [both]
            for document, rest in kept.items():
                more = table.tried(other.degree, [*other.documents, document])
                yield ([piece, other], [rest, more]) if more and sooner(end, (until, other, more)) else None
                for back in other.documents:
                    given = table.tried(other.degree, [*(one for one in other.documents if one != back), document])
                    taken = table.tried(piece.degree, [*rest.documents, back])
                    good = given and taken and sooner(end, (until, other, given), (end, piece, taken))
                    yield ([piece, other], [taken, given]) if given and taken and good else None
