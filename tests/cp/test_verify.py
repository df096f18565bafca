"""Schedules without processes: every strategy that conf/ names is proven for many P, and a wrong schedule is caught."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lcbench.cp.schedule import Hop, Step
from lcbench.cp.verify import ScheduleError, verify
from lcbench.grid.build import build_strategy
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.problem import Heads, Problem, Scale
from lcbench.testing.masks import load, names, small

SCALES = [Scale(1, p) for p in (1, 2, 3, 4, 5, 6, 7, 8)] + [Scale(2, 8), Scale(3, 4), Scale(12, 8)]


@pytest.mark.parametrize("name", names("cp"))
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_schedule_covers_every_mask_once(name: str, scale: Scale, tmp_path: Path) -> None:
    seqlen = 1013  # a prime: no shard is even
    strategy = build_strategy(load("cp", name))
    problem = Problem(seqlen, Heads(96, 8, 64), scale, "bfloat16", "forward_backward")
    # At many ranks a tile costs more than it shows: a few masks stand for all.
    chosen = names() if scale.world_size <= 4 else ["full", "share_question", "dual_scope", "block_random"]
    for mask in (small(mask, seqlen, problem.heads, tmp_path) for mask in chosen):
        if strategy.unsupported(problem, mask):
            continue
        report = verify(strategy.schedule(problem, mask), mask, problem.heads, itemsize=2)
        # Every pair once for each share of the heads.
        assert report.rank_pairs.sum() == mask.pairs(problem.heads.q)


def test_zigzag_balances_causal_steps() -> None:
    problem = Problem(4096, Heads(8, 8, 64), Scale(1, 8), "bfloat16", "forward")
    strategy = build_strategy({"name": "ring", "_target_": "lcbench.cp.ring.Ring", "order": "auto"})
    report = verify(strategy.schedule(problem, causal(4096)), causal(4096), problem.heads, 2)
    assert report.imbalance < 1.01
    plain = build_strategy({"name": "ring", "_target_": "lcbench.cp.ring.Ring", "order": "contiguous"})
    assert verify(plain.schedule(problem, causal(4096)), causal(4096), problem.heads, 2).imbalance > 1.7


@pytest.mark.parametrize(("ranks", "forward_mb"), [(8, 235), (32, 1040)])
def test_ring_bytes_match_the_published_formula(ranks: int, forward_mb: int) -> None:
    """Forward (P-1) KV blocks; backward the same again for KV and, in float32, for its gradient."""
    seqlen = 8192 * ranks
    problem = Problem(seqlen, Heads(64, 8, 128), Scale(1, ranks), "bfloat16", "forward_backward")
    strategy = build_strategy({"name": "ring", "_target_": "lcbench.cp.ring.Ring", "order": "auto"})
    report = verify(strategy.schedule(problem, full(seqlen)), full(seqlen), problem.heads, 2)
    block = 2 * 8192 * 8 * 128 * 2
    assert set(report.forward_bytes.tolist()) == {(ranks - 1) * block}
    assert set(report.backward_bytes.tolist()) == {(ranks - 1) * block * 3}
    assert round(report.forward_bytes[0] / 1e6) == forward_mb


def test_ulysses_bytes_match_the_published_formula() -> None:
    ranks, seqlen = 8, 8192 * 8
    problem = Problem(seqlen, Heads(64, 8, 128), Scale(1, ranks), "bfloat16", "forward_backward")
    strategy = build_strategy({"name": "ulysses", "_target_": "lcbench.cp.ulysses.Ulysses"})
    report = verify(strategy.schedule(problem, full(seqlen)), full(seqlen), problem.heads, 2)
    assert set(report.forward_bytes.tolist()) == {(ranks - 1) * 8192 // ranks * 128 * 2 * (2 * 64 + 2 * 8)}
    assert (report.forward_bytes == report.backward_bytes).all()


def test_refusals_name_the_numbers() -> None:
    ulysses = build_strategy({"name": "ulysses", "_target_": "lcbench.cp.ulysses.Ulysses"})
    problem = Problem(4096, Heads(64, 8, 128), Scale(12, 8), "bfloat16", "forward")
    assert ulysses.unsupported(problem, full(4096)) == "cannot split 64 query heads evenly over 96 ranks"
    usp = build_strategy({"name": "usp", "_target_": "lcbench.cp.usp.USP", "ulysses_degree": 5, "order": "auto"})
    assert usp.unsupported(problem, full(4096)) == "ulysses_degree=5 does not divide the 96 ranks of scale=12x8"


def test_a_wrong_schedule_is_caught_and_shown() -> None:
    problem = Problem(64, Heads(4, 4, 8), Scale(1, 4), "float64", "forward")
    mask = full(64)
    schedule = build_strategy({"name": "ring", "_target_": "lcbench.cp.ring.Ring", "order": "auto"}).schedule(problem, mask)
    missing = dataclasses.replace(schedule, steps=schedule.steps[:-1])
    with pytest.raises(ScheduleError, match="nobody computed q0k1"):
        verify(missing, mask, problem.heads, 8)
    early = dataclasses.replace(schedule, steps=(Step(schedule.steps[0].tiles), *schedule.steps[1:]))
    with pytest.raises(ScheduleError, match="rank 0 holds keys of shard 0, not of shard 3"):
        verify(early, mask, problem.heads, 8)
    twice = dataclasses.replace(schedule, steps=(schedule.steps[0], Step(schedule.steps[0].tiles, (Hop("ring"),))))
    with pytest.raises(ScheduleError, match="step 1"):
        verify(twice, mask, problem.heads, 8)
    assert "q0k3" in str(schedule).splitlines()[2]
    assert np.array_equal(schedule.mesh.source("ring", 1), [3, 0, 1, 2])
