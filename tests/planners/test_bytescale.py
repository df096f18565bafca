"""ByteScale's HDP: the paper's number of ranks, packs that fit, ranks that end together, and what offloading saves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcbench.planners.base import Assignment, Documents, Fleet, Infeasible, Offload
from lcbench.planners.bytescale_hdp import BytescaleHDP
from lcbench.testing.costs import Quadratic

FLEET = Fleet(ranks=8, per_node=4, capacity=1000)
COST = Quadratic(tuple(range(1, 9)), per_node=4)


def documents(*tokens: int) -> Documents:
    sizes = np.array(tokens, dtype=np.int64)
    return Documents(sizes, sizes * (sizes + 1) // 2)


LAYERS = Offload(layers=10, token_bytes=1e3, host_bytes_per_s=1e9, forward=0.25)


@dataclass(frozen=True)
class Offloading(Quadratic):
    offloads: Offload | None = None


def degrees(assignment: Assignment) -> dict[int, int]:
    """Ranks of each document."""
    return {number: len(group.ranks) for _, group in assignment.groups for number in group.documents}


BATCHES = st.lists(st.integers(1, 8000), min_size=1, max_size=40)


@given(BATCHES, st.booleans(), st.booleans())
@pytest.mark.slow
def test_every_document_is_computed_once_by_ranks_that_hold_it(tokens: list[int], spread: bool, offload: bool) -> None:
    batch, cost = documents(*tokens), Offloading(COST.degrees, per_node=4, offloads=LAYERS)
    found = BytescaleHDP(spread, offload, fallback=False).plan(batch, FLEET, cost)
    assert found.wrong(batch, FLEET) is None
    assert BytescaleHDP(spread, offload, fallback=False).plan(batch, FLEET, cost) == found
    assert all(len(group.documents) == 1 for _, group in found.groups if len(group.ranks) > 1)


@given(BATCHES)
def test_by_the_papers_rule_a_document_has_the_fewest_ranks_that_hold_it(tokens: list[int]) -> None:
    found = BytescaleHDP(fallback=False, spread=False).plan(documents(*tokens), FLEET, COST)
    assert degrees(found) == {number: -(-length // 1000) for number, length in enumerate(tokens)}


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60))
def test_ranks_end_together(tokens: list[int]) -> None:
    """What is handed out longest first ends at most one document later than an even share; overheads apart."""
    batch, cost = documents(*tokens), replace(COST, start_s=0.0)
    found = BytescaleHDP(fallback=False, spread=False).plan(batch, FLEET, cost)
    seconds = cost.documents_s(batch, 1)
    assert found.makespan_s(batch, cost, 8) <= seconds.sum() / 8 + seconds.max() * 7 / 8 + 1e-12


@given(BATCHES)
@pytest.mark.slow
def test_spreading_never_makes_a_batch_slower(tokens: list[int]) -> None:
    batch, cost = documents(*tokens), replace(COST, exchange_s=0.0)  # which a makespan does not know across nodes
    by_rule, spread = (BytescaleHDP(fallback=False, spread=spread).plan(batch, FLEET, cost) for spread in (False, True))
    assert spread.makespan_s(batch, cost, 8) <= by_rule.makespan_s(batch, cost, 8) * (1 + 1e-12)


def test_a_long_document_is_spread_over_ranks_that_would_idle() -> None:
    batch = documents(2000, *[100] * 8)
    by_rule, spread = (BytescaleHDP(fallback=False, spread=spread).plan(batch, FLEET, COST) for spread in (False, True))
    assert (degrees(by_rule)[0], degrees(spread)[0]) == (2, 4)  # beyond a node exchange takes four times as long
    assert spread.makespan_s(batch, COST, 8) < 0.8 * by_rule.makespan_s(batch, COST, 8)


def test_short_documents_are_packed_best_fit() -> None:
    found = BytescaleHDP(fallback=False).plan(documents(600, 500, 500, 400), replace(FLEET, ranks=1, per_node=1), COST)
    assert [group.documents for _, group in found.groups] == [(0, 3), (1, 2)]


def test_groups_are_within_a_node_where_that_is_sooner() -> None:
    plans = [
        BytescaleHDP(fallback=False, spread=False).plan(documents(3000, 3000, 2000), FLEET, replace(COST, exchange_s=exchange_s))
        for exchange_s in (1e-5, 0.0)  # nothing is lost across nodes by the second
    ]
    assert [[group.ranks for _, group in plan.groups] for plan in plans] == [
        [(0, 1, 2), (4, 5, 6), (0, 3)],
        [(0, 1, 2), (4, 5, 6), (3, 7)],
    ]


def ranks_by_formula(tokens: int, offloads: Offload, capacity: int, cost: Quadratic) -> int:
    """D(s), written from the paper: r as large as T(s) allows, of an activation per token."""
    layers = offloads.layers
    for ranks in cost.degrees:
        forward_s = offloads.forward * float(cost.documents_s(documents(tokens), ranks)[0])
        ratio = min(1.0, forward_s * ranks * offloads.host_bytes_per_s / (tokens * offloads.token_bytes))
        if math.ceil((2 + (1 - ratio) * (layers - 2)) * tokens / (layers * capacity)) <= ranks:
            return ranks
    raise AssertionError(tokens)


@given(st.integers(1, 8000), st.floats(1e6, 1e12), st.integers(3, 40))
def test_offloading_takes_the_ranks_of_the_papers_formula(tokens: int, bandwidth: float, layers: int) -> None:
    offloads = replace(LAYERS, layers=layers, host_bytes_per_s=bandwidth)
    cost = Offloading(COST.degrees, per_node=4, offloads=offloads)
    (placed,) = BytescaleHDP(fallback=False, spread=False, offload=True).plan(documents(tokens), FLEET, cost).groups
    group = placed[1]
    # The formula counts parts of tokens, and ranks hold whole ones.
    formula = {ranks_by_formula(tokens, offloads, capacity, cost) for capacity in (FLEET.capacity, FLEET.capacity - 1)}
    assert len(group.ranks) in formula
    assert bool(group.offload) == (-(-tokens // len(group.ranks)) > FLEET.capacity)


def test_offloading_moves_no_more_than_what_forward_hides() -> None:
    costs = [Offloading(COST.degrees, offloads=replace(LAYERS, host_bytes_per_s=bandwidth)) for bandwidth in (1e5, 1e12)]
    plans = [BytescaleHDP(fallback=False, spread=False, offload=True).plan(documents(4000), FLEET, cost) for cost in costs]
    assert [degrees(plan)[0] for plan in plans] == [4, 1]
    assert plans[0].groups[0][1].offload == 0
    assert plans[1].groups[0][1].offload == pytest.approx(0.75, abs=1e-3)


def test_what_cannot_be_is_refused_with_the_reason() -> None:
    with pytest.raises(Infeasible, match=r"^document 1 of 8001 tokens needs 9 ranks of 1000 tokens; there are 8, "):
        BytescaleHDP(fallback=False).plan(documents(5, 8001), FLEET, COST)
    with pytest.raises(Infeasible, match=r"^document 0 of 7001 tokens needs 8 ranks .* among 7 of them at most$"):
        BytescaleHDP(fallback=False).plan(documents(7001), FLEET, replace(COST, degrees=tuple(range(1, 8))))
    with pytest.raises(Infeasible, match=r"^planner.offload=true: .* no activations"):
        BytescaleHDP(fallback=False, offload=True).plan(documents(5), FLEET, COST)


def test_degrees_that_methods_know_are_taken() -> None:
    found = BytescaleHDP(fallback=False, spread=False).plan(documents(2500, 5000), FLEET, replace(COST, degrees=(1, 2, 4, 8)))
    assert degrees(found) == {0: 4, 1: 8}


@pytest.mark.slow
def test_ten_thousand_documents_on_a_thousand_ranks_say_how_far_they_are() -> None:
    lengths = np.random.default_rng(0).lognormal(7, 1.6, 10_000).astype(np.int64).clip(1, 400_000)
    batch, fleet = documents(*lengths.tolist()), Fleet(1024, 8, 16384)
    lines: list[str] = []
    found = BytescaleHDP(fallback=False).plan(batch, fleet, Quadratic(tuple(range(1, 1025))), lines.append)
    assert found.wrong(batch, fleet) is None
    assert len(lines) > 2
    assert all(line.startswith("bytescale_hdp: ") for line in lines)
