"""FlexSP (Wang et al., ASPLOS 2025, arXiv 2412.01523): groups of different sizes in each micro-batch, by a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import Ints
from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Planner, Say
from lcbench.planners.moves import Moves, Piece, Pieces
from lcbench.planners.packing import best_fit_decreasing, descending
from lcbench.planners.programs import Sharing, alike, exact
from lcbench.planners.table import Table
from lcbench.problem import check_whole


@dataclass(frozen=True)
class FlexSP(Planner):
    """Documents, sorted by length, are cut into micro-batches ("blaster"), and those of each into buckets of about one length; then
    a mixed-integer program chooses the groups of each micro-batch and how many documents of each bucket they share.

    The paper waits for all ranks after each micro-batch. Here nobody waits, so that its micro-batches are only where documents are
    packed together: groups are laid on the ranks that are free first. Small changes at the end (``Moves.best``) make good what
    cutting at one length and rounding to buckets cost; they are ours.

    Attributes:
        buckets: of a micro-batch, at most.
        trials: numbers of micro-batches that are tried, from the fewest that hold the batch up.
        gap: relative, at which the solver may stop.
        nodes: of the solver's search, at most.
        groups: that can be, each of which the program has by itself; where there can be more, those of one size are taken alike.
        effort: groups that are laid for small changes, at most.
    """

    buckets: int = 16
    trials: int = 3
    gap: float = 0.01
    nodes: int = 200
    groups: int = 15
    effort: int = 50_000

    def __post_init__(self) -> None:
        for name in ("buckets", "trials", "nodes", "groups", "effort"):
            check_whole(f"planner.{name}", getattr(self, name), 1)
        if isinstance(self.gap, bool) or not isinstance(self.gap, int | float) or not 0 < self.gap < 1:
            raise ValueError(f"planner.gap={self.gap} is no number between 0 and 1, such as 0.01")

    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        if not len(documents):
            return Assignment(())
        table = Table.of(documents, fleet, cost)
        order = np.argsort(-documents.tokens, kind="stable")
        fewest = fleet.needed(-(-int(documents.tokens.sum()) // fleet.ranks))
        moves, found = Moves(table.known, fleet, table.degrees), list[Pieces]()
        for count in range(fewest, min(fewest + self.trials, max(len(documents), fewest + 1))):
            pieces: list[Piece] = []
            parts = blasted(documents.tokens[order], count)
            for number, (begin, end) in enumerate(parts):
                pieces += self._grouped(order[begin:end], table)
                say(f"flexsp: {count} micro-batches: {number + 1} of {len(parts)} planned, {len(pieces)} groups")
            found.append(moves.ordered(pieces))
        return moves.best(found, self.effort)

    def _grouped(self, numbers: Ints, table: Table) -> list[Piece]:
        """The groups of a micro-batch.

        Args:
            numbers: of documents, the longest first.
        """
        documents, fleet = table.documents, table.fleet
        ends = bucketed(documents.tokens[numbers], self.buckets)
        buckets = np.split(numbers, ends[:-1])
        degrees = np.array(table.degrees)

        def sharing(tokens: Ints, capacity: int | None) -> Sharing:
            return Sharing(
                counts=np.array([len(own) for own in buckets]),
                tokens=tokens,
                degrees=degrees,
                seconds=np.array([[table.each_s[degree][own].mean() for degree in table.degrees] for own in buckets]),
                overhead_s=np.array([table.overhead_s[degree] for degree in table.degrees]),
                ranks=fleet.ranks,
                capacity=capacity,
            )

        if int((fleet.ranks // degrees).sum()) <= self.groups:
            longest = np.array([documents.tokens[own].max() for own in buckets])
            if (chosen := exact(sharing(longest, fleet.capacity), self.gap, self.nodes)) is not None:
                return _dealt(buckets, chosen, table)
        mean = np.array([int(documents.tokens[own].mean()) for own in buckets])
        # Without the capacity where these ranks do not hold all at once: the program then makes groups that have several turns.
        many = alike(sharing(mean, fleet.capacity), self.gap, self.nodes) or alike(sharing(mean, None), self.gap, self.nodes)
        assert many is not None, "every document fits a group"
        pieces = []
        for kind, degree in enumerate(table.degrees):
            # The longest of a bucket go to the largest groups.
            own = np.concatenate([
                bucket[shares[kind + 1 :].sum() : shares[kind:].sum()] for bucket, shares in zip(buckets, many[1], strict=True)
            ])  # fmt: skip
            pieces += [Piece(tuple(one), degree) for one in _spread(own, table, degree, int(many[0][kind]))]
        return pieces


def blasted(tokens: Ints, count: int) -> list[tuple[int, int]]:
    """Stretches [begin, end) of sorted documents, at most ``count``, of which that with most tokens has as few as can be (the
    paper's 4.2.2; by bisection, which finds the same)."""
    sums = np.concatenate([[0], np.cumsum(tokens)])

    def cut(most: int) -> list[int]:
        ends = [0]
        while ends[-1] < len(tokens):
            ends.append(int(np.searchsorted(sums, sums[ends[-1]] + most, side="right")) - 1)
        return ends

    low, high = int(tokens.max()), int(sums[-1])
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) - 1 <= count else (middle + 1, high)
    ends = cut(low)
    return list(pairwise(ends))


