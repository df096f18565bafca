"""FlexSP: its buckets, its micro-batches and its program against brute force, its plans against the oracle's and ``fixed``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.planners import programs
from lcbench.planners.base import Documents, Fleet, Infeasible, Planner
from lcbench.planners.fixed import Fixed
from lcbench.planners.flexsp import FlexSP, blasted, bucketed
from lcbench.planners.hydraulis import Hydraulis
from lcbench.planners.oracle import Oracle
from lcbench.planners.programs import Sharing, alike, exact
from lcbench.testing.costs import Quadratic

BOTH = [FlexSP(), Hydraulis()]


def causal(tokens: list[int]) -> Documents:
    sizes = np.array(tokens, dtype=np.int64)
    return Documents(sizes, sizes * (sizes + 1) // 2)


def cuts(size: int, most: int) -> Iterator[list[int]]:
    """Ends of all ways to cut so many into at most so many stretches."""
    for count in range(min(size, most)):
        for inner in combinations(range(1, size), count):
            yield [*inner, size]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 5))
def test_buckets_round_up_by_as_little_as_can_be(tokens: list[int], count: int) -> None:
    sizes = np.array(sorted(tokens, reverse=True))

    def rounded(ends: list[int]) -> int:
        return sum(int(sizes[begin]) * (end - begin) for begin, end in zip([0, *ends], ends, strict=False))

    ends = bucketed(sizes, count).tolist()
    assert len(ends) <= count
    assert ends[-1] == len(sizes)
    assert rounded(ends) == min(map(rounded, cuts(len(sizes), count)))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 5))
def test_micro_batches_have_as_few_tokens_as_can_be(tokens: list[int], count: int) -> None:
    sizes = np.array(sorted(tokens, reverse=True))
    parts = blasted(sizes, count)
    assert [begin for begin, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == len(sizes)
    assert len(parts) <= count
    sums = [[int(sizes[b:e].sum()) for b, e in zip([0, *ends], ends, strict=False)] for ends in cuts(len(sizes), count)]
    assert max(int(sizes[begin:end].sum()) for begin, end in parts) == min(map(max, sums))


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to put items into sets."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for place in range(len(rest)):
            yield [*rest[:place], [items[0], *rest[place]], *rest[place + 1 :]]


def one_micro_batch(documents: Documents, fleet: Fleet, cost: Quadratic) -> float:
    """The least makespan of groups side by side, by enumeration."""
    best = np.inf

    def tried(sets: list[list[int]], ranks: int, longest: float) -> None:
        nonlocal best
        if longest >= best:
            return
        if not sets:
            best = longest
            return
        own = documents.of(sets[0])
        for degree in cost.degrees:
            if degree <= ranks and int(own.tokens.sum()) <= degree * fleet.capacity:
                seconds = float(cost.documents_s(own, degree).sum()) + cost.overhead_s(degree)
                tried(sets[1:], ranks - degree, max(longest, seconds))

    for sets in partitions(list(range(len(documents)))):
        tried(sets, fleet.ranks, 0.0)
    return best


def shared(documents: Documents, fleet: Fleet, cost: Quadratic) -> Sharing:
    """A bucket for each document."""
    return Sharing(
        counts=np.ones(len(documents), dtype=np.int64),
        tokens=documents.tokens,
        degrees=np.array(cost.degrees),
        seconds=np.stack(
            [np.where(documents.tokens <= d * fleet.capacity, cost.documents_s(documents, d), np.inf) for d in cost.degrees], axis=1
        ),
        overhead_s=np.array([cost.overhead_s(d) for d in cost.degrees]),
        ranks=fleet.ranks,
        capacity=fleet.capacity,
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_program_finds_the_best_groups_of_a_micro_batch(seed: int) -> None:
    random = np.random.default_rng(seed)
    documents = causal(random.integers(200, 6000, 5).tolist())
    fleet = Fleet(4, 4, -(-int(documents.tokens.sum()) // 3))
    cost = Quadratic((1, 2, 4), per_node=4)
    groups = exact(shared(documents, fleet, cost), 1e-6, 10_000)
    assert groups is not None
    assert sum(degree for degree, _ in groups) <= fleet.ranks
    np.testing.assert_array_equal(sum(own for _, own in groups), 1)
    seconds = [float(cost.documents_s(documents, d) @ own) + cost.overhead_s(d) for d, own in groups]
    assert all(int(documents.tokens @ own) <= d * fleet.capacity for d, own in groups)
    # Beside the makespan, the program weighs the mean busy seconds by a thousandth.
    assert max(seconds) <= one_micro_batch(documents, fleet, cost) * 1.001 + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_groups_taken_alike_bound_what_groups_can_do(seed: int) -> None:
    random = np.random.default_rng(seed)
    documents = causal(random.integers(200, 6000, 5).tolist())
    fleet = Fleet(4, 4, -(-int(documents.tokens.sum()) // 3))
    cost = Quadratic((1, 2, 4), per_node=4)
    many = alike(shared(documents, fleet, cost), 0.01, 200)
    assert many is not None
    groups, shares = many
    assert groups @ np.array(cost.degrees) <= fleet.ranks
    np.testing.assert_array_equal(shares.sum(axis=1), 1)
    busy = [
        (float(cost.documents_s(documents, d)[own > 0].sum()) + count * cost.overhead_s(d)) / count
        for d, count, own in zip(cost.degrees, groups, shares.T, strict=True)
        if count
    ]
    # What may be cut takes no longer than what may not, but for the gaps at which the bisection and the solver stop.
    assert max(busy) <= one_micro_batch(documents, fleet, cost) * 1.1


def test_a_micro_batch_that_no_group_holds_has_no_groups() -> None:
    documents, cost = causal([100, 100]), Quadratic((1, 2))
    fleet = Fleet(2, 2, 50)
    assert exact(shared(documents, fleet, cost), 0.01, 100) is None
    assert alike(shared(documents, fleet, cost), 0.01, 100) is None


@pytest.mark.slow
@pytest.mark.parametrize("planner", [*BOTH, Hydraulis(stay=True), FlexSP(groups=1, buckets=2, trials=1, effort=1)])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_plans_compute_every_document_once_within_the_capacity(planner: Planner, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(1, 5000), min_size=1, max_size=20))
    per_node = data.draw(st.sampled_from([1, 2, 4]))
    ranks = per_node * data.draw(st.integers(1, 3))
    capacity = data.draw(st.integers(-(-max(tokens) // ranks), 6000))
    documents, fleet = causal(tokens), Fleet(ranks, per_node, capacity)
    cost = Quadratic(tuple(range(1, ranks + 1)), per_node=per_node)
    plan = planner.plan(documents, fleet, cost)
    assert plan.wrong(documents, fleet) is None
    assert plan == planner.plan(documents, fleet, cost)


@pytest.mark.parametrize("planner", BOTH)
@pytest.mark.parametrize("seed", range(12))
def test_plans_are_near_the_best_and_no_worse_than_fixed(planner: Planner, seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens = np.maximum(1, np.exp(random.normal(random.choice([6, 8, 10]), random.choice([0.5, 1, 1.6]), random.integers(2, 8))))
    ranks = int(random.choice([2, 4]))
    documents = causal(tokens.astype(int).tolist())
    total, longest = int(documents.tokens.sum()), int(documents.tokens.max())
    fleet = Fleet(ranks, ranks, max(-(-longest // ranks), int(total / ranks * random.choice([0.4, 0.7, 1.1, 3]))))
    cost = Quadratic((1, 2, 4)[:ranks], start_s=float(random.choice([1e-5, 1e-3])), exchange_s=float(random.choice([1e-8, 1e-6])))
    seconds = planner.plan(documents, fleet, cost).makespan_s(documents, cost, ranks)
    assert seconds <= 1.05 * Oracle().plan(documents, fleet, cost).makespan_s(documents, cost, ranks)
    assert seconds <= Fixed().plan(documents, fleet, cost).makespan_s(documents, cost, ranks) * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("planner", BOTH)
def test_a_long_tail_is_faster_than_by_one_degree(planner: Planner) -> None:
    random = np.random.default_rng(0)
    documents = causal([60_000, 20_000, *np.exp(random.normal(6.5, 1.0, 300)).astype(int).tolist()])
    fleet, cost = Fleet(16, 8, 8192), Quadratic((1, 2, 4, 8, 16))
    lines: list[str] = []
    plan = planner.plan(documents, fleet, cost, lines.append)
    assert lines
    assert plan.wrong(documents, fleet) is None
    fixed = Fixed().plan(documents, fleet, cost).makespan_s(documents, cost, 16)
    assert plan.makespan_s(documents, cost, 16) < 0.8 * fixed
    assert len({len(group.ranks) for _, group in plan.groups}) > 1


@pytest.mark.parametrize("planner", BOTH)
def test_what_no_group_holds_is_one_line(planner: Planner) -> None:
    with pytest.raises(Infeasible, match=r"^document 1 has 900 tokens[^\n]*4 ranks that hold 200 each$"):
        planner.plan(causal([10, 900]), Fleet(4, 4, 200), Quadratic((1, 2, 4)))


@pytest.mark.parametrize("planner", BOTH)
def test_a_degree_that_is_no_power_of_two_is_taken_where_it_must_be(planner: Planner) -> None:
    plan = planner.plan(causal([1100, 50]), Fleet(12, 4, 100), Quadratic(tuple(range(1, 13)), per_node=4))
    assert {len(group.ranks) for _, group in plan.groups if 0 in group.documents} <= {11, 12}


@pytest.mark.parametrize(
    "options", [{"buckets": 0}, {"trials": True}, {"gap": 1.0}, {"nodes": 1.5}, {"groups": "x"}, {"effort": -1}]
)
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"^planner\.{name}={value} is no "):
        FlexSP(**options)


def test_what_a_solver_prints_is_not_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with programs._printing_to_stderr():
        os.write(1, b"a line of the solver\n")
    print("own")
    assert capfd.readouterr() == ("own\n", "a line of the solver\n")
