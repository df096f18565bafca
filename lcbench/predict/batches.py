"""Batches of documents, predicted: planned as they would be, then every sub-group played by its own schedule, rank after rank.

Nobody waits between micro-batches for ranks that it shares nothing with. Sub-groups that are at work at once are played as if each
had its links alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from lcbench.cp.assigned import sub_problems
from lcbench.grid import build
from lcbench.grid.cell import Cell
from lcbench.masks.band import BandMask, DoesNotFit, Ints
from lcbench.planners.base import Fleet, Infeasible
from lcbench.planners.telling import telling
from lcbench.predict.composed import Together, mean_of, sum_of
from lcbench.predict.costs import FittedCost, Micro, Rates, cost_of
from lcbench.predict.draws import CannotPredict, looked_at, unforeseen
from lcbench.problem import Problem
from lcbench.schedule.machine import Floats
from lcbench.schedule.simulate import Phase, Simulated
from lcbench.workloads.parts import BATCH, Made, Share, flops_of
from lcbench.workloads.planned import Planned, idle_share, plan_of

SUMS = 4  # bytes of an LSE


@dataclass(frozen=True, eq=False)
class Batched:
    """A cell whose workload takes a planner, with its draws.

    Attributes:
        pairs: of each draw that is looked at, over all query heads of all ranks.
        memory: whether what ranks hold is worked out too.
    """

    cell: Cell
    masks: tuple[BandMask, ...]
    pairs: tuple[float, ...]
    cost: FittedCost
    memory: bool

    @classmethod
    def of(cls, cell: Cell, rates: Rates, *, memory: bool = True) -> Batched:
        """Raises:
        CannotPredict: nothing is known of what it does, or its mask cannot be drawn.
        """
        if reason := unforeseen(cell):
            raise CannotPredict(reason)
        try:
            masks = [build.cell_mask(cell, number) for number in range(build.draws(cell.config["mask"]))]
        except DoesNotFit as error:
            raise CannotPredict(str(error)) from error
        pairs = np.array([float(mask.pairs(cell.heads.q)) for mask in masks])
        chosen = looked_at(pairs)
        bands = tuple(mask for n in chosen if isinstance(mask := masks[n], BandMask))
        if len(bands) < len(chosen):
            raise CannotPredict("a mask of blocks, or of each head's own, has no documents to plan")
        return cls(cell, bands, tuple(pairs[chosen].tolist()), cost_of(cell, rates), memory)

    @property
    def _made(self) -> Made:
        """On a rank with the mean share."""
        problem = self.cell.problem
        return build.made_of(
            self.cell.config, Share(problem, math.ceil(problem.queries / problem.scale.world_size), self.cell.mesh)
        )

    def flops(self, made: Made, phase: str, *, again: bool = False) -> float:
        """As of ``Composed.flops``."""
        ranks = float(self.cell.scale.world_size)
        pairs = fmean(self.pairs)
        return flops_of(made.phases[phase], lambda _: pairs, self.cell.problem, ranks, again=again)

    def play(self) -> Together:
        """Plan and play all draws.

        Raises:
            CannotPredict: the planner has no assignment, or a wrong one.
        """
        curves = self.cost.curves
        draws = [self.drawn(mask, self._planned(mask)) for mask in self.masks]
        metrics = {name: fmean(draw.metrics[name] for draw in draws) for name in draws[0].metrics}
        metrics["batch/peak_tokens"] = max(draw.metrics["batch/peak_tokens"] for draw in draws)
        return Together(
            {BATCH: mean_of([draw.phase for draw in draws])} | curves.once,
            {name: mean_of([draw.attention[name] for draw in draws]) for name in draws[0].attention},
            self._made, tuple(draw.fullest for draw in draws), metrics, draws[0].notes,
        )  # fmt: skip

    def _planned(self, mask: BandMask) -> Planned:
        planner = build.build_planner(self.cell.config)
        assert planner is not None
        try:
            planned = plan_of(planner, mask, self.fleet, self.cost, telling())
        except Infeasible as refused:
            raise CannotPredict(str(refused)) from refused
        if planned.wrong:
            raise CannotPredict(f"the planner's assignment: {planned.wrong}")
        return planned

    @property
    def fleet(self) -> Fleet:
        """Its ranks."""
        scale = self.cell.problem.scale
        return Fleet(scale.world_size, scale.gpus_per_node, self.cost.curves.capacity)

    def drawn(self, mask: BandMask, planned: Planned) -> Drawn:
        """A draw played as it is planned."""
        problem, curves = self.cell.problem, self.cost.curves
        groups = [group for _, group in planned.assignment.groups]
        tiles = [sub_problems(problem, mask, planned.bounds, group, curves.inside)[2] for group in groups]
        played = [
            curves.group(group.method, np.array(group.ranks), tile, offload=group.offload)
            for group, tile in zip(groups, tiles, strict=True)
        ]  # fmt: skip
        fullest = max(range(len(played)), key=lambda n: played[n].tokens)
        inside = played[fullest].simulated
        if self.memory:
            found = groups[fullest]
            inside = curves.group(found.method, np.array(found.ranks), tiles[fullest], memory=True).simulated
        return Drawn(problem, planned, played, inside)


@dataclass(frozen=True, eq=False)
class Drawn:
    """A draw that was planned and played.

    Attributes:
        played: the sub-groups, in the order of the assignment.
        inside: attention of the sub-group whose ranks have most tokens.
    """

    problem: Problem
    planned: Planned
    played: list[Micro]
    inside: Simulated

    @cached_property
    def _times(self) -> tuple[Floats, Floats]:
        """Begins and ends of the sub-groups."""
        return self.planned.assignment.played([micro.phase.seconds for micro in self.played], self.ranks)

    @property
    def ranks(self) -> int:
        return self.problem.scale.world_size

    @property
    def _last(self) -> int:
        """A rank that is done last."""
        return self.planned.assignment.groups[int(self._times[1].argmax())][1].ranks[0]

    def _of_ranks(self, values: Floats) -> Floats:
        """Sums over the sub-groups that each rank is in, (ranks,)."""
        found = np.zeros(self.ranks)
        for (_, group), value in zip(self.planned.assignment.groups, values.tolist(), strict=True):
            found[list(group.ranks)] += value
        return found

    @property
    def gantt(self) -> list[list[list[float]]]:
        """As a measured one: of each rank its micro-batches, each with its number, its begin, the end of forward, and its end."""
        begins, ends = self._times
        found: list[list[list[float]]] = [[] for _ in range(self.ranks)]
        every = zip(self.planned.assignment.groups, self.played, begins.tolist(), ends.tolist(), strict=True)
        for (number, group), micro, begin, end in every:
            for rank in group.ranks:
                found[rank].append([float(number), begin, begin + micro.forward_s, end])
        return found

    @property
    def phase(self) -> Phase:
        """All micro-batches. What the rank that is done last waits for, others included, counts as exposed."""
        _, ends = self._times
        seconds = float(ends.max())
        of = {name: self._of_ranks(np.array([getattr(m.phase, name) for m in self.played])) for name in Phase.__dataclass_fields__}
        busiest = min(float(of["busiest_s"].max()), seconds)
        overhead = min(float(of["overhead_s"][self._last]), seconds - busiest)
        return Phase(seconds, min(float(of["compute_s"].mean()), busiest), busiest, seconds - busiest - overhead, overhead)

    @property
    def attention(self) -> dict[str, Phase]:
        """One attention of each micro-batch of the rank that is done last, by direction."""
        last = self._last
        own = [
            micro.simulated.phases
            for (_, group), micro in zip(self.planned.assignment.groups, self.played, strict=True) if last in group.ranks
        ]  # fmt: skip
        return {name: sum_of([phases[name] for phases in own]) for name in own[0]}

    @property
    def held(self) -> Ints:
        """Tokens of each rank in each micro-batch, (micro-batches, ranks); of a sub-group all ranks as many as that with most."""
        found = np.zeros((len(self.planned.assignment.micro_batches), self.ranks), dtype=np.int64)
        for (number, group), micro in zip(self.planned.assignment.groups, self.played, strict=True):
            found[number, list(group.ranks)] = micro.tokens
        return found

    @property
    def fullest(self) -> Simulated:
        """Attention of the sub-group whose ranks hold most, with results of all other micro-batches of a rank."""
        problem, heads = self.problem, self.problem.heads
        held = self.held
        others = int(held.sum(axis=0).max() - held.max())
        kept = others * ((heads.q * (heads.dim + heads.v) + heads.kv * heads.kv_width) * problem.itemsize + heads.q * SUMS)
        more = kept if self.inside.peak_bytes else 0
        return replace(self.inside, peak_bytes=self.inside.peak_bytes + more, own_bytes=self.inside.own_bytes + more)

    @property
    def metrics(self) -> dict[str, float]:
        tokens = float(self.planned.documents.tokens.sum())
        return self.planned.metrics | {
            "batch/padding": 1 - tokens / float(self.ranks * self.held.max(axis=1).sum()),
            "batch/idle_share": idle_share(self.planned.assignment, self.gantt),
            "batch/peak_tokens": float(self.held.max()),
        }

    @property
    def notes(self) -> dict[str, Any]:
        return self.planned.notes | {"gantt": self.gantt}
