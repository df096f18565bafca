"""Packs: every cell once, none over its limits, the shortest first and those that will not fit last; and who is tried again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcbench.grid.cell import Cell
from lcbench.problem import Heads, Problem, Scale
from lcbench.runs.estimate import Estimator, flops, memory_bytes
from lcbench.runs.pack import given_up, group, tries_again
from lcbench.runs.store import Attempt, Failure, Sweep
from tests.runs.test_store import made_cell

H100 = {"name": "h100", "names": ["NVIDIA H100 80GB HBM3"], "peak_tflops": {"bfloat16": 989}, "memory_bytes": 80_000_000_000}
BASE = {
    "kernel": {"name": "sdpa_flash", "_target_": "lcbench.kernels.sdpa_flash.SDPAFlash"},
    "cp": {"name": "ring", "_target_": "lcbench.cp.ring.Ring"},
    "mask": {"name": "causal", "_target_": "lcbench.masks.causal.causal"},
    "seqlen": 1024, "scale": "1x8", "heads": "32x8x128", "dtype": "bfloat16", "direction": "forward_backward",
    "reduce_dtype": "float32", "seed": 0,
    "measure": {"warmup": 1, "min_iterations": 5, "max_iterations": 50, "budget_s": 10.0, "precision": 0.02, "timeline": False},
}  # fmt: skip


def cell(**config: object) -> Cell:
    return Cell.from_config({**BASE, **config})


class Given(Estimator):
    """Estimates by seed."""

    def __init__(self, seconds: list[float], fails: list[bool]) -> None:
        super().__init__()
        self._seconds, self._fails = seconds, fails

    def seconds(self, cell: Cell) -> float:
        return self._seconds[cell.config["seed"]]

    def will_fail(self, cell: Cell) -> bool:
        return self._fails[cell.config["seed"]]


@given(
    st.lists(st.tuples(st.floats(0.1, 4000), st.booleans(), st.sampled_from(["1x2", "2x2"])), min_size=1, max_size=40),
    st.none() | st.integers(1, 7),
    st.none() | st.integers(5, 200),
)
def test_every_cell_is_in_one_pack_and_no_pack_is_over_its_limits(
    drawn: list[tuple[float, bool, str]], max_cells: int | None, max_minutes: int | None
) -> None:
    seconds, fails = [s for s, _, _ in drawn], [f for _, f, _ in drawn]
    cells = [cell(seed=i, scale=scale) for i, (_, _, scale) in enumerate(drawn)]
    groups = group(cells, Given(seconds, fails), max_cells=max_cells, max_minutes=max_minutes)
    assert sorted(c.id for g in groups for c in g.cells) == sorted(c.id for c in cells)
    for made in groups:
        assert {c.scale for c in made.cells} == {made.scale}
        order = [(fails[c.config["seed"]], seconds[c.config["seed"]]) for c in made.cells]
        assert order == sorted(order)
        assert max_cells is None or len(made.cells) <= max_cells
        total = sum(made.seconds.values())
        if max_minutes is not None:
            assert made.minutes <= max_minutes
        if max_minutes is None or len(made.cells) > 1:
            assert 60 * made.minutes >= total  # there is time for what is expected


def test_estimates_come_from_like_results_else_from_flops() -> None:
    blank, long = Estimator(H100), cell(seqlen=1 << 20)
    assert blank.seconds(long) > blank.seconds(cell(seqlen=1 << 14))
    # 1M causal, 32 heads: 5e17 FLOPs forward and 2.5 times that backward; a quarter of eight H100s does 2e15 a second.
    assert flops(long) == pytest.approx(3.5 * 4 * 128 * 32 * 2**39, rel=1e-3)
    # A first block of twelve passes, with the check and what is timed apart, and two later ones of six.
    assert blank.seconds(long) == pytest.approx(24 * flops(long) / (8 * 0.25 * 989e12), rel=0.1)
    taught = Estimator(H100)
    metrics = {"time/total/median_s": 0.01, "time/prepare_s": 0.5, "time/check_s": 0.5}
    metrics["compute/tflops_per_gpu"] = flops(cell(seqlen=1 << 14)) / 8 / 0.01 / 1e12
    taught.learn(cell(seqlen=1 << 14), Attempt("x", "s", 1, "ok", metrics=metrics))
    assert taught.seconds(cell(seqlen=1 << 14)) < blank.seconds(long)
    # Twice the length is four times the work.
    assert taught.seconds(cell(seqlen=1 << 15)) > taught.seconds(cell(seqlen=1 << 14))
    assert taught.seconds(cell(seqlen=1 << 14, dtype="float32")) == Estimator(H100).seconds(cell(seqlen=1 << 14, dtype="float32"))


def test_an_estimate_holds_all_blocks_of_a_cell() -> None:
    measure = {**BASE["measure"], "budget_s": 30.0, "max_iterations": 1 << 20}  # type: ignore[dict-item]

    def seconds(blocks: int, estimator: Estimator) -> float:
        return estimator.seconds(cell(scale="1x1", measure={**measure, "blocks": blocks}))

    estimator = Estimator(H100)
    metrics = {"time/total/median_s": 0.5, "time/prepare_s": 7.0, "time/first_pass_s": 1.5, "time/check_s": 48.5}
    metrics["compute/tflops_per_gpu"] = flops(cell(scale="1x1")) / 0.5 / 1e12
    estimator.learn(cell(scale="1x1"), Attempt("x", "s", 1, "ok", metrics=metrics))
    # The budget is shared; each later block is prepared anew, warms up once, and has three passes that are checked.
    assert seconds(2, estimator) - seconds(1, estimator) == pytest.approx(7.0 + 4 * 0.5)
    assert seconds(6, estimator) - seconds(1, estimator) == pytest.approx(5 * (7.0 + 4 * 0.5))
    assert seconds(1, estimator) == pytest.approx(30.0 + 57.0 + 2 * 0.5, abs=3.0)
    default = estimator.seconds(cell(scale="1x1", measure=measure))
    assert default == seconds(3, estimator)
    (made,) = group([cell(scale="1x1", seed=i) for i in range(100)], estimator, max_cells=None, max_minutes=None)
    assert 60 * made.minutes > 100 * estimator.seconds(cell(scale="1x1"))


def test_what_will_not_fit_is_told_by_its_bytes_and_by_what_did_not_fit_before() -> None:
    small, large = cell(seqlen=1 << 16), cell(seqlen=1 << 24, scale="1x1")
    estimator = Estimator(H100)
    assert not estimator.will_fail(small)
    assert estimator.will_fail(large)
    assert not Estimator(None).will_fail(large)  # CPU ranks: nothing is known of their memory
    estimator.learn(small, Attempt("x", "s", 1, "failed", Failure("oom", "")))
    assert estimator.will_fail(small)
    assert not estimator.will_fail(cell(seqlen=1 << 15))
    problem = Problem(1 << 20, Heads(32, 8, 128), Scale(1, 8), "bfloat16", "forward")
    assert memory_bytes(problem, "allgather") > memory_bytes(problem, "ring")


def attempts(*kinds: str) -> list[Attempt]:
    return [
        Attempt("c", "s", i, "failed" if kind else "ok", Failure(kind, "") if kind else None)  # type: ignore[arg-type]
        for i, kind in enumerate(kinds, 1)
    ]


@pytest.mark.parametrize(
    ("history", "again"),
    [
        ((), False), (("",), False), (("node-fail",), True), (("node-fail", "node-fail"), True),
        (("node-fail", "node-fail", "node-fail"), False), (("oom",), False), (("preempted", "node-fail"), True),
        (("nccl",), True), (("nccl", "nccl"), False), (("crash", "nccl"), False), (("node-fail", ""), False),
        (("crash", "preempted"), True),
    ],
)  # fmt: skip
def test_retries_by_class(history: tuple[str, ...], again: bool) -> None:
    assert tries_again(attempts(*history), {"node-fail": 2, "preempted": 5, "nccl": 1, "oom": 0}) == again


def test_what_kills_its_gang_twice_is_not_tried_a_third_time() -> None:
    generous = {"crash": 9, "hang": 9}
    assert tries_again(attempts("crash"), generous)
    assert not tries_again(attempts("crash", "hang"), generous)
    assert given_up(attempts("", "crash", "hang"))
    assert not given_up(attempts("crash", "numerics"))
    assert not given_up(attempts("crash", "crash", ""))


def test_a_sweep_without_history_has_an_estimator(tmp_path: object) -> None:
    root = Path(str(tmp_path))
    Sweep(root, "s").add([], command=[])
    assert not Estimator.of(root, {"device": "cpu"}, [H100]).known
    assert Estimator.of(root, {"device": "h100"}, [H100]).device == H100
    assert made_cell().scale == Scale(1, 2)


def test_cells_that_run_here_are_estimated_for_the_gpu_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = tmp_path / "nvidia-smi"
    lists.write_text("#!/bin/sh\necho '0, GPU-1, NVIDIA H100 80GB HBM3, 580.1, 0, 1980, 1980, 0x0, 40, Disabled'\n")
    lists.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Estimator.of(tmp_path, {"device": None}, [H100], here=True).device == H100
    assert Estimator.of(tmp_path, {"device": None}, [H100]).device is None
    assert Estimator.of(tmp_path, {"device": "cpu"}, [H100], here=True).device is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert Estimator.of(tmp_path, {"device": None}, [H100], here=True).device is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Estimator.of(tmp_path, {"device": None}, [H100], here=True).device is None


def test_cpu_ranks_that_share_a_core_take_turns(tmp_path: Path) -> None:
    large = cell(scale="12x8", seqlen=1 << 16)
    alone, crowded = Estimator(), Estimator(cores=(2.0, float("inf")))
    assert crowded.seconds(large) > 10 * alone.seconds(large)
    assert crowded.seconds(cell(scale="1x2")) == alone.seconds(cell(scale="1x2"))
    here = Estimator.of(tmp_path, {"device": "cpu"}, [], here=True)
    assert here.cores[0] == os.cpu_count()
    nodes = Estimator.of(tmp_path, {"device": "cpu", "cpus_per_task": 4}, [])
    assert nodes.seconds(large) > 1.5 * alone.seconds(large)
