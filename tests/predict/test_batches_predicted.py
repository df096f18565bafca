"""Batches of documents, predicted: what documents cost on groups of ranks, plans that are played, and how near that comes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.masks.band import OPEN, BandMask
from lcbench.masks.document import squares
from lcbench.measure.metrics import METRICS
from lcbench.planners.base import Assignment, Documents
from lcbench.predict.batches import Batched
from lcbench.predict.costs import FittedCost, Shape, cost_of, packed
from lcbench.predict.fit import fit
from lcbench.predict.machines import machine_of
from lcbench.predict.predictor import CannotPredict, Predictor
from lcbench.runs.passes import passes_on
from lcbench.runs.worker import work_of
from tests.predict import batch_seconds

DATA = Path(__file__).parent / "data" / "batch_seconds.json"
H100 = Predictor(machine_of("h100"))
MEDIAN = 0.15  # of the absolute errors of makespans


def cell_of(*words: str) -> Cell:
    base = ("workload=batch", "kernel=flash_attn3", "heads=32x8x128", "mask=causal_document", "lengths=web_text", "dtype=bfloat16",
            "site=local", "cp=ring", "cp.layout=documents", "seqlen=256k", "scale=2x8")  # fmt: skip
    said = {word.partition("=")[0] for word in words}
    options = () if "cp" in said else ("cp.layout",)
    kept = [word for word in base if (name := word.partition("=")[0]) not in said and (name != "cp.layout" or options)]
    (planned,) = look([*kept, *words]).cells
    assert planned.skip is None, planned.skip
    return planned.cell


def causal(*tokens: int) -> Documents:
    sizes = np.array(tokens, dtype=np.int64)
    return Documents(sizes, sizes * (sizes + 1) // 2)


@pytest.fixture(scope="module")
def cost() -> FittedCost:
    return cost_of(cell_of(), H100)


# -- what documents cost -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_tokens_and_more_pairs_never_cost_less(cost: FittedCost) -> None:
    tokens = np.unique(np.geomspace(16, 1 << 18, 60).astype(np.int64))
    for degree in (1, 3, 8, 16):
        found = cost.documents_s(causal(*tokens), degree)
        assert (np.diff(found) >= 0).all(), degree
        # A short document that is seen whole may cost less: it is dealt out in fewer pieces.
        long = tokens[tokens >= 8192]
        found = cost.documents_s(causal(*long), degree)
        full = cost.documents_s(Documents(long, long**2), degree)
        assert (full > found).all(), degree
        between = cost.documents_s(Documents(long, (3 * long**2) // 4), degree)
        assert ((between >= found * (1 - 1e-9)) & (between <= full * (1 + 1e-9))).all(), degree


def test_groups_that_share_a_long_document_are_faster_and_a_short_one_slower(cost: FittedCost) -> None:
    long, short = (cost.documents_s(causal(tokens), 1)[0] for tokens in (1 << 17, 256))
    assert cost.documents_s(causal(1 << 17), 8)[0] < long / 4
    assert cost.documents_s(causal(256), 8)[0] + cost.overhead_s(8) > short + cost.overhead_s(1)
    assert cost.overhead_s(16) > cost.overhead_s(8) > cost.overhead_s(2) > cost.overhead_s(1) > 0


def test_a_group_on_more_nodes_than_need_be_is_never_faster(cost: FittedCost) -> None:
    for sizes in ((64,) * 4, (1 << 15,)):
        near, method = cost.group(causal(*sizes), range(4))
        far, _ = cost.group(causal(*sizes), (0, 1, 8, 9))
        assert method == "ring"
        assert far > near == pytest.approx(float(cost.documents_s(causal(*sizes), 4).sum()) + cost.overhead_s(4))


@settings(max_examples=60, deadline=None)
@given(per_node=st.integers(1, 8), data=st.data())
def test_shapes_hold_their_ranks(per_node: int, data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.integers(0, 4 * per_node - 1), min_size=1, unique=True))
    shape = Shape.of(ranks, per_node)
    nodes = {rank // per_node for rank in ranks}
    lies = shape.ranks(per_node)
    assert len(set(lies.tolist())) == shape.degree == len(ranks)
    assert 1 <= shape.together <= per_node
    if len(nodes) == -(-len(ranks) // per_node):
        assert len(set((lies // per_node).tolist())) == len(nodes)
    else:
        assert len(set((lies // per_node).tolist())) >= len(nodes)


def test_only_what_a_method_can_share_has_a_cost() -> None:
    found = cost_of(cell_of("cp=ulysses", "heads=8x4x128"), H100)
    assert found.degrees == (1, 2, 4, 8)
    assert np.isinf(found.documents_s(causal(4096), 3)).all()
    assert np.isfinite(found.documents_s(causal(4096), 4)).all()


def test_the_sum_of_gradients_is_an_all_reduce() -> None:
    assert cost_of(cell_of(), H100).reduce_s == 0
    size = 1 << 30
    found = cost_of(cell_of(f"workload.gradient_bytes={size}"), H100).reduce_s
    each = sum(H100.machine.collective_s(name, size / 16, 16, 8, 8, 1) for name in ("reduce_scatter", "all_gather"))
    assert found == pytest.approx(each)


@pytest.mark.parametrize("words", [("cp=ring", "cp.layout=documents"), ("cp=ulysses",)])
@pytest.mark.slow
def test_documents_of_a_group_add_up(words: tuple[str, ...]) -> None:
    """Against whole groups that are simulated: random ones of a batch's own documents."""
    cell = cell_of(*words, "seqlen=1m")
    found = cost_of(cell, H100)
    sizes, random, errors = found.sample.tokens, np.random.default_rng(1), []
    for degree in (1, 2, 4, 8, 16):
        for _ in range(4):
            order = random.permutation(sizes)
            count = int(np.searchsorted(np.cumsum(order), found.curves.capacity * degree * random.uniform(0.4, 1.0)))
            own = order[:count]
            bounds = np.concatenate([[0], np.cumsum(own)])
            mask = BandMask.of(int(bounds[-1]), int(bounds[-1]), squares(bounds, hi=0))
            whole = found.curves.group(found.methods[0], np.arange(degree), mask).phase.seconds
            errors.append(found.documents_s(causal(*own), degree).sum() + found.overhead_s(degree))
            errors[-1] = abs(errors[-1] / whole - 1)
    assert np.median(errors) < 0.05
    assert np.quantile(errors, 0.9) < 0.12


