"""On inputs with structure, at equal density: nobody finds more than the oracle, and who looks at q and k more than chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lcbench.problem import Heads
from lcbench.testing.masks import names
from tests.selectors.recall import MUST_FIND, SLACK, Found, Setting, found, judged, missed, pairs, table

SELECTORS = [name for name in names("selector") if name != "none"]
DENSITY = 0.2


@pytest.fixture(scope="module", params=[("causal", 2), ("full", 1)])
def results(request: pytest.FixtureRequest) -> dict[tuple[str, float], list[Found]]:
    mask, seeds = request.param
    setting = Setting("structured", mask, 1024, Heads(4, 2, 64), 32, 32)
    of_seeds = [found(setting, SELECTORS, [DENSITY], seed) for seed in range(seeds)]
    return {key: [of[key] for of in of_seeds] for key in of_seeds[0]}


@pytest.mark.slow
def test_the_order_of_selectors_is_as_it_must_be(results: dict[tuple[str, float], list[Found]]) -> None:
    assert list(missed(results)) == []
    for name in MUST_FIND:
        for best, one, chance in zip(*(results[of, DENSITY] for of in ("oracle", name, "random")), strict=True):
            assert abs(one.density.mean() - DENSITY) < 0.03  # equal, or nothing is compared
            assert one.recall.mean() > chance.recall.mean() + 0.1
            assert best.recall.mean() > one.recall.mean() - 0.05  # whose density is not quite the same
            assert (one.recall <= one.best + SLACK).all()
    for one in results["oracle", DENSITY]:
        np.testing.assert_allclose(one.recall, one.best, rtol=1e-4)
    for one in results["random", DENSITY]:
        np.testing.assert_allclose(one.recall.mean(), one.random.mean(), atol=0.05)


@pytest.mark.slow
def test_what_is_not_as_it_must_be_is_said(results: dict[tuple[str, float], list[Found]]) -> None:
    one = results["dsv", DENSITY][0]
    worse, more = replace(one, recall=one.random), replace(one, recall=one.best + 1e-3)
    (line,) = missed({("dsv", 0.3): [one, worse]})
    assert line.startswith("dsv at 0.3 of seed 1 has")
    assert line.endswith("at random " + f"{one.random.mean():.4f}")
    (line,) = missed({("moba", 0.3): [more]})
    assert line.startswith("moba at 0.3 of seed 0 has")
    assert line.endswith("at best")
    (line,) = missed({("oracle", 0.3): [one]})
    assert line.startswith("oracle at 0.3 of seed 0 has")


@pytest.mark.slow
def test_a_table_has_a_row_per_selector(results: dict[tuple[str, float], list[Found]]) -> None:
    lines = list(table(results, [DENSITY]))
    assert [line.split("`")[1] for line in lines[2:]] == SELECTORS
    assert len({line.count("|") for line in lines}) == 1


def test_recall_is_the_weight_that_is_kept() -> None:
    setting = Setting("gaussian", "causal", 12, Heads(1, 1, 16), 4, 4)
    of_mask = pairs(setting)
    np.testing.assert_array_equal(of_mask, [[10, 0, 0], [16, 10, 0], [16, 16, 10]])
    masses = np.array([[[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.3, 0.2]]])
    keep = np.array([[[1, 0, 0], [1, 0, 0], [0, 1, 1]]], dtype=bool)
    one = judged(keep, masses, of_mask, [4, 4, 4], 0.0)
    np.testing.assert_allclose(
        [one.recall, one.best, one.random], [[(1 + 0.25 + 0.5) / 3], [(1 + 0.75 + 0.8) / 3], [(1 + 0.5 + 2 / 3) / 3]]
    )
    np.testing.assert_allclose(one.density, [(10 + 16 + 26) / 78])
