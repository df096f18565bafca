"""Hydraulis (Li et al., arXiv 2412.07894): replicas of different degrees, each with documents and micro-batches of its own."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Infeasible, Planner, Say
from lcbench.planners.flexsp import bucketed
from lcbench.planners.moves import Moves, Piece
from lcbench.planners.packing import best_fit_decreasing, descending, in_order, level
from lcbench.planners.placing import side_by_side
from lcbench.planners.programs import Sharing, alike
from lcbench.planners.table import Table
from lcbench.problem import check_whole

BUCKETS, GAP, NODES = 16, 0.01, 200  # of the program that proposes replicas
SPREAD = 0.3  # of a trial: standard deviation of the logarithm of what documents are sorted by
SEED = 0


@dataclass(frozen=True, eq=False)
class _Dealt:
    """Documents dealt to replicas.

    Attributes:
        score: when the last replica is done, and the sum over ranks of the squares of when each is.
        degrees: of the replicas, descending; they add up to the ranks, or so nearly that no other replica fits.
        own: numbers of documents of each replica.
    """

    score: tuple[float, float]
    degrees: tuple[int, ...]
    own: list[list[int]]


@dataclass(frozen=True)
class Hydraulis(Planner):
    """Stage 1 chooses replicas, whose degrees add up to the ranks, and deals documents to them so that the largest sum of what a
    replica's documents cost is as small as can be: the longest documents first, each where it is done first, in several trials, of
    which each but the first sorts by lengths that are off by chance; then documents move and change places. Stage 2 packs those of
    a replica into as few micro-batches as hold them, level by tokens.

    Which replicas: those of one degree, those that a program over buckets proposes (``programs.alike``), and what is one step away
    from the best: a replica is cut in two, two become one, or ranks move from one to another. The paper's term for pipeline stages,
    ``(pp - 1) max cost``, is 0: a batch has no stages here.

    In the paper replicas change between batches only. So where one document needs many ranks, these share all that they have, and
    the batch may take much longer than the best plan. Unless ``stay``, the longest documents may have replicas of their own first,
    and small changes at the end (``Moves.best``) let ranks come together in other groups between micro-batches. Both are ours.

    Attributes:
        stay: ranks of a replica stay the same in all micro-batches, as in the paper.
        trials: of dealing documents to the replicas in the end.
        effort: documents dealt to find replicas, moves of documents that are looked at, and those of the end: each at most so many.
    """

    stay: bool = False
    trials: int = 10
    effort: int = 50_000

    def __post_init__(self) -> None:
        if not isinstance(self.stay, bool):
            raise ValueError(f"planner.stay={self.stay} is neither true nor false")
        for name in ("trials", "effort"):
            check_whole(f"planner.{name}", getattr(self, name), 1)

    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        if not len(documents):
            return Assignment(())
        table = Table.of(documents, fleet, cost)
        order = descending(documents.pairs)
        found = self._replicas(table, order, self.effort)
        say(f"hydraulis: {len(found.degrees)} replicas, {found.score[0]:.4g} s")
        random = np.random.default_rng(SEED)
        for number in range(1, self.trials):
            noise = np.exp(random.normal(0.0, SPREAD, len(documents)))
            dealt = _dealt(table, found.degrees, descending(documents.pairs * noise))
            if dealt is not None and dealt.score < found.score:
                found = dealt
                say(f"hydraulis: trial {number + 1} of {self.trials}: {found.score[0]:.4g} s")
        found = self._leveled(found, table)
        stayed = in_order(
            table.known.made(ranks, batch, fleet)
            for ranks, degree, numbers in zip(side_by_side(found.degrees, fleet), found.degrees, found.own, strict=True)
            for batch in _packed(table, degree, numbers)
        )
        if self.stay:
            return stayed
        moves = Moves(table.known, fleet, table.degrees)
        starts = [_pieces(table, [found])]
        firsts = [1 << power for power in range(min(len(order) - 1, fleet.ranks).bit_length())]
        for first in firsts:
            effort = self.effort // len(firsts)
            both = [self._replicas(table, numbers, effort) for numbers in (order[:first], order[first:])]
            starts.append(_pieces(table, both))
        say(f"hydraulis: replicas that change once, after the longest {', '.join(map(str, firsts))}")
        changed = moves.best(map(moves.ordered, starts), self.effort)
        return min(changed, stayed, key=lambda plan: plan.makespan_s(documents, cost, fleet.ranks))

    def _replicas(self, table: Table, order: list[int], effort: int) -> _Dealt:
        """The best replicas that are found for some documents, which are dealt to them once.

        Args:
            effort: documents that are dealt, at most, beside those of the replicas that it starts from.
        """
        ranks = table.fleet.ranks
        starts = [_filled([degree] * (ranks // degree), table) for degree in table.degrees]
        starts += [_filled(proposed, table) for proposed in self._proposed(table, order)]
        seen = set(starts)
        dealt = [one for one in (_dealt(table, degrees, order) for degrees in dict.fromkeys(starts)) if one is not None]
        if not dealt:
            known = ", ".join(map(str, table.degrees))
            raise Infeasible(f"no replicas of {known} ranks side by side on {ranks} ranks take every document")
        best = min(dealt, key=lambda one: one.score)
        left = effort
        found = True
        while found:
            found = False
            for degrees in _steps(best.degrees, table.degrees):
                if left < 0:
                    break
                if degrees in seen:
                    continue
                seen.add(degrees)
                left -= len(order)
                other = _dealt(table, degrees, order)
                if other is not None and other.score < best.score:
                    best, found = other, True
                    break
        return best

    def _proposed(self, table: Table, numbers: list[int]) -> Iterator[list[int]]:
        """Degrees of replicas by the program, which sees no micro-batches: what they cost is in what documents cost."""
        documents, room = table.documents, np.array(table.degrees) * table.fleet.capacity
        longest = np.array(numbers)[np.argsort(-documents.tokens[numbers], kind="stable")]
        buckets = np.split(longest, bucketed(documents.tokens[longest], BUCKETS)[:-1])
        overhead = np.array([table.overhead_s[degree] for degree in table.degrees])
        tokens = np.array([int(documents.tokens[own].mean()) for own in buckets])
        seconds = np.array([[table.each_s[degree][own].mean() for degree in table.degrees] for own in buckets])
        sharing = Sharing(
            counts=np.array([len(own) for own in buckets]),
            tokens=tokens,
            degrees=np.array(table.degrees),
            seconds=seconds + tokens[:, None] / room * overhead,
            overhead_s=0.0 * overhead,
            ranks=table.fleet.ranks,
            capacity=None,
        )
        if (many := alike(sharing, GAP, NODES)) is not None:
            yield np.repeat(table.degrees, many[0]).tolist()

    def _leveled(self, dealt: _Dealt, table: Table) -> _Dealt:
        """After moves of documents from the replica that is done last, alone or for another, as long as it is done sooner so."""
        own = [list(one) for one in dealt.own]
        spent = [_takes(table, degree, one) for degree, one in zip(dealt.degrees, own, strict=True)]
        left = self.effort

        def moved() -> bool:
            nonlocal left
            last = int(np.argmax(spent))
            here = table.each_s[dealt.degrees[last]]
            for other in np.argsort(spent, kind="stable").tolist():
                there = table.each_s[dealt.degrees[other]]
                for document in own[last] if other != last else ():
                    if not np.isfinite(there[document]):
                        continue
                    for back in [None, *own[other]]:
                        left -= 1
                        if left < 0:
                            return False
                        given = [one for one in own[other] if one != back] + [document]
                        kept = [one for one in own[last] if one != document] + ([] if back is None else [back])
                        # What documents cost first, since packing takes longer to try.
                        if there[given].sum() >= spent[last] or (back is not None and not np.isfinite(here[back])):
                            continue
                        after = _takes(table, dealt.degrees[last], kept), _takes(table, dealt.degrees[other], given)
                        if max(after) < spent[last] * (1 - 1e-9):
                            own[last], own[other] = kept, given
                            spent[last], spent[other] = after
                            return True
            return False

        while moved():
            pass
        return _Dealt(_scored(spent, dealt.degrees), dealt.degrees, own)


def _scored(spent: Sequence[float], degrees: Sequence[int]) -> tuple[float, float]:
    seconds = np.array(spent)
    return float(seconds.max()), float(seconds**2 @ np.array(degrees))


def _filled(degrees: Sequence[int], table: Table) -> tuple[int, ...]:
    """Degrees, descending, with the largest that there are for ranks that are left; what is fewer than any stays idle."""
    own = list(degrees)
    while (left := table.fleet.ranks - sum(own)) >= table.degrees[0]:
        own.append(max(degree for degree in table.degrees if degree <= left))
    return tuple(sorted(own, reverse=True))


def _steps(degrees: tuple[int, ...], known: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """What becomes of replicas, descending, when two of them, or one and none, share their ranks in another way."""
    kinds = sorted(set(degrees), reverse=True)
    pairs = [(one, 0) for one in kinds]
    pairs += [(one, two) for one in kinds for two in kinds if one > two or (one == two and degrees.count(one) > 1)]
    for one, two in pairs:
        for first in known:
            second = one + two - first
            if 0 <= second <= first and (second in known or second == 0) and {first, second} != {one, two}:
                rest = list(degrees)
                rest.remove(one)
                if two:
                    rest.remove(two)
                yield tuple(sorted([*rest, first, *([second] if second else [])], reverse=True))


def _dealt(table: Table, degrees: tuple[int, ...], order: Sequence[int]) -> _Dealt | None:
    """Documents in this order, each to the replica that is done with it first; None where one fits no replica. While they are
    dealt, a micro-batch's overhead is spread over the tokens that it has room for."""
    heaps: dict[int, list[tuple[float, int]]] = {degree: [] for degree in degrees}
    for place, degree in enumerate(degrees):
        heaps[degree].append((table.overhead_s[degree], place))
    tokens = table.documents.tokens
    seconds = {
        degree: (table.each_s[degree] + tokens * table.overhead_s[degree] / (degree * table.fleet.capacity)).tolist()
        for degree in heaps
    }
    own: list[list[int]] = [[] for _ in degrees]
    for number in order:
        end, degree = min((heap[0][0] + seconds[degree][number], degree) for degree, heap in heaps.items())
        if end == np.inf:
            return None
        place = heaps[degree][0][1]
        own[place].append(number)
        heapq.heapreplace(heaps[degree], (end, place))
    return _Dealt(_scored([_takes(table, d, one) for d, one in zip(degrees, own, strict=True)], degrees), degrees, own)


