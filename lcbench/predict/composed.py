"""A cell as what it is made of: passes of its attention, which are played, and parts beside these, which are looked up.

What is assumed of a rank's streams: messages of weights and copies to the host go beside everything that the phase computes, and
show only where they take longer; those of tensor parallelism and sums of gradients after backward are waited for. CPU ranks do
one thing after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np

from lcbench.grid import build
from lcbench.grid.cell import Cell
from lcbench.kernels.base import Kernel, Platform
from lcbench.kernels.cache import CacheKind, ReadsCache, unread
from lcbench.masks.band import Ints
from lcbench.masks.block import BlockMap
from lcbench.predict.draws import draws_of
from lcbench.predict.fitted import DenseFit, KernelFit
from lcbench.predict.machines import platform_of
from lcbench.problem import Mesh, Scale
from lcbench.schedule.machine import Machine
from lcbench.schedule.schedule import MoveColumn
from lcbench.schedule.simulate import COPIED, Groups, Holding, Phase, Prepared, Simulated, holdings, play
from lcbench.workloads.parts import Attend, Compute, Copied, Exchange, Made, Part, Share, ToHost, flops_of

NOTHING = Phase(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Together:
    """A cell as a machine plays it.

    Attributes:
        phases: by name, of all groups at once.
        attention: passes of the attention, by direction.
        made: what the cell is made of.
        draws: the simulated draws.
        metrics: what is known besides, by keys of ``measure.metrics``.
        notes: what a result would have in its provenance.
    """

    phases: dict[str, Phase]
    attention: dict[str, Phase]
    made: Made
    draws: tuple[Simulated, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attended:
    """The attention of a cell as a machine plays it.

    Attributes:
        attention: passes, by direction.
        draws: the simulated draws.
        times: how long parts take beside it.
    """

    attention: dict[str, Phase]
    draws: tuple[Simulated, ...]
    times: Times


@dataclass(frozen=True)
class Composed:
    """A cell with its draws, ready to be played.

    Attributes:
        pairs: of each draw, over all query heads of all groups.
        shares: of all passes of the attention, by draw.
        memory: whether what is kept between ranks is worked out, which takes longer than the play.
    """

    cell: Cell
    draws: tuple[Prepared, ...]
    pairs: tuple[float, ...]
    shares: tuple[float, ...]
    platform: Platform
    memory: bool = True

    @classmethod
    def of(cls, cell: Cell, machine: Machine, *, memory: bool = True) -> Composed:
        """Raises:
        CannotPredict: nothing is known of how the strategy works, or it cannot run the cell.
        """
        found = tuple(draws_of(cell, machine))
        draws, pairs, shares = (tuple(getattr(draw, name) for draw in found) for name in ("prepared", "pairs", "share"))
        return cls(cell, draws, pairs, shares, platform_of(machine), memory)

    @cached_property
    def key_bytes(self) -> float:
        """Of a number of keys and values as kernels read it; 0: as inputs have it."""
        return self.made().key_bytes

    @cached_property
    def more(self) -> bool:
        """Whether there is anything beside its attention."""
        return any(isinstance(part, Compute) for parts in self.made().phases.values() for part in parts)

    def like(self, cell: Cell) -> Composed:
        """Another cell with the same attention: one that differs in the options of its workload, or in what is recomputed."""
        found = replace(self, cell=cell)
        vars(found)["_held"] = self._held  # which is of the attention alone, and takes longer than all else
        return found

    def varied(self, change: Callable[[Prepared], Prepared]) -> Composed:
        """With other draws."""
        return replace(self, draws=tuple(map(change, self.draws)))

    @cached_property
    def tokens(self) -> int:
        """Of the rank with most."""
        if self.cell.problem.scale.world_size == 1:
            return self.cell.problem.queries
        queries = self.draws[0].modelled.schedule.q
        return int(np.bincount(queries.owner, weights=queries.sizes).max())

    @cached_property
    def keys(self) -> int:
        """Tokens of the rank that holds keys of most."""
        keys = self.draws[0].modelled.schedule.k
        return int(np.bincount(keys.owner, weights=keys.sizes).max())

    @cached_property
    def _seen(self) -> float | None:
        """Pairs of a query head of the mask within which blocks were chosen; None: none were."""
        mask = self.draws[0].modelled.mask
        return None if not isinstance(mask, BlockMap) else float(mask.within.area if mask.within else mask.num_q * mask.num_k)

    @cached_property
    def _calls(self) -> int:
        """Tiles and messages of the rank with most of both."""
        draw, ranks = self.draws[0], self.draws[0].modelled.schedule.world_size
        found = np.bincount(draw.tiling.rank, minlength=ranks)
        for transfer in draw.moves.transfers:
            found = found + np.bincount(transfer.rows[:, MoveColumn.SOURCE], minlength=ranks)
        return int(found.max())

    @cached_property
    def _kernel(self) -> Kernel:
        return build.build_kernel(self.cell.config["kernel"])

    @cached_property
    def _ready(self) -> tuple[Prepared, ...]:
        """Its draws as they are played, as often as anybody wants."""
        return tuple(replace(draw, in_place=self.key_bytes > 0) for draw in self.draws)

    @cached_property
    def _copies(self) -> Callable[[CacheKind], bool]:
        """Whether a cache is copied out: kernels do not read it, or are not called on what a rank has."""
        modelled, moves = self.draws[0].modelled, self.draws[0].moves
        schedule, problem = modelled.schedule, modelled.problem
        moved = any(transfer.payload.side == "kv" for transfer in moves.transfers)
        parted = any(len(group.kv) < problem.heads.kv for group in schedule.heads)
        if moved or parted or not all(_in_order(schedule.k.tokens(rank), self.cell) for rank in range(schedule.world_size)):
            return lambda _: True
        return cache(lambda kind: unread(self._kernel, kind, problem, self.platform) is not None)

    @cached_property
    def _held(self) -> Holding | None:
        """What the rank that keeps most of an attention holds of it."""
        if not self.memory or "workload" not in self.cell.config:
            return None
        return max(holdings(self.draws[0]), key=lambda held: sum(held.kept) + sum(rows * heads for rows, heads in held.finals))

    def made(self, hides: Callable[[Sequence[Part]], float] = lambda _: 0.0) -> Made:
        """What the cell is made of on the rank with most; ``hides`` as of ``Share``."""
        return build.made_of(self.cell.config, self.share(hides))

    def share(self, hides: Callable[[Sequence[Part]], float] = lambda _: 0.0) -> Share:
        """What the rank with most has of the cell; ``hides`` as of ``Share``."""
        problem, held, modelled = self.cell.problem, self._held, self.draws[0].modelled
        return Share(
            problem, self.tokens, self.cell.mesh, held.finals if held else (), held.kept if held else (),
            self.platform.type == "cuda", hides, self.keys, modelled.problem.heads.kv, modelled.replicas,
            seen=self._seen, calls=self._calls, copies=self._copies,
        )  # fmt: skip

    def flops(self, made: Made, phase: str, *, again: bool = False) -> float:
        """Of a phase, over all ranks of all groups; ``again`` as of ``flops_of``. Pairs of draws are those that passes are of."""
        ranks = self.cell.problem.queries / self.tokens * self.cell.mesh.count  # as many as have the tokens of the rank with most
        pairs = float(np.dot(self.shares, self.pairs))
        return flops_of(made.phases[phase], lambda _: pairs, self.cell.problem, ranks, again=again)

    def play(self, machine: Machine, kernel: KernelFit, dense: DenseFit, *, alone: bool = False) -> Together:
        """What the phases take; ``alone``: of one context-parallel group while the others are idle."""
        return self.together(self.attended(machine, kernel, dense, alone=alone))

    def together(self, attended: Attended) -> Together:
        """What the phases take with an attention that has been played."""
        made = self.made(attended.times.hides)
        phases = {name: attended.times.phase(parts) for name, parts in made.phases.items()}
        return Together(phases, attended.attention, made, attended.draws)

    def attended(self, machine: Machine, kernel: KernelFit, dense: DenseFit, *, alone: bool = False) -> Attended:
        """The attention alone, as ``play`` plays it."""
        cell, scale = self.cell, self.cell.scale
        at_work = cell.problem.scale.gpus_per_node if alone else scale.gpus_per_node
        cores = rank_cores(kernel.cores, scale.gpus_per_node, at_work)
        state = {
            "rank_cores": cores, "read_bytes_per_s": machine.read_bytes_per_s, "key_bytes": self.key_bytes,
            "packed": cell.problem.rectangular and isinstance(self._kernel, ReadsCache),
        }  # fmt: skip
        kernel, groups = kernel.model_copy(update=state), None
        if not alone and cell.mesh.count > 1:
            ranks = cell.mesh.groups(scale)
            simulated = self.draws[0].modelled.schedule.world_size
            groups = Groups(ranks.reshape(-1, ranks.shape[-1])[:, :simulated], scale.gpus_per_node)
        draws = tuple(play(draw, machine, kernel, memory=self.memory, groups=groups) for draw in self._ready)
        attention = {name: self._mean([draw.phases[name] for draw in draws]) for name in draws[0].phases}
        return Attended(attention, draws, Times(machine, dense, cores or 1.0, attention, cell.mesh, scale))

    def _mean(self, phases: Sequence[Phase]) -> Phase:
        """Of passes, one of each draw."""
        return sum_of([scaled(phase, share) for phase, share in zip(phases, self.shares, strict=True)])


def rank_cores(cores: int, per_node: int, at_work: int) -> float:
    """Cores that a rank has: whole ones, one thread each, unless more ranks are at work than there are. 0: it has a device."""
    return min(float(max(1, cores // per_node)), cores / at_work) if cores else 0.0


@dataclass(frozen=True)
class Times:
    """How long parts take on a rank. ``attention``: a pass of it, by direction."""

    machine: Machine
    dense: DenseFit
    cores: float
    attention: dict[str, Phase]
    mesh: Mesh
    scale: Scale

    def phase(self, parts: Sequence[Part]) -> Phase:
        passes = [scaled(self.attention[part.direction], part.times) for part in parts if isinstance(part, Attend)]
        attended = sum_of([NOTHING, *passes])
        computed = sum(self._compute_s(part) for part in parts if isinstance(part, Compute))
        exchanges = [part for part in parts if isinstance(part, Exchange)]
        waited = sum(self._exchange_s(part) for part in exchanges if not part.beside)
        beside = sum(self._exchange_s(part) for part in exchanges if part.beside)
        copied = sum(part.bytes for part in parts if isinstance(part, ToHost)) / self.host_bytes_per_s
        waited += sum(part.bytes for part in parts if isinstance(part, Copied)) / self.machine.memory_bytes_per_s
        if self.machine.cores:
            waited += beside + copied
        else:
            waited += max(0.0, max(beside, copied) - attended.seconds - computed)
        own = Phase(computed + waited, computed, computed, waited, 0.0)
        return sum_of([attended, own])

    def hides(self, parts: Sequence[Part]) -> float:
        return self.phase(parts).seconds * self.host_bytes_per_s

    @property
    def host_bytes_per_s(self) -> float:
        return self.machine.host_bytes_per_s or self.machine.memory_bytes_per_s / COPIED

    def _compute_s(self, part: Compute) -> float:
        d, launches = self.dense, part.launches * self.machine.launch_s
        own = (max(part.flops * d.flop_s, part.operand_bytes * d.byte_s) + part.moved_bytes * d.byte_s) / self.cores
        # A host starts kernels while those before them are at work, and a CPU rank is its own host.
        return own + launches if self.machine.cores else max(own, launches)

    def _exchange_s(self, part: Exchange) -> float:
        """Of the slowest set of ranks, while all sets do the same."""
        per_node = self.scale.gpus_per_node
        shared = per_node // self.machine.nics_of(per_node)
        found = 0.0
        for ranks, most, fewest in _sets(part.over, self.mesh, self.scale):
            block = part.bytes / ranks
            one = sum(self.machine.collective_s(each, block, ranks, most, fewest, shared) for each in part.operations)
            found = max(found, one * (ranks > 1))
        return part.times * found


@lru_cache(maxsize=256)
def _sets(over: tuple[str, ...], mesh: Mesh, scale: Scale) -> frozenset[tuple[int, int, int]]:
    """Of sets of ranks that differ in some dimensions: how many there are, and of them in one node, at most and at least."""
    dimensions = ("dp", "tp", "cp")
    groups = mesh.groups(scale)
    others = [i for i, name in enumerate(dimensions) if name not in over]
    inner = [i for i, name in enumerate(dimensions) if name in over]
    sets = groups.transpose([*others, *inner]).reshape(-1, int(np.prod([groups.shape[i] for i in inner])))
    counts = (np.unique(ranks // scale.gpus_per_node, return_counts=True)[1] for ranks in sets)
    return frozenset((sets.shape[1], int(each.max()), int(each.min())) for each in counts)


def _in_order(tokens: Ints, cell: Cell) -> bool:
    """Whether tokens that lie so are those of one request of a cell behind those of another."""
    return cell.batch is None or bool((np.diff(np.searchsorted(cell.batch.k_bounds, tokens, side="right")) >= 0).all())


def mean_of(phases: Sequence[Phase]) -> Phase:
    """The mean of draws."""
    return scaled(sum_of(phases), 1 / len(phases))


def sum_of(phases: Sequence[Phase]) -> Phase:
    return Phase(**{name: float(sum(getattr(phase, name) for phase in phases)) for name in Phase.__dataclass_fields__})


def scaled(phase: Phase, by: float) -> Phase:
    return Phase(**{name: by * getattr(phase, name) for name in Phase.__dataclass_fields__})
