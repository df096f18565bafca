"""Play a schedule on a machine: when each rank computes, sends and waits, without running anything.

The rules are those of ``execute``. At each time a rank copies what it must, begins its messages, computes its tiles, waits for what
must have arrived by the end of that time, and takes it. A rank has one stream that computes, one stream per channel that
communicates, and a host that starts kernels and messages: on a device it goes ahead of the streams, on a CPU it is the rank itself.
A message begins when both ends are ready. What is on a link at once shares it: messages of one time one after the other, and a
message that may take several times has half of the link while others are on it. What is computed for all ranks at once is one
numpy expression, so a schedule of a thousand ranks and steps takes seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lcbench.masks.band import Ints, distinct
from lcbench.masks.mask import Mask
from lcbench.problem import Problem, Scale
from lcbench.schedule.adjoint import Bools, Traffic, Transfer, traffic
from lcbench.schedule.lowering import Collective, Operation, collectives
from lcbench.schedule.machine import Floats, KernelModel, Link, Machine
from lcbench.schedule.payload import PAYLOADS, element_bytes
from lcbench.schedule.program import ROUND, Program, rounds_of
from lcbench.schedule.schedule import MoveColumn, Schedule
from lcbench.schedule.states import backward_times, received_bytes, summarised, summary_share
from lcbench.schedule.tiling import Tiling, tiling

COPIED = 2  # a copy reads and writes
MERGED = 3  # a merge or a sum reads two and writes one
AT_ONCE = 2  # rounds that are under way before tiles are computed


@dataclass(frozen=True)
class Phase:
    """What a phase takes, in seconds. ``compute_s``, ``imbalance_s``, ``exposed_s`` and ``overhead_s`` add up to ``seconds``.

    Attributes:
        seconds: from its begin until the last rank has ended.
        compute_s: kernels of the average rank.
        busiest_s: kernels of the rank with most.
        exposed_s: what messages add: ``seconds`` less what the slowest rank takes without any, as ``overlap/<phase>/exposed_s``.
        overhead_s: merges, sums, copies and launches: what the slowest rank takes without messages, less ``busiest_s``.
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
        times: seconds (ranks of the first group, times, 4): begin, messages sent, tiles computed, messages there, as of
            ``Executor.timeline``.
        buffer_bytes: of the rank with most, among those with most tiles, the first and the last; 0 where nobody asked.
        peak_bytes: of that rank, as ``memory/peak_bytes``: in one iteration, without inputs, with buffers and with what the kernel
            is said to need inside. 0 where nobody asked.
        own_bytes: the same without what the kernel needs inside.
    """

    phases: dict[str, Phase]
    times: Floats
    buffer_bytes: int
    peak_bytes: int
    own_bytes: int

    def timeline(self) -> list[list[list[float]]]:
        """As a measured one: per rank, per time, its number and four moments."""
        return [[[float(number), *row] for number, row in enumerate(rank)] for rank in self.times.tolist()]


@dataclass(frozen=True)
class Around:
    """A collective before or after the tiles of a rank, which waits for it.

    Attributes:
        operation: as of ``schedule.lowering``.
        block: bytes from each rank of a set to each other.
        sets: ranks that exchange among themselves; none: nothing is sent.
        per_node: ranks of a node, which are adjacent.
        moved: bytes that are read and written to put together what is sent, and to take what has come.
        launches: kernels and copies for that.
        buffers: bytes of its ends.
    """

    operation: Operation
    block: float
    sets: tuple[tuple[int, ...], ...]
    per_node: int
    moved: float
    launches: int
    buffers: int

    def exposed_s(self, machine: Machine) -> float:
        """What its messages take, of the slowest set."""
        shared = self.per_node // machine.nics_of(self.per_node)
        found = 0.0
        for ranks in self.sets:
            nodes = np.unique(np.array(ranks) // self.per_node, return_counts=True)[1]
            most, fewest = int(nodes.max()), int(nodes.min())
            one = machine.collective_s(self.operation, self.block, len(ranks), most, fewest, min(shared, most))
            found = max(found, machine.message_s + one)
        return found

    def own_s(self, machine: Machine) -> float:
        """What a rank does for it by itself."""
        return self.moved / machine.memory_bytes_per_s + self.launches * machine.launch_s


@dataclass(frozen=True)
class Modelled:
    """What is simulated for a strategy: its own schedule, or, for a library's, one that does the same; of one that is no schedule,
    the tiles of the rank with most as a schedule of one rank, and what is around them.

    Attributes:
        problem: as the schedule is of it; what a library does otherwise than ours, the type of its sums, say, is in it.
        around: what is waited for in forward, one after the other.
        replicas: ranks that hold each key.
    """

    schedule: Schedule
    mask: Mask
    problem: Problem
    around: tuple[Around, ...] = ()
    replicas: int = 1


@dataclass(frozen=True)
class Prepared:
    """What does not depend on the machine: worked out once, played as often as a fit wants.

    Attributes:
        found: the collective of each transfer of ``moves``, or None.
        operations: what goes by collectives.
        alone: of each rank whether it has nothing but one kernel call over all of its tokens, around which nothing is packed,
            summed or sent, (P,).
        in_place: whether kernels read keys and values where a cache has them, so that they are not packed.
    """

    modelled: Modelled
    moves: Traffic
    found: list[Collective | None]
    tiling: Tiling
    operations: tuple[Operation, ...]
    alone: Bools
    in_place: bool = False

    def laid_out(self, groups: Groups, nics: int) -> _LaidOut:
        """Its messages as all groups send them, on nodes of so many NICs."""
        key = (groups.ranks.shape, groups.ranks.tobytes(), groups.per_node, nics)
        if key not in self._laid_out:
            self._laid_out[key] = _LaidOut(self, groups, nics)
        return self._laid_out[key]

    @cached_property
    def _laid_out(self) -> dict[Hashable, _LaidOut]:
        return {}

    def without_messages(self) -> Prepared:
        """The same with nothing that is sent, as it is timed to see what of the communication is hidden."""
        around = tuple(replace(each, sets=()) for each in self.modelled.around)
        return replace(self, moves=replace(self.moves, transfers=()), found=[], modelled=replace(self.modelled, around=around))

    def without_kernels(self) -> Prepared:
        """The same with messages alone."""
        tiles, around = self.tiling.tiles, tuple(replace(each, moved=0.0) for each in self.modelled.around)
        bare = replace(self.tiling, tiles=replace(tiles, pairs=np.zeros(len(tiles))))
        return replace(self, tiling=bare, modelled=replace(self.modelled, around=around))


def prepare(modelled: Modelled, operations: tuple[Operation, ...] = ()) -> Prepared:
    schedule, problem = modelled.schedule, modelled.problem
    moves = traffic(schedule, backward=problem.backward, gates=problem.rule is not None)
    found = collectives(schedule, moves, problem, operations)
    made = tiling(schedule, modelled.mask)
    return Prepared(modelled, moves, found, made, operations, _alone(schedule, moves, made, problem))


def _alone(schedule: Schedule, moves: Traffic, made: Tiling, problem: Problem) -> Bools:
    """The ranks whose one tile is all that there is of them. A schedule of one rank may be a library's."""
    ranks, tiles = schedule.world_size, made.tiles
    if ranks == 1:
        return np.ones(1, dtype=bool)
    queries, keys = (np.bincount(side.owner, weights=side.sizes, minlength=ranks) for side in (schedule.q, schedule.k))
    whole = (tiles.rows == queries[made.rank]) & (tiles.keys == keys[made.rank])
    whole &= (tiles.q_heads == problem.heads.q) & (tiles.kv_heads == problem.heads.kv)
    found: Bools = (np.bincount(made.rank, minlength=ranks) == 1) & (np.bincount(made.rank, weights=whole, minlength=ranks) == 1)
    for transfer in moves.transfers:
        found[transfer.rows[:, : MoveColumn.SHARD].ravel()] = False
    return found


