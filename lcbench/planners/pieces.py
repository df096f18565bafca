"""Pieces: documents that so many ranks share in a micro-batch, before it is said which ranks; and when and where they lie."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest

import numpy as np

from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Floats, Infeasible
from lcbench.planners.packing import Seconds, in_order

Score = tuple[float, float]  # of a timeline; less is better
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
        """With all powers of two that the cost knows and, where those do not hold a document, the fewest ranks that do.

        Raises:
            Infeasible: a document that no degree holds.
        """
        known = Seconds(documents, cost)
        possible = [degree for degree in cost.degrees if degree <= fleet.ranks]

        def each(degree: int) -> Floats:
            held = documents.tokens <= degree * fleet.capacity
            return np.where(held, known.by_method(degree).min(axis=0), np.inf)

        table: dict[int, Floats] = {}
        homeless = np.ones(len(documents), dtype=np.bool_)
        powers = [degree for degree in possible if not degree & (degree - 1)]
        for degree in [*powers, *possible]:
            if degree in powers or homeless.any():
                seconds = each(degree)
                if np.isfinite(seconds[homeless]).any():
                    table[degree] = seconds
                    homeless &= ~np.isfinite(seconds)
                elif degree in powers and np.isfinite(seconds).any():
                    table[degree] = seconds
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

    def tried(self, degree: int, documents: Iterable[int]) -> Piece | None:
        """The same; None where so many ranks cannot share or hold them."""
        own = tuple(documents)
        if int(self.documents.tokens[list(own)].sum()) > degree * self.fleet.capacity:
            return None
        piece = self.piece(degree, own)
        return piece if np.isfinite(piece.seconds) else None


class Timeline:
    """Until when each rank is busy, node by node. It does what ``placing.earliest`` does, for many thousand groups."""

    def __init__(self, fleet: Fleet) -> None:
        self.per_node = fleet.per_node
        # Of each node its ranks as (busy until, number), those that are free first in front.
        self.rows = [
            [(0.0, rank) for rank in range(begin, begin + fleet.per_node)] for begin in range(0, fleet.ranks, fleet.per_node)
        ]

    def take(self, degree: int, seconds: float) -> tuple[int, ...]:
        """Keep those ranks busy that can begin first, on as few nodes as hold so many; returns them, ascending."""
        whole, rest = divmod(degree, self.per_node)
        if whole:
            nodes = nsmallest(whole + (rest > 0), self.rows, key=lambda row: row[-1][0])
        else:
            nodes = [min(self.rows, key=lambda row: row[rest - 1][0])]
        counts = [self.per_node] * whole + [rest] * (rest > 0)
        end = max(row[count - 1][0] for row, count in zip(nodes, counts, strict=True)) + seconds
        ranks = []
        for row, count in zip(nodes, counts, strict=True):
            taken = [rank for _, rank in row[:count]]
            del row[:count]
            for rank in taken:
                insort(row, (end, rank))
            ranks += taken
        return tuple(sorted(ranks))

    def score(self) -> Score:
        """When the last rank is done, and, of timelines that are as long, less where ranks are busy for less long."""
        ends = np.array([end for row in self.rows for end, _ in row])
        return float(ends.max()), float(ends @ ends)


def better(one: Score, other: Score) -> bool:
    """Whether a timeline is better than another by more than rounding."""
    if abs(one[0] - other[0]) > TIE * other[0]:
        return one[0] < other[0]
    return one[1] < other[1] * (1 - TIE)


def _laid(pieces: Sequence[Piece], fleet: Fleet) -> tuple[Score, list[Piece], list[tuple[int, ...]]]:
    """Pieces each on the ranks that can begin it first, those of many ranks first or those that take longest first, whichever is
    better: score, order, and the ranks of each."""

    def tried(order: list[Piece]) -> tuple[Score, list[Piece], list[tuple[int, ...]]]:
        timeline = Timeline(fleet)
        ranks = [timeline.take(piece.degree, piece.seconds) for piece in order]
        return timeline.score(), order, ranks

    return min(
        tried(sorted(pieces, key=lambda piece: (-piece.degree, -piece.seconds, piece.documents))),
        tried(sorted(pieces, key=lambda piece: (-piece.seconds, -piece.degree, piece.documents))),
        key=lambda one: one[0],
    )


def score(pieces: Sequence[Piece], table: Table) -> Score:
    """How good they are where they are laid as ``assigned`` does."""
    return _laid(pieces, table.fleet)[0]


def assigned(pieces: Sequence[Piece], table: Table) -> Assignment:
    """Pieces on ranks, one behind the other. A rank's first piece is in its first micro-batch; a piece is in the first micro-batch in
    which all of its ranks are without one."""
    _, order, ranks = _laid(pieces, table.fleet)
    return in_order(table.known.made(own, piece.documents, table.fleet) for own, piece in zip(ranks, order, strict=True))


def improved(pieces: Sequence[Piece], table: Table, effort: int) -> list[Piece]:
    """Pieces after small changes, as long as one makes the timeline better: another degree, a document into another piece or one of
    its own, two documents change places, two pieces become one.

    Args:
        effort: pieces that are laid, at most.
    """
    found, least, left = list(pieces), score(pieces, table), effort
    while True:
        for without, new in _changes(found, table):
            left -= len(found)
            if left < 0:
                return found
            changed = [piece for piece in found if piece not in without] + new
            if better(now := score(changed, table), least):
                found, least = changed, now
                break
        else:
            return found


def _changes(pieces: list[Piece], table: Table) -> Iterator[tuple[list[Piece], list[Piece]]]:
    """(pieces, those in their place) of whatever is one small change away, those of pieces that take longest first."""
    order = sorted(pieces, key=lambda piece: (-piece.seconds, piece.documents))
    for piece in order:
        for degree in table.degrees:
            if degree != piece.degree and (other := table.tried(degree, piece.documents)):
                yield [piece], [other]
        kept = {one: [other for other in piece.documents if other != one] for one in piece.documents}
        for document in piece.documents if len(piece.documents) > 1 else ():
            for degree in table.degrees:
                if own := table.tried(degree, [document]):
                    yield [piece], [table.piece(piece.degree, kept[document]), own]
        for other in reversed(order):
            if other is piece:
                continue
            for document in piece.documents:
                rest = [table.piece(piece.degree, kept[document])] if kept[document] else []
                if more := table.tried(other.degree, [*other.documents, document]):
                    yield [piece, other], [*rest, more]
                for back in other.documents:
                    given = table.tried(other.degree, [*(one for one in other.documents if one != back), document])
                    taken = table.tried(piece.degree, [*kept[document], back])
                    if given and taken:
                        yield [piece, other], [taken, given]
            for degree in table.degrees:
                if both := table.tried(degree, [*piece.documents, *other.documents]):
                    yield [piece, other], [both]
