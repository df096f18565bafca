"""A whole cell on one rank: every mask is checked in the types that people run, and draws are joined honestly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lcbench.cp.none import Local
from lcbench.grid.build import build_mask
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.full import full
from lcbench.masks.mask import Mask
from lcbench.measure import reference
from lcbench.measure.bounds import Check
from lcbench.measure.cell import measure_cell
from lcbench.measure.measured import Measured, over_draws
from lcbench.measure.owners import owners
from lcbench.measure.ranks import EVERY
from lcbench.measure.session import Gang
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.schedule.held import Held, Part
from lcbench.testing.masks import WITHIN, every_mask, small, small_config
from lcbench.workloads.attention import Attention
from lcbench.workloads.base import Work

HEADS = Heads(4, 2, 16)
GANG = Gang(0, 1, torch.device("cpu"), Groups(), [])
SETTINGS = {"warmup": 0, "min_iterations": 2, "max_iterations": 2, "budget_s": 1.0, "precision": 0.5, "timeline": False}


def measured(name: str, seqlen: int, dtype: str, folder: Path, draws: int = 1) -> Measured:
    def make(draw: int) -> Mask:
        if name in WITHIN:
            return small(name, seqlen, HEADS, folder, seed=5 + draw)
        return build_mask(small_config(name, seqlen, HEADS, folder), seqlen, HEADS, 5, draw)

    problem = Problem(seqlen, HEADS, Scale(1, 1), dtype, "forward_backward")
    return measure_cell(Work(Attention(), problem, make, SDPAFlash(), Local(), SETTINGS, 5, draws), GANG, lambda _: None)


@pytest.mark.parametrize("name", every_mask())
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_mask_passes_its_check_in_every_type(name: str, dtype: str, tmp_path: Path) -> None:
    result = measured(name, 200, dtype, tmp_path)
    assert result.check is not None
    assert not result.check.failures
    assert result.check.whole
    assert result.metrics["time/total/median_s"] > 0
    assert json.dumps(result.metrics)


@pytest.mark.parametrize("name", ["causal_document", "dual_scope", "star_attention", "block_random", "block_file", *WITHIN])
@pytest.mark.slow
def test_long_masks_are_checked_by_sampled_rows_and_columns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a quarter of the elements that are looked at as a whole, half the length is long already."""
    monkeypatch.setattr(reference, "ELEMENTS", reference.ELEMENTS // 4)
    result = measured(name, 751, "float64", tmp_path)
    assert result.check is not None
    assert not result.check.whole
    assert not result.check.failures
    assert max(result.check.errors.values()) <= 1e-12


def test_draws_are_measured_each_and_joined(tmp_path: Path) -> None:
    result = measured("causal_document", 150, "float64", tmp_path, draws=3)
    metrics, samples = result.metrics, result.samples
    assert metrics["draws/count"] == 3
    assert len(set(samples["draw_area"])) == 3
    assert metrics["mask/area"] == pytest.approx(np.mean(samples["draw_area"]))
    assert len(samples["total_s"]) == 6
    assert metrics["time/total/median_s"] == pytest.approx(np.mean(samples["draw_total_median_s"]))
    flops = 4 * 3.5 * HEADS.q * HEADS.dim * sum(samples["draw_area"])
    assert metrics["compute/tflops_per_gpu"] == pytest.approx(flops / sum(samples["draw_total_median_s"]) / 1e12)


def test_the_spread_over_draws_is_apart_from_the_spread_over_iterations() -> None:
    def one(area: float, seconds: float, error: float) -> Measured:
        times = {"median_s": seconds, "p20_s": 0.9 * seconds, "p80_s": 1.1 * seconds}
        metrics = {f"time/total/{name}": value for name, value in times.items()} | {
            "mask/area": area,
            "time/noise": 0.01,
            "compute/tflops_per_gpu": area / seconds,
            "compute/mfu": area / seconds / 10,
            "compute/peak_tflops": 10.0,
            "check/out_error": error,
            "memory/peak_bytes": area,
        }
        check = Check({"out": error}, {"out": 1.0}, 1, 1, True, {"reference": {"out": error}})
        return Measured(metrics, {"total_s": [seconds]}, check, {"stopped_by": "precision", "kernel_calls": [1]})

    joined = over_draws([one(100, 1.0, 0.1), one(300, 2.0, 0.5), one(500, 9.0, 0.2)])
    metrics = joined.metrics
    assert metrics["time/total/median_s"] == 4.0
    assert metrics["time/total/p80_s"] == pytest.approx(4.4)  # iterations: ten percent
    assert metrics["draws/total/spread"] == pytest.approx(4.0)  # draws: four times the median
    assert (metrics["draws/total/min_s"], metrics["draws/total/max_s"]) == (1.0, 9.0)
    assert metrics["compute/tflops_per_gpu"] == pytest.approx(900 / 12)
    assert metrics["compute/mfu"] == pytest.approx(7.5)
    assert (metrics["check/out_error"], metrics["memory/peak_bytes"]) == (0.5, 500)
    assert joined.check is not None
    assert joined.check.errors == {"out": 0.5}


def test_a_draw_that_fails_its_check_is_the_answer(tmp_path: Path) -> None:
    class Wrong(SDPAFlash):
        def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> object:  # type: ignore[override]
            prepared = super().prepare(mask, heads, dtype, device)
            forward = prepared.forward

            def off(*args: torch.Tensor, softmax_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
                out, lse = forward(*args, softmax_scale=softmax_scale)
                return out + 1e-6, lse

            prepared.forward = off  # type: ignore[method-assign]
            return prepared

    config = small_config("document", 100, HEADS, tmp_path)
    problem = Problem(100, HEADS, Scale(1, 1), "float64", "forward")
    work = Work(Attention(), problem, lambda draw: build_mask(config, 100, HEADS, 0, draw), Wrong(), Local(), SETTINGS, 0, 2)
    result = measure_cell(work, GANG, lambda _: None)
    assert result.check is not None
    assert result.check.failures
    assert result.notes["draw"] == 0
    assert "time/total/median_s" not in result.metrics


class Keeps(SDPAFlash):
    """Takes memory when it is made ready, or in its first pass, and keeps it."""

    ready: int = 0
    first: int = 0

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> object:  # type: ignore[override]
        prepared = super().prepare(mask, heads, dtype, device)
        forward, kept = prepared.forward, [torch.ones(type(self).ready, dtype=torch.uint8)]

        def keeping(*args: torch.Tensor, softmax_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
            if len(kept) == 1:
                kept.append(torch.ones(type(self).first, dtype=torch.uint8))
            return forward(*args, softmax_scale=softmax_scale)

        prepared.forward = keeping  # type: ignore[method-assign]
        return prepared


@pytest.mark.parametrize(("ready", "first"), [(0, 0), (64 << 20, 0), (0, 64 << 20), (32 << 20, 96 << 20)])
def test_memory_has_what_a_kernel_keeps(ready: int, first: int, tmp_path: Path) -> None:
    config = small_config("causal", 256, HEADS, tmp_path)
    problem = Problem(256, HEADS, Scale(1, 1), "float32", "forward_backward")
    kind = type("Keeping", (Keeps,), {"ready": ready, "first": first})
    work = Work(Attention(), problem, lambda draw: build_mask(config, 256, HEADS, 0, draw), kind(), Local(), SETTINGS, 0)
    measure_cell(work, GANG, lambda _: None)  # what libraries take once in a process
    peak = measure_cell(work, GANG, lambda _: None).metrics["memory/peak_bytes"]
    assert ready + first <= peak < ready + first + (12 << 20)


def test_a_peer_must_own_every_token_once() -> None:
    problem = Problem(100, HEADS, Scale(1, 1), "float32", "forward")

    def found(tokens: np.ndarray) -> str | None:
        own = Part(tokens)
        return owners(Held(own, own, own), full(100), problem, torch.device("cpu"), EVERY).wrong

    for tokens, says in (
        (np.arange(50), "not owned"), (np.concatenate([np.arange(99), [0]]), "not owned"), (np.arange(1, 101), "not among"),
    ):  # fmt: skip
        why = found(tokens)
        assert why is not None
        assert says in why
    assert found(np.random.default_rng(0).permutation(100)) is None


def test_a_number_that_cannot_be_true_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcbench.measure.limits.measured_limit", lambda *_, **__: 1e-9)
    result = measured("causal", 200, "float32", tmp_path)
    assert result.check is not None
    assert not result.check.failures
    assert result.implausible is not None
    assert "times the peak of 1e-09 (matrix product measured on" in result.implausible
    assert not result.stands