@dataclass(frozen=True)
class Groups:
    """Context-parallel groups that do the same at once.

    Attributes:
        ranks: (groups, P), the global ranks of each.
        per_node: ranks of a node, of all groups.
    """

    ranks: Ints
    per_node: int

    @classmethod
    def alone(cls, scale: Scale) -> Groups:
        """One group that has all ranks of its nodes."""
        return cls(np.arange(scale.world_size, dtype=np.int64)[None], scale.gpus_per_node)


def play(
    prepared: Prepared, machine: Machine, model: KernelModel, *, memory: bool = True, groups: Groups | None = None
) -> Simulated:
    """Play one iteration of what was prepared.

    Args:
        memory: whether buffers are worked out, which takes longer than the play.
        groups: who does it at once, on links that they share; None: one group alone.
    """
    modelled = prepared.modelled
    groups = groups or Groups.alone(modelled.problem.scale)
    work = _work(prepared, machine, model).times(len(groups.ranks))
    clocks = _Play(prepared, machine, work, prepared.laid_out(groups, machine.nics_of(groups.per_node)))
    for time in range(len(work.compute)):
        clocks.step(time)
    times = clocks.times()
    buffers, peak, own = _memory(prepared, model) if memory else (0, 0, 0)
    phases = clocks.phases(times)
    phases["forward"] = _with(phases["forward"], modelled.around, machine)
    return Simulated(phases, times[: groups.ranks.shape[1]], buffers, peak, own)