def bucketed(tokens: Ints, count: int) -> Ints:
    """Ends of at most ``count`` buckets of documents that are sorted, the longest first, so that their lengths, each rounded up to
    the longest of its bucket, add up to as little as can be (the paper's 4.1.3).

    Dynamic programming: with the first j lengths in q buckets, ``best[q, j] = min_i best[q - 1, i] + tokens[i] (j - i)``. For each
    q the terms are lines in j, of which the lowest are a hull, so that a bucket takes n log n steps.
    """
    values, counts = np.unique(tokens, return_counts=True)
    values, at = values[::-1], np.concatenate([[0], np.cumsum(counts[::-1])])
    if len(values) <= count:
        return np.asarray(at[1:], dtype=np.int64)
    size = len(values)
    best: NDArray[np.float64] = np.r_[0.0, np.full(size, np.inf)]
    chosen = np.zeros((count, size + 1), dtype=np.int64)
    for q in range(count):
        now = np.full(size + 1, np.inf)
        lines: list[tuple[float, float, int]] = []  # slope, value at 0, i; lowest further on behind
        for j in range(1, size + 1):
            i = j - 1
            if np.isfinite(best[i]):
                new = (float(values[i]), float(best[i] - values[i] * at[i]), i)
                while len(lines) > 1 and _hidden(lines[-2], lines[-1], new):
                    lines.pop()
                lines.append(new)
            if lines:
                low, high = 0, len(lines) - 1
                while low < high:  # along the hull, at one j, values fall and then rise
                    middle = (low + high) // 2
                    one, two = lines[middle], lines[middle + 1]
                    if one[0] * at[j] + one[1] <= two[0] * at[j] + two[1]:
                        high = middle
                    else:
                        low = middle + 1
                now[j], chosen[q, j] = lines[low][0] * at[j] + lines[low][1], lines[low][2]
        best = now
    ends, j = [], size
    for q in range(count - 1, -1, -1):
        ends.append(int(at[j]))
        j = int(chosen[q, j])
    return np.array(ends[::-1], dtype=np.int64)


def _hidden(first: tuple[float, float, int], middle: tuple[float, float, int], last: tuple[float, float, int]) -> bool:
    """Whether a line is nowhere below both of its neighbours; slopes fall."""
    return (last[1] - first[1]) * (first[0] - middle[0]) <= (middle[1] - first[1]) * (first[0] - last[0])


def _dealt(buckets: Sequence[Ints], groups: Sequence[tuple[int, Ints]], table: Table) -> list[Piece]:
    """Documents of each bucket to groups that are to have so many, the longest first, each to the group that is done first."""
    load = np.array([table.overhead_s[degree] for degree, _ in groups])
    left = np.stack([shares for _, shares in groups])
    own: list[list[int]] = [[] for _ in groups]
    for bucket, numbers in enumerate(buckets):
        for number in numbers.tolist():
            group = int(np.where(left[:, bucket] > 0, load, np.inf).argmin())
            own[group].append(number)
            left[group, bucket] -= 1
            load[group] += table.each_s[groups[group][0]][number]
    return [Piece(tuple(numbers), degree) for (degree, _), numbers in zip(groups, own, strict=True)]


def _spread(numbers: Ints, table: Table, degree: int, bins: int) -> list[list[int]]:
    """Documents in so many groups of a degree: what takes longest first, each to the group that is done first of those with room
    for it. Where these groups do not hold them so, as few as best-fit-decreasing packing needs."""
    seconds, tokens = table.each_s[degree][numbers], table.documents.tokens[numbers]
    room = degree * table.fleet.capacity
    load, left = np.zeros(bins), np.full(bins, room)
    own: list[list[int]] = [[] for _ in range(bins)]
    for place in descending(seconds):
        free = np.where(left >= tokens[place], load, np.inf)
        group = int(free.argmin()) if bins else 0
        if not bins or not np.isfinite(free[group]):
            return [numbers[one].tolist() for one in best_fit_decreasing(tokens, room)]
        own[group].append(int(numbers[place]))
        load[group] += seconds[place]
        left[group] -= tokens[place]
    return [one for one in own if one]
