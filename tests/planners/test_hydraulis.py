"""Hydraulis: replicas that stay, against all replicas that there are; what changing them at the end gains."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from lcbench.planners.base import Assignment, Documents, Fleet
from lcbench.planners.hydraulis import Hydraulis
from lcbench.planners.packing import best_fit_decreasing
from lcbench.testing.costs import Quadratic


def causal(tokens: list[int]) -> Documents:
    sizes = np.array(tokens, dtype=np.int64)
    return Documents(sizes, sizes * (sizes + 1) // 2)


def replicas(plan: Assignment) -> set[tuple[int, ...]]:
    return {group.ranks for _, group in plan.groups}


def sums(total: int, most: int) -> Iterator[tuple[int, ...]]:
    """Whole numbers, descending, that add up to a total."""
    if not total:
        yield ()
    for first in range(min(total, most), 0, -1):
        yield from ((first, *rest) for rest in sums(total - first, first))


def best_that_stays(documents: Documents, fleet: Fleet, cost: Quadratic) -> float:
    """The least makespan of replicas that stay the same, by enumeration; documents are packed best-fit decreasing."""
    best = np.inf
    for degrees in sums(fleet.ranks, fleet.ranks):
        if not set(degrees) <= set(cost.degrees):
            continue
        seconds = {d: np.where(documents.tokens <= d * fleet.capacity, cost.documents_s(documents, d), np.inf) for d in degrees}
        for dealt in product(range(len(degrees)), repeat=len(documents)):
            ends = [0.0] * len(degrees)
            for place, degree in enumerate(degrees):
                own = [number for number, where in enumerate(dealt) if where == place]
                if own and np.isfinite(spent := float(seconds[degree][own].sum())):
                    turns = len(best_fit_decreasing(documents.tokens[own], degree * fleet.capacity))
                    ends[place] = spent + turns * cost.overhead_s(degree)
                elif own:
                    ends[place] = np.inf
            best = min(best, max(ends))
    return float(best)


@pytest.mark.parametrize("seed", range(10))
def test_replicas_that_stay_are_near_the_best_that_stay(seed: int) -> None:
    random = np.random.default_rng(seed)
    documents = causal(np.exp(random.normal(8, 1.2, 5)).astype(int).tolist())
    total, longest = int(documents.tokens.sum()), int(documents.tokens.max())
    fleet = Fleet(4, 4, max(-(-longest // 4), int(total * random.choice([0.15, 0.3, 1]))))
    cost = Quadratic((1, 2, 3, 4), start_s=float(random.choice([1e-5, 1e-3])), per_node=4)
    plan = Hydraulis(stay=True).plan(documents, fleet, cost)
    assert plan.wrong(documents, fleet) is None
    assert plan.makespan_s(documents, cost, 4) <= 1.05 * best_that_stays(documents, fleet, cost)
    assert sum(map(len, replicas(plan))) <= 4
    assert len({rank for own in replicas(plan) for rank in own}) == sum(map(len, replicas(plan)))


def test_replicas_of_several_degrees_stay_through_many_micro_batches() -> None:
    random = np.random.default_rng(1)
    documents = causal([30_000, *random.integers(100, 4000, 60).tolist()])
    fleet, cost = Fleet(16, 8, 4096), Quadratic((1, 2, 4, 8, 16))
    plan = Hydraulis(stay=True).plan(documents, fleet, cost)
    assert plan.wrong(documents, fleet) is None
    assert len(plan.micro_batches) > 1
    assert len({len(own) for own in replicas(plan)}) > 1
    ranks = [rank for own in replicas(plan) for rank in own]
    assert len(ranks) == len(set(ranks))
    assert all(len({rank // 8 for rank in own}) == 1 for own in replicas(plan) if len(own) <= 8)


@pytest.mark.slow
def test_changing_replicas_gains_where_one_document_needs_all_ranks() -> None:
    documents = causal([4000, *[500] * 7])
    fleet, cost = Fleet(4, 4, 1000), Quadratic((1, 2, 4), exchange_s=1e-6)
    stays = Hydraulis(stay=True).plan(documents, fleet, cost)
    changes = Hydraulis().plan(documents, fleet, cost)
    assert {len(own) for own in replicas(stays)} == {4}
    assert len({len(own) for own in replicas(changes)}) > 1
    assert changes.makespan_s(documents, cost, 4) < 0.9 * stays.makespan_s(documents, cost, 4)


@pytest.mark.parametrize("options", [{"stay": 1}, {"trials": 0}, {"effort": False}])
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"^planner\.{name}={value} is n"):
        Hydraulis(**options)