def _with(phase: Phase, around: Sequence[Around], machine: Machine) -> Phase:
    """A phase with what is around its tiles."""
    exposed, own = (sum(each(one, machine) for one in around) for each in (Around.exposed_s, Around.own_s))
    return replace(
        phase, seconds=phase.seconds + exposed + own, exposed_s=phase.exposed_s + exposed, overhead_s=phase.overhead_s + own
    )


def simulate(
    modelled: Modelled, machine: Machine, model: KernelModel, *, operations: tuple[Operation, ...] = (), memory: bool = True
) -> Simulated:
    """Play one iteration.

    Args:
        operations: what goes by collectives.
        memory: whether buffers are worked out, which takes longer than the play.
    """
    return play(prepare(modelled, operations), machine, model, memory=memory)


# -- what ranks do by themselves -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """Seconds of kernels, and of those of them whose results leave at the same time, ``first``; of merging, adding up and copying
    without any message; and launches: each (times, ranks)."""

    compute: Floats
    first: Floats
    besides: Floats
    launches: Floats
    tiling: Tiling

    def times(self, groups: int) -> _Work:
        """The same of several groups, one behind the other."""
        if groups == 1:
            return self
        compute, first, besides, launches = (
            np.tile(each, (1, groups)) for each in (self.compute, self.first, self.besides, self.launches)
        )
        return _Work(compute, first, besides, launches, self.tiling)


def _of_all(transfer: Transfer, collective: Collective | None, groups: int, ranks: int) -> tuple[Transfer, Collective | None]:
    """A transfer as all groups make it: rank r of group g is number g * ``ranks`` + r."""
    if groups == 1:
        return transfer, collective
    rows = np.tile(transfer.rows, (groups, 1))
    rows[:, : MoveColumn.SHARD] += np.repeat(np.arange(groups) * ranks, len(transfer.rows))[:, None]
    if collective is not None:
        sets = tuple(tuple(g * ranks + r for r in members) for g in range(groups) for members in collective.sets)
        collective = replace(collective, sets=sets, blocks=collective.blocks * groups)
    return replace(transfer, rows=rows), collective


def _work(prepared: Prepared, machine: Machine, model: KernelModel) -> _Work:
    modelled, moves, made = prepared.modelled, prepared.moves, prepared.tiling
    schedule, problem = modelled.schedule, modelled.problem
    times = 2 * moves.steps + 1 if problem.backward else moves.steps
    shape = (times, schedule.world_size)
    compute, first, launches = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    besides = _own_copies(prepared, shape)
    tiles, some = made.tiles, made.tiles.pairs > 0
    calls = model.calls(tiles)
    sums, inputs, heads = element_bytes("sum", problem), problem.itemsize, problem.heads
    merged = np.where(made.again, float(MERGED * sums * heads.v) * tiles.rows * tiles.q_heads, 0.0)
    numbers = tiles.rows * tiles.q_heads * heads.dim + tiles.keys * tiles.kv_heads * heads.kv_width
    added = np.where(some, (sums * COPIED + inputs) * numbers, 0.0)
    shared = ~prepared.alone[made.rank]
    linear = problem.rule is not None  # results and gradients are written where they belong, and summed up nowhere
    if linear:
        added = np.zeros(len(tiles))
    for backward in (False, True)[: 2 if problem.backward else 1]:
        later = backward_times(schedule, moves) if linear and backward else 2 * moves.steps - made.step
        place = (later if backward else made.step) * shape[1] + made.rank
        once = shared * (3.0 if backward else 1.0 * (merged > 0))
        for target, value in (
            (compute, model.seconds(tiles, problem, backward=backward)),
            (besides, (added if backward else merged) * shared),
            (launches, calls + once),
        ):
            target += np.bincount(place, weights=np.where(some, value, 0.0), minlength=times * shape[1]).reshape(shape)
        for rank in summarised(schedule, moves, backward=backward) if linear else ():  # before anything is sent
            own = model.seconds(tiles, problem, backward=backward)[made.rank == rank].sum()
            first[moves.steps * backward, rank] = summary_share(problem, backward=backward) * own
            compute[moves.steps * backward, rank] += first[moves.steps * backward, rank]
            launches[moves.steps * backward, rank] += 1
    return _Work(compute, first, besides / machine.memory_bytes_per_s, launches, made)


def _own_copies(prepared: Prepared, shape: tuple[int, int]) -> Floats:
    """Bytes read and written at each time whatever is computed: own tensors packed, cleared and converted."""
    modelled, moves, made = prepared.modelled, prepared.moves, prepared.tiling
    schedule, problem = modelled.schedule, modelled.problem
    found = np.zeros(shape)
    if prepared.alone.all() or problem.rule is not None:
        return found
    queries, keys = (np.bincount(side.owner, weights=side.sizes, minlength=shape[1]) for side in (schedule.q, schedule.k))
    q, kv = queries * problem.heads.q * problem.heads.dim, keys * problem.heads.kv * problem.heads.kv_width
    sums, inputs = element_bytes("sum", problem), problem.itemsize
    # Keys and values behind one another; a latent key has its value in it.
    found[0] += 0 if prepared.in_place or problem.heads.latent else COPIED * inputs * kv
    merges = np.bincount(made.rank, weights=made.again, minlength=shape[1]) > 0
    out = queries * problem.heads.q * problem.heads.v
    several = np.bincount(schedule.q.owner, weights=(moves.queries.computing > 1).any(axis=1), minlength=shape[1]) > 0
    found[moves.steps - 1] += np.where(merges | several, (sums + inputs) * out, 0.0)
    if problem.backward:
        found[moves.steps] += sums * (q + kv)
        found[-1] += (sums + inputs) * (q + kv)
    found[:, prepared.alone] = 0.0
    return found


# -- what goes between them, whatever it takes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Messages:
    """Messages of a transfer from point to point over one kind of link.

    Attributes:
        link: ``inside`` or ``across``.
        late: whether they leave after tiles are computed.
        source, to: ranks, (n,).
        ways: the links by which they leave and arrive, as numbers below that of ranks, (n,) each.
        size: bytes, (n,).
    """

    link: str
    late: bool
    source: Ints
    to: Ints
    ways: tuple[Ints, Ints]
    size: Floats


@dataclass(frozen=True)
class _Set:
    """Ranks that make a collective among themselves.

    Attributes:
        block: bytes from each to each other.
        most, fewest: ranks of a node.
        shared: ranks that send by the NIC with most.
        ways: each kind of link that it uses, in a direction, with the links of its ranks.
    """

    ranks: Ints
    block: float
    most: int
    fewest: int
    shared: int
    ways: tuple[tuple[tuple[str, int], Ints], ...]


@dataclass(frozen=True)
class _Sent:
    """A transfer: messages, or the sets of a collective, of whose bytes the share ``early`` leaves before tiles are computed."""

    begin: int
    end: int
    channel: str
    messages: tuple[_Messages, ...] = ()
    operation: Operation | None = None
    sets: tuple[_Set, ...] = ()
    early: float = 1.0


@dataclass(frozen=True)
class _Leaving:
    """What begins at a time.

    Attributes:
        packed: bytes that are read and written to pack it, (ranks,).
        batches: batches of messages that a host begins, (ranks,).
        taken: bytes that are read and written where it arrives, (ranks,), each with the time of that.
    """

    sent: tuple[_Sent, ...]
    packed: Floats
    batches: Floats
    taken: tuple[tuple[int, Floats], ...]


class _LaidOut:
    """All messages of all groups, and where they go. It depends on no speed, so a fit lays them out once.

    Attributes:
        ranks: of all groups.
    """

    def __init__(self, prepared: Prepared, groups: Groups, nics: int) -> None:
        self._schedule, self._problem = prepared.modelled.schedule, prepared.modelled.problem
        self.ranks, self._of_group = groups.ranks.size, groups.ranks.shape[1]
        self._node, place = np.divmod(groups.ranks.ravel(), groups.per_node)
        # The link that a rank sends by, as a number below that of ranks: its own inside the node, and a NIC that others may share.
        own_nic = self._node * nics + place * nics // groups.per_node
        self._way = {"inside": np.arange(self.ranks), "across": np.unique(own_nic, return_inverse=True)[1]}
        self._by_begin: dict[int, list[tuple[Transfer, Collective | None]]] = defaultdict(list)
        for transfer, collective in zip(prepared.moves.transfers, prepared.found, strict=True):
            self._by_begin[transfer.begin].append(_of_all(transfer, collective, *groups.ranks.shape))
        self._played: set[int] = set()
        self._kept: dict[int, _Leaving] = {}

    def leaving(self, time: int) -> _Leaving:
        """What begins at a time. It is kept from the second play on: a single one of thousands of ranks needs no room for all."""
        if time in self._kept:
            return self._kept[time]
        made = self._leaving(self._by_begin.get(time, []))
        if time in self._played:
            self._kept[time] = made
        self._played.add(time)
        return made

    def _leaving(self, transfers: list[tuple[Transfer, Collective | None]]) -> _Leaving:
        packed, batches = np.zeros(self.ranks), np.zeros(self.ranks)
        taken: dict[int, Floats] = defaultdict(lambda: np.zeros(self.ranks))
        sizes = [transfer.bytes(self._schedule, self._problem).astype(np.float64) for transfer, _ in transfers]
        for (transfer, collective), size in zip(transfers, sizes, strict=True):
            packed += self._packed(transfer, collective, size)
            taken[transfer.end] += self._taken(transfer, size)
        for channel, end in {(t.channel, t.end) for t, _ in transfers}:
            of = [t.rows[:, : MoveColumn.SHARD].ravel() for t, _ in transfers if (t.channel, t.end) == (channel, end)]
            batches += np.bincount(np.concatenate(of), minlength=self.ranks) > 0
        # Those that may take several times first: the others share the links with them.
        ordered = sorted(zip(transfers, sizes, strict=True), key=lambda each: each[0][0].begin - each[0][0].end)
        return _Leaving(tuple(self._sent(*each, size) for each, size in ordered), packed, batches, tuple(taken.items()))

    def _taken(self, transfer: Transfer, size: Floats) -> Floats:
        """Bytes that are read and written to take messages where they arrive, of each rank."""
        held = {"replace": 0, "merge": COPIED if transfer.kind == "final" else MERGED, "add": MERGED, "scan": MERGED}[
            transfer.payload.combine
        ]
        to = transfer.rows[:, MoveColumn.TARGET]
        return np.bincount(to, weights=held * size, minlength=self.ranks).astype(np.float64)

    def _packed(self, transfer: Transfer, collective: Collective | None, size: Floats) -> Floats:
        """Bytes that are read and written to pack messages, of each rank."""
        payload = transfer.payload
        source, group = transfer.rows[:, MoveColumn.SOURCE], transfer.rows[:, MoveColumn.GROUP]
        if payload.combine == "add":
            copied = element_bytes(payload.precision, self._problem) != element_bytes(payload.held, self._problem)
            staged = np.full(len(size), copied)
        elif payload.combine == "merge":
            staged = np.ones(len(size), dtype=bool)
        elif payload.combine == "scan":  # a state leaves as it was put together
            staged = np.zeros(len(size), dtype=bool)
        else:  # some heads of own tensors are no stretch of memory
            lengths = np.array([len(g) for g in self._schedule.heads])
            own = self._schedule.side(payload.side).owner[transfer.rows[:, MoveColumn.SHARD]] == source % self._of_group
            staged = (lengths[group] < self._problem.heads.q) & own
        if collective is not None and collective.operation == "all_gather":  # what goes to all is packed once
            size = size / (len(collective.sets[0]) - 1)
        found: Floats = np.bincount(source, weights=COPIED * size * staged, minlength=self.ranks).astype(np.float64)
        return found

    def _sent(self, transfer: Transfer, collective: Collective | None, size: Floats) -> _Sent:
        """A transfer. Of sums that come from many ranks only the first rounds leave before tiles are computed."""
        if collective is not None:
            in_rounds = collective.operation == "reduce_scatter" and transfer.begin == transfer.end
            rounds = -(-len(collective.sets[0]) // ROUND) if in_rounds and not self._direct(transfer) else 1
            sets = tuple(self._set(members, block) for members, block in zip(collective.sets, collective.blocks, strict=True))
            early = min(1.0, AT_ONCE / rounds)
            return _Sent(transfer.begin, transfer.end, transfer.channel, (), collective.operation, sets, early)
        source, to = transfer.rows[:, MoveColumn.SOURCE], transfer.rows[:, MoveColumn.TARGET]
        late = rounds_of(transfer, self._schedule, transfer.rows) >= AT_ONCE
        outside = self._node[source] != self._node[to]
        messages = []
        for is_late in (False, True):
            for link, there in (("inside", ~outside), ("across", outside)):
                which = there & (late == is_late)
                if which.any():
                    one, other, way = source[which], to[which], self._way[link]
                    messages.append(_Messages(link, is_late, one, other, (way[one], way[other]), size[which]))
        return _Sent(transfer.begin, transfer.end, transfer.channel, tuple(messages))

    def _direct(self, transfer: Transfer) -> bool:
        """Whether sums leave from the buffer as it is: that is, in the order of their ranks, in the type in which they are held."""
        payload = transfer.payload
        if element_bytes(payload.precision, self._problem) != element_bytes(payload.held, self._problem):
            return False
        owners = self._schedule.side(payload.side).owner[distinct(transfer.rows[:, MoveColumn.SHARD])]
        return bool((np.diff(owners) >= 0).all())

    def _set(self, members: Sequence[int], block: float) -> _Set:
        ranks = np.array(members)
        nodes = np.unique(self._node[ranks], return_counts=True)[1]
        shared = int(np.unique(self._way["across"][ranks], return_counts=True)[1].max())
        used = [name for name, some in (("inside", nodes.max() > 1), ("across", len(nodes) > 1)) if some]
        ways = tuple(((name, direction), self._way[name][ranks]) for name in used for direction in (0, 1))
        return _Set(ranks, block, int(nodes.max()), int(nodes.min()), shared, ways)


# -- and when ------------------------------------------------------------------------------------------------------------


class _Play:
    """The clocks of all ranks of all groups."""

    def __init__(self, prepared: Prepared, machine: Machine, work: _Work, laid_out: _LaidOut) -> None:
        self._machine, self._work, self._laid_out = machine, work, laid_out
        self._steps, self._backward = prepared.moves.steps, prepared.modelled.problem.backward
        ranks = self._ranks = laid_out.ranks
        self._now, self._host = np.zeros(ranks), np.zeros(ranks)
        self._alone, self._alone_host = np.zeros(ranks), np.zeros(ranks)  # the same without any message
        self._at_half: list[Floats] = []  # what phases take so
        self._streams: dict[str, Floats] = defaultdict(lambda: np.zeros(ranks))  # until when a channel is busy
        self._links: dict[tuple[str, int], Floats] = defaultdict(lambda: np.zeros(ranks))  # and a link, by direction
        self._long: dict[tuple[str, int], Floats] = defaultdict(lambda: np.zeros(ranks))  # with what may take several times
        self._awaited: dict[int, list[tuple[str, _Messages]]] = defaultdict(list)  # with their channel
        self._arrivals: dict[int, Floats] = defaultdict(lambda: np.zeros(ranks))
        self._taken: dict[int, Floats] = defaultdict(lambda: np.zeros(ranks))  # bytes, by the time at which they are taken
        self._times = np.empty((len(work.compute), ranks, 4))

    def step(self, time: int) -> None:
        machine, work, leaving = self._machine, self._work, self._laid_out.leaving(time)
        if time == self._steps:  # phases are timed apart: all ranks begin backward together
            self._end_phase()
        begin = self._now
        if machine.device == "cpu":  # the host is the rank
            self._host, self._alone_host = np.maximum(self._host, begin), np.maximum(self._alone_host, self._alone)
        for end, taken in leaving.taken:
            self._taken[end] += taken
        self._host = self._host + leaving.batches * machine.message_s
        first, launching = work.first[time], work.launches[time] * machine.launch_s
        sent = np.maximum(begin + first + leaving.packed / machine.memory_bytes_per_s, self._host)
        computing = work.compute[time] - first + work.besides[time]
        self._host = self._host + launching
        computed = np.maximum(sent + computing, self._host)
        self._alone_host = self._alone_host + launching
        self._alone = np.maximum(self._alone + first + computing, self._alone_host)
        for each in leaving.sent:
            self._post(each, sent, computed)
        there = self._arrived(time, computed)
        np.stack([begin, sent, computed, there], axis=1, out=self._times[time])
        self._now = there

    def _end_phase(self) -> None:
        self._at_half.append(self._alone)
        for name in ("_now", "_host"):
            setattr(self, name, np.full(self._ranks, self._now.max()))
        for name in ("_alone", "_alone_host"):
            setattr(self, name, np.zeros(self._ranks))

    def _arrived(self, time: int, computed: Floats) -> Floats:
        """When all that must be there by the end of a time is there and taken."""
        for channel, messages in self._awaited.pop(time, []):
            one, other = messages.ways
            ends = np.maximum(self._long[messages.link, 0][one], self._long[messages.link, 1][other])
            self._come(channel, time, messages, ends)
        there = np.maximum(computed, self._arrivals.pop(time, computed))
        return there + self._taken.pop(time, np.zeros(self._ranks)) / self._machine.memory_bytes_per_s

    def _post(self, transfer: _Sent, sent: Floats, computed: Floats) -> None:
        """Begin a transfer."""
        if transfer.operation is not None:
            self._collective(transfer, transfer.operation, sent, transfer.early)
            if transfer.early < 1:
                self._collective(transfer, transfer.operation, computed, 1 - transfer.early)
        for late, ready in ((False, sent), (True, computed)):
            if messages := [each for each in transfer.messages if each.late == late]:
                self._messages(transfer, messages, np.maximum(ready, self._streams[transfer.channel]))

    def _messages(self, transfer: _Sent, messages: list[_Messages], free: Floats) -> None:
        """Messages from point to point: each begins when both ends are ready."""
        for each in messages:
            begins = np.maximum(free[each.source], free[each.to])
            seconds = each.size / self._link(each).bytes_per_s
            if transfer.end > transfer.begin:
                self._on_link_long(each, seconds, begins)
                self._awaited[transfer.end].append((transfer.channel, each))
            else:
                self._come(transfer.channel, transfer.end, each, self._on_link(each, seconds, begins))

    def _link(self, messages: _Messages) -> Link:
        return self._machine.inside if messages.link == "inside" else self._machine.across

    def _on_link(self, messages: _Messages, seconds: Floats, begins: Floats) -> Floats:
        """When messages that each take ``seconds`` by themselves have gone over a link, (n,)."""
        ends = begins + seconds
        for direction, ranks in enumerate(messages.ways):
            free, long = self._links[messages.link, direction], self._long[messages.link, direction]
            first, busy = self._sums(ranks, seconds, begins)
            start = np.maximum(first, free)
            shared = np.minimum(busy, np.maximum(long - start, 0))
            used = busy > 0
            long[used & (shared > 0)] += busy[used & (shared > 0)]
            free[used] = (start + busy + shared)[used]
            ends = np.maximum(ends, np.where(used[ranks], free[ranks], ends))
        return ends

    def _on_link_long(self, messages: _Messages, seconds: Floats, begins: Floats) -> None:
        """Messages that others go past: they end later for each of these."""
        for direction, ranks in enumerate(messages.ways):
            long = self._long[messages.link, direction]
            first, busy = self._sums(ranks, seconds, begins)
            used = np.isfinite(first)
            long[used] = (np.maximum(first, long) + busy)[used]

    def _sums(self, ranks: Ints, seconds: Floats, begins: Floats) -> tuple[Floats, Floats]:
        """When the first message of each link begins (inf: it has none), and how long all take, both (ranks,)."""
        first = np.full(self._ranks, np.inf)
        np.minimum.at(first, ranks, begins)
        return first, np.bincount(ranks, weights=seconds, minlength=self._ranks).astype(np.float64)

    def _come(self, channel: str, end: int, messages: _Messages, ends: Floats) -> None:
        """Messages have gone over their link: they are there a latency later."""
        there = ends + self._link(messages).latency_s
        for ranks in (messages.source, messages.to):
            np.maximum.at(self._arrivals[end], ranks, there)
            np.maximum.at(self._streams[channel], ranks, there)

    def _collective(self, transfer: _Sent, operation: Operation, ready: Floats, share: float) -> None:
        """A collective of each set, of this share of its bytes. It begins when all ranks of the set are ready."""
        stream = self._streams[transfer.channel]
        free = np.maximum(ready, stream)
        for each in transfer.sets:
            ways = [(self._links[link], way) for link, way in each.ways]
            begin = float(max(free[each.ranks].max(), *(busy[way].max() for busy, way in ways)))
            end = begin + self._machine.collective_s(
                operation, share * each.block, len(each.ranks), each.most, each.fewest, each.shared
            )
            for busy, way in ((self._arrivals[transfer.end], each.ranks), (stream, each.ranks), *ways):
                busy[way] = np.maximum(busy[way], end)

    def times(self) -> Floats:
        return self._times.swapaxes(0, 1)

    def phases(self, times: Floats) -> dict[str, Phase]:
        names = ("forward", "backward") if self._backward else ("forward",)
        parts = (slice(0, self._steps), slice(self._steps, None))
        alone = (*self._at_half, self._alone)
        return {
            name: _phase(times[:, part], self._work.compute[part], own)
            for name, part, own in zip(names, parts, alone, strict=False)
        }


def _phase(times: Floats, compute: Floats, alone: Floats) -> Phase:
    """A phase from what ranks did in it, and from what each takes without messages."""
    seconds = float(times[:, -1, 3].max() - times[:, 0, 0].min())
    own = compute.sum(axis=0)
    busiest, slowest = float(own.max()), float(alone.max())
    return Phase(seconds, float(own.mean()), busiest, max(0.0, seconds - slowest), max(0.0, min(slowest, seconds) - busiest))


# -- memory --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holding:
    """What a rank holds beside its inputs, without what its kernel needs inside.

    Attributes:
        tiles: those that it computes, as numbers of all tiles.
        buffer_bytes: of buffers, which live as long as the run.
        fixed: bytes that are held while tiles are computed, forward and backward; backward: None where there is none.
        besides: bytes that are held at other times instead of what tiles need, in each.
        results: bytes of each tile's results, in each, (n,).
        tokens: that it has.
        finals: (tokens, heads) of results of others' queries that it alone computes, and keeps for backward.
        kept: bytes of each buffer that is kept from forward to backward.
    """

    tiles: Ints
    buffer_bytes: int
    fixed: tuple[int, int | None]
    besides: tuple[int, int]
    results: tuple[Floats, Floats]
    tokens: int = 0
    finals: tuple[tuple[int, int], ...] = ()
    kept: tuple[int, ...] = ()

    def peak_bytes(self, workspaces: Sequence[Floats]) -> int:
        """The most that is held at once; ``workspaces``: bytes that each of all tiles needs inside, forward and backward."""
        return max(
            fixed + max(besides, int((results + inside[self.tiles]).max(initial=0)))
            for fixed, besides, results, inside in zip(self.fixed, self.besides, self.results, workspaces, strict=True)
            if fixed is not None
        )


def _memory(prepared: Prepared, model: KernelModel) -> tuple[int, int, int]:
    """Bytes of the rank with most: buffers, peak without inputs, and that without what kernels need inside."""
    tiles, problem, held = prepared.tiling.tiles, prepared.modelled.problem, holdings(prepared)
    inside = [model.workspace_bytes(tiles, problem, backward=backward) for backward in (False, True)]
    own = peak_bytes(held, [np.zeros(len(tiles)), np.zeros(len(tiles))])
    around = sum(each.buffers for each in prepared.modelled.around)
    return around + max(each.buffer_bytes for each in held), around + peak_bytes(held, inside), around + own


def holdings(prepared: Prepared) -> tuple[Holding, ...]:
    """What the rank with most tiles, the first and the last hold."""
    modelled, made = prepared.modelled, prepared.tiling
    schedule = modelled.schedule
    tiles = np.bincount(made.rank, minlength=schedule.world_size)
    ranks = dict.fromkeys([int(tiles.argmax()), 0, schedule.world_size - 1])
    if modelled.problem.rule is not None:
        return tuple(_linear_holding(prepared, rank) for rank in ranks)
    return tuple(
        _holding(prepared, Program(schedule, prepared.moves, modelled.problem, rank, prepared.operations), rank) for rank in ranks
    )


def _linear_holding(prepared: Prepared, rank: int) -> Holding:
    """What ``scan`` allocates: what comes, results, and gradients. What the kernel keeps for backward is the kernel's."""
    modelled, made = prepared.modelled, prepared.tiling
    problem, schedule = modelled.problem, modelled.schedule
    own = np.flatnonzero((made.rank == rank) & (made.tiles.pairs > 0))
    heads, tokens = problem.heads, int(schedule.k.sizes[schedule.k.own(rank)].sum())
    come = received_bytes(schedule, prepared.moves, problem, rank)
    gates = PAYLOADS["gates"].elements(heads, problem.rule) * heads.kv * element_bytes("sum", problem)
    given = (heads.q * heads.dim + heads.kv * heads.kv_width) * problem.itemsize + gates
    out = come + tokens * heads.q * heads.v * problem.itemsize
    nothing = np.zeros(len(own))
    return Holding(own, come, (out, out + tokens * given if problem.backward else None), (0, 0), (nothing, nothing), tokens)


