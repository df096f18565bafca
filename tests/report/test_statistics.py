"""What the statistics promise, by simulation with known truth: intervals cover, gates do not trip, changes are found.

A draw is a pair of sweeps, or one sweep. Its blocks differ by ``sd`` (a standard deviation of the logarithm), and where ``apart``
is given, a cell's blocks of one sweep share that much besides: an effect from sweep to sweep that no block shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import lfilter

from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.report.comparison import Comparison, Side, compare
from lcbench.report.intervals import LEVEL, Timing, holm, medians, within_block
from lcbench.report.winners import lead
from lcbench.runs.attempt import Attempt

Array = NDArray[np.float64]
DRAWS = 500
BLOCKS = 3
COUNTS = (1, 2, 4, 12, 48)


@cache
def a_cell() -> Cell:
    return look(["seqlen=64k", "scale=1x8"]).cells[0].cell


def timed(logs: Array) -> list[Timing]:
    """Timings of cells from the logarithms of their blocks."""
    seconds = np.exp(logs)
    return [Timing(float(blocks.mean()), tuple(blocks.tolist()), 0.0) for blocks in seconds]


def side(logs: Array) -> Side:
    """A sweep with these cells, as ``compare`` takes it."""
    good = {}
    for number, blocks in enumerate(np.exp(logs).tolist()):
        metrics = {"time/total/median_s": math.fsum(blocks) / len(blocks)}
        samples = {"total_s": blocks, "block_total_s": blocks}
        good[str(number)] = (a_cell(), Attempt(str(number), "s", 1, "ok", None, metrics, samples))
    return Side(good, {}, {}, {})


def compared(
    random: np.random.Generator, count: int, sd: Array | float, *, apart: float = 0.0, truth: Array | float = 0.0
) -> Comparison:
    """A comparison of two sweeps whose cells' times differ by the factor exp(truth)."""
    shape = np.broadcast_to(sd, count)[:, None]
    a, b = (random.normal(0, 1, (count, BLOCKS)) * shape + random.normal(0, apart, (count, 1)) for _ in range(2))
    return compare(side(a), side(b + np.broadcast_to(truth, count)[:, None]))


