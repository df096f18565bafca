"""Play a schedule on a machine: when each rank computes, sends and waits, without running anything.

The rules are those of ``execute``. At each time a rank begins its messages, computes its tiles, waits for what must have arrived by
the end of that time, and merges it. A rank has one stream that computes, and one stream per channel that communicates. A link is
shared by all that is on it at once. What is computed for all ranks at once is one numpy expression, so a schedule of a thousand
ranks and steps takes seconds.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from lcbench.masks.band import Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.adjoint import Traffic, Transfer, traffic
from lcbench.schedule.lowering import Collective, Operation, collectives
from lcbench.schedule.machine import Floats, KernelModel, Link, Machine
from lcbench.schedule.payload import element_bytes
from lcbench.schedule.program import Program
from lcbench.schedule.schedule import MoveColumn, Schedule
from lcbench.schedule.tiling import Tiling, tiling

SAMPLED = 4  # ranks whose buffers are worked out: those with most tiles, the first and the last
BYTES_MERGED = 3  # a merge reads two results and writes one


@dataclass(frozen=True)
class Phase:
    """What a phase takes, in seconds of the rank that ends last.

    Attributes:
        seconds: from its begin until the last rank has ended.
        compute_s: kernels of the average rank.
        busiest_s: kernels of the rank with most.
        exposed_s: waiting for messages, of the rank that ends last.
        overhead_s: merges, copies and launches of that rank.
    """

    seconds: float
    compute_s: float
    busiest_s: float
    exposed_s: float
    overhead_s: float

    @property
    def imbalance_s(self) -> float:
        """What the busiest rank computes more than the average."""
        return self.busiest_s - self.compute_s


@dataclass(frozen=True)
class Simulated:
    """A simulated iteration.

    Attributes:
        phases: ``forward`` and, with backward, ``backward``.
        times: seconds (ranks, times, 4): begin, messages sent, tiles computed, messages there, as of ``Executor.timeline``.
        buffer_bytes: of the rank with most, among those that were looked at.
        peak_bytes: of that rank, in one iteration, without inputs: results, gradients and buffers.
    """

    phases: dict[str, Phase]
    times: Floats
    buffer_bytes: int
    peak_bytes: int

    def timeline(self) -> list[list[list[float]]]:
        """As a measured one: per rank, per time, its number and four moments."""
        return [[[float(number), *row] for number, row in enumerate(rank)] for rank in self.times.tolist()]


@dataclass(frozen=True)
class Modelled:
    """What is simulated for a strategy: its own schedule, or, for a library's, one that does the same and what it does besides.

    Attributes:
        schedule: of the tokens that it computes, padding included.
        mask, problem: of these tokens.
        copied_bytes: that every rank copies besides at each time.
    """

    schedule: Schedule
    mask: Mask
    problem: Problem
    copied_bytes: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """What does not depend on the machine: worked out once, played as often as a fit wants.

    Attributes:
        found: the collective of each transfer of ``moves``, or None.
        operations: what goes by collectives.
    """

    modelled: Modelled
    moves: Traffic
    found: list[Collective | None]
    tiling: Tiling
    operations: tuple[Operation, ...]

    def without_messages(self) -> Prepared:
        """The same with nothing that is sent, as it is timed to see what of the communication is hidden."""
        return replace(self, moves=replace(self.moves, transfers=()), found=[])

    def without_kernels(self) -> Prepared:
        """The same with messages alone."""
        tiles = self.tiling.tiles
        return replace(self, tiling=replace(self.tiling, tiles=replace(tiles, pairs=np.zeros(len(tiles)))))


def prepare(modelled: Modelled, operations: tuple[Operation, ...] = ()) -> Prepared:
    schedule, problem = modelled.schedule, modelled.problem
    moves = traffic(schedule, backward=problem.backward)
    found = collectives(schedule, moves, problem, operations)
    return Prepared(modelled, moves, found, tiling(schedule, modelled.mask), operations)


def play(prepared: Prepared, machine: Machine, model: KernelModel, *, memory: bool = True) -> Simulated:
    """Play one iteration of what was prepared; ``memory``: whether buffers are worked out, which takes longer than the play."""
    modelled, moves = prepared.modelled, prepared.moves
    clocks = _Play(modelled, machine, moves, _work(prepared, machine, model))
    by_begin: dict[int, list[tuple[Transfer, Collective | None]]] = defaultdict(list)
    for transfer, collective in zip(moves.transfers, prepared.found, strict=True):
        by_begin[transfer.begin].append((transfer, collective))
    for time in range(2 * moves.steps + 1 if modelled.problem.backward else moves.steps):
        clocks.step(time, by_begin.get(time, []))
    times = clocks.times()
    buffers, peak = _memory(modelled, moves, clocks.work, prepared.operations) if memory else (0, 0)
    return Simulated(clocks.phases(times), times, buffers, peak)


def simulate(
    modelled: Modelled, machine: Machine, model: KernelModel, *, operations: tuple[Operation, ...] = (), memory: bool = True
) -> Simulated:
    """Play one iteration.

    Args:
        operations: what goes by collectives.
        memory: whether buffers are worked out, which takes longer than the play.
    """
    return play(prepare(modelled, operations), machine, model, memory=memory)


@dataclass(frozen=True)
class _Work:
    """Seconds of kernels, and of merging and adding up their results, and launches, each (times, ranks)."""

    compute: Floats
    besides: Floats
    launches: Floats
    tiling: Tiling


def _work(prepared: Prepared, machine: Machine, model: KernelModel) -> _Work:
    modelled, moves, made = prepared.modelled, prepared.moves, prepared.tiling
    problem = modelled.problem
    times = 2 * moves.steps + 1 if problem.backward else moves.steps
    shape = (times, modelled.schedule.world_size)
    compute, besides, launches = (np.zeros(shape) for _ in range(3))
    tiles, some = made.tiles, made.tiles.pairs > 0
    sums, inputs = element_bytes("sum", problem), problem.itemsize
    # A tile's result is merged into what there is; a rank's first one and the only one are not.
    first = np.zeros(len(tiles), dtype=bool)
    alone = np.bincount(made.rank, minlength=shape[1])[made.rank] == 1
    first[np.unique(made.rank, return_index=True)[1]] = True
    merged = np.where(first | alone, 0.0, BYTES_MERGED * sums * tiles.rows * tiles.q_heads * problem.heads.dim)
    calls = model.calls(tiles)
    for backward in (False, True)[: 2 if problem.backward else 1]:
        when = 2 * moves.steps - made.step if backward else made.step
        added = (sums * 2 + inputs) * (tiles.rows * tiles.q_heads + 2 * tiles.keys * tiles.kv_heads) * problem.heads.dim
        for target, value in (
            (compute, model.seconds(tiles, problem, backward=backward)),
            (besides, (added if backward else merged) / machine.memory_bytes_per_s),
            (launches, calls + (3.0 if backward else (merged > 0))),
        ):
            np.add.at(target, (when, made.rank), np.where(some, value, 0.0))
    return _Work(compute, besides, launches, made)


class _Play:
    """The clocks of all ranks."""

    def __init__(self, modelled: Modelled, machine: Machine, moves: Traffic, work: _Work) -> None:
        self._modelled, self._machine, self._moves, self.work = modelled, machine, moves, work
        ranks = modelled.schedule.world_size
        self._ranks = ranks
        self._now = np.zeros(ranks)
        self._streams: dict[str, Floats] = defaultdict(lambda: np.zeros(ranks))  # until when a channel is busy
        self._links: dict[str, Floats] = defaultdict(lambda: np.zeros(ranks))  # and each direction of a link
        self._arrivals: dict[int, Floats] = defaultdict(lambda: np.zeros(ranks))
        self._unpacked: dict[int, Floats] = defaultdict(lambda: np.zeros(ranks))  # bytes, by the time at which they are taken
        self._rows: list[Floats] = []

    def step(self, time: int, transfers: list[tuple[Transfer, Collective | None]]) -> None:
        machine, work = self._machine, self.work
        begin = self._now
        if time == self._moves.steps:  # phases are timed apart: all ranks begin backward together
            begin = np.full(self._ranks, begin.max())
        sent = begin + self._copies(time)
        for transfer, collective in transfers:
            if collective is None:
                self._messages(transfer, sent)
            else:
                self._collective(transfer, collective, sent)
        taking = np.zeros(self._ranks, dtype=bool)
        for transfer, _ in transfers:
            taking[transfer.rows[:, : MoveColumn.SHARD].ravel()] = True
        sent = sent + machine.message_s * taking
        launching = work.launches[time] * machine.launch_s
        computed = sent + np.maximum(work.compute[time] + work.besides[time], launching)
        there = np.maximum(computed, self._arrivals.pop(time, computed))
        there = there + self._unpacked.pop(time, np.zeros(self._ranks)) / machine.memory_bytes_per_s
        self._rows.append(np.stack([begin, sent, computed, there], axis=1))
        self._now = there

    def _copies(self, time: int) -> Floats:
        return np.full(self._ranks, self._modelled.copied_bytes / self._machine.memory_bytes_per_s)

    def _messages(self, transfer: Transfer, ready: Floats) -> None:
        """Messages from point to point: each begins when both ends are ready, and all that are on a link share it."""
        source, to = transfer.rows[:, MoveColumn.SOURCE], transfer.rows[:, MoveColumn.TARGET]
        size = transfer.bytes(self._modelled.schedule, self._modelled.problem).astype(np.float64)
        per_node = self._modelled.problem.scale.gpus_per_node
        outside = source // per_node != to // per_node
        stream = self._streams[transfer.channel]
        begins = np.maximum(np.maximum(ready, stream)[source], np.maximum(ready, stream)[to])
        for name, link, which in (("inside", self._machine.inside, ~outside), ("across", self._machine.across, outside)):
            if which.any():
                self._on_link(name, link, source[which], to[which], size[which], begins[which], transfer)
        self._note_unpacked(transfer, to, size)

    def _on_link(self, name: str, link: Link, source: Ints, to: Ints, size: Floats, begins: Floats, transfer: Transfer) -> None:
        ends = np.zeros(len(source))
        for direction, ranks in (("out", source), ("in", to)):
            free = self._links[f"{name} {direction}"]
            first = np.full(self._ranks, np.inf)
            np.minimum.at(first, ranks, begins)
            busy = np.maximum(np.where(np.isinf(first), free, first), free)
            busy = busy + np.bincount(ranks, weights=size, minlength=self._ranks) / link.bytes_per_s
            used = np.unique(ranks)
            free[used] = busy[used]
            ends = np.maximum(ends, busy[ranks])
        ends = np.maximum(ends, begins + size / link.bytes_per_s) + link.latency_s
        for ranks in (source, to):
            np.maximum.at(self._arrivals[transfer.end], ranks, ends)
            np.maximum.at(self._streams[transfer.channel], ranks, ends)

    def _collective(self, transfer: Transfer, collective: Collective, ready: Floats) -> None:
        per_node = self._modelled.problem.scale.gpus_per_node
        stream = self._streams[transfer.channel]
        for members in collective.sets:
            ranks = np.array(members)
            begin = float(np.maximum(ready[ranks], stream[ranks]).max())
            nodes = np.unique(ranks // per_node, return_counts=True)[1]
            end = begin + self._machine.collective_s(collective.operation, collective.block, len(ranks), int(nodes.max()))
            np.maximum.at(self._arrivals[transfer.end], ranks, end)
            np.maximum.at(stream, ranks, end)
        to = transfer.rows[:, MoveColumn.TARGET]
        self._note_unpacked(transfer, to, transfer.bytes(self._modelled.schedule, self._modelled.problem).astype(np.float64))

    def _note_unpacked(self, transfer: Transfer, to: Ints, size: Floats) -> None:
        """What is merged or added where it arrives reads it, and reads and writes what it is added to."""
        if transfer.payload.combine != "replace" and transfer.kind != "final":
            np.add.at(self._unpacked[transfer.end], to, BYTES_MERGED * size)

    def times(self) -> Floats:
        return np.stack(self._rows, axis=1)

    def phases(self, times: Floats) -> dict[str, Phase]:
        steps = self._moves.steps
        parts = {"forward": slice(0, steps)}
        if self._modelled.problem.backward:
            parts["backward"] = slice(steps, None)
        return {name: self._phase(times[:, part], self.work.compute[part]) for name, part in parts.items()}

    def _phase(self, times: Floats, compute: Floats) -> Phase:
        last = int(times[:, -1, 3].argmax())
        begin, _, computed, there = times[last].T
        seconds = float(there[-1] - begin[0])
        own = compute.sum(axis=0)
        exposed = float((there - computed).sum())
        return Phase(seconds, float(own.mean()), float(own.max()), exposed, max(0.0, seconds - exposed - float(own[last])))


def _memory(modelled: Modelled, moves: Traffic, work: _Work, operations: tuple[Operation, ...]) -> tuple[int, int]:
    """(buffers, peak without inputs) of the rank with most, in bytes."""
    schedule, problem = modelled.schedule, modelled.problem
    tiles = np.bincount(work.tiling.rank, minlength=schedule.world_size)
    looked_at = dict.fromkeys([int(tiles.argmax()), 0, schedule.world_size - 1][:SAMPLED])
    sums = element_bytes("sum", problem)
    buffers = peak = 0
    for rank in looked_at:
        program = Program(schedule, moves, problem, rank, operations)
        q, kv = (program.tokens * heads * problem.heads.dim for heads in (problem.heads.q, problem.heads.kv))
        held = q * problem.itemsize + program.tokens * problem.heads.q * sums + program.buffer_bytes
        if schedule.world_size > 1:
            held += 2 * kv * problem.itemsize + q * sums
        if problem.backward:
            held += (q + 2 * kv) * (sums + problem.itemsize)
        buffers, peak = max(buffers, program.buffer_bytes), max(peak, held)
    return buffers, peak


def without_backward(modelled: Modelled) -> Modelled:
    """The same, of forward alone."""
    return replace(modelled, problem=replace(modelled.problem, direction="forward"))