def peak_bytes(held: Sequence[Holding], workspaces: Sequence[Floats]) -> int:
    """Of the rank with most."""
    return max(each.peak_bytes(workspaces) for each in held)


def _holding(prepared: Prepared, program: Program, rank: int) -> Holding:
    """What ``execute`` allocates."""
    modelled, made = prepared.modelled, prepared.tiling
    problem, tiles = modelled.problem, made.tiles
    heads, inputs, sums = problem.heads, problem.itemsize, element_bytes("sum", problem)
    queries, tokens = program.tokens["q"], program.tokens["kv"]
    own = np.flatnonzero((made.rank == rank) & (tiles.pairs > 0))
    rows, keys = (tiles.rows * tiles.q_heads)[own], (tiles.keys * tiles.kv_heads)[own]
    q, kv, lse = queries * heads.q * heads.dim, tokens * heads.kv * heads.kv_width, queries * heads.q * sums
    result = queries * heads.q * heads.v
    results: tuple[Floats, Floats] = (
        (rows * (heads.v * inputs + sums)).astype(np.float64),
        ((rows * heads.dim + keys * (heads.dim + heads.v)) * inputs).astype(np.float64),
    )
    out = result * inputs + lse
    if prepared.alone[rank]:
        return Holding(own, 0, (0, out if problem.backward else None), (out, 0), results, queries)
    others = tuple(
        (sum(modelled.schedule.q.sizes[list(bundle)].tolist()), len(modelled.schedule.heads[group]))
        for group, bundle in program.finals
    )
    finals = sum(rows * held * (heads.v * inputs + sums) for rows, held in others)
    wide = bool(made.again[own].any()) or not program.all_final  # merged, so summed up in the type of sums
    packed = 0 if prepared.in_place or heads.latent else kv * inputs
    total, held = result * (sums if wide else inputs) + lse, program.buffer_bytes + finals + packed
    forward, backward = held + total, None
    stats = (2 * lse, 2 * result * sums) if program.sends_stats else (0, 0)  # and what it takes to work them out
    if problem.backward:
        backward = held + out + (q + kv) * sums + stats[0]
    besides = (result * inputs if wide else 0, max(stats[1], (q + kv) * inputs))
    kept = tuple(program.slots[slot] for slot in sorted(program.kept_slots))
    return Holding(own, program.buffer_bytes, (forward, backward), besides, results, queries, others, kept)