def test_full_documents_by_pairs(cost: FittedCost) -> None:
    """Half way between causal and full: as far from both as their pairs say."""
    tokens = np.array([1 << 14])
    half = Documents(tokens, (tokens * (tokens + 1) // 2 + tokens**2) // 2)
    ends = [cost.curves.shares_s("ring", Shape(1, 1), tokens, hi)[0] for hi in (0, OPEN)]
    assert cost.documents_s(half, 1)[0] == pytest.approx(np.mean(ends), rel=1e-3)


# -- batches -----------------------------------------------------------------------------------------------------------------


def test_one_document_on_all_ranks_is_that_attention() -> None:
    words = ("lengths=explicit", "lengths.values=[65536]", "seqlen=64k", "scale=1x8", "cp=ring", "cp.layout=documents")
    batch = H100.predict(cell_of(*words), memory=False)
    (plain,) = look([*words, "kernel=flash_attn3", "heads=32x8x128", "mask=causal_document", "dtype=bfloat16", "site=local"]).cells
    alone = H100.predict(plain.cell, memory=False)
    assert batch.seconds == pytest.approx(alone.seconds)
    assert batch.metrics()["compute/tflops_per_gpu"] == pytest.approx(alone.metrics()["compute/tflops_per_gpu"])
    assert batch.metrics()["plan/predicted_s"] == pytest.approx(alone.seconds, rel=0.05)


@pytest.mark.parametrize("planner", ["none", "fixed", "megatron_hybrid", "flexsp", "bytescale_hdp"])
def test_a_prediction_has_what_a_result_has(planner: str) -> None:
    cell = cell_of(f"planner={planner}", "workload.gradient_bytes=1000000")
    found = H100.predict(cell)
    metrics, known = found.metrics(), {metric.key for metric in METRICS}
    assert not {key for key in metrics if key.startswith(("batch/", "plan/"))} - known
    assert metrics["time/total/median_s"] == pytest.approx(metrics["time/batch/median_s"] + metrics["time/reduce/median_s"])
    assert metrics["batch/tokens"] == 256 * 1024
    assert 0 < metrics["batch/peak_tokens"] <= 16384
    assert metrics["batch/with_plan_s"] == pytest.approx(metrics["time/total/median_s"] + metrics["plan/seconds"])
    assert 0 <= metrics["batch/idle_share"] < 1
    assert 0 <= metrics["batch/padding"] < 1
    assert found.peak_bytes > 0
    assert found.peak_interval[0] <= found.peak_bytes <= found.peak_interval[1]
    phase = found.phases["batch"]
    parts = phase.compute_s + phase.imbalance_s + phase.exposed_s + phase.overhead_s
    assert parts == pytest.approx(phase.seconds)
    assert min(phase.compute_s, phase.imbalance_s, phase.exposed_s) >= 0
    # The Gantt picture: nobody is in two micro-batches at once, and the last end is the makespan.
    spans = found.notes["gantt"]
    assert len(spans) == 16
    assert max(span[-1] for own in spans for span in own) == pytest.approx(phase.seconds)
    for own in spans:
        moments = [moment for span in own for moment in span[1:]]
        assert moments == sorted(moments)
    assigned = Assignment.of_plain(found.notes["assignment"])
    assert sorted(d for _, group in assigned.groups for d in group.documents) == list(range(len(found.notes["documents"])))


@pytest.mark.slow
def test_draws_are_batches_of_a_stream() -> None:
    found = H100.predict(cell_of("mask.samples=3", "planner=megatron_hybrid"), memory=False)
    assert len(found.draws) == 3


@pytest.mark.slow
def test_planning_does_not_count_what_costs_are_made_of() -> None:
    """Those of a problem that nobody has asked for yet take longer than the plan, which is of one document."""
    words = ("lengths=explicit", "lengths.values=[262144]", "heads=16x8x96", "planner=none", "scale=4x8", "workload.capacity=8k")
    batch = Batched.of(cell_of(*words), H100, memory=False)
    found = batch.play()
    spent = batch.cost.prepared_s
    assert spent > 0
    assert found.metrics["plan/seconds"] < spent


def test_what_cannot_be_planned_is_not_predicted() -> None:
    config = cell_of("planner=fixed").config  # which a plan would skip with this degree
    cell = Cell.from_config({**config, "planner": {**config["planner"], "degree": 5}})
    with pytest.raises(CannotPredict, match=r"planner\.degree=5"):
        H100.predict(cell, memory=False)


def test_an_estimate_does_not_plan() -> None:
    passes = passes_on(None)
    words = ("kernel=sdpa_flash", "dtype=float32", "heads=4x2x64", "seqlen=8k", "scale=1x2", "workload.capacity=4k")
    found = {planner: passes.of(cell_of(*words, f"planner={planner}")) for planner in ("none", "flexsp", "bytescale_hdp")}
    assert all(each.simulated for each in found.values()), found
    assert len({each.seconds for each in found.values()}) == 1


def test_a_rank_is_told_what_documents_cost() -> None:
    cell = cell_of("kernel=sdpa_flash", "dtype=float32", "heads=4x2x64", "seqlen=8k", "scale=1x2", "workload.capacity=4k")
    make = work_of(cell).cost
    assert make is not None
    made = make()
    assert made.degrees == (1, 2)
    assert made.basis
    assert made.documents_s(causal(512), 1)[0] > 0


# -- how near it comes -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_makespans_of_batches_that_no_fit_has_seen() -> None:
    """CPU seconds of gloo ranks with a thread each (``batch_seconds``), by a fit of 12 cells of attention alone."""
    seen, batches = batch_seconds.read(DATA)
    assert len(seen) == 12
    assert len(batches) == 30
    cores = replace(machine_of("this"), cores=2)
    rows = batch_seconds.judged(fit(seen, cores, folds=1), batches)
    for name in ("error", "cost_error"):
        errors = np.abs([getattr(row, name) for row in rows])
        assert np.median(errors) <= MEDIAN, batch_seconds.table(rows)
        assert np.quantile(errors, 0.9) <= 2 * MEDIAN, batch_seconds.table(rows)


STEP = ("workload=batch_step", "model=llama3_8b", "heads=32x8x128", "layers=2", "workload.capacity=16k",
        "lengths=long_text_512k", "seqlen=512k",
        "planner=bytescale_hdp", "planner.spread=false", "planner.fallback=false")  # fmt: skip


def test_what_layers_keep_may_be_offloaded_as_far_as_it_is_known() -> None:
    of_step, of_attention = (cost_of(cell_of(*words), H100) for words in (STEP, ()))
    offloads = of_step.offloads
    assert of_attention.offloads is None
    assert offloads is not None
    assert offloads.layers == 32
    assert offloads.host_bytes_per_s == H100.machine.host_bytes_per_s
    assert 0.2 < offloads.forward < 0.4
    assert cost_of(cell_of(*STEP, "recompute=full"), H100).offloads is None
    with pytest.raises(AssertionError, match="recompute=none"):  # the plan skips it
        cell_of(*STEP, "planner.offload=true", "recompute=full")


@pytest.mark.slow
def test_offloading_takes_fewer_ranks_and_its_copies_are_predicted() -> None:
    plain, offloaded = (H100.predict(cell_of(*STEP, f"planner.offload={word}"), memory=False) for word in ("false", "true"))
    assert offloaded.metrics()["batch/degree"] < plain.metrics()["batch/degree"]
    shares = [group.get("offload", 0.0) for groups in offloaded.notes["assignment"] for group in groups]
    assert max(shares) > 0
    curves = cost_of(cell_of(*STEP), H100).curves
    none, half = (curves.group("ring", np.zeros(1, dtype=np.int64), packed(4096, 2), offload=share) for share in (0.0, 0.5))
    assert half.phase.seconds >= none.phase.seconds
