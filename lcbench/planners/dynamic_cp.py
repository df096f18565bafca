"""Any degree for each document, chosen by cost: the general form of what power-of-two planners approximate.

Assignments are built for several times within which every document is to be done: each document gets the degree that takes fewest
rank-seconds of those that keep the time, documents of one degree share groups, and those of one rank fill up what is left, the
longest first (two-phase scheduling of malleable tasks, Turek, Wolf and Yu, SPAA 1992). The best are improved by moves: another
degree, documents to other groups or groups of their own, documents exchanged, groups joined, another order. Where no move helps,
some groups are taken apart and their documents put back one by one where they cost least (ruin and recreate, Schrimpf et al., J.
Comput. Phys. 159, 2000). What ``fixed`` gives is one of the starts, and is returned where nothing better is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lcbench.masks.band import Ints
from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Floats, Planner, Say
from lcbench.planners.moves import Moves, Piece, Pieces
from lcbench.planners.packing import Seconds, best_fit_decreasing, check_longest, level, longest_first
from lcbench.problem import check_whole

EVERY = 32  # degrees up to it are all tried; above, multiples of a node
TIMES = 16  # within which assignments are built


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
        check_whole("planner.effort", self.effort, 0)

    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        degrees = [d for d in cost.degrees if d <= min(EVERY, fleet.ranks) or (d <= fleet.ranks and d % fleet.per_node == 0)]
        check_longest(documents, degrees, fleet)
        if not len(documents):
            return Assignment(())
        moves = Moves(Seconds(documents, cost), fleet, degrees)
        built = _Built(moves)
        starts = {built.within(time) for time in built.times()}
        shortest = min(map(moves.score, starts))[0]
        say(f"{len(starts)} assignments of {len(documents)} documents are built, the best takes {shortest:.4g} s")
        return moves.best(starts, self.effort)


@dataclass(frozen=True, eq=False)
class _Built:
    """Building pieces of a batch."""

    moves: Moves

    @cached_property
    def _fastest(self) -> tuple[Floats, Floats]:
        """(degrees, documents): seconds of each alone in a group, infinite where it does not fit; and times ranks."""
        tokens = self.moves.seconds.documents.tokens
        alone = np.stack(
            [np.where(tokens <= d * self.moves.fleet.capacity, self.moves.seconds.alone(d), np.inf) for d in self.moves.degrees]
        )
        return alone, alone * np.array(self.moves.degrees)[:, None]

    def times(self) -> list[float]:
        """Times within which documents are to be done: from what no assignment can beat, to that of one group after another."""
        alone, areas = self._fastest
        longest = float(alone.min(axis=0).max())
        low = max(longest, float(areas.min(axis=0).sum()) / self.moves.fleet.ranks)
        high = max(float(alone.max(axis=0, where=np.isfinite(alone), initial=0.0).max()), low)
        return np.unique(np.append(np.geomspace(longest, max(2 * low, high), TIMES), low)).tolist()

    def within(self, time: float) -> Pieces:
        """Pieces of documents by the degree that takes fewest rank-seconds within a time, or is fastest where none keeps it."""
        alone, areas = self._fastest
        kept = np.where(alone <= time, areas, np.inf)
        chosen = np.where(np.isfinite(kept).any(axis=0), kept.argmin(axis=0), alone.argmin(axis=0))
        pieces: list[Piece] = []
        for place in sorted(set(chosen.tolist()), reverse=True):
            own = np.nonzero(chosen == place)[0]
            pieces += (
                self._narrow(own, pieces) if self.moves.degrees[place] == 1 else self._wide(own, self.moves.degrees[place], time)
            )
        return self.moves.ordered(pieces)

    def _wide(self, own: Ints, degree: int, time: float) -> list[Piece]:
        """Documents of a degree in as few groups as hold their tokens, and of which each can be done within a time."""
        tokens, room = self.moves.seconds.documents.tokens[own], degree * self.moves.fleet.capacity
        took = float(self.moves.seconds.by_method(degree)[:, own].sum(axis=1).min())
        fewest = -(-int(tokens.sum()) // room)
        parts = max(
            fewest, min(len(own), int(np.ceil(took / max(time - self.moves.seconds.cost.overhead_s(degree), took / len(own)))))
        )
        bins = level(tokens, parts, room) or best_fit_decreasing(tokens, room)
        return [Piece(tuple(own[held].tolist()), degree) for held in bins if held]

    def _narrow(self, own: Ints, wider: list[Piece]) -> list[Piece]:
        """Documents of one rank, to the ranks that are free first beside wider groups, in as few micro-batches as hold them."""
        table = self.moves.table(self.moves.ordered(wider))
        took, pieces = self.moves.seconds.by_method(1)[:, own].min(axis=0), list[Piece]()
        for bin_ in longest_first(took, table.free()):
            tokens = self.moves.seconds.documents.tokens[own[bin_]]
            pieces += [Piece(tuple(own[bin_][b].tolist()), 1) for b in best_fit_decreasing(tokens, self.moves.fleet.capacity)]
        return pieces
