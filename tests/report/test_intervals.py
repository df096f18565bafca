"""Intervals and p values: what must hold of any numbers. That they cover what they promise is in test_statistics.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcbench.report.intervals import ENOUGH, SHARED, Median, Timing, holm, medians, noise_of, ratios, within_block

SECONDS = st.floats(1e-6, 1e3)
BLOCKS = st.lists(SECONDS, min_size=1, max_size=5)


def timing(blocks: list[float], within: float = 0.0) -> Timing:
    return Timing(float(np.mean(blocks)), tuple(blocks), within)


def around(value: float, *off: float) -> Timing:
    return timing([value * (1 + o) for o in off or (-0.004, 0.001, 0.003)])


@given(BLOCKS, BLOCKS)
def test_a_ratio_lies_in_its_interval_and_its_inverse_mirrors_it(a: list[float], b: list[float]) -> None:
    one, other = medians([timing(a, 0.01)]) + medians([timing(b, 0.01)])
    ratio, inverse = one.over(other), other.over(one)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value == pytest.approx(np.mean(a) / np.mean(b))
    assert inverse.value == pytest.approx(1 / ratio.value)
    assert inverse.low == pytest.approx(1 / ratio.high)
    assert inverse.p == pytest.approx(ratio.p)
    assert (ratio.p <= 0.05) == (not ratio.low <= 1 <= ratio.high)


@given(st.lists(BLOCKS, min_size=1, max_size=8))
def test_a_sweep_over_itself_is_the_same(cells: list[list[float]]) -> None:
    timings = [timing(blocks, 0.01) for blocks in cells]
    found, between = ratios(timings, timings)
    assert [r.value for r in found] == pytest.approx([1.0] * len(cells))
    assert all(r.p == pytest.approx(1.0) for r in found)
    assert between == (0.0 if len(cells) >= ENOUGH else None)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_lies_between_the_p_values_and_bonferroni(ps: list[float]) -> None:
    adjusted = holm(ps)
    assert all(p <= a <= min(1.0, p * len(ps)) + 1e-12 for p, a in zip(ps, adjusted, strict=True))
    assert all(a <= b for (p, a) in zip(ps, adjusted, strict=True) for (q, b) in zip(ps, adjusted, strict=True) if p < q)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_an_interval_by_hand() -> None:
    # Three blocks, standard deviation 0.01, Student's t of two degrees of freedom.
    (found,) = medians([timing([math.exp(x) for x in (0.99, 1.0, 1.01)])])
    assert (found.sigma, found.dof, found.known) == (pytest.approx(0.01 / math.sqrt(3)), 2, True)
    assert math.log(found.high / found.value) == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-5)
    twice = found.over(found)
    assert (twice.sigma, twice.dof) == (pytest.approx(0.01 * math.sqrt(2 / 3)), pytest.approx(4))


def test_noise_that_is_alike_is_pooled_and_what_differs_is_not() -> None:
    alike = noise_of([1.0, 1.2, 0.9, 1.1, 0.8, 1.3], [2.0] * 6)
    assert alike.variance == pytest.approx([1.05] * 6)
    assert list(alike.dof) == [12.0] * 6
    assert alike.total == 12
    unlike = noise_of([1.0, 100.0, 0.01, 10.0, 0.1, 1000.0], [2.0] * 6)
    assert unlike.variance[5] > 100 * unlike.variance[2]
    assert max(unlike.dof) < 4
    loud = noise_of([1.0, 1.2, 0.9, 1.1, 0.8, 400.0], [8.0] * 6)
    assert loud.variance[5] > 200
    few = noise_of([1.0, 4.0], [2.0, 2.0])
    assert list(few.variance) == [1.0, 4.0]


def test_a_cell_with_one_block_takes_its_noise_from_the_others() -> None:
    others = [around(1.0) for _ in range(SHARED)]
    *_, alone = medians([*others, timing([1.0], within=0.0001)])
    assert alone.known
    assert alone.sigma == pytest.approx(math.sqrt(3) * medians(others)[0].sigma)
    *_, louder = medians([*others, timing([1.0], within=0.2)])
    assert louder.sigma == 0.2
    (single,) = medians([timing([1.0], within=0.01)])
    assert not single.known
    assert single.high == pytest.approx(math.exp(0.0196), rel=1e-3)


def test_iterations_that_drift_together_do_not_narrow_the_interval_of_one_block() -> None:
    random = np.random.default_rng(0)
    apart = random.lognormal(0, 0.01, 60)
    assert within_block(sorted(apart)) > 2 * within_block(list(apart))
    assert within_block([1.0]) == 0.0
    assert within_block([1.0, 1.1]) > 0.02


def test_old_results_have_one_block() -> None:
    metrics = {"time/total/median_s": 2.0, "time/noise": 0.03}
    iterations = [1.9, 2.0, 2.1, 2.0, 1.95, 2.05, 2.0]
    old = Timing.of(metrics, {"total_s": iterations}, "total")
    assert old == Timing(2.0, (2.0,), within_block(iterations))
    assert Timing.of(metrics, {"total_s": iterations, "block_total_s": [2.0]}, "total") == old
    drawn = Timing.of(metrics | {"draws/count": 20.0}, {"total_s": iterations}, "total")
    assert drawn is not None
    assert drawn.within == pytest.approx(math.log(1.03) / 1.96, rel=1e-3)
    new = Timing.of(metrics, {"total_s": iterations, "block_total_s": [1.99, 2.01]}, "total")
    assert new == Timing(2.0, (1.99, 2.01), 0.0)
    assert Timing.of(metrics, {"total_s": iterations}, "backward") is None


def test_a_spread_between_sweeps_that_blocks_do_not_show_widens_intervals() -> None:
    random = np.random.default_rng(1)
    a = [around(1.0) for _ in range(60)]
    b = [around(float(np.exp(x))) for x in random.normal(0, 0.05, 60)]
    found, between = ratios(a, b)
    assert between == pytest.approx(0.05, rel=0.25)
    assert sum(r.p <= 0.05 for r in found) < 8
    assert all(p > 0.05 for p in holm([r.p for r in found]))


def test_cells_that_changed_do_not_hide_as_spread() -> None:
    a = [around(1.0) for _ in range(9)]
    same = [around(1 + e) for e in (-0.003, -0.002, 0.0, 0.001, 0.003, 0.002)]
    found, _ = ratios(a, [*same, *[around(1.1)] * 3])
    assert [p <= 0.05 for p in holm([r.p for r in found])] == [False] * 6 + [True] * 3


def test_a_change_of_all_cells_alike_is_no_spread() -> None:
    found, between = ratios([around(1.0)] * 10, [around(1.2)] * 10)
    assert between == 0.0
    assert all(r.p < 0.001 for r in found)


def test_too_few_cells_say_nothing_about_a_spread() -> None:
    a, b = [around(1.0)] * (ENOUGH - 1), [around(1.0)] * (ENOUGH - 1)
    found, between = ratios(a, b)
    assert between is None
    assert all(r.known for r in found)
    single, _ = ratios([timing([1.0], 0.01)], [timing([1.1], 0.01)])
    assert not single[0].known
    many, between = ratios([timing([1.0], 0.01)] * ENOUGH, [timing([1.001], 0.01)] * ENOUGH)
    assert between == 0.0
    assert all(r.known for r in many)


def test_numbers_without_any_spread_are_no_trouble() -> None:
    flat = [timing([1.0, 1.0, 1.0])] * 6
    assert [(m.low, m.high) for m in medians(flat)] == [(1.0, 1.0)] * 6
    found, between = ratios(flat, [*flat[:5], timing([1.1, 1.1, 1.1])])
    assert between == 0.0
    assert [r.p < 0.05 for r in found] == [False] * 5 + [True]
    assert Median(1.0, 0.5, 0.1, 1.0, True).high > 1e100
