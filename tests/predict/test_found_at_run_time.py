"""Predictions of what is not known before a pass: masks that selectors choose, and layers that read a memory in groups."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcbench.cp.none import Local
from lcbench.grid.cell import Cell
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.causal import causal
from lcbench.measure.metrics import metric_of
from lcbench.measure.session import Gang
from lcbench.predict.cells import cell_times
from lcbench.predict.draws import CannotPredict
from lcbench.predict.fit import fit
from lcbench.predict.machines import machine_of
from lcbench.predict.predictor import Prediction, Predictor
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.selectors.base import Rows, Selector, block_edges, pairs_of
from lcbench.selectors.foreseen import foreseen
from lcbench.selectors.moba import Moba
from lcbench.selectors.nsa import Nsa
from lcbench.selectors.random import Random
from lcbench.workloads.base import Work
from lcbench.workloads.memory_parts import made_of
from lcbench.workloads.models import Model
from lcbench.workloads.recurrent_memory import RecurrentMemory
from lcbench.workloads.remembering import MemorySession
from tests.predict import held_out

H100 = machine_of("h100")
SPARSE = ("workload=sparse_attention", "inputs=structured", "mask=causal", "kernel=triton_block_sparse", "scale=1x4", "seqlen=4k",
          "heads=4x2x64")  # fmt: skip
MEMORY = ("workload=recurrent_memory", "model=tiny", "mask=causal", "scale=1x1", "cp=none", "seqlen=4k", "workload.segment=512")


def cell_of(*words: str) -> Cell:
    (cell,) = held_out.cells(words)
    return cell


def predicted(*words: str) -> Prediction:
    return Predictor(H100).predict(cell_of(*words))


# -- masks that are chosen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "selector", [Random(density=0.3), Moba(blocks=3, local=2), Nsa(density=0.6, sink=1, local=2, k_block=64, per="kv_head")]
)
def test_a_map_that_is_foreseen_has_the_blocks_that_are_asked_for(selector: Selector) -> None:
    problem, mask = Problem(1000, Heads(4, 2, 8), Scale(1, 1), "float32", "forward"), causal(1000)
    found = foreseen(selector, problem, mask)
    assert found.maps == selector.maps(problem.heads)
    k_edges = block_edges(1000, selector.k_block)
    q = torch.randn((1000, 4, 8), generator=torch.Generator().manual_seed(0))
    keys: Any = {"mean": torch.randn((2, len(k_edges) - 1, 8)), "keys": torch.randn((2, 62, 8))}
    for number, (begin, end) in enumerate(zip(found.q_edges[:-1].tolist(), found.q_edges[1:].tolist(), strict=True)):
        sees = mask.crop(begin, end, 0, 1000)
        rows = Rows(number, q[begin:end], pairs_of(sees, k_edges), sees)
        really = selector.keep(rows, keys, k_edges, problem)
        for one in range(found.maps):
            assert found.keep(one)[number].sum() == really[one].sum()
    assert any((found.keep(one) != found.keep(0)).any() for one in range(1, found.maps)), "each head has a map of its own"


def test_a_cell_that_chooses_has_all_its_phases_and_says_what_was_drawn() -> None:
    found, dense, alone = (
        predicted(*SPARSE, "cp=ring", "selector=moba", "selector.density=0.1"),
        predicted(*SPARSE, "cp=ring", "selector=none", "kernel=sdpa_flash"),
        predicted("mask=causal", "kernel=sdpa_flash", "scale=1x4", "seqlen=4k", "heads=4x2x64", "cp=ring"),
    )
    assert list(found.phases) == ["select", "plan", "forward", "backward"]
    assert all(phase.seconds > 0 for phase in found.phases.values())
    assert found.notes == {"foreseen": "density asked, places drawn"}
    assert "places drawn" in found.basis
    assert found.error >= 0.5
    metrics = found.metrics()
    for key in metrics:
        metric_of(key)
    assert 0 < metrics["select/share"] < 1
    assert "compute/select/tflops_per_gpu" not in metrics, "choosing is no part of what attention costs"
    assert dense.phases == alone.phases, "what keeps everything is known"
    assert not dense.notes


def test_what_is_asked_of_a_selector_decides_what_its_cell_takes() -> None:
    few, many = (predicted(*SPARSE, "cp=ulysses", "selector=moba", f"selector.density={density}") for density in (0.1, 0.6))
    for phase in ("forward", "backward"):
        flops = [each.flops[phase] for each in (few, many)]
        assert 4 < flops[1] / flops[0] < 9  # whole blocks, and of those on the diagonal half the pairs
        assert few.phases[phase].seconds < many.phases[phase].seconds
    oracle = predicted(*SPARSE, "cp=ulysses", "selector=oracle", "selector.density=0.1")
    assert oracle.phases["select"].seconds > few.phases["select"].seconds, "all products against those of means"
    longer = predicted(*SPARSE, "cp=ulysses", "selector=oracle", "selector.density=0.1", "seqlen=16k")
    assert longer.phases["select"].seconds > oracle.phases["select"].seconds


@pytest.mark.parametrize("words", [("selector=adaspa",), ("selector=sale", "selector.density=null", "selector.threshold=0.004")])
def test_a_choice_whose_size_depends_on_the_inputs_is_neither_predicted_nor_fitted_on(words: tuple[str, ...]) -> None:
    with pytest.raises(CannotPredict, match="depends on queries and keys"):
        predicted(*SPARSE, "cp=ring", *words)
    device = {"device": "NVIDIA H100 80GB HBM3", "cuda": True}
    good = SimpleNamespace(status="ok", no_speed="", metrics={"time/forward/median_s": 1.0}, samples={}, provenance=device)
    cell, other = cell_of(*SPARSE, "cp=ring", *words), cell_of(*SPARSE, "cp=ring", "selector=moba")
    (time,) = cell_times([(cell, [good]), (other, [good])], H100, "here")
    assert time.cell == other


def test_a_selector_that_does_not_say_what_it_takes_has_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Moba, "scoring", Selector.work)
    with pytest.raises(CannotPredict, match="Moba does not say what choosing takes"):
        predicted(*SPARSE, "cp=ring", "selector=moba")


@pytest.mark.parametrize("name", ["dsv", "moba", "nsa", "oracle", "random", "sale", "topk"])
def test_every_selector_with_a_density_is_predicted(name: str) -> None:
    found = predicted(*SPARSE, "cp=sparse_sequence", f"selector={name}", "seqlen=2k")
    assert 0 < found.phases["select"].seconds < 1


# -- layers with a memory --------------------------------------------------------------------------------------------------


def test_layers_with_a_memory_count_what_a_session_counts() -> None:
    model = Model(3, 32, 4, 2, 8, 48, 64, 10000.0)
    for order in ("sequential", "diagonal"):
        options = RecurrentMemory(model, segment=64, memory_tokens=4, memory_dim=8, nu=2, order=order)  # type: ignore[arg-type]
        session = _session(options, 320)
        words = ("workload.segment=64", "workload.memory_tokens=4", "workload.memory_dim=8", "workload.nu=2", "seqlen=320",
                 f"workload.order={order}", "layers=3", "model.hidden=32", "model.heads_q=4", "model.heads_kv=2",
                 "model.head_dim=8", "model.ffn=48", "dtype=float32")  # fmt: skip
        found = predicted(*MEMORY, *words)
        assert {name: cost.flops for name, cost in session.costs().items()} == pytest.approx(found.flops, rel=1e-12)
        counted = session.counted().metrics
        metrics = found.metrics()
        for key in metrics:
            metric_of(key)
        for key in ("mask/area", "recurrent/segments", "recurrent/groups", "recurrent/members", "recurrent/tokens"):
            assert metrics[key] == counted[key], key
        assert metrics["recurrent/tokens_per_s"] == pytest.approx(320 / found.seconds)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_pass_with_a_memory_saves_is_counted(dtype: str) -> None:
    options = RecurrentMemory(Model(2, 64, 4, 2, 16, 96, 64, 10000.0), segment=128, memory_tokens=8, memory_dim=16, nu=3)
    session = _session(options, 512, dtype)
    seen: dict[int, int] = {}
    weights = {x.untyped_storage().data_ptr() for x in session.layers.weights.layers.values()}

    def saved(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(saved, lambda x: x):
        _ = session._forward(session.x)
    room = made_of(options, session._work.problem, fused=False).room
    assert room is not None
    assert room.classes["activations"] == pytest.approx(sum(seen.values()), rel=0.12)


def test_groups_are_launched_together_and_forward_alone_keeps_nothing() -> None:
    slow = replace(H100, launch_s=1e-3)
    words = (*MEMORY, "layers=4", "workload.segment=128")
    one, groups = (Predictor(slow).predict(cell_of(*words, f"workload.order={order}")) for order in ("sequential", "diagonal"))
    # 32 segments of 4 layers: 128 by themselves, and 35 groups.
    assert groups.seconds / one.seconds == pytest.approx(35 / 128, rel=0.1)
    forward = Predictor(H100).predict(cell_of(*words, "direction=forward"))
    assert forward.peak_bytes < one.peak_bytes / 2
    assert list(forward.phases) == ["forward"]


@pytest.mark.slow
def test_measured_layers_with_a_memory_are_predicted_from_others() -> None:
    times = held_out.read(held_out.DATA / "memory_seconds.json")
    rows = held_out.judged(fit(times["fit"], machine_of("this"), folds=1), times["others"])
    assert (len(times["fit"]), len(rows)) == (5, 9)
    median, share = held_out.verdict(rows)
    assert median <= 0.1, held_out.table(rows)
    assert share == 1.0, held_out.table(rows)


def _session(options: RecurrentMemory, seqlen: int, dtype: str = "float32") -> MemorySession:
    problem = Problem(seqlen, options.model.heads(), Scale(1, 1), dtype, "forward_backward")
    settings = {"warmup": 1, "min_iterations": 2, "max_iterations": 2, "budget_s": 0.5, "precision": 1e-9, "timeline": False}
    work = Work(options, problem, lambda _: causal(seqlen), SDPAFlash(), Local(), settings, 3)
    session = MemorySession(options, work, work.arranged(Gang(0, 1, torch.device("cpu"), Groups(), [])), 0)
    assert session.refused is None
    return session
