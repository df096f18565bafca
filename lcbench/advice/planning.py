"""The plan of a model's step on some GPUs: the search over pipeline stages, micro-batches and the ways of layers, and what lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lcbench.advice.pipeline import Plan, best, uniform
from lcbench.advice.ways import Asked, Way, stage_scale, ways
from lcbench.predict.predictor import Predictor


@dataclass(frozen=True)
class Rival:
    """The best plan with one number of stages and one pair of degrees for all layers, whose strategy, sharding and recomputation
    may differ; where nothing fits, the one that needs least.

    Attributes:
        over: bytes by which it does not fit; 0: it fits.
    """

    plan: Plan
    over: float

    @property
    def fits(self) -> bool:
        return self.over == 0


@dataclass(frozen=True)
class Planned:
    """What a search comes to.

    Attributes:
        plan: the best; None: nothing fits.
        rivals: of each number of stages and pair of degrees, those that fit first, by time, then by what they lack.
        refused: why a strategy is out at some degrees, with the first of these, in words.
        ways: how many ways of a layer were looked at.
    """

    plan: Plan | None
    rivals: tuple[Rival, ...]
    refused: dict[str, str]
    ways: int


def plan(asked: Asked, predictor: Predictor) -> Planned:
    """The fastest plan within the budget, of all numbers of stages, micro-batches and ways."""
    refused: dict[str, str] = {}
    by_stages = {
        stages: ways(asked, scale, predictor, refused)
        for stages in range(1, min(asked.scale.world_size, asked.layers) + 1)
        if asked.allows("pp", stages) and (scale := stage_scale(asked.scale, stages)) is not None
    }
    rivals = [
        _rival([way for way in every if way.degrees == degrees], asked, stages, predictor)
        for stages, every in by_stages.items() for degrees in sorted({way.degrees for way in every})
    ]  # fmt: skip
    rivals.sort(key=lambda rival: (rival.over, rival.plan.seconds))
    found = rivals[0].plan if rivals and rivals[0].fits else None
    for stages, every in by_stages.items():
        for sequences in sorted({way.dp for way in every}):
            able = [way for way in every if sequences % way.dp == 0]
            if len({way.degrees for way in able}) == 1:
                continue  # which a rival is the best of
            bound = math.inf if found is None else found.seconds
            found = best(able, asked, stages, sequences, predictor.machine, bound) or found
    return Planned(found, tuple(rivals), refused, sum(map(len, by_stages.values())))


def _rival(able: Sequence[Way], asked: Asked, stages: int, predictor: Predictor) -> Rival:
    """Of ways with the same degrees, a sequence of each replica at a time."""
    sequences, machine = able[0].dp, predictor.machine
    alike = [uniform(way, asked, stages, sequences, machine) for way in able]
    fitting = [each for each in alike if each.bytes <= asked.budget]
    fastest = min(fitting, key=lambda each: each.seconds, default=None)
    found = best(able, asked, stages, sequences, machine, math.inf if fastest is None else fastest.seconds) or fastest
    if found is not None:
        return Rival(found, 0.0)
    nearest = min(alike, key=lambda each: each.bytes)
    return Rival(nearest, nearest.bytes - asked.budget)
