"""Estimates: simulated, corrected by results, bounded where nothing can be simulated, and never at the cost of a slow plan."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcbench.grid.build import build
from lcbench.grid.cell import Cell
from lcbench.grid.devices import known_devices
from lcbench.grid.paths import CONF
from lcbench.measure.cores import usable_cores
from lcbench.measure.peak import entry_of
from lcbench.predict import machines
from lcbench.predict.fitted import Fit, KernelFit
from lcbench.predict.predictor import Prediction, Predictor
from lcbench.problem import Scale
from lcbench.runs import passes as passes_module
from lcbench.runs.attempt import Attempt, Failure
from lcbench.runs.estimate import Estimator
from lcbench.runs.pack import group
from lcbench.runs.passes import ALONE, Passes, exchanged_bytes, flops, passes_on
from lcbench.runs.store import Sweep
from lcbench.testing.masks import load, names
from tests.runs.test_pack import BASE, H100, cell
from tests.runs.test_store import made_cell

ROOT = Path(__file__).parents[2]
DEVICES = {entry["name"]: entry for entry in known_devices()}


def result(of: Cell, pass_s: float, **metrics: float) -> Attempt:
    """A good result of a cell."""
    found = {"time/total/median_s": pass_s, "compute/tflops_per_gpu": flops(of) / of.scale.world_size / pass_s / 1e12}
    return Attempt(of.id, "s", 1, "ok", metrics={**found, **metrics}, config=of.config)


def fresh(device: str | None = "h100") -> Passes:
    """Iterations of which nothing is known yet."""
    return Passes(passes_on(DEVICES[device] if device else None).predictor)


def test_without_results_a_pass_is_what_the_simulation_says() -> None:
    long = cell(seqlen=1 << 20)
    # 1M causal, 32 heads: 5e17 FLOPs forward and 2.5 times that backward.
    assert flops(long) == pytest.approx(3.5 * 4 * 128 * 32 * 2**39, rel=1e-3)
    found = fresh().of(long)
    assert (found.basis, found.simulated) == ("simulation", True)
    assert found.seconds == Predictor.of("h100").predict(long).seconds
    estimate = Estimator(DEVICES["h100"]).estimate(long)
    # A first block of twelve passes, with what is timed apart, and two later ones of six; before them the check.
    assert estimate.seconds == pytest.approx(24 * found.seconds + 64, rel=0.15)
    assert estimate.most_s > 1.5 * estimate.seconds  # nothing was fitted
    assert estimate.basis == "simulation"


def test_the_nearest_result_of_like_cells_counts_times_what_the_simulation_says_of_the_two() -> None:
    device, near, far = DEVICES["h100"], cell(seqlen=1 << 15), cell(seqlen=1 << 20)
    taught = Estimator(device)
    taught.learn(near, result(near, 0.3))
    taught.learn(far, result(far, 90.0))
    assert taught._pass(near).seconds == pytest.approx(0.3)
    asked = cell(seqlen=1 << 16)
    simulated = fresh()
    assert taught._pass(asked).seconds == pytest.approx(0.3 * simulated.of(asked).seconds / simulated.of(near).seconds)
    assert taught.estimate(asked).basis == "results of like cells"
    assert taught.estimate(asked).most_s < 1.5 * taught.estimate(asked).seconds
    other = cell(seqlen=1 << 16, dtype="float32")
    assert taught.estimate(other) == Estimator(device).estimate(other)


def test_results_of_a_kernel_say_how_far_the_simulation_is_off_for_its_other_cells() -> None:
    device, other = (
        DEVICES["h100"],
        cell(scale="1x4", seqlen=1 << 17, cp={"name": "ulysses", "_target_": "lcbench.cp.ulysses.Ulysses"}),
    )
    taught, blank, simulated = Estimator(device), Estimator(device), fresh()
    for seqlen, factor in ((1 << 14, 2.0), (1 << 15, 3.0), (1 << 16, 40.0)):
        like = cell(seqlen=seqlen)
        taught.learn(like, result(like, factor * simulated.of(like).seconds))
    assert taught._pass(other).seconds == pytest.approx(3 * blank._pass(other).seconds)
    assert "results of its kernel" in taught.estimate(other).basis


def test_a_result_of_another_device_says_nothing() -> None:
    devices, of = known_devices(), cell(seqlen=1 << 15)
    estimator = Estimator(DEVICES["h100"])
    for name, same in ((H100["names"][0], True), ("NVIDIA H200", False), ("AMD EPYC", False), (None, True)):  # type: ignore[index]
        attempt = replace(result(of, 1.0), provenance={"device": name} if name else {})
        assert estimator.is_of_this_device(attempt, devices) == same
    assert Estimator().is_of_this_device(replace(result(of, 1.0), provenance={"device": "AMD EPYC"}), devices)


def test_an_estimate_holds_all_blocks_of_a_cell() -> None:
    measure: dict[str, Any] = {**BASE["measure"], "budget_s": 30.0, "max_iterations": 1 << 20}  # type: ignore[dict-item]

    def seconds(blocks: int, estimator: Estimator) -> float:
        return estimator.seconds(cell(scale="1x1", measure={**measure, "blocks": blocks}))

    estimator = Estimator(DEVICES["h100"])
    alone = cell(scale="1x1")
    estimator.learn(alone, result(alone, 0.5, **{"time/prepare_s": 7.0, "time/first_pass_s": 1.5, "time/check_s": 48.5}))
    # The budget is shared; each later block is prepared anew, warms up once, and has three passes that are checked.
    assert seconds(2, estimator) - seconds(1, estimator) == pytest.approx(7.0 + 4 * 0.5)
    assert seconds(6, estimator) - seconds(1, estimator) == pytest.approx(5 * (7.0 + 4 * 0.5))
    assert seconds(1, estimator) == pytest.approx(30.0 + 57.0 + 2 * 0.5, abs=3.0)
    default = estimator.seconds(cell(scale="1x1", measure=measure))
    assert default == seconds(3, estimator)
    (made,) = group([cell(scale="1x1", seed=i) for i in range(100)], estimator, max_cells=None, max_minutes=None)
    assert 60 * made.minutes > 100 * estimator.seconds(cell(scale="1x1"))
    assert set(made.basis.values()) == {"results of like cells"}


@pytest.mark.parametrize("folder", ["tests/data/results-0.1/before", "results/h200/long"])
def test_estimates_are_within_a_factor_of_three_of_stored_results(folder: str) -> None:
    """Each cell by the results of the others, which lack a type, a strategy or a scale of it."""
    read = [json.loads(path.read_text()) for path in sorted((ROOT / folder).glob("*/attempt-1.json"))]
    attempts = [a for a in map(Attempt.from_json, read) if "time/total/median_s" in a.metrics]
    assert len(attempts) >= 7
    device = entry_of(known_devices(), attempts[0].provenance["device"])
    ratios, walls = [], []
    for attempt in attempts:
        estimator, of = Estimator(device, (math.inf, math.inf) if device else (2.0, math.inf)), Cell.from_config(attempt.config)
        for other in attempts:
            if other is not attempt:
                estimator.learn(Cell.from_config(other.config), other)
        later_s = sum(block["finished_at"] - block["started_at"] for block in attempt.again)
        walls.append(estimator.seconds(of) / (attempt.finished_at - attempt.started_at + later_s))
        ratios.append(estimator._pass(of).seconds / attempt.metrics["time/total/median_s"])
    assert np.median(np.abs(np.log(ratios))) < math.log(1.5)
    # A rank alone has all cores, and is told by pairs of ranks.
    assert sorted(np.abs(np.log(ratios)))[-2] < math.log(3)
    # A kernel of triton_band was compiled for seven seconds in one of two cells, of which each is told by the other.
    assert sorted(np.abs(np.log(walls)))[-3] < math.log(3)


@pytest.mark.slow
def test_longer_cells_take_longer_and_more_ranks_less_each() -> None:
    simulated = fresh()
    lengths = [simulated.of(cell(seqlen=1 << power)).seconds for power in range(15, 22)]
    assert lengths == sorted(lengths)
    assert lengths[-1] > 1000 * lengths[0]
    scales = [simulated.of(cell(seqlen=1 << 21, scale=scale)).seconds for scale in ("1x1", "1x2", "1x8", "4x8", "16x8")]
    assert scales == sorted(scales, reverse=True)


def step(layers: int = 2, recompute: str = "none", **more: Any) -> Cell:
    workload = {**load("workload", "block"), "layers": layers, "model": load("model", "llama3_8b")}
    axes = {} if recompute == "none" else {"recompute": load("recompute", recompute)}
    return cell(seqlen=1 << 16, workload=workload, **axes, **more)


def test_a_step_takes_what_its_layers_and_its_head_take_and_what_is_done_again() -> None:
    model = build(load("model", "llama3_8b"))
    attention = flops(cell(seqlen=1 << 16))
    parameters = 2 * model.layer_parameters() + model.head_parameters()
    assert flops(step()) == pytest.approx(2 * attention + 6 * 2**16 * parameters, rel=1e-9)
    assert flops(step(recompute="full")) == flops(step())
    simulated = fresh()
    two, four, full = (simulated.of(each) for each in (step(), step(4), step(recompute="full")))
    assert two.simulated
    assert two.seconds > 2 * simulated.of(cell(seqlen=1 << 16)).seconds
    assert two.seconds < four.seconds < 2 * two.seconds
    assert full.seconds > two.seconds
    assert full.peak_bytes < two.peak_bytes
    assert two.peak_bytes > 2 * 2 * parameters, "weights and gradients"
    estimator = Estimator(DEVICES["h100"])
    assert not estimator.will_fail(step())
    assert estimator.will_fail(step(32, scale="1x4"))


def test_meshes_are_estimated_by_all_their_ranks() -> None:
    simulated = fresh()
    mesh = {"tp": 2, "dp": 2, "order": "tp-cp-dp"}
    whole, groups = cell(seqlen=1 << 17, scale="1x8"), cell(seqlen=1 << 17, scale="2x16", mesh=mesh)
    assert groups.problem.scale == Scale(1, 8)
    assert flops(groups) == pytest.approx(2 * flops(whole)), "two sequences, half of the heads each"
    found = simulated.of(groups)
    assert found.simulated
    assert found.seconds == pytest.approx(simulated.of(whole).seconds / 2, rel=0.15)
    bound = Passes(simulated.predictor, allowance=0.0).of(groups)
    assert not bound.simulated
    assert bound.seconds == pytest.approx(found.seconds, rel=0.5)
    estimator = Estimator(DEVICES["h100"])
    assert estimator.seconds(groups) < estimator.seconds(whole) + 1
    many = Estimator(cores=(2.0, math.inf))
    assert many.seconds(cell(scale="1x16", mesh=mesh)) > 1.5 * many.seconds(cell(scale="1x4"))  # two sequences on two cores


def test_what_cannot_be_simulated_has_a_bound_and_says_why(tmp_path: Path) -> None:
    simulated = fresh()
    peer = cell(seqlen=1 << 18, cp={"name": "torch_cp", "_target_": "lcbench.cp.peers.torch_cp.TorchCP"})
    large = cell(seqlen=1 << 23, scale="512x8")
    pace = Predictor.of("h100").predict(Cell.from_config({**BASE, **ALONE, "seqlen": 16384}))
    for asked, link, why in ((peer, 370e9, "library"), (large, 45e9, "longer than a plan may")):
        found = simulated.of(asked)
        if found.simulated:  # the peer carries a model by now
            continue
        assert why in found.basis
        kernels = flops(asked) / asked.scale.world_size / (flops(pace.cell) / pace.seconds)
        assert found.seconds == pytest.approx(kernels + exchanged_bytes(asked.problem) / link, rel=0.01)
        assert found.peak_bytes == asked.problem.input_bytes
    assert not simulated.of(large).simulated
    gone = cell(mask={"name": "band_file", "_target_": "lcbench.masks.band_file.band_file", "file": str(tmp_path / "gone.csv")})
    assert simulated.of(gone).basis.startswith("FLOPs and bytes: ")
    assert flops(gone) == pytest.approx(3.5 * 4 * 128 * 32 * 1024**2)


def test_a_plan_simulates_only_so_much_and_what_is_beyond_follows_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Cell] = []
    play = Predictor.predict

    def predict(self: Predictor, asked: Cell, *, memory: bool = True) -> Prediction:
        counted.append(asked)
        return play(self, asked, memory=memory)

    monkeypatch.setattr(Predictor, "predict", predict)
    simulated = fresh(None)
    drawn = {**load("mask", "causal_document"), "lengths": load("lengths", "web_text")}
    seeds = [simulated.of(cell(mask=drawn, scale="1x2", seqlen=8192, seed=seed)) for seed in range(50)]
    assert len(counted) == 1
    assert len({found.seconds for found in seeds}) > 10  # by the FLOPs of each
    per_flop = [found.seconds / found.flops for found in seeds]
    assert per_flop == pytest.approx([per_flop[0]] * 50)
    simulated.allowance = 3000.0
    found = {seqlen: simulated.of(cell(scale="1x2", seqlen=seqlen)) for seqlen in range(1024, 20481, 1024)}
    assert len(counted) <= 1 + 4
    assert {expected.basis for expected in found.values()} == {"simulation", "simulation of another length"}
    assert [expected.seconds for expected in found.values()] == sorted(expected.seconds for expected in found.values())
    assert simulated.of(cell(scale="1x4")).basis == "FLOPs and bytes: the plan has simulated as much as it may"
    monkeypatch.setattr(passes_module, "_made", {})
    first = passes_on(None)
    first.allowance = 0.0
    assert passes_on(None) is first
    assert first.allowance == passes_module.ALLOWANCE


def test_what_will_not_fit_is_told_by_simulated_bytes_and_by_what_did_not_fit_before() -> None:
    small, large = cell(seqlen=1 << 16), cell(seqlen=1 << 23, scale="1x1")
    estimator = Estimator(DEVICES["h100"])
    assert not estimator.will_fail(small)
    assert estimator.will_fail(large)
    assert not Estimator(None).will_fail(large)  # CPU ranks: nothing is known of their memory
    estimator.learn(small, Attempt("x", "s", 1, "failed", Failure("oom", "")))
    assert estimator.will_fail(small)
    assert estimator.will_fail(cell(seqlen=1 << 17))
    assert not estimator.will_fail(cell(seqlen=1 << 15))
    assert not estimator.will_fail(cell(seqlen=1 << 17, scale="2x8"))
    gathers = {"name": "allgather", "_target_": "lcbench.cp.allgather.AllGather"}
    long = {"seqlen": 6 << 20, "scale": "4x8"}
    assert estimator.passes.of(cell(cp=gathers, **long)).peak_bytes > 2 * estimator.passes.of(cell(**long)).peak_bytes
    assert (estimator.will_fail(cell(cp=gathers, **long)), estimator.will_fail(cell(**long))) == (True, False)
    part = Estimator({**H100, **DEVICES["h100"], "memory_bytes": 1 << 30})
    assert part.will_fail(cell(seqlen=1 << 19))
    assert not Estimator(DEVICES["h100"]).will_fail(cell(seqlen=1 << 19))


def test_a_slice_is_slower_and_a_device_without_links_of_its_own_has_its_neighbours() -> None:
    asked = cell(scale="1x1", seqlen=1 << 15)
    whole, part = (entry_of(known_devices(), f"NVIDIA H100 80GB HBM3{mig}") for mig in ("", " MIG 3g.40gb"))
    assert passes_on(part).of(asked).seconds == pytest.approx(132 / 60 * passes_on(whole).of(asked).seconds)
    assert passes_on(part).predictor.machine.memory_bytes == 40e9
    for name, entry in DEVICES.items():
        machine = passes_on(entry).predictor.machine
        assert (machine.device, machine.memory_bytes) == (name, entry["memory_bytes"])
        assert passes_on(entry).of(asked).seconds > 0
    assert passes_on(DEVICES["gb200"]).predictor.machine.name == "b200"
    assert passes_on(DEVICES["a100_pcie"]).predictor.machine.name == "a100"


def test_a_fit_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module, "_made", {})
    file = tmp_path / "h100.fit.json"
    monkeypatch.setattr("lcbench.predict.predictor.fit_of", lambda name: file)
    for content in ("{}", "no JSON"):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"{file} is no fit of lcbench.fit: ") as refused:
            Estimator(DEVICES["h100"]).seconds(cell())
        assert "\n" not in str(refused.value)


def test_a_sweep_without_history_has_an_estimator(tmp_path: Path) -> None:
    Sweep(tmp_path, "s").add([], command=[])
    assert not Estimator.of(tmp_path, {"device": "cpu"}, [H100]).known
    assert Estimator.of(tmp_path, {"device": "h100"}, [H100]).device == H100
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
    alone, crowded = Estimator(), Estimator(cores=(2.0, math.inf))
    assert crowded.seconds(large) > 10 * alone.seconds(large)
    assert crowded.seconds(cell(scale="1x2")) == alone.seconds(cell(scale="1x2"))
    here = Estimator.of(tmp_path, {"device": "cpu"}, [], here=True)
    assert here.cores[0] == usable_cores()
    nodes = Estimator.of(tmp_path, {"device": "cpu", "cpus_per_task": 4}, [])
    assert nodes.seconds(large) > 1.5 * alone.seconds(large)


def test_turns_that_a_fit_has_counted_are_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    of = {"call_s": 1e-5, "flop_s": 1e-10}
    kernel = KernelFit(kernel="sdpa_flash", dtype="bfloat16", forward=of, backward=of, cores=2)  # type: ignore[arg-type]
    machine = replace(machines.machine_of("this"), cores=2)
    fitted, unfitted = Passes(Predictor(machine, Fit(machine="this", kernels=(kernel,)))), Passes(Predictor(machine))
    for scale, by_fit, besides in (("1x1", 1.0, 1.0), ("1x2", 1.0, 1.0), ("1x8", 4.0, 1.0), ("3x4", 2.0, 3.0)):
        asked = cell(scale=scale, seqlen=1 << 14)
        assert (fitted.turns_of(asked.scale), unfitted.turns_of(asked.scale)) == (by_fit, 1.0)
        for passes, turns in ((fitted, besides), (unfitted, by_fit * besides)):
            estimator = Estimator(cores=(2.0, math.inf))
            monkeypatch.setattr(estimator, "passes", passes)
            assert estimator._pass(asked).seconds == pytest.approx(turns * passes.of(asked).seconds)


def test_ninety_six_ranks_on_a_few_cores_have_the_time_that_they_took() -> None:
    """The cell of tests/slurm/test_sweep.py took 143 to 170 s on two cores; of its site only the cores of a node are known."""
    wide = cell(
        scale="12x8", seqlen=1536, heads="4x4x16", dtype="float64", measure={**BASE["measure"], "blocks": 1, "warmup": 0,
        "min_iterations": 1, "max_iterations": 1},  # type: ignore[dict-item]
    )  # fmt: skip
    assert 135 < Estimator(cores=(math.inf, 8.0)).seconds(wide) < 400
    assert 143 < Estimator(cores=(2.0, math.inf)).seconds(wide) < 400
    assert Estimator(cores=(2.0, math.inf)).seconds(cell(scale="1x2", seqlen=512, heads="4x2x32", dtype="float32")) < 20


@pytest.mark.slow
def test_estimating_loads_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys; from lcbench.grid.command_line import look; from lcbench.runs.estimate import Estimator;"
        "plan = look(['cp=glob(*)', 'mask=causal,causal_document,block_random', 'scale=1x2', 'seqlen=1k']);"
        "step = look(['workload=block', 'model=tiny', 'recompute=glob(*)', 'scale=1x4', 'mesh.tp=2', 'seqlen=1k']);"
        "found = [Estimator().seconds(p.cell) for p in [*plan.cells, *step.cells]]; assert len(found) > 35;"
        "print([m for m in ('torch', 'mlflow', 'pandas', 'submitit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_stands_in_for_a_kernel_alone_is_what_conf_says() -> None:
    for group_name in ("cp", "mask"):
        assert load(group_name, ALONE[group_name]["name"]) == ALONE[group_name]  # type: ignore[index]
    assert {path.stem for path in (CONF / "cp").glob("*.yaml")} == set(names("cp"))
