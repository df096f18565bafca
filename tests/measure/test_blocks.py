"""Blocks of timings: what one of them may take, and how one more is joined to what a cell has."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest

from lcbench.measure.blocks import BLOCKS, blocks_of, share, shared, with_block, without_times
from lcbench.measure.measured import Measured
from lcbench.measure.stopping import Stopping

SETTINGS = {"warmup": 3, "min_iterations": 5, "max_iterations": 100, "budget_s": 21.0, "precision": 0.02, "timeline": False}


def test_blocks_share_a_cells_budget() -> None:
    first, later = shared(SETTINGS), shared(SETTINGS, first=False)
    assert (first["budget_s"], first["min_iterations"], first["max_iterations"], first["warmup"]) == (7.0, 2, 34, 3)
    assert later == first | {"warmup": 1}
    assert shared(first) == first  # what is shared is not shared again
    assert shared(later, first=False) == later
    assert shared(SETTINGS | {"min_iterations": 1, "max_iterations": 1, "warmup": 0})["min_iterations"] == 2
    assert Stopping.from_config(first).max_iterations == 34


@pytest.mark.parametrize(("said", "blocks"), [({}, BLOCKS), ({"blocks": 1}, 1), ({"blocks": 7}, 7)])
def test_the_number_of_blocks_is_the_default_where_a_cell_says_none(said: dict[str, int], blocks: int) -> None:
    assert blocks_of(SETTINGS | said) == blocks
    assert shared(SETTINGS | said)["budget_s"] == pytest.approx(21.0 / blocks)


def test_one_block_is_the_whole_cell() -> None:
    alone = SETTINGS | {"blocks": 1, "min_iterations": 1, "max_iterations": 1}
    assert shared(alone) == alone


def test_shares_add_up_to_the_cell() -> None:
    for blocks in (1, 2, 3, 9):
        shares = [share(done, blocks) for done in range(1, blocks + 1)]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
    assert share(1, 3) == 0.5


def block(forward: list[float], backward: list[float] | None) -> dict[str, list[float]]:
    times = {"forward": forward} | ({"backward": backward} if backward else {})
    times["total"] = np.sum(list(times.values()), axis=0).tolist()
    return {f"{phase}_s": v for phase, v in times.items()} | {f"block_{p}_s": [float(np.median(v))] for p, v in times.items()}


def first(samples: dict[str, list[float]], work: float = 12.0) -> dict[str, float]:
    metrics = {"time/blocks": 1.0, "time/iterations": float(len(samples["forward_s"])), "time/noise": 0.01, "time/check_s": 9.0}
    for phase in ("forward", "backward", "total"):
        if f"{phase}_s" in samples:
            low, median, high = np.quantile(samples[f"{phase}_s"], [0.2, 0.5, 0.8]).tolist()
            metrics |= {f"time/{phase}/{k}_s": v for k, v in (("p20", low), ("median", median), ("p80", high))}
            rates = "compute" if phase == "total" else f"compute/{phase}"
            metrics |= {f"{rates}/tflops_per_gpu": work / median, f"{rates}/mfu": work / median / 100}
    return metrics | {"compute/peak_tflops": 100.0, "overlap/forward/compute_s": 0.5, "memory/peak_bytes": 7.0}


def test_a_cells_time_is_the_mean_of_its_blocks_and_its_rates_follow() -> None:
    samples = block([1.0, 1.1, 1.2], [2.0, 2.2, 2.1]) | {"rank_forward_median_s": [1.0, 1.1]}
    metrics = first(samples)
    kept = dict(metrics), {k: list(v) for k, v in samples.items()}
    more = [block([2.0, 2.2], [3.0, 3.4]), block([1.5], [2.5])]
    joined, all_samples = metrics, samples
    for again in more:
        joined, all_samples = with_block(joined, all_samples, Measured(samples=again | {"rank_forward_median_s": [9.0, 9.0]}))
    assert (metrics, samples) == kept  # nothing is changed in its place
    assert all_samples["forward_s"] == [1.0, 1.1, 1.2, 2.0, 2.2, 1.5]
    assert all_samples["block_forward_s"] == [1.1, pytest.approx(2.1), 1.5]
    assert all_samples["rank_forward_median_s"] == [1.0, 1.1]
    assert (joined["time/blocks"], joined["time/iterations"]) == (3, 6)
    for phase in ("forward", "backward", "total"):
        median = joined[f"time/{phase}/median_s"]
        assert median == pytest.approx(fmean(all_samples[f"block_{phase}_s"]))
        assert joined[f"time/{phase}/p20_s"] == pytest.approx(np.quantile(all_samples[f"{phase}_s"], 0.2))
        assert joined[f"time/{phase}/p80_s"] == pytest.approx(np.quantile(all_samples[f"{phase}_s"], 0.8))
        rates = "compute" if phase == "total" else f"compute/{phase}"
        assert joined[f"{rates}/tflops_per_gpu"] == pytest.approx(12.0 / median)
        assert joined[f"{rates}/mfu"] == pytest.approx(0.12 / median)
    same = ("time/noise", "time/check_s", "compute/peak_tflops", "overlap/forward/compute_s", "memory/peak_bytes")
    assert all(joined[key] == metrics[key] for key in same)
    assert joined.keys() == metrics.keys()


def test_a_forward_only_cell_has_no_backward_to_join() -> None:
    samples = block([1.0, 1.2], None)
    joined, all_samples = with_block(first(samples), samples, Measured(samples=block([3.0], None)))
    assert joined["time/total/median_s"] == joined["time/forward/median_s"] == pytest.approx((1.1 + 3.0) / 2)
    assert "backward_s" not in all_samples


def test_over_draws_p20_and_p80_show_no_difference_between_draws() -> None:
    samples = block([1.0, 1.0, 9.0, 9.0], None) | {"block_forward_s": [5.0], "block_total_s": [5.0]}
    metrics = first(samples) | {"draws/count": 2.0, "time/iterations": 2.0}
    metrics |= {f"time/{p}/{k}_s": v for p in ("forward", "total") for k, v in (("p20", 4.5), ("median", 5.0), ("p80", 5.5))}
    again = block([1.4, 1.4, 9.0, 9.0], None) | {"block_forward_s": [7.0], "block_total_s": [7.0]}
    joined, _ = with_block(metrics, samples, Measured(samples=again))
    assert joined["time/total/median_s"] == 6.0
    assert (joined["time/total/p20_s"], joined["time/total/p80_s"]) == (pytest.approx(5.4), pytest.approx(6.6))
    assert joined["time/iterations"] == 4  # of a draw


def test_what_is_wrong_has_no_speed() -> None:
    samples = block([1.0, 1.2], [1.0, 1.0]) | {"rank_peak_bytes": [7.0], "draw_total_median_s": [1.0], "draw_area": [5.0]}
    metrics, rest = without_times(first(samples) | {"draws/total/spread": 0.5, "check/out_error": 1e-3}, samples)
    assert metrics == {"memory/peak_bytes": 7.0, "check/out_error": 1e-3, "time/check_s": 9.0}
    assert rest == {"rank_peak_bytes": [7.0], "draw_area": [5.0]}
