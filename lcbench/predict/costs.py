"""What documents of a batch cost on groups of ranks, for planners: by the simulator, with what was fitted.

A curve belongs to a method, a size of group and how its ranks lie on nodes. Its points are groups that are simulated as they would
be run, forward and backward: as many documents of one length as a group holds, packed behind one another. So a document's share of
what a full group takes is in it, and communication that a full group hides is not. What even the smallest group takes is the
overhead. Lengths and sizes between points follow in logarithms, and pairs between those of causal and of full documents.

What is left out: groups of different lengths hide communication, and are out of balance, otherwise than groups of equal ones; and
groups that are at work at once are simulated as if each had its links alone. ``docs/predicting.md`` says how far this is off.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.cp.sub_groups import scale_of
from lcbench.grid import build
from lcbench.grid.cell import Cell
from lcbench.kernels.base import Kernel
from lcbench.masks.band import OPEN, BandMask, Ints
from lcbench.masks.document import squares
from lcbench.planners.base import Cost, Documents, Say
from lcbench.planners.base import Offload as Offloads
from lcbench.planners.telling import telling
from lcbench.predict.composed import Times, rank_cores
from lcbench.predict.counted import counted
from lcbench.predict.draws import operations_on
from lcbench.predict.fitted import DenseFit, KernelFit
from lcbench.problem import Mesh, Problem, Scale
from lcbench.schedule.machine import Floats, Machine
from lcbench.schedule.simulate import Groups, Phase, Simulated, play, prepare
from lcbench.workloads.base import Workload
from lcbench.workloads.parts import BATCH, Share
from lcbench.workloads.planned import documents_of
from lcbench.workloads.recompute.none import NoRecompute
from lcbench.workloads.recompute.offload import Offload

SHORTEST = 128  # tokens of the shortest documents that are simulated; shorter ones cost as much a token
PACKED = 64  # documents of a simulated group, at most
EXACT = 8  # groups of up to so many ranks are simulated, larger ones at powers of two and half way between
NEAR = 1e-3  # relative difference of pairs from causal or full ones that is none
FULLER = 0.75  # share of a square that is as near to causal as to full
LEAST = 0.02  # of a causal document's cost: what one of fewer pairs costs at least

UNEVEN, GOLDEN = 0.25, (math.sqrt(5) - 1) / 2  # how far simulated documents are from one length
SAMPLES, SAMPLED = 3, 256  # groups of real documents that are simulated, and documents of each, at most
FEW = 64  # ranks of a group, of more than which one is simulated, since that takes seconds
TINY = 1e-6  # of what a group takes: what its documents take at least

_known: dict[str, Curves] = {}


@dataclass(frozen=True)
class Shape:
    """A group of ranks as curves know it.

    Attributes:
        degree: its ranks.
        together: of them on each node that has as many as any; the last node may have fewer.
    """

    degree: int
    together: int

    @classmethod
    def compact(cls, degree: int, per_node: int) -> Shape:
        """On as few nodes as hold it."""
        return cls(degree, min(degree, per_node))

    @classmethod
    def of(cls, ranks: Sequence[int], per_node: int) -> Shape:
        """Of ranks wherever they are: on more nodes than need be, the power of two below their mean number on a node counts."""
        degree, nodes = len(ranks), len({rank // per_node for rank in ranks})
        if nodes == -(-degree // per_node):
            return cls.compact(degree, per_node)
        return cls(degree, 1 << ((degree // nodes).bit_length() - 1))

    def near(self, degree: int) -> Shape:
        """Another size that lies on nodes likewise."""
        if self.together == self.degree:
            return Shape(degree, degree)
        return Shape(degree, max(1, min(self.together, degree // 2)))

    def ranks(self, per_node: int) -> Ints:
        """Ranks that lie so, (degree,)."""
        node, place = np.divmod(np.arange(self.degree), self.together)
        return np.asarray(node * per_node + place, dtype=np.int64)


@dataclass(frozen=True)
class Micro:
    """A micro-batch of one group.

    Attributes:
        phase: what it takes, forward and backward.
        simulated: its attention, once.
        tokens: of the rank with most.
    """

    phase: Phase
    simulated: Simulated
    tokens: int

    @property
    def forward_s(self) -> float:
        """When its forward ends, seconds from its begin: attention's forward and backward share what is beside it."""
        forward, every = self.simulated.phases["forward"].seconds, sum(p.seconds for p in self.simulated.phases.values())
        return self.phase.seconds * forward / every


