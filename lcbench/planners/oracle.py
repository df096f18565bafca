"""The best assignment that there is under a cost, where that can be found: what other planners are held against.

Groups are begun one after the other in the order of their begins, each on the ranks that are free first: every assignment can be
brought into that form without ending later, since the ranks of a node are alike, and so are nodes. So a state is the set of
documents that are done and the times at which ranks become free; of two states of one set, one whose ranks all become free no
later makes the other needless. All sets are gone through in the order of their numbers, and with them every group, every degree,
every method and as many micro-batches as it takes. What cannot end before the best that is known is dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import Ints
from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Floats, Group, Infeasible, Planner, Say
from lcbench.planners.dynamic_cp import DynamicCp
from lcbench.planners.packing import Seconds, check_longest, in_order

EQUAL = 1e-12  # of a time: nearer ones are the same, but for the order in which they were summed up


@dataclass(frozen=True)
class Oracle(Planner):
    """Shortest by ``Assignment.makespan_s``, of the assignments whose groups lie on as few nodes as they can.

    Its time grows with 3^documents. Batches of more than ``documents`` or fleets of more than ``ranks`` are Infeasible.
    """

    documents: ClassVar[int] = 8
    ranks: ClassVar[int] = 4

    def unsupported(self, documents: Documents, fleet: Fleet) -> str | None:
        for count, most, what in ((len(documents), self.documents, "documents"), (fleet.ranks, self.ranks, "ranks")):
            if count > most:
                return f"a batch of {count} {what} is too large for planner=oracle, which takes at most {most}"
        return None

    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        if (reason := self.unsupported(documents, fleet)) is not None:
            raise Infeasible(reason)
        degrees = [degree for degree in cost.degrees if degree <= fleet.ranks]
        check_longest(documents, degrees, fleet)
        if not len(documents):
            return Assignment(())
        known = DynamicCp().plan(documents, fleet, cost).makespan_s(documents, cost, fleet.ranks) - cost.reduce_s
        search = _Search(Seconds(documents, cost), fleet, degrees, known * (1 + 1e3 * EQUAL))
        return in_order(search.best())


@dataclass(frozen=True)
class _Choice:
    """Where a group may lie: ``columns`` of a state that its ranks are, (ranks,)."""

    degree: int
    columns: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Search:
    """All states of all sets of documents. A set is a number whose bit i says whether document i is in it.

    Attributes:
        bound: seconds; what ends no earlier is dropped.
    """

    seconds: Seconds
    fleet: Fleet
    degrees: list[int]
    bound: float

    def best(self) -> list[Group]:
        """The groups of an assignment that ends first, in the order of their begins."""
        count, ranks = len(self.seconds.documents), self.fleet.ranks
        choices, sets = list(self._choices()), np.arange(2**count)
        members = (sets[:, None] >> np.arange(count)) & 1
        taken = {degree: self._of_sets(members, degree) for degree in self.degrees}
        # Ranks times seconds that documents take at least: each where it takes least, and one group's overhead.
        alone = {degree: seconds[1 << np.arange(count)] for degree, seconds in taken.items()}
        least = np.min([d * (alone[d] - self.seconds.cost.overhead_s(d)) for d in self.degrees], axis=0)
        overhead = min(d * self.seconds.cost.overhead_s(d) for d in self.degrees)
        work = (1 - members) @ least + overhead * (sets < sets[-1])
        free: dict[int, Floats] = {}
        parents: dict[int, Ints] = {}
        found: defaultdict[int, list[tuple[Floats, Ints]]] = defaultdict(list)
        found[0].append((np.zeros((1, ranks)), np.zeros((1, 3), dtype=np.int64)))
        for done in sets.tolist():
            if done not in found:
                continue
            every, origins = (np.concatenate(parts) for parts in zip(*found.pop(done), strict=True))
            hopeful = self._ends(every, alone, members[done] == 0) < self.bound
            every, origins = every[hopeful], origins[hopeful]
            every = np.take_along_axis(every, self._order(every), axis=1)
            kept = self._needed(every)
            free[done], parents[done] = every[kept], origins[kept]
            self._go_on(done, free[done], choices, taken, work, found)
        return self._told(choices, taken, free, parents, int(sets[-1]))

    def _choices(self) -> Iterator[_Choice]:
        """All ways to take ranks of as few nodes as can be: of each node, those that become free first."""
        per_node = self.fleet.per_node
        for degree in self.degrees:
            for counts in product(range(per_node + 1), repeat=self.fleet.ranks // per_node):
                if sum(counts) == degree and np.count_nonzero(counts) == -(-degree // per_node):
                    yield _Choice(degree, (np.arange(per_node) < np.array(counts)[:, None]).reshape(-1))

    def _of_sets(self, members: Ints, degree: int) -> Floats:
        """(sets,), seconds of a group of a degree with a set of documents, infinite where it cannot be."""
        tokens = members @ self.seconds.documents.tokens
        each = self.seconds.by_method(degree)[:, None, :]
        sums = np.where(members > 0, each, 0.0).sum(axis=2).min(axis=0) + self.seconds.cost.overhead_s(degree)
        return np.where((tokens > 0) & (tokens <= degree * self.fleet.capacity), sums, np.inf)

    def _go_on(
        self, done: int, free: Floats, choices: list[_Choice], taken: dict[int, Floats], work: Floats,
        found: defaultdict[int, list[tuple[Floats, Ints]]],
    ) -> None:  # fmt: skip
        """Put what one more group makes of states into ``found``, by the set of documents that are then done; columns are not in
        order there."""
        rest = len(work) - 1 - done
        groups = np.array([g for g in range(1, len(work)) if g & rest == g], dtype=np.int64)
        for number, choice in enumerate(choices):
            begins = free[:, choice.columns].max(axis=1)
            ends = begins + taken[choice.degree][groups][:, None]  # (groups, states)
            held = np.where(choice.columns, 0.0, free).sum(axis=1) + choice.degree * ends
            bounds = np.maximum((held + work[done | groups][:, None]) / self.fleet.ranks, ends)
            for place in np.nonzero((bounds < self.bound).any(axis=1))[0].tolist():
                states = np.nonzero(bounds[place] < self.bound)[0]
                after = np.where(choice.columns, ends[place, states][:, None], free[states])
                origins = np.stack([np.full(len(states), done), states, np.full(len(states), number)], axis=1)
                found[done | int(groups[place])].append((after, origins))

    def _order(self, free: Floats) -> Ints:
        """(n, ranks), the columns of states in the order that all have: ascending in each node, and nodes by their first times."""
        nodes = free.reshape(len(free), self.fleet.ranks // self.fleet.per_node, self.fleet.per_node)
        inside = np.argsort(nodes, axis=2, kind="stable")
        nodes = np.take_along_axis(nodes, inside, axis=2)
        order = np.tile(np.arange(nodes.shape[1]), (len(free), 1))
        for column in reversed(range(self.fleet.per_node)):
            by = np.take_along_axis(nodes[:, :, column], order, axis=1)
            order = np.take_along_axis(order, np.argsort(by, axis=1, kind="stable"), axis=1)
        columns = np.take_along_axis(inside, order[:, :, None], axis=1) + order[:, :, None] * self.fleet.per_node
        return columns.reshape(free.shape)

    def _ends(self, free: Floats, alone: dict[int, Floats], rest: NDArray[np.bool_]) -> Floats:
        """(n,), when states end at least: none of the other documents before it is done on the ranks that are free first."""
        ranks = np.sort(free, axis=1)
        ends = np.min([ranks[:, d - 1, None] + alone[d][rest] for d in self.degrees], axis=0)
        return np.asarray(ends.max(axis=1, initial=0.0))

    def _needed(self, free: Floats) -> Ints:
        """Numbers of states of one set of which none makes another needless."""
        left, kept = np.argsort(free.sum(axis=1), kind="stable"), []
        while len(left):
            kept.append(int(left[0]))
            left = left[(free[left] < free[left[0]] * (1 - EQUAL)).any(axis=1)]
        return np.array(kept, dtype=np.int64)

    def _told(
        self, choices: list[_Choice], taken: dict[int, Floats], free: dict[int, Floats], parents: dict[int, Ints], last: int
    ) -> list[Group]:
        """The groups on the way to the best state of all documents, on ranks that are put in order as their times are."""
        done, state, way = last, int(free[last].max(axis=1).argmin()), list[tuple[int, int]]()
        while done:
            before, state, number = parents[done][state].tolist()
            way.append((done ^ before, number))
            done = before
        ranks, times, groups = np.arange(self.fleet.ranks), np.zeros(self.fleet.ranks), list[Group]()
        for members, number in reversed(way):
            choice = choices[number]
            held = [n for n in range(len(self.seconds.documents)) if members >> n & 1]
            groups.append(self.seconds.made(sorted(ranks[choice.columns].tolist()), held, self.fleet))
            times = np.where(choice.columns, times[choice.columns].max() + taken[choice.degree][members], times)
            order = self._order(times[None])[0]
            ranks, times = ranks[order], times[order]
        return groups
