"""Training steps and meshes, predicted: what must be larger than what, counts that a step has, and how near measured steps are."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lcbench.grid.build import made_of
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.measure.metrics import metric_of
from lcbench.predict.cells import cell_times
from lcbench.predict.composed import rank_cores
from lcbench.predict.fit import error_key, fit
from lcbench.predict.machines import machine_of
from lcbench.predict.observations import CellTime
from lcbench.predict.predictor import NO_DENSE, CannotPredict, Prediction, Predictor
from lcbench.problem import Mesh, Scale
from lcbench.workloads.models import Model
from lcbench.workloads.parts import Attend, Compute, Exchange, Share, ToHost
from tests.predict import held_out

H100 = machine_of("h100")
STEP = ("workload=block", "model=llama3_8b", "layers=2", "kernel=flash_attn3", "cp=usp", "scale=2x8", "seqlen=256k", "site=local")
LLAMA = Model(32, 4096, 32, 8, 128, 14336, 128256, 500000.0)
STEPS = Path(__file__).parent / "data" / "step_seconds.json"


def cell_of(*words: str) -> Cell:
    named = {word.partition("=")[0] for word in words}
    (planned,) = look([*(word for word in STEP if word.partition("=")[0] not in named), *words]).cells
    assert planned.skip is None, planned.skip
    return planned.cell


UNFORESEEN = {
    ("workload.vision=0.25",): "workload.vision=0.25 moves images between ranks (reshard, reshard_backward), which",
    ("cp=ulysses", "cp.async_projections=true", "scale=1x8"): "exchanges q, k and v one by one while a layer projects them",
}  # fmt: skip


@pytest.mark.parametrize("words", UNFORESEEN)
def test_what_no_prediction_knows_of_is_neither_predicted_nor_fitted_on(words: tuple[str, ...]) -> None:
    cell = cell_of(*words)
    plain = cell_of(*(word for word in words if not word.endswith(("true", "0.25"))))
    with pytest.raises(CannotPredict, match=re.escape(UNFORESEEN[words])):
        Predictor(H100).predict(cell)
    assert Predictor(H100).predict(plain, memory=False).seconds > 0
    device = {"device": "NVIDIA H100 80GB HBM3", "cuda": True}
    good = SimpleNamespace(status="ok", no_speed="", metrics={"time/forward/median_s": 1.0}, samples={}, provenance=device)
    (time,) = cell_times([(cell, [good]), (plain, [good])], H100, "here")
    assert time.cell == plain
    with pytest.raises(ValueError, match="here: no cell has a good result with a time"):
        cell_times([(cell, [good])], H100, "here")


def predicted(*words: str) -> Prediction:
    return Predictor(H100).predict(cell_of(*words))


def test_recomputation_costs_time_and_saves_memory_by_how_much_it_does_again() -> None:
    policies = ("none", "attention_out", "selective", "full")
    found = {name: predicted(f"recompute={name}") for name in policies}
    seconds = [found[name].phases["backward"].seconds for name in policies]
    assert seconds[0] < seconds[1] == pytest.approx(seconds[2])
    assert seconds[2] < seconds[3]
    assert found["none"].peak_bytes > found["selective"].peak_bytes > found["full"].peak_bytes
    again = found["full"].phases["backward"].seconds - found["none"].phases["backward"].seconds
    assert again == pytest.approx(found["none"].phases["forward"].seconds, rel=1e-6), "all of forward once more, and nothing else"
    rates = {name: each.metrics() for name, each in found.items()}
    assert 0 < rates["full"]["compute/mfu"] < rates["none"]["compute/mfu"] < 1
    assert rates["full"]["compute/mfu"] < rates["full"]["compute/hfu"] < 1
    assert rates["none"]["compute/hfu"] == rates["none"]["compute/mfu"]
    classes = ("weights", "gradients", "optimizer", "activations")
    for name, metrics in rates.items():
        assert sum(metrics[f"memory/{of}_bytes"] for of in classes) <= metrics["memory/peak_bytes"], name
        assert metrics["memory/weights_bytes"] == rates["none"]["memory/weights_bytes"]


def test_a_prediction_has_the_metrics_of_a_measured_step() -> None:
    metrics = predicted("recompute=full", "workload.optimizer=adamw").metrics()
    for key, value in metrics.items():
        metric_of(key)
        assert np.isfinite(value), key
    parameters = 2 * LLAMA.layer_parameters() + LLAMA.head_parameters()
    assert metrics["memory/weights_bytes"] == metrics["memory/gradients_bytes"] == 2 * parameters
    assert metrics["memory/optimizer_bytes"] == 4 * parameters
    tokens = 2**18 / 16
    pairs = 2**18 * (2**18 + 1) / 2 * 32
    flops = 6 * 2**18 * parameters + 2 * 14 * pairs * 128
    assert metrics["compute/tflops_per_gpu"] * metrics["time/total/median_s"] * 16e12 == pytest.approx(flops, rel=1e-9)
    again = 2 * (2 * 2**18 * LLAMA.layer_parameters() + 4 * pairs * 128)
    assert metrics["step/recomputed_flops_per_gpu"] == pytest.approx(again / 16, rel=1e-9)
    assert metrics["step/tokens_per_s_per_gpu"] == pytest.approx(tokens / metrics["time/total/median_s"])
    assert [key.split("/")[1] for key in metrics if key.endswith("repeats")] == [
        "forward", "head", "backward", "reduce", "optimizer",
    ]  # fmt: skip
    assert metrics["model/forward/repeats"] == 16
    assert 0 < metrics["attention/share"] < 1


def test_a_head_on_labelled_tokens_alone_takes_less_and_counts_as_much() -> None:
    every, few, masked = (
        predicted(*words) for words in ((), ("workload.labelled=0.25",), ("workload.labelled=0.25", "workload.masked_logits=true"))
    )
    assert few.phases["head"] == every.phases["head"]
    assert masked.phases["head"].seconds < 0.4 * every.phases["head"].seconds
    assert few.flops["head"] == pytest.approx(0.25 * every.flops["head"]) == pytest.approx(masked.flops["head"])
    assert masked.metrics()["step/labelled_tokens"] == 2**16


def test_a_step_is_its_layers_and_a_head() -> None:
    two, four = (predicted(f"layers={layers}") for layers in (2, 4))
    for phase in ("forward", "backward"):
        assert four.phases[phase].seconds == pytest.approx(2 * two.phases[phase].seconds, rel=1e-9)
    assert four.phases["head"] == two.phases["head"]
    alone = Predictor(H100).predict(
        Cell.from_config({key: value for key, value in cell_of().config.items() if key not in ("workload", "recompute")})
    )
    attention = two.attention["forward"].seconds
    assert attention == pytest.approx(alone.phases["forward"].seconds)
    assert two.phases["forward"].seconds > 2 * attention
    assert list(alone.phases) == ["forward", "backward"]
    assert "memory/weights_bytes" not in alone.metrics()


def test_sharded_weights_take_less_memory_and_are_gathered_beside_what_computes() -> None:
    whole, sharded = predicted("workload.optimizer=adamw"), predicted("workload.optimizer=adamw", "workload.fsdp=true")
    assert "reduce" in whole.phases
    assert "reduce" not in sharded.phases
    for name in ("weights", "gradients", "optimizer"):
        metrics = whole.metrics()[f"memory/{name}_bytes"], sharded.metrics()[f"memory/{name}_bytes"]
        assert metrics[1] == pytest.approx(metrics[0] / 16)
    assert sharded.peak_bytes < whole.peak_bytes
    assert sharded.phases["forward"].seconds == whole.phases["forward"].seconds, "hidden behind 256k tokens"
    short = [predicted("seqlen=4k", f"workload.fsdp={fsdp}").phases["forward"] for fsdp in ("true", "false")]
    assert short[0].exposed_s > short[1].exposed_s, "and not behind 256 tokens of a rank"


def test_tensor_parallelism_divides_what_a_rank_has_and_sums_over_ranks() -> None:
    one, two = predicted("scale=1x4", "cp=ring"), predicted("scale=1x8", "cp=ring", "mesh.tp=2")
    halves = two.metrics()["memory/weights_bytes"] / one.metrics()["memory/weights_bytes"]
    assert halves == pytest.approx(0.5, abs=0.01)
    # As many FLOPs on twice the ranks, less what is sent: more than half as long.
    assert 0.5 * one.phases["forward"].seconds < two.phases["forward"].seconds < one.phases["forward"].seconds
    assert sum(two.flops.values()) == pytest.approx(sum(one.flops.values()), rel=1e-3)
    inside, across = (predicted("scale=2x8", "cp=ring", "mesh.tp=8", f"mesh.order={o}") for o in ("tp-cp-dp", "cp-tp-dp"))
    assert inside.phases["forward"].exposed_s < across.phases["forward"].exposed_s, "sums of tokens are many bytes"


def test_what_goes_to_the_host_shows_only_where_computing_does_not_hide_it() -> None:
    short, long = (
        [predicted("scale=1x4", "cp=ring", "layers=8", f"seqlen={seqlen}", f"recompute={each}") for each in ("none", "offload")]
        for seqlen in ("16k", "512k")
    )
    assert short[1].phases["forward"].seconds > short[0].phases["forward"].seconds
    assert long[1].phases["forward"].seconds == long[0].phases["forward"].seconds
    assert long[1].peak_bytes < long[0].peak_bytes
    shares = [
        next(part.flops for part in predicted("scale=1x4", "cp=ring", f"seqlen={seqlen}", "recompute=token_wise").made.phases[
            "backward"] if isinstance(part, Compute) and part.again)
        for seqlen in ("16k", "64k")
    ]  # fmt: skip
    assert shares[1] < 4 * shares[0], "a longer forward hides the transfer of a larger fraction, so less is computed again"
    made = predicted("scale=1x4", "cp=ring", "recompute=token_wise").made
    assert any(isinstance(part, ToHost) for part in made.phases["forward"])


@pytest.mark.parametrize("order", ["tp-cp-dp", "cp-tp-dp"])
def test_groups_cost_one_another_what_they_share(order: str) -> None:
    words = ("cp=ring", "kernel=flash_attn3", "mask=causal", "seqlen=64k", "scale=2x8", "heads=32x8x128", "mesh.tp=4",
             f"mesh.order={order}", "site=local")  # fmt: skip
    (planned,) = look(list(words)).cells
    own, shared = (Predictor(replace(H100, nics=nics)).predict(planned.cell).metrics() for nics in (0, 2))
    assert own["mesh/slowdown"] == pytest.approx(1.0), "a NIC for each GPU: nobody shares"
    strided = order == "tp-cp-dp"
    assert (shared["mesh/slowdown"] > 1.1) == strided, "groups of four adjacent ranks stay in their nodes; others leave them"
    keys = {f"mesh/{phase}/{what}" for phase in ("forward", "backward") for what in ("alone_s", "slowdown")}
    assert keys | {"mesh/slowdown", "mesh/total/alone_s"} <= shared.keys() | {"mesh/total/slowdown"}


def test_ranks_of_all_groups_share_the_cores() -> None:
    assert rank_cores(16, 8, 8) == 2
    assert rank_cores(16, 8, 2) == 2, "as many threads, whoever is idle"
    assert rank_cores(2, 8, 8) == 0.25
    assert rank_cores(2, 8, 4) == 0.5
    assert rank_cores(0, 8, 8) == 0


def test_parts_of_a_step_are_those_of_its_policy() -> None:
    """By hand: passes of the attention, products of forward that are done again, sums of tensor parallelism."""
    config = cell_of("recompute=full", "scale=1x8", "mesh.tp=2", "cp=ring", "workload.fsdp=true").config
    cell = Cell.from_config(config)
    made = made_of(config, Share(cell.problem, 2**16, Mesh(tp=2)))
    assert made.attends("forward") == 4
    assert made.attends("forward", again=False) == made.attends("backward") == 2
    own = (LLAMA.layer_parameters() - 2 * LLAMA.hidden) / 2 + 2 * LLAMA.hidden
    products = [part for part in made.phases["backward"] if isinstance(part, Compute)]
    assert [(part.flops, part.again) for part in products] == [(2 * 4 * own * 2**16, False), (2 * 2 * own * 2**16, True)]
    sums = [part for part in made.phases["backward"] if isinstance(part, Exchange) and part.over == ("tp",)]
    assert [part.times for part in sums] == [4, 4]
    assert {part.bytes for part in sums} == {2 * 2**16 * 4096}
    sharded = [part for part in made.phases["backward"] if isinstance(part, Exchange) and part.beside]
    assert [(part.operations, part.bytes) for part in sharded] == [(("all_gather",), 2 * own), (("reduce_scatter",), 4 * own)]
    assert isinstance(made.phases["forward"][0], Attend)


@pytest.mark.slow
def test_a_fit_finds_what_goes_token_by_token() -> None:
    """From steps that were made with other numbers, and says so; the band is one of steps."""
    machine = machine_of("h100")
    seen = []
    for words in (("seqlen=4k",), ("seqlen=16k",), ("seqlen=16k", "recompute=full")):
        cell = cell_of("scale=1x1", "cp=none", *words)
        found = Predictor(machine).predict(cell, memory=False)
        faster = {"forward": 0.8, "head": 0.7, "backward": 0.8}
        seen.append(
            CellTime(cell, {name: faster[name] * phase.seconds for name, phase in found.phases.items()}, " ".join(words), "made")
        )
    fitted = fit(seen, machine, folds=2)
    dense = fitted.dense_of("bfloat16")
    assert dense is not None
    assert dense.sources == ("made",)
    assert {error_key(seen[0].cell, phase) for phase in seen[0].phases} <= fitted.error.keys()
    predictor = Predictor(fitted.links.of(machine), fitted)
    for time in seen:
        prediction = predictor.predict(time.cell, memory=False)
        assert prediction.seconds == pytest.approx(sum(time.phases.values()), rel=0.12)
        assert NO_DENSE not in prediction.basis
    assert NO_DENSE in predicted().basis


@pytest.mark.slow
def test_measured_steps_are_predicted_from_others() -> None:
    """CPU seconds of steps on two ranks, fitted, and of others: more layers, other strategies, policies and lengths, one rank."""
    times = held_out.read(STEPS)
    cores = json.loads(STEPS.read_text())["provenance"]["cpus"]
    rows = held_out.judged(fit(times["fit"], replace(machine_of("this"), cores=cores), folds=1), times["others"], one_thread=True)
    assert held_out.holds(rows), held_out.table(rows)


def test_links_of_sets_are_those_of_their_ranks() -> None:
    """On two nodes of 8 the ranks with the same weights of tp=2 are 8 a node, four of them if tp=4 goes across."""
    from lcbench.predict.composed import _sets

    assert set(_sets(("dp", "cp"), Mesh(tp=2), Scale(2, 8))) == {(8, 4, 4)}
    assert set(_sets(("tp",), Mesh(tp=2), Scale(2, 8))) == {(2, 2, 2)}
    assert set(_sets(("tp",), Mesh(tp=2, order="cp-tp-dp"), Scale(2, 8))) == {(2, 1, 1)}
