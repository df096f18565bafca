"""Planners: every one of conf/planner gives an assignment of what fits; packing and placing; how near to the best they come."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations, permutations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.grid.build import build
from lcbench.planners.base import Assignment, Documents, Fleet, Group, Infeasible, Planner
from lcbench.planners.packing import best_fit_decreasing, in_order, level, longest_first
from lcbench.planners.placing import Timetable, is_near, side_by_side
from lcbench.testing.costs import Quadratic
from lcbench.testing.masks import load, names

PLANNERS = names("planner")
# Those that claim to find about the best plan of few documents: times the best at most. Others are rules (docs/batches.md).
NEAR = {"dynamic_cp": 1.05, "flexsp": 1.05, "hydraulis": 1.05}
SETTINGS = ({}, {"start_s": 5e-3}, {"exchange_s": 1e-6}, {"start_s": 1e-5, "exchange_s": 1e-8})


def planner(name: str, **options: Any) -> Planner:
    made: Planner = build({**load("planner", name), **options})
    return made


def causal(tokens: list[int]) -> Documents:
    sizes = np.array(tokens, dtype=np.int64)
    return Documents(sizes, sizes * (sizes + 1) // 2)


def plan_or_reason(name: str, documents: Documents, fleet: Fleet, cost: Quadratic) -> Assignment | str:
    try:
        return planner(name).plan(documents, fleet, cost)
    except Infeasible as error:
        return str(error)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Documents, Fleet, Quadratic]:
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    per_node = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    fleet = Fleet(ranks, per_node, draw(st.integers(50, 400)))
    tokens = draw(st.lists(st.integers(1, ranks * fleet.capacity), min_size=1, max_size=20))
    degrees = (1, *sorted(draw(st.sets(st.integers(2, ranks))) if ranks > 1 else []))
    return causal(tokens), fleet, Quadratic(degrees, start_s=draw(st.sampled_from([1e-6, 1e-3])), per_node=per_node)


@pytest.mark.parametrize("name", PLANNERS)
@settings(max_examples=15, deadline=None)
@given(batch=batches())
def test_every_planner_assigns_all_documents_or_says_why_not(name: str, batch: tuple[Documents, Fleet, Quadratic]) -> None:
    documents, fleet, cost = batch
    first = plan_or_reason(name, documents, fleet, cost)
    assert plan_or_reason(name, documents, fleet, cost) == first
    if isinstance(first, str):
        assert first
        assert "\n" not in first
        return
    assert first.wrong(documents, fleet) is None
    assert all(len(group.ranks) in cost.degrees for _, group in first.groups)
    assert np.isfinite(first.makespan_s(documents, cost, fleet.ranks))
    assert Assignment.of_plain(first.plain()) == first


@pytest.mark.parametrize("name", PLANNERS)
def test_a_document_that_all_ranks_do_not_hold_is_refused_or_offloaded(name: str) -> None:
    documents, fleet = causal([5, 401]), Fleet(4, 4, 100)
    made = plan_or_reason(name, documents, fleet, Quadratic((1, 2, 4)))
    if isinstance(made, str):
        assert re.search("document 1 .*401 tokens", made)
        return
    assert made.wrong(documents, fleet) is None
    assert any(group.offload for _, group in made.groups)  # the host's memory has the rest


def test_no_degree_that_holds_it_is_refused() -> None:
    for name in ("fixed", "megatron_hybrid", "dynamic_cp", "oracle"):
        with pytest.raises(Infeasible, match=r"document 0 has 250 tokens; .* 2 ranks of 100, holds 200"):
            planner(name).plan(causal([250]), Fleet(4, 4, 100), Quadratic((1, 2)))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("fixed", "degree", 0), ("fixed", "degree", True), ("megatron_hybrid", "slack", 1), ("megatron_hybrid", "packed", 1),
        ("megatron_hybrid", "fallback", "x"), ("bytescale_hdp", "spread", "x"), ("dynamic_cp", "effort", -1),
    ],
)  # fmt: skip
def test_bad_options_are_one_line_with_the_value(name: str, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"planner.{option}={value} is n"):
        planner(name, **{option: value})


def test_a_degree_that_does_not_divide_the_ranks_is_refused_with_those_that_do() -> None:
    with pytest.raises(Infeasible, match=r"planner.degree=3 is none of \[1, 2, 4\]"):
        planner("fixed", degree=3).plan(causal([5]), Fleet(4, 4, 100), Quadratic((1, 2, 3, 4)))


def test_fixed_has_one_degree_and_as_few_micro_batches_as_tokens_allow() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        documents = causal(np.exp(random.normal(5, 1, 200)).astype(int).clip(1, 1900).tolist())
        made = planner("fixed").plan(documents, Fleet(8, 8, 1000), Quadratic(tuple(range(1, 9))))
        needed = 2 if documents.tokens.max() > 1000 else 1
        assert {len(group.ranks) for _, group in made.groups} == {needed}
        assert len(made.micro_batches) <= -(-int(documents.tokens.sum()) // 8000) + 1


def test_megatron_takes_powers_of_two_and_doubles_groups_until_no_rank_is_idle() -> None:
    cost, fleet = Quadratic(tuple(range(1, 9))), Fleet(8, 8, 100)
    published = planner("megatron_hybrid", fallback=False)
    made = published.plan(causal([350, 90]), fleet, cost)
    assert sorted(len(group.ranks) for _, group in made.groups) == [4, 4]  # 90 tokens need one rank, and four are idle
    alone = planner("megatron_hybrid", fallback=False, packed=False).plan(causal([40] * 20), fleet, cost)
    assert all(len(group.documents) == 1 for _, group in alone.groups)
    assert len(published.plan(causal([40] * 20), fleet, cost).groups) < len(alone.groups)


def partitions(numbers: list[int]) -> Iterator[list[list[int]]]:
    if not numbers:
        yield []
        return
    for rest in partitions(numbers[1:]):
        yield [[numbers[0]], *rest]
        yield from ([*rest[:n], [numbers[0], *rest[n]], *rest[n + 1 :]] for n in range(len(rest)))


def best_of_all(documents: Documents, fleet: Fleet, cost: Quadratic) -> float:
    """The shortest of all assignments, one after the other: every partition, order and set of near ranks."""
    sets = [r for d in cost.degrees for r in combinations(range(fleet.ranks), d) if is_near(r, fleet)]
    best = np.inf
    for parts in partitions(list(range(len(documents)))):
        tokens = [int(documents.tokens[part].sum()) for part in parts]
        took = {(n, d): float(cost.documents_s(documents.of(part), d).sum()) + cost.overhead_s(d)
                for n, part in enumerate(parts) for d in cost.degrees}  # fmt: skip
        fits = [[r for r in sets if tokens[n] <= len(r) * fleet.capacity] for n in range(len(parts))]
        for order in permutations(range(len(parts))):
            for ranks in product(*(fits[n] for n in order)):
                free = [0.0] * fleet.ranks
                for n, own in zip(order, ranks, strict=True):
                    end = max(free[r] for r in own) + took[n, len(own)]
                    for r in own:
                        free[r] = end
                best = min(best, max(free))
    return best


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("fleet", [Fleet(2, 2, 900), Fleet(3, 3, 700), Fleet(4, 2, 600)])
def test_the_oracle_is_what_plain_enumeration_finds(fleet: Fleet, options: dict[str, float]) -> None:
    random = np.random.default_rng(fleet.ranks)
    for count in (1, 2, 3):
        documents = causal(random.integers(1, 2 * fleet.capacity, count).tolist())
        cost = Quadratic(tuple(range(1, fleet.ranks + 1)), per_node=fleet.per_node, **options)
        plan = planner("oracle").plan(documents, fleet, cost)
        assert planner("oracle").plan(documents, fleet, cost) == plan
        found = plan.makespan_s(documents, cost, fleet.ranks)
        assert found == pytest.approx(best_of_all(documents, fleet, cost), rel=1e-9)


def test_the_oracle_refuses_what_is_too_large() -> None:
    with pytest.raises(Infeasible, match="9 documents"):
        planner("oracle").plan(causal([1] * 9), Fleet(4, 4, 100), Quadratic((1,)))
    with pytest.raises(Infeasible, match="8 ranks"):
        planner("oracle").plan(causal([1]), Fleet(8, 8, 100), Quadratic((1,)))


@pytest.mark.slow
@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("seed", range(5))
def test_planners_that_claim_to_be_optimal_are_near_the_oracle(seed: int, options: dict[str, float]) -> None:
    random = np.random.default_rng(seed)
    tokens = np.exp(random.normal(7.5, 1.2, 4 + seed)).astype(int).clip(1).tolist()
    fleet = Fleet(4, 4, int(max(tokens) / 4 * (1.01, 1.5, 3)[seed % 3]) + 1)
    cost, documents = Quadratic((1, 2, 3, 4), per_node=4, **options), causal(tokens)
    best = planner("oracle").plan(documents, fleet, cost).makespan_s(documents, cost, fleet.ranks)
    for name, most in NEAR.items():
        own = planner(name).plan(documents, fleet, cost).makespan_s(documents, cost, fleet.ranks)
        assert best * (1 - 1e-9) <= own <= best * most, name


@pytest.mark.parametrize("name", ["megatron_hybrid", "bytescale_hdp", "dynamic_cp"])
@pytest.mark.slow
def test_what_falls_back_is_never_longer_than_fixed(name: str) -> None:
    random, cost = np.random.default_rng(1), Quadratic(tuple(range(1, 9)))
    for _ in range(5):
        documents = causal(np.exp(random.normal(6, 1.5, 60)).astype(int).clip(1, 7000).tolist())
        fixed, own = (planner(n).plan(documents, Fleet(8, 8, 1000), cost).makespan_s(documents, cost, 8) for n in ("fixed", name))
        assert own <= fixed * (1 + 1e-12)


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(100, 300))
def test_best_fit_decreasing_packs_all_within_its_bound(sizes: list[int], capacity: int) -> None:
    bins = best_fit_decreasing(sizes, capacity)
    assert sorted(n for held in bins for n in held) == list(range(len(sizes)))
    assert all(sum(sizes[n] for n in held) <= capacity for held in bins)
    assert all(sum(sizes[n] for n in (*one, *other)) > capacity for one, other in combinations(bins, 2))  # none could be spared


def test_a_size_above_the_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="7 is more than the capacity of 6"):
        best_fit_decreasing([1, 7], 6)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 6))
def test_longest_first_keeps_grahams_bound(weights: list[int], bins: int) -> None:
    shared = longest_first(weights, [0.0] * bins)
    assert sorted(n for own in shared for n in own) == list(range(len(weights)))
    most = max(sum(weights[n] for n in own) for own in shared)
    assert most <= sum(weights) / bins + max(weights, default=0)
    limit = -(-len(weights) // bins)
    assert all(len(own) <= limit for own in longest_first(weights, [0.0] * bins, most=limit))


def test_level_bins_hold_their_capacity_or_are_none() -> None:
    assert level([3, 3, 2, 2, 2], 2, 6) is None  # 3 + 2 + 2 by longest first, although 3 + 3 and 2 + 2 + 2 would do
    assert level([3, 3, 2, 2], 2, 6) == [[0, 2], [1, 3]]


def test_groups_side_by_side_lie_inside_of_nodes() -> None:
    fleet = Fleet(16, 8, 1)
    placed = side_by_side([1, 2, 5, 3, 4, 1], fleet)
    assert [len(ranks) for ranks in placed] == [1, 2, 5, 3, 4, 1]
    assert len({rank for ranks in placed for rank in ranks}) == 16
    assert all(is_near(ranks, fleet) for ranks in placed)
    assert side_by_side([4, 12], fleet)[1] == tuple(range(12))
    with pytest.raises(ValueError, match="17 ranks side by side on 16"):
        side_by_side([9, 8], fleet)


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), max_size=20))
@pytest.mark.slow
def test_a_timetable_is_what_playing_its_groups_gives(puts: list[tuple[int, int]]) -> None:
    fleet = Fleet(12, 4, 1)
    table = Timetable(fleet)
    ends, groups = [], []
    for degree, seconds in puts:
        before = table.free()
        end, ranks = table.put(degree, float(seconds))
        assert is_near(ranks, fleet)
        near = (r for r in combinations(range(12), degree) if is_near(r, fleet))
        assert end - seconds == min(float(before[list(r)].max()) for r in near)
        ends.append(end)
        groups.append(Group(ranks, (len(groups),), "ring"))
    played = in_order(groups)
    seconds_of = [float(puts[group.documents[0]][1]) for _, group in played.groups]
    _, got = played.played(seconds_of, 12)
    assert {g.documents[0]: e for (_, g), e in zip(played.groups, got, strict=True)} == dict(enumerate(ends))