class Rates(Protocol):
    """What is known of a machine (``predict.predictor``)."""

    @property
    def machine(self) -> Machine: ...

    @abstractmethod
    def dense(self, cell: Cell) -> DenseFit: ...

    @abstractmethod
    def kernel(self, cell: Cell, strategy: str) -> tuple[KernelFit, str, float]: ...


@dataclass(frozen=True, eq=False)
class Curves:
    """Simulated groups of a problem on a machine, each once in a process.

    Attributes:
        problem: of the whole batch: its heads, type, direction and ranks count.
        mesh, scale: of all ranks.
        workload: what a micro-batch has besides its attention.
        recompute: as of ``Work``.
        inside: strategies by name, as of ``Strategy.inside``.
        models: the kernel as each of them calls it.
        dense: what treats every token alone.
        capacity: tokens of a rank in a micro-batch, at most.
    """

    problem: Problem
    mesh: Mesh
    scale: Scale
    workload: Workload
    recompute: Any
    inside: dict[str, Scheduled]
    kernel: Kernel
    models: dict[str, KernelFit]
    dense: DenseFit
    machine: Machine
    capacity: int
    _points: dict[tuple[str, Shape, int, int], float] = field(default_factory=dict)
    _spent_s: list[float] = field(default_factory=list)
    _say: Say = field(default_factory=telling, repr=False)  # curves of the same shape are known by what they say of themselves

    @property
    def per_node(self) -> int:
        """Ranks of a node."""
        return self.problem.scale.gpus_per_node

    @cached_property
    def cores(self) -> float:
        """Of a rank, while all are at work; 0: it has a device."""
        return next(iter(self.models.values())).rank_cores

    def supported(self, method: str, degree: int) -> bool:
        """Whether a method shares documents among so many ranks at all."""
        mask = packed(2 * SHORTEST * degree, 1)
        scale = scale_of(list(range(degree)), self.per_node)
        return self.inside[method].unsupported(replace(self.problem, seqlen=mask.num_q, scale=scale), mask) is None

    def group(self, method: str, ranks: Ints, mask: BandMask, *, memory: bool = False, offload: float = 0.0) -> Micro:
        """A micro-batch of one group.

        Args:
            ranks: where they are.
            mask: of its documents, behind one another.
            memory: whether what it holds is worked out too.
            offload: share of what its layers keep that goes to the host's memory.
        """
        begun = time.perf_counter()
        self._say(f"{len(self._spent_s)} groups simulated to know what documents cost, next {len(ranks)} ranks by {method}")
        scale, strategy = scale_of(ranks.tolist(), self.per_node), self.inside[method]
        problem = replace(self.problem, seqlen=mask.num_q, scale=scale)
        modelled = strategy.modelled(problem, mask)
        prepared = prepare(modelled, operations_on(self.machine) if strategy.lowering == "auto" else ())
        if self.machine.device == "cpu":
            prepared = replace(prepared, tiling=counted(prepared.tiling, modelled, self.kernel))
        groups = Groups(ranks[None], self.per_node)
        simulated = play(prepared, self.machine, self.models[method], memory=memory, groups=groups)
        held = np.bincount(modelled.schedule.q.owner, weights=modelled.schedule.q.sizes, minlength=len(ranks))
        times = self._times(simulated.phases)
        share = Share(problem, int(held.max()), self.mesh, fused=self.machine.device != "cpu", hides=times.hides)
        recompute = Offload(offload) if offload else self.recompute
        found = Micro(times.phase(self.workload.made(share, recompute).phases[BATCH]), simulated, share.tokens)
        self._spent_s.append(time.perf_counter() - begun)
        return found

    @property
    def spent_s(self) -> float:
        """Seconds that simulating took so far."""
        return sum(self._spent_s)

    def _times(self, attention: dict[str, Phase]) -> Times:
        return Times(self.machine, self.dense, self.cores or 1.0, attention, self.mesh, self.scale)

    @cached_property
    def once(self) -> dict[str, Phase]:
        """What comes once in a batch, such as sums of gradients, by name."""
        phases = self.workload.made(Share(self.problem, self.capacity, self.mesh), self.recompute).phases
        return {name: self._times({}).phase(parts) for name, parts in phases.items() if name != BATCH}

    @cached_property
    def offloads(self) -> Offloads | None:
        """What documents may offload: of layers of which nothing is computed again."""
        share = Share(self.problem, self.capacity, self.mesh, fused=self.machine.device != "cpu")
        keeps = self.workload.layers_keep(share)
        if keeps is None or not isinstance(self.recompute, NoRecompute):
            return None
        layers, token_bytes = keeps
        alone = self.group(next(iter(self.inside)), np.zeros(1, dtype=np.int64), packed(self.capacity, 1))
        return Offloads(layers, token_bytes, self._times({}).host_bytes_per_s, alone.forward_s / alone.phase.seconds)

    def overhead_s(self, method: str, shape: Shape) -> float:
        """Of a group with next to nothing in it."""
        return self._point(method, shape, 0, 0)

    def shares_s(self, method: str, shape: Shape, tokens: Ints, hi: int) -> Floats:
        """What causal (``hi=0``) or full (``hi=OPEN``) documents each add to a group, (n,)."""
        rungs = self._rungs(shape, int(tokens.max(initial=SHORTEST)))
        seconds = np.maximum.accumulate([self._point(method, shape, rung, hi) for rung in rungs.tolist()])
        places, values, at = np.log(rungs), np.log(seconds), np.log(tokens)
        # Beyond what a group holds as the last two lengths go, between linear and quadratic.
        slope = min(max((values[-1] - values[-2]) / (places[-1] - places[-2]), 1.0), 2.0)
        found = np.interp(at, places, values) + slope * np.maximum(at - places[-1], 0) + np.minimum(at - places[0], 0)
        return np.asarray(np.exp(found))

    def _rungs(self, shape: Shape, longest: int) -> Ints:
        """Lengths to simulate: powers of two up to the first that is no shorter than the longest document, as far as they fit. In
        groups of many ranks what short documents take goes by their tokens, which are sent."""
        shortest = max(SHORTEST, 1 << (shape.degree.bit_length() - 1))
        most = max(min(longest, self.capacity * shape.degree), shortest + 1)
        found: Ints = 1 << np.arange(shortest.bit_length() - 1, (most - 1).bit_length() + 1)
        return found

    def _point(self, method: str, shape: Shape, tokens: int, hi: int) -> float:
        """What a document of so many tokens adds to a group; 0 tokens: what a group takes without."""
        key = (method, shape, tokens, hi)
        if key not in self._points:
            self._points[key] = self._simulated(*key)
        return self._points[key]

    def _simulated(self, method: str, shape: Shape, tokens: int, hi: int) -> float:
        ranks, least = shape.ranks(self.per_node), 2 * shape.degree  # strategies want two tokens of every rank
        if not tokens:
            return self.group(method, ranks, packed(least, 1)).phase.seconds
        count = max(min(self.capacity * shape.degree // tokens, PACKED), -(-least // tokens), 1)
        whole = self.group(method, ranks, packed(tokens, count, hi)).phase.seconds
        return max(whole - self.overhead_s(method, shape), TINY * whole) / count


@dataclass(frozen=True, eq=False)
class FittedCost(Cost):
    """The cost of documents by curves.

    Attributes:
        curves: what is simulated, when it is asked for.
        by_method: among how many ranks each method shares documents.
        error: the least that times by it may be off, relative, by what the kernel's fit rests on.
        sample: documents of which mixed groups are simulated, to see what these take more than groups of one length.
    """

    curves: Curves
    by_method: dict[str, frozenset[int]]
    basis: str
    error: float
    sample: Documents
    _factors: dict[tuple[str, Shape], float] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.by_method)

    @cached_property
    def degrees(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(sorted(frozenset[int]().union(*self.by_method.values())))

    @property
    def reduce_s(self) -> float:  # type: ignore[override]
        return sum(phase.seconds for phase in self.curves.once.values())

    @property
    def offloads(self) -> Offloads | None:  # type: ignore[override]
        return self.curves.offloads

    @property
    def prepared_s(self) -> float:  # type: ignore[override]
        return self.curves.spent_s

    def documents_s(self, documents: Documents, degree: int, method: str | None = None) -> Floats:
        shape = Shape.compact(degree, self.curves.per_node)
        found = [self._shares_s(documents, shape, name) for name in ([method] if method else self.methods)]
        return np.asarray(np.min(found, axis=0))

    def overhead_s(self, degree: int) -> float:
        shape = Shape.compact(degree, self.curves.per_node)
        return min(self._overhead_s(name, shape) for name in self.methods)

    def group(self, documents: Documents, ranks: Sequence[int]) -> tuple[float, str]:
        shape = Shape.of(ranks, self.curves.per_node)
        by = {name: float(self._shares_s(documents, shape, name).sum()) + self._overhead_s(name, shape) for name in self.methods}
        best = min(by, key=by.__getitem__)
        return by[best], best

    def _overhead_s(self, method: str, shape: Shape) -> float:
        found = [w * math.log(self.curves.overhead_s(method, one)) for one, w in self._neighbours(method, shape)]
        return math.exp(sum(found)) if found else math.inf

    def _shares_s(self, documents: Documents, shape: Shape, method: str) -> Floats:
        found = np.zeros(len(documents))
        neighbours = self._neighbours(method, shape)
        for one, weight in neighbours:
            # A document that has a group for itself is mixed with nothing.
            others = 1 - np.minimum(documents.tokens / (self.curves.capacity * one.degree), 1.0)
            mixed = 1 + (self._mixed(method, one) - 1) * others
            found += weight * np.log(mixed * self._by_pairs_s(documents, one, method))
        return np.exp(found) if neighbours else np.full(len(documents), np.inf)

    def _neighbours(self, method: str, shape: Shape) -> list[tuple[Shape, float]]:
        """Shapes that are simulated for one, with weights in logarithms; none: the method does not share among so many ranks."""
        own, degree = self.by_method[method], shape.degree
        if degree not in own:
            return []
        below = max((d for d in own if d <= degree and _is_rung(d)), default=0)
        above = min((d for d in own if d >= degree and _is_rung(d)), default=0)
        if not below or not above or below == above:
            return [(shape, 1.0)]
        weight = math.log(degree / below) / math.log(above / below)
        return [(shape.near(below), 1 - weight), (shape.near(above), weight)]

    def _mixed(self, method: str, shape: Shape) -> float:
        """What documents take in mixed groups, over what they take among those of their length."""
        key = (method, shape)
        if key not in self._factors:
            random = np.random.default_rng(0)
            every = [
                self._sampled(method, shape, random.permutation(len(self.sample)))
                for _ in range(SAMPLES if shape.degree <= FEW else 1)
            ]
            found = [one for one in every if one is not None]
            self._factors[key] = float(np.median(found)) if found else 1.0
        return self._factors[key]

    def _sampled(self, method: str, shape: Shape, order: Ints) -> float | None:
        """The same of one group, as many of the documents as fit, in an order; None: not two do."""
        curves, tokens = self.curves, self.sample.tokens[order]
        order = order[tokens <= curves.capacity * shape.degree]
        bounds = np.concatenate([[0], np.cumsum(self.sample.tokens[order])])
        count = min(int(np.searchsorted(bounds, curves.capacity * shape.degree, side="right")) - 1, SAMPLED)
        if shape.degree == 1 or count < 2 or bounds[count] < 2 * shape.degree:
            return None
        own = self.sample.of(order[:count])
        hi = 0 if own.pairs.sum() < FULLER * (own.tokens.astype(np.float64) ** 2).sum() else OPEN
        whole = curves.group(method, shape.ranks(curves.per_node), _behind_one_another(bounds[: count + 1], hi)).phase.seconds
        overhead = curves.overhead_s(method, shape)
        return max(whole - overhead, TINY * whole) / float(curves.shares_s(method, shape, own.tokens, hi).sum())

    def _by_pairs_s(self, documents: Documents, shape: Shape, method: str) -> Floats:
        """What documents add, (n,): of causal or of full ones, or, of others, on the line through both."""
        tokens, pairs = documents.tokens, documents.pairs.astype(np.float64)
        causal, full = tokens * (tokens + 1) / 2, tokens.astype(np.float64) ** 2
        for of, hi in ((causal, 0), (full, OPEN)):
            if (np.abs(pairs - of) <= NEAR * of).all():
                return self.curves.shares_s(method, shape, tokens, hi)
        half, whole = (self.curves.shares_s(method, shape, tokens, hi) for hi in (0, OPEN))
        slope = (np.maximum(whole, half) - half) / np.maximum(full - causal, 1.0)
        return np.maximum(half + (pairs - causal) * slope, LEAST * half)


def _is_rung(degree: int) -> bool:
    """Whether groups of so many ranks are simulated: of few, of a power of two, and half way to the next."""
    odd = degree // (degree & -degree)
    return degree <= EXACT or odd in (1, 3)


def packed(tokens: int, count: int, hi: int = 0) -> BandMask:
    """Documents of about so many tokens each, behind one another, in all one more than divides: as real ones they end nowhere in
    particular. ``hi``: 0 of causal, ``OPEN`` of full ones."""
    bounds = np.arange(count + 1, dtype=np.int64) * tokens
    bounds[1:-1] += np.rint(UNEVEN * tokens * (np.arange(1, count) * GOLDEN % 1 - 0.5)).astype(np.int64)
    bounds[-1] += 1
    return _behind_one_another(bounds, hi)


def _behind_one_another(bounds: Ints, hi: int) -> BandMask:
    return BandMask.of(int(bounds[-1]), int(bounds[-1]), squares(bounds, hi=hi))


def cost_of(cell: Cell, rates: Rates, slower: float = 1.0) -> FittedCost:
    """What documents cost a cell of a workload that takes a planner. What was simulated for one cell others of the same shape use.

    Args:
        slower: how many times as long as those of the rates kernels take.

    Raises:
        ValueError: its workload has no capacity, since it takes no planner, or its strategy no schedule inside of groups.
    """
    curves, basis, error = curves_of(cell, rates, slower)
    ranks = cell.problem.scale.world_size
    by_method = {name: frozenset(d for d in range(1, ranks + 1) if curves.supported(name, d)) for name in curves.inside}
    return FittedCost(curves, by_method, basis, error, documents_of(build.cell_mask(cell, 0))[1])


def curves_of(cell: Cell, rates: Rates, slower: float = 1.0) -> tuple[Curves, str, float]:
    """The curves of a cell, what they rest on, in words, and the least error of that."""
    workload, strategy = build.build_workload(cell.config.get("workload")), build.build_strategy(cell.config["cp"])
    capacity = getattr(workload, "capacity", None)
    if capacity is None or not strategy.inside:
        raise ValueError(f"nothing is planned for workload={cell.words.get('workload', 'attention')} cp={cell.words['cp']}")
    inside = strategy.inside
    found = {name: rates.kernel(cell, name) for name in inside}
    cores = rank_cores(next(iter(found.values()))[0].cores, cell.scale.gpus_per_node, cell.scale.gpus_per_node)
    state = {"rank_cores": cores, "read_bytes_per_s": rates.machine.read_bytes_per_s}
    models = {}
    for name, (fit, _, _) in found.items():
        factors = tuple(factor.model_copy(update={"compute": slower * factor.compute}) for factor in fit.factors)
        models[name] = fit.model_copy(update=state | {"factors": factors})
    dense = rates.dense(cell)
    problem = replace(cell.problem, seqlen=0)
    recompute = build.build_recompute(cell.config)
    made = Curves(
        problem, cell.mesh, cell.scale, workload, recompute, inside, build.build_kernel(cell.config["kernel"]), models, dense,
        rates.machine, capacity,
    )  # fmt: skip
    basis = "; ".join(dict.fromkeys(basis for _, basis, _ in found.values()))
    return _known.setdefault(repr(made), made), basis, max(error for _, _, error in found.values())