def _takes(table: Table, degree: int, numbers: Sequence[int]) -> float:
    """Seconds of a replica with these documents, in as few micro-batches as packing needs."""
    if not len(numbers):
        return 0.0
    sizes = table.documents.tokens[list(numbers)]
    room = degree * table.fleet.capacity
    count = 1 if int(sizes.sum()) <= room else len(best_fit_decreasing(sizes, room))
    return float(table.each_s[degree][list(numbers)].sum()) + count * table.overhead_s[degree]


def _packed(table: Table, degree: int, numbers: Sequence[int]) -> list[list[int]]:
    """Micro-batches of a replica, the longest first."""
    sizes, room = table.documents.tokens[list(numbers)], degree * table.fleet.capacity
    tight = best_fit_decreasing(sizes, room)
    packed = [[numbers[place] for place in one] for one in level(sizes, len(tight), room) or tight if one]
    return sorted(packed, key=lambda one: (-table.each_s[degree][one].sum(), one))


def _pieces(table: Table, turns: Sequence[_Dealt]) -> list[Piece]:
    """All micro-batches of replicas."""
    return [
        Piece(tuple(batch), degree)
        for dealt in turns
        for degree, numbers in zip(dealt.degrees, dealt.own, strict=True)
        for batch in _packed(table, degree, numbers)
    ]
