"""A plan of a model's step: pipeline stages, and a way for each of their layers; its time, its memory, and the search for the best.

The search is Galvatron's (arXiv 2211.13878, section 3.3; 2307.02031): for each number of stages a dynamic program over the layers
of a stage finds what is fastest within the memory that a rank may have; neighbours of another order cost a move of activations.
Where Galvatron rounds memory to a grid, this keeps exact bytes. Of what the layers behind a cut may come to it keeps what nothing
else beats in time, in what a step ends with, in peak and in what stays, so that the answer is the best there is.

A step: each of m micro-batches passes the stages forward and backward, one forward one backward (1F1B, arXiv 1806.03377), and then
gradients are summed and the optimizer takes its step. With t the seconds that a stage needs for a micro-batch and e those that it
ends with, a step takes sum(t) + (m - 1) max(t) + max(e).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from lcbench.advice.ways import Asked, Way
from lcbench.schedule.machine import Machine

Floats = NDArray[np.float64]
# What a stage may come to, by its number of layers: (n, 2) seconds of a micro-batch and of the end, and the ways of its layers.
Ends = list[tuple[Floats, list[tuple[Way, ...]]]]
TIME, END, PEAK, STAYS = range(4)  # of a row of labels
# What of a way a plan counts, beside the seconds of a layer and what its first layer is given.
COUNTED = ("end_s", "head_s", "head_end_s", "steady", "gradient", "kept", "moment", "head_steady", "head_gradient", "head_moment")
ROUNDING = 1e-12  # of sums of the same seconds in another order
CHUNK = 256  # rows that are compared at once
EARLIER = np.tri(CHUNK, k=-1, dtype=bool)  # whether a row (second index) comes before another (first)


@dataclass(frozen=True)
class Stage:
    """Adjacent layers on some ranks.

    Attributes:
        ways: of its layers, in their order.
        number, stages: which it is, of how many.
        sequences: of a micro-batch.
        batches: micro-batches of a step.
        per_node: ranks of a node.
        machine: what it runs on.
    """

    ways: tuple[Way, ...]
    number: int
    stages: int
    sequences: int
    batches: int
    per_node: int
    machine: Machine

    @property
    def last(self) -> bool:
        return self.number == self.stages - 1

    @property
    def under_way(self) -> int:
        """Micro-batches whose activations it holds at once, at most: those between its forward and its backward in 1F1B."""
        return min(self.batches, self.stages - self.number)

    @property
    def moving_s(self) -> float:
        """Of a micro-batch: activations and their gradients between layers of another order, and from and to other stages."""
        ways = self.ways
        between = sum(switch_s(a, b, self.sequences, self.per_node, self.machine) for a, b in pairwise(ways))
        return between + hop_s(ways[0], self, self.number) + hop_s(ways[-1], self, self.number + 1)

    @property
    def batch_s(self) -> float:
        """A micro-batch, forward and backward."""
        own = sum(way.passes(self.sequences) * (way.forward_s + way.backward_s) for way in self.ways)
        head = self.ways[-1].passes(self.sequences) * self.ways[-1].head_s if self.last else 0.0
        return own + head + self.moving_s

    @property
    def end_s(self) -> float:
        """What a step ends with."""
        return sum(way.end_s for way in self.ways) + (self.ways[-1].head_end_s if self.last else 0.0)

    @cached_property
    def bytes(self) -> float:
        """The most that a rank holds, inputs included: while the head is at work, or while some layer is in backward."""
        loads = [load(way, self.sequences, self.batches, self.under_way) for way in self.ways]
        head = head_load(self.ways[-1], self.sequences, self.batches) if self.last else (0.0, 0.0)
        gradients, peaks = head[1], [head[0] + sum(each.kept for each in loads)]
        for number in range(len(loads) - 1, -1, -1):
            before = sum(each.kept for each in loads[: number + 1])
            steady = self.ways[-1].head_steady + self._head_gradient if self.last else 0.0
            peaks.append(steady + gradients + before + loads[number].moment)
            gradients += loads[number].gradient
        return sum(each.steady for each in loads) + max(peaks) + first_bytes(self.ways[0], self.sequences)

    @property
    def _head_gradient(self) -> float:
        """Of the head, where it is there from the micro-batch before."""
        return self.ways[-1].head_gradient if self.batches > 1 else 0.0


@dataclass(frozen=True)
class Load:
    """Bytes of a layer, as of ``Way``, in a step of several micro-batches of several sequences each."""

    steady: float
    gradient: float
    kept: float
    moment: float


def load(way: Way, sequences: int, batches: int, under_way: int) -> Load:
    """What a layer holds. Gradients stay from one micro-batch to the next, and activations of micro-batches under way besides."""
    passes, stay = way.passes(sequences), way.gradient if batches > 1 else 0.0
    return Load(
        way.steady + stay + (under_way - 1) * passes * way.kept, way.gradient - stay, passes * way.kept,
        way.moment + 2 * passes * way.x_bytes,
    )  # fmt: skip


def head_load(way: Way, sequences: int, batches: int) -> tuple[float, float]:
    """Of the head: bytes while it is at work, without what layers keep, and its gradient while layers are in backward."""
    stay = way.head_gradient if batches > 1 else 0.0
    return way.head_steady + stay + way.head_moment + 2 * way.passes(sequences) * way.x_bytes, way.head_gradient - stay


def first_bytes(way: Way, sequences: int) -> float:
    """What the first layer of a stage is given, where what it keeps of its input is the same memory."""
    return way.passes(sequences) * (way.given - way.inputs)


def switch_s(a: Way, b: Way, sequences: int, per_node: int, machine: Machine) -> float:
    """Activations between layers on the same ranks, and their gradients on the way back: an exchange of all with all, of as much
    as a rank has of them on the side where it has more."""
    if a.order == b.order:
        return 0.0
    together = min(a.ranks, per_node)
    block = max(way.passes(sequences) * way.x_bytes for way in (a, b)) / a.ranks
    shared = min(together, per_node // machine.nics_of(per_node))
    return 2 * (machine.message_s + machine.collective_s("all_to_all", block, a.ranks, together, shared=shared))


def hop_s(way: Way, stage: Stage, boundary: int) -> float:
    """What a rank of a stage receives over a boundary, the activations or, from behind, their gradients. Boundary i lies before
    stage i; before the first and behind the last stage there is none."""
    if boundary in (0, stage.stages):
        return 0.0
    machine, first = stage.machine, boundary * way.ranks
    across = first % stage.per_node == 0  # who sends is on the node before
    link = machine.across if across else machine.inside
    shared = stage.per_node // machine.nics_of(stage.per_node) if across else 1
    return machine.message_s + link.latency_s + way.passes(stage.sequences) * way.x_bytes * shared / link.bytes_per_s


@dataclass(frozen=True)
class Plan:
    """Stages of a model; ``sequences`` of a micro-batch, and ``batches`` of these."""

    stages: tuple[Stage, ...]

    @property
    def sequences(self) -> int:
        return self.stages[0].sequences

    @property
    def batches(self) -> int:
        return self.stages[0].batches

    @property
    def ways(self) -> list[Way]:
        return [way for stage in self.stages for way in stage.ways]

    @property
    def seconds(self) -> float:
        """Of a step."""
        each = [stage.batch_s for stage in self.stages]
        return sum(each) + (self.batches - 1) * max(each) + self.end_s

    @property
    def end_s(self) -> float:
        return max(stage.end_s for stage in self.stages)

    @property
    def bytes(self) -> float:
        """Of the rank with most."""
        return max(stage.bytes for stage in self.stages)

    @property
    def error(self) -> float:
        return max(way.error for way in self.ways)

    @property
    def interval(self) -> tuple[float, float]:
        """Of ``seconds``, 95 %."""
        return self.seconds / (1 + self.error), self.seconds * (1 + self.error)

    @property
    def basis(self) -> str:
        """What its times rest on, in words."""
        return "; ".join(dict.fromkeys(way.basis for way in self.ways))

    @property
    def parts(self) -> dict[str, float]:
        """Where the seconds go; they sum to ``seconds``. ``bubble``: what the average stage waits for others."""
        size = len(self.stages)
        passes = [(way, self.batches * way.passes(self.sequences) / size) for way in self.ways]
        last = self.stages[-1].ways[-1]
        found = {
            "computing": sum(n * way.computing_s for way, n in passes)
            + self.batches * last.passes(self.sequences) * last.head_s / size,
            "recomputing": sum(n * way.again_s for way, n in passes),
            "exposed communication": sum(n * way.exposed_s for way, n in passes)
            + self.batches * sum(stage.moving_s for stage in self.stages) / size,
            "gradients and optimizer": self.end_s,
        }
        waiting = self.seconds - sum(found.values())
        return {**found, "bubble": waiting if waiting > ROUNDING * self.seconds else 0.0}

    @property
    def flops(self) -> float:
        """Of a step, over all ranks, without what is done again."""
        last = self.stages[-1].ways[-1]
        return self.sequences * self.batches * (sum(way.flops for way in self.ways) + last.head_flops)


def uniform(way: Way, asked: Asked, stages: int, sequences: int, machine: Machine) -> Plan:
    """A plan of one way for all layers, which are shared out evenly, the last stages having more where that does not go."""
    counts = [(asked.layers + number) // stages for number in range(stages)]
    return _plan([(way,) * count for count in counts], asked, sequences, machine)


def _plan(by_stage: Sequence[tuple[Way, ...]], asked: Asked, sequences: int, machine: Machine) -> Plan:
    more = len(by_stage), sequences, asked.batch // sequences, asked.scale.gpus_per_node, machine
    return Plan(tuple(Stage(own, number, *more) for number, own in enumerate(by_stage)))


# -- the search ----------------------------------------------------------------------------------------------------------


def best(ways: Sequence[Way], asked: Asked, stages: int, sequences: int, machine: Machine, bound_s: float) -> Plan | None:
    """The fastest plan of these ways, stages and micro-batches that fits; None where none does, or takes less than ``bound_s``.

    Args:
        ways: on the ranks of a stage, each with a number of replicas that divides ``sequences``.
    """
    more = stages, sequences, asked.batch // sequences, asked.scale.gpus_per_node, machine
    search = _Search(_sensible(ways), asked, Stage((), 0, *more), bound_s)
    found = search.run()
    return None if found is None else _tidied(_plan(found, asked, sequences, machine), asked)


def _tidied(plan: Plan, asked: Asked) -> Plan:
    """The same with layers that are run alike side by side, where that fits too and takes no longer."""
    for backwards in (False, True):
        by_stage = []
        for stage in plan.stages:
            own: list[Way] = []
            for _, run in groupby(stage.ways, key=lambda way: way.order):
                each = list(run)
                kinds = list(dict.fromkeys(each))[:: -1 if backwards else 1]
                own += sorted(each, key=kinds.index)
            by_stage.append(tuple(own))
        found = _plan(by_stage, asked, plan.sequences, plan.stages[0].machine)
        if found.bytes <= asked.budget and found.seconds <= plan.seconds * (1 + ROUNDING):
            return found
    return plan


def _sensible(ways: Sequence[Way]) -> list[Way]:
    """Those that no other of the same order beats in all that a plan counts."""
    found: list[Way] = []
    for order in dict.fromkeys(way.order for way in ways):
        own = [way for way in ways if way.order == order]
        counted = np.array([
            [*(getattr(way, name) for name in COUNTED), way.forward_s + way.backward_s, first_bytes(way, way.dp)] for way in own
        ])  # fmt: skip
        found += [own[at] for at in sorted(unbeaten(counted))]
    return found


@dataclass(frozen=True)
class _Level:
    """What some layers at the end of a stage may come to.

    Attributes:
        rows: (n, 4): seconds of a micro-batch, seconds of the end, peak, and what stays while layers before are in backward.
        way: of the first of the layers, (n,).
        behind: which row of the level of one layer less it goes on with, (n,).
    """

    rows: Floats
    way: NDArray[np.int64]
    behind: NDArray[np.int64]


@dataclass(frozen=True)
class _Cut:
    """Layers from some stage on: ``summed`` and ``longest`` seconds of a micro-batch, ``end`` of a step; what the stages are."""

    summed: float
    longest: float
    end: float
    stages: tuple[tuple[int, int], ...] = ()  # (layers, row of the stage's ends)


@dataclass(frozen=True)
class _Search:
    """A search with one number of stages and one size of micro-batches. ``stage``: an empty one, for all that stages have alike."""

    ways: Sequence[Way]
    asked: Asked
    stage: Stage
    bound_s: float

    def run(self) -> list[tuple[Way, ...]] | None:
        stages, layers = self.stage.stages, self.asked.layers
        if layers < stages or self._least_s(layers) >= self.bound_s:
            return None
        cuts: dict[int, list[_Cut]] = {0: [_Cut(0.0, 0.0, 0.0)]}
        ends: list[Ends] = []
        for number in range(stages - 1, -1, -1):
            own = self._ends(Stage((), number, *self._alike))
            ends.append(own)
            cuts = self._joined(cuts, own, number)
            if not cuts:
                return None
        found = min(cuts.get(layers, []), key=self._seconds, default=None)
        if found is None or self._seconds(found) >= self.bound_s:
            return None
        by_stage = [ends[at][count - 1][1][row] for at, (count, row) in enumerate(found.stages)]
        return by_stage[::-1]

    @property
    def _alike(self) -> tuple[int, int, int, int, Machine]:
        one = self.stage
        return one.stages, one.sequences, one.batches, one.per_node, one.machine

    @cached_property
    def _each_s(self) -> Floats:
        """Seconds of a layer, forward and backward, by way."""
        return np.array([way.passes(self.stage.sequences) * (way.forward_s + way.backward_s) for way in self.ways])

    @cached_property
    def _given(self) -> Floats:
        """``first_bytes`` of each way."""
        return np.array([first_bytes(way, self.stage.sequences) for way in self.ways])

    def _least_s(self, layers: int) -> float:
        """No plan of so many layers takes less."""
        summed = layers * float(self._each_s.min())
        return summed + (self.stage.batches - 1) * summed / self.stage.stages

    def _seconds(self, cut: _Cut) -> float:
        return cut.summed + (self.stage.batches - 1) * cut.longest + cut.end

    def _joined(self, cuts: dict[int, list[_Cut]], own: Ends, number: int) -> dict[int, list[_Cut]]:
        """Each of the cuts with a stage before it, by layers; ``own``: what that stage may come to, by layers."""
        found: dict[int, list[_Cut]] = {}
        for behind, known in cuts.items():
            for count in range(1, self.asked.layers - behind - number + 1):
                if count > len(own):
                    break
                left = self.asked.layers - behind - count
                if number == 0 and left:
                    continue
                rest = left * float(self._each_s.min())
                for cut in known:
                    for row, (t, end) in enumerate(own[count - 1][0].tolist()):
                        one = _Cut(cut.summed + t, max(cut.longest, t), max(cut.end, end), (*cut.stages, (count, row)))
                        if self._seconds(one) + rest < self.bound_s:
                            found.setdefault(behind + count, []).append(one)
        return {count: _unbeaten_cuts(each) for count, each in found.items()}

    def _ends(self, stage: Stage) -> Ends:
        """What a stage may come to, by its number of layers from 1 on: (n, 2) seconds of a micro-batch and of the end, and its
        ways."""
        levels: list[_Level] = []
        found = []
        for count in range(1, self.asked.layers - stage.stages + 2):
            levels.append(self._level(stage, count, levels[-1] if levels else None))
            if not len(levels[-1].rows):
                break
            found.append(self._ended(stage, levels))
        return found

    def _ended(self, stage: Stage, levels: list[_Level]) -> tuple[Floats, list[tuple[Way, ...]]]:
        """The last level as a whole stage: with what its first layer is given, and what comes from the stage before."""
        level = levels[-1]
        given = self._given[level.way]
        hops = np.array([hop_s(way, stage, stage.number) for way in self.ways])[level.way]
        fits = np.flatnonzero(level.rows[:, PEAK] + given <= self.asked.budget)
        times = np.stack([level.rows[fits, TIME] + hops[fits], level.rows[fits, END]], axis=1)
        kept = unbeaten(times)
        return times[kept], [self._told(levels, int(fits[row])) for row in kept]

    def _told(self, levels: list[_Level], row: int) -> tuple[Way, ...]:
        found = []
        for level in reversed(levels):
            found.append(self.ways[int(level.way[row])])
            row = int(level.behind[row])
        return tuple(found)

    def _level(self, stage: Stage, count: int, behind: _Level | None) -> _Level:
        """``count`` layers, one more than those ``behind``; None: the last layer of the stage."""
        parts: list[tuple[Floats, NDArray[np.int64], NDArray[np.int64]]] = []
        for own in self._by_order:
            if behind is None:
                parts += [self._before(stage, 1, np.array([at]), *self._behind_all(stage, at)) for at in own]
                continue
            rows = behind.rows.copy()
            rows[:, TIME] += self._switches_s[own[0]][behind.way]
            kept = unbeaten(rows)
            parts.append(self._before(stage, count, np.array(own), rows[kept], kept))
        rows, way, row = (np.concatenate(each) for each in zip(*parts, strict=True))
        return _Level(rows, way, row)

    def _behind_all(self, stage: Stage, at: int) -> tuple[Floats, NDArray[np.int64]]:
        """What is behind the last layer of a stage: the head, or another stage."""
        way = self.ways[at]
        if not stage.last:
            return np.array([[hop_s(way, stage, stage.number + 1), 0.0, 0.0, 0.0]]), np.array([-1])
        peak, gradient = head_load(way, stage.sequences, stage.batches)
        stays = way.head_steady + (way.head_gradient if stage.batches > 1 else 0.0) + gradient
        return np.array([[way.passes(stage.sequences) * way.head_s, way.head_end_s, peak, stays]]), np.array([-1])

    def _before(
        self, stage: Stage, count: int, own: NDArray[np.int64], rows: Floats, numbers: NDArray[np.int64]
    ) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
        """Rows with a layer before them that is run in each of some ways of one order, ``count`` layers in all: those that fit and
        that nothing beats."""
        loads = [load(self.ways[at], stage.sequences, stage.batches, stage.under_way) for at in own]
        steady, gradient, kept, moment = (
            np.array([getattr(each, name) for each in loads])[:, None] for name in ("steady", "gradient", "kept", "moment")
        )
        ends = np.array([self.ways[at].end_s for at in own])[:, None]
        grown = np.stack([
            rows[:, TIME] + self._each_s[own][:, None], rows[:, END] + ends,
            steady + kept + np.maximum(rows[:, PEAK], moment + rows[:, STAYS]), rows[:, STAYS] + steady + gradient,
        ], axis=2).reshape(-1, 4)  # fmt: skip
        way, behind = np.repeat(own, len(rows)), np.tile(numbers, len(own))
        fits = np.flatnonzero((grown[:, PEAK] <= self.asked.budget) & (self._bounds_s(grown, count) < self.bound_s))
        # Of two that go on alike one may be the better end of a stage: by what its first layer is given.
        as_first = grown[fits, PEAK] + self._given[way[fits]]
        chosen = fits[unbeaten(np.column_stack([grown[fits], as_first]))]
        return grown[chosen], way[chosen], behind[chosen]

    def _bounds_s(self, rows: Floats, count: int) -> Floats:
        """No plan with a stage that ends with ``count`` layers of these rows takes less."""
        rest = (self.asked.layers - count) * float(self._each_s.min())
        longest = np.maximum(rows[:, TIME], (rows[:, TIME] + rest) / self.stage.stages)
        return np.asarray(rows[:, TIME] + rest + (self.stage.batches - 1) * longest + rows[:, END])

    @cached_property
    def _switches_s(self) -> Floats:
        """Seconds of a move of activations from the order of a way to that of another, (ways, ways)."""
        size, one = len(self.ways), self.stage
        found = np.empty((size, size))
        for own in self._by_order:
            for other in self._by_order:
                moved = switch_s(self.ways[own[0]], self.ways[other[0]], one.sequences, one.per_node, one.machine)
                found[np.ix_(own, other)] = moved
        return found

    @cached_property
    def _by_order(self) -> list[list[int]]:
        """Numbers of ways, those of one order together."""
        found: dict[str, list[int]] = {}
        for number, way in enumerate(self.ways):
            found.setdefault(way.order, []).append(number)
        return list(found.values())


def _unbeaten_cuts(cuts: list[_Cut]) -> list[_Cut]:
    return [cuts[at] for at in unbeaten(np.array([(cut.summed, cut.longest, cut.end) for cut in cuts]))]


def unbeaten(rows: Floats) -> NDArray[np.int64]:
    """Numbers of the rows that no other is at most as large as in all columns, equal rows once, by the first column."""
    order = np.lexsort(rows.T[::-1])
    kept = np.empty(0, dtype=np.int64)
    for begin in range(0, len(order), CHUNK):
        own = order[begin : begin + CHUNK]
        if len(kept):
            own = own[~_at_most(rows[kept], rows[own]).any(axis=1)]
        before = _at_most(rows[own], rows[own]) & EARLIER[: len(own), : len(own)]
        kept = np.concatenate([kept, own[~before.any(axis=1)]])
    return kept


def _at_most(rows: Floats, others: Floats) -> NDArray[np.bool_]:
    """Whether a row is at most as large as another one in all columns, (others, rows)."""
    found = np.ones((len(others), len(rows)), dtype=bool)
    for column in range(rows.shape[1]):  # one by one, which is several times as fast as all at once
        found &= rows[None, :, column] <= others[:, None, column]
    return found
