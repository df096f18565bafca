"""Intervals: they cover what they promise, and a spread between runs is told from a change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcbench.report.intervals import ENOUGH, Median, Ratio, between_runs

SAMPLES = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=40)


@given(SAMPLES, SAMPLES)
def test_a_ratio_lies_in_its_interval_and_its_inverse_mirrors_it(a: list[float], b: list[float]) -> None:
    ratio, inverse = Median.of(a).over(Median.of(b)), Median.of(b).over(Median.of(a))
    assert ratio.low <= ratio.value * (1 + 1e-12)
    assert ratio.value <= ratio.high * (1 + 1e-12)
    assert inverse.low == pytest.approx(1 / ratio.high)
    assert inverse.high == pytest.approx(1 / ratio.low)
    assert ratio.value == pytest.approx(np.median(a) / np.median(b))


@given(SAMPLES)
def test_a_sample_over_itself_is_never_beyond_the_noise(a: list[float]) -> None:
    assert not Median.of(a).over(Median.of(a)).beyond_noise


@pytest.mark.parametrize("count", [8, 20, 60])
@pytest.mark.parametrize("shape", ["normal", "lognormal"])
def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says(count: int, shape: str) -> None:
    random = np.random.default_rng(count)
    draw = {"normal": lambda n: random.normal(10, 1, n), "lognormal": lambda n: random.lognormal(0, 0.3, n)}[shape]
    hits = 0
    for _ in range(800):
        ratio = Median.of(2 * draw(count)).over(Median.of(draw(count)))
        hits += ratio.low <= 2.0 <= ratio.high
    assert 0.92 < hits / 800 <= 1.0


def test_a_spread_between_runs_is_found_and_widens_intervals() -> None:
    random = np.random.default_rng(1)
    ratios = [Ratio(r, r * 0.995, r * 1.005) for r in np.exp(random.normal(0, 0.05, 200))]
    sigma = between_runs(ratios)
    assert sigma == pytest.approx(0.05, rel=0.25)
    assert sum(r.beyond_noise for r in ratios) > 150
    assert sum(r.widened(sigma).beyond_noise for r in ratios) < 20


def test_some_cells_that_changed_do_not_hide_as_spread() -> None:
    same = [Ratio(1 + e, (1 + e) * 0.99, (1 + e) * 1.01) for e in (-0.01, -0.005, 0.0, 0.004, 0.01, 0.006)]
    slow = [Ratio(2.0, 1.98, 2.02)] * 3
    sigma = between_runs([*same, *slow])
    assert sigma is not None
    assert [r.widened(sigma).beyond_noise for r in (*same, *slow)] == [False] * 6 + [True] * 3


def test_a_change_of_all_cells_alike_is_no_spread() -> None:
    assert between_runs([Ratio(1.2, 1.19, 1.21)] * 10) == 0.0


def test_too_few_cells_say_nothing() -> None:
    assert between_runs([Ratio(1.0, 0.9, 1.1)] * (ENOUGH - 1)) is None