def draws_of(count: int) -> int:
    """More of small sweeps, where a draw has few cells and is cheap."""
    return max(DRAWS, 2400 // count)


@pytest.mark.parametrize("sd", [0.01, 0.03])
@pytest.mark.parametrize("count", COUNTS)
def test_the_interval_of_a_cell_covers(count: int, sd: float) -> None:
    random, draws = np.random.default_rng([count, int(1000 * sd)]), draws_of(count)
    hits = sum(m.low <= 1 <= m.high for _ in range(draws) for m in medians(timed(random.normal(0, sd, (count, BLOCKS)))))
    assert 0.93 <= hits / draws / count <= 0.97


# Between blocks alone; from sweep to sweep alone, but for what iterations leave open, where there are cells enough to see it; both.
@pytest.mark.parametrize(
    ("count", "sd", "apart"),
    [*((c, sd, 0.0) for c in (*COUNTS, 6) for sd in (0.01, 0.03)), *((c, 0.0025, s) for c in (4, 6, 12, 48) for s in (0.01, 0.03)),
     *((c, 0.01, 0.01) for c in (4, 12, 48))],
)  # fmt: skip
@pytest.mark.slow
def test_the_interval_of_a_ratio_covers_and_the_gate_does_not_trip_on_nothing(count: int, sd: float, apart: float) -> None:
    random, draws = np.random.default_rng([count, int(1e4 * sd), int(1e4 * apart)]), draws_of(count)
    found = [compared(random, count, sd, apart=apart) for _ in range(draws)]
    covered = sum(c.ratio.low <= 1 <= c.ratio.high for one in found for c in one.cells) / draws / count
    error = 2 * math.sqrt(0.07 * 0.93 / draws / count)
    assert 0.93 - error <= covered <= 0.97 + error
    assert sum(bool(one.regressions(0.05)) for one in found) / draws <= 0.05
    # Any cell called slower or faster. An effect from sweep to sweep as large as the blocks' own may stay unseen.
    called = sum(any(c.verdict != "same" for c in one.cells) for one in found) / draws
    assert called <= (0.05 if not apart else 0.1) + 2 * math.sqrt(0.05 * 0.95 / draws)


@pytest.mark.parametrize(("sd", "apart"), [(0.01, 0.0), (0.0025, 0.01)])
@pytest.mark.slow
def test_a_slowdown_of_one_cell_of_twelve_is_found(sd: float, apart: float) -> None:
    random = np.random.default_rng(1)
    truth = np.where(np.arange(12) == 7, math.log(1.1), 0.0)
    found = [compared(random, 12, sd, apart=apart, truth=truth) for _ in range(DRAWS)]
    assert sum([c is one.cells[7] for c in one.regressions(0.05)] == [True] for one in found) / DRAWS >= 0.93
    assert sum(one.cells[7] in one.regressions(0.05) for one in found) / DRAWS >= 0.95


@pytest.mark.slow
def test_a_slower_strategy_of_three_is_found() -> None:
    random = np.random.default_rng(2)
    truth = np.where(np.arange(18) < 6, math.log(1.1), 0.0)
    found = [compared(random, 18, 0.01, truth=truth) for _ in range(DRAWS)]
    assert sum(len(one.regressions(0.05)) for one in found) / DRAWS / 6 >= 0.95
    assert sum(any(c.verdict != "same" for c in one.cells[6:]) for one in found) / DRAWS <= 0.05


@pytest.mark.parametrize(("problems", "choices"), [(1, 2), (1, 4), (1, 9), (12, 2), (4, 6)])
@pytest.mark.parametrize("sd", [0.01, 0.03])
def test_equal_choices_are_called_beyond_the_noise_in_five_percent_of_tables(problems: int, choices: int, sd: float) -> None:
    random = np.random.default_rng([problems, choices])
    draws = 2000 if problems * choices < 5 else DRAWS
    called = sum(min(holm(leads(random.normal(0, sd, (problems * choices, BLOCKS)), choices))) <= LEVEL for _ in range(draws))
    assert called / draws <= 0.05


def test_a_better_choice_is_called_so() -> None:
    random = np.random.default_rng(3)
    better = np.where(np.arange(24) % 2, 0.0, -0.05)[:, None]
    called = [holm(leads(random.normal(0, 0.01, (24, BLOCKS)) + better, 2)) for _ in range(DRAWS)]
    assert np.mean(np.array(called) <= LEVEL) >= 0.9


def leads(logs: Array, choices: int) -> list[float]:
    """The p value of the fastest choice of every problem of a sweep."""
    times = medians(timed(logs))
    problems = [sorted(times[i : i + choices], key=lambda t: t.value) for i in range(0, len(times), choices)]
    return [lead(problem)[1] for problem in problems]


@pytest.mark.parametrize("count", [6, 12, 48])
@pytest.mark.parametrize("kind", ["one", "half", "all"])
@pytest.mark.slow
def test_cells_that_differ_in_their_noise_keep_most_of_their_coverage(count: int, kind: str) -> None:
    """One cell five times as noisy; every second four times; all by a lognormal factor."""
    random = np.random.default_rng([count, len(kind)])
    known = {"one": np.where(np.arange(count) == 0, 0.05, 0.01), "half": np.where(np.arange(count) % 2, 0.01, 0.04)}
    draws = 2400 // count if count < 48 else 100
    alone, together, tripped = np.zeros(count), np.zeros(count), 0
    for _ in range(draws):
        sd = known.get(kind, 0.01 * random.lognormal(0, 0.7, count))
        alone += [m.low <= 1 <= m.high for m in medians(timed(random.normal(0, 1, (count, BLOCKS)) * sd[:, None]))]
        one = compared(random, count, sd)
        together += [c.ratio.low <= 1 <= c.ratio.high for c in one.cells]
        tripped += bool(one.regressions(0.05))
    for hits in (alone, together):
        assert hits.mean() / draws >= 0.93
        assert hits[0] / draws >= 0.8
    assert tripped / draws <= 0.05


@pytest.mark.parametrize("kind", ["one", "half"])
def test_equal_choices_of_unequal_noise_are_seldom_called_different(kind: str) -> None:
    random = np.random.default_rng(4)
    sd = {"one": np.where(np.arange(24) == 0, 0.05, 0.01), "half": np.where(np.arange(24) % 2, 0.01, 0.04)}[kind][:, None]
    called = sum(min(holm(leads(random.normal(0, 1, (24, BLOCKS)) * sd, 2))) <= LEVEL for _ in range(DRAWS))
    assert called / DRAWS <= 0.13


@pytest.mark.parametrize("sd", [0.01, 0.05])
@pytest.mark.slow
def test_iterations_that_drift_do_not_narrow_the_interval_of_a_cell(sd: float) -> None:
    """33 iterations a block, each with 0.9 of the one before it (AR(1)); blocks apart from each other. Of one block the interval is
    wider than that of iterations taken as independent, which covers 26 to 37 %, but iterations cannot tell all of a drift.
    """
    random, draws = np.random.default_rng(5), 2000
    logs = drifting(random, (draws, BLOCKS, 33), sd)
    hits = sum(m.low <= 1 <= m.high for blocks in np.median(logs, axis=2) for m in medians(timed(blocks[None])))
    assert hits / draws >= 0.93
    single = sum(
        m.low <= 1 <= m.high
        for block in np.exp(drifting(random, (draws, 100), sd))
        for m in medians([Timing(float(np.median(block)), (1.0,), within_block(block.tolist()))])
    )
    assert single / draws >= 0.7


def drifting(random: np.random.Generator, shape: Sequence[int], sd: float) -> Array:
    """AR(1) with 0.9 along the last axis, from its stationary distribution."""
    noise = random.normal(0, sd * math.sqrt(1 - 0.81), shape)
    noise[..., 0] = random.normal(0, sd, shape[:-1])
    return np.asarray(lfilter([1.0], [1.0, -0.9], noise, axis=-1))
