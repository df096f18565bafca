"""Layers with a memory: both orders give the same bits, float64 holds them to their definition, and wrong ones are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lcbench.cp.none import Local
from lcbench.grid.command_line import look
from lcbench.kernels.base import Kernel
from lcbench.kernels.naive import Naive
from lcbench.kernels.reference import Reference
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.causal import causal
from lcbench.measure.cell import measure_again, measure_cell
from lcbench.measure.session import Gang
from lcbench.problem import Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.testing.masks import load
from lcbench.workloads import memory_layers
from lcbench.workloads.base import Work
from lcbench.workloads.memory_exact import sequence
from lcbench.workloads.memory_layers import Memory, MemoryLayers
from lcbench.workloads.models import Model
from lcbench.workloads.recurrent_memory import RecurrentMemory
from lcbench.workloads.remembering import MemorySession

CPU = torch.device("cpu")
MODEL = Model(4, 32, 4, 2, 8, 48, 64, 10000.0)
OPTIONS = RecurrentMemory(MODEL, layers=3, segment=8, memory_tokens=3, memory_dim=6, nu=2)
SETTINGS = {"warmup": 1, "min_iterations": 2, "max_iterations": 2, "budget_s": 0.5, "precision": 1e-9, "timeline": False}


def work(options: RecurrentMemory, segments: int = 5, dtype: str = "float64", direction: str = "", **more: Any) -> Work:
    problem = Problem(segments * options.segment, options.model.heads(), Scale(1, 1), dtype, direction or "forward_backward")
    kernel = more.pop("kernel", SDPAFlash())
    return Work(options, problem, lambda _: causal(problem.seqlen), kernel, Local(), SETTINGS, 3, **more)


def gang() -> Gang:
    return Gang(0, 1, CPU, Groups(), [])


def begun(options: RecurrentMemory, **more: Any) -> MemorySession:
    one = work(options, **more)
    session = MemorySession(options, one, one.arranged(gang()), 0)
    assert session.refused is None
    return session


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("segments", "layers"), [(1, 1), (1, 3), (2, 4), (5, 3), (7, 2)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_diagonal_order_gives_the_bits_of_sequential_order(dtype: str, segments: int, layers: int, qk_norm: bool) -> None:
    found = {}
    for order in ("sequential", "diagonal"):
        options = replace(OPTIONS, layers=layers, order=order, model=replace(MODEL, qk_norm=qk_norm))
        session = begun(options, segments=segments, dtype=dtype)
        found[order] = {name: x.clone() for name, x in session._passed().tensors.items()}
        counted = session.counted().metrics
        groups = {"sequential": segments * layers, "diagonal": segments + layers - 1}[order]
        assert counted["recurrent/groups"] == groups
        assert counted["recurrent/members"] == segments * layers
    assert set(found["diagonal"]) >= {"out", "dx", "d_tokens", "d_memory_b", "d_q"}
    for name, x in found["sequential"].items():
        assert torch.equal(x, found["diagonal"][name]), name
        last = segments == 1 and name.startswith(("d_memory_", "d_tokens"))  # nobody reads a memory of one segment
        assert bool(x.abs().max()) is not last, name


@pytest.mark.parametrize("order", ["sequential", "diagonal"])
@pytest.mark.slow
def test_out_and_gradients_are_those_of_the_definition(order: Any) -> None:
    session = begun(replace(OPTIONS, order=order, model=replace(MODEL, qk_norm=True)), kernel=Reference())
    weights, dout = session.layers.weights, session.dout
    by_layer = [{name: w[i] for name, w in weights.layers.items()} for i in range(3)]
    known = sequence(session.layers.options, by_layer, weights.tokens, session.x, dout, 0)
    got = session._passed().tensors
    assert set(got) == set(known)
    for name, x in got.items():
        error = float((x - known[name].value).abs().max() / known[name].value.abs().max())
        assert error <= 1e-12, (name, error)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("kernel", [SDPAFlash(), Naive()], ids=["sdpa_flash", "naive"])
def test_a_cell_is_measured_and_checked(dtype: str, direction: str, kernel: Kernel) -> None:
    one = work(replace(OPTIONS, order="diagonal"), dtype=dtype, direction=direction, kernel=kernel)
    measured = measure_cell(one, gang(), lambda line: None)
    assert measured.check is not None
    assert not measured.check.failures
    assert measured.check.whole
    assert measured.check.columns == (measured.check.rows if direction == "forward_backward" else 0)
    assert not measured.check.unchecked
    assert measured.metrics["recurrent/tokens_per_s"] > 0
    assert ("time/backward/median_s" in measured.metrics) == (direction == "forward_backward")
    again = measure_again(one, gang(), lambda line: None)
    assert again.check is not None
    assert not again.check.failures


@pytest.mark.slow
def test_a_long_pass_is_compared_by_its_first_segments_and_some_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcbench.workloads.remembering.BUDGET", {"cpu": 1})
    measured = measure_cell(work(OPTIONS), gang(), lambda line: None)
    assert measured.check is not None
    assert not measured.check.failures
    assert not measured.check.whole
    assert measured.check.rows == measured.check.columns == 2 * OPTIONS.segment
    assert list(measured.check.unchecked) == ["gradients of the whole pass"]
    assert any(name.startswith("a of layer") for name in measured.check.ratios["layers"])


# -- what the check finds ----------------------------------------------------------------------------------------------


def _forgets(layers: MemoryLayers, x: torch.Tensor, memory: Memory, which: slice) -> Any:
    return REAL_LAYER(layers, x, Memory(memory.a * 0, memory.z), which)


def _writes_twice(layers: MemoryLayers, tokens: torch.Tensor, memory: Memory, which: slice) -> Memory:
    return REAL_WRITTEN(layers, tokens, REAL_WRITTEN(layers, tokens, memory, which), which)


def _does_not_correct(layers: MemoryLayers, tokens: torch.Tensor, memory: Memory, which: slice) -> Memory:
    new = REAL_WRITTEN(layers, tokens, memory, which)
    return Memory(new.a, new.z + 0.01)


def _other_layer(layers: MemoryLayers, name: str, which: slice) -> Any:
    count = len(layers.weights.layers[name])
    start = min(which.start, count - 1 - (which.stop - which.start)) if name == "up" and which.start else which.start
    return REAL_WEIGHT(layers, name, slice(start, start + which.stop - which.start))


def _loses_a_gradient(x: torch.Tensor, nu: int) -> torch.Tensor:
    return REAL_PHI(x.detach(), nu)


def _rolls_once_less(x: torch.Tensor, nu: int) -> torch.Tensor:
    return torch.cat([REAL_PHI(x, 1)] * nu, -1)


REAL_LAYER, REAL_WRITTEN = MemoryLayers._layer, MemoryLayers._written
REAL_WEIGHT, REAL_PHI = MemoryLayers._weight, memory_layers.phi
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a memory that is not read": (MemoryLayers, "_layer", _forgets),
    "memory tokens written twice": (MemoryLayers, "_written", _writes_twice),
    "a normaliser that grows": (MemoryLayers, "_written", _does_not_correct),
    "weights of another layer": (MemoryLayers, "_weight", _other_layer),
    "no gradient through features": (memory_layers, "phi", _loses_a_gradient),
    "other features": (memory_layers, "phi", _rolls_once_less),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("budget", [1 << 32, 1], ids=["whole", "sampled"])
@pytest.mark.slow
def test_a_wrong_pass_is_found(fault: str, dtype: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong)
    monkeypatch.setattr("lcbench.workloads.remembering.BUDGET", {"cpu": budget})
    monkeypatch.setattr("lcbench.workloads.remembering.SAMPLED", 15)
    measured = measure_cell(work(replace(OPTIONS, order="diagonal"), dtype=dtype), gang(), lambda line: None)
    assert measured.check is not None
    assert measured.check.failures


def test_a_segment_that_begins_with_another_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no layer of a segment is compared with the reference."""
    monkeypatch.setattr("lcbench.workloads.remembering.BUDGET", {"cpu": 1})
    monkeypatch.setattr("lcbench.workloads.remembering.SAMPLED", 0)
    session = begun(OPTIONS)
    session.first_pass()
    spoilt = session._cells[7]
    session._cells[7] = replace(spoilt, before=Memory(spoilt.before.a + 1e-3, spoilt.before.z))
    session._check_first()
    assert any("between layers" in failure for failure in session.check().failures)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["workload.segment=96"], "workload.segment=96 does not divide seqlen=256"),
        (["cp=ring", "scale=1x2"], "a memory is read and written by one rank; cp=none"),
        (["mask=full"], "mask=causal only"),
        (["dtype=float16"], "beyond what float16 holds"),
        (["mesh.dp=2", "scale=1x2"], "a sequence with a memory is read by one rank"),
    ],
)
def test_what_cannot_run_is_skipped_with_the_reason(words: list[str], reason: str) -> None:
    given = ["workload=recurrent_memory", "model=tiny", "workload.segment=32", "seqlen=256", "dtype=float64"]
    given += [] if any(word.startswith("cp=") for word in words) else ["cp=none"]
    (planned,) = look([*given, *words]).cells
    assert reason in str(planned.skip)


@pytest.mark.parametrize("word", ["order=backwards", "segment=0", "nu=0", "layers=9", "memory_dim=1"])
def test_bad_options_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=f"workload.{'nu' if word == 'memory_dim=1' else word.split('=')[0]}"):
        look(["workload=recurrent_memory", "model=tiny", "cp=none", "seqlen=256", f"workload.{word}"])


def test_the_yaml_is_the_class() -> None:
    config = load("workload", "recurrent_memory")
    assert config["_target_"].endswith("RecurrentMemory")
