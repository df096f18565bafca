"""Plans of a step: as good as the best of all assignments, within the budget, and of layers alike what their block takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.advice.pipeline import Plan, Stage, best, hop_s, switch_s, unbeaten, uniform
from lcbench.advice.planning import plan
from lcbench.advice.ranking import rank
from lcbench.advice.sizing import GIB
from lcbench.advice.ways import Asked, Way, stage_scale, ways
from lcbench.commands.plan import main
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.predict.machines import machine_of
from lcbench.predict.predictor import Predictor
from lcbench.problem import Scale

MACHINE = machine_of("h100")
PER_NODE = 2  # of the stages that are made up, so that some boundaries lie between nodes
SIZES = ("steady", "gradient", "kept", "moment", "head_steady", "head_gradient", "head_moment", "x_bytes")
TIMES = ("forward_s", "backward_s", "end_s", "head_s", "head_end_s")


def cells(*words: str) -> tuple[Cell, ...]:
    grid = ["workload=block", "workload.optimizer=adamw", "site=plain", *words]
    return tuple(planned.cell for planned in look(grid).cells)


def asked(*words: str, batch: int = 1, gib: float = 1e6, **most: int) -> Asked:
    found = cells(*words)
    return Asked(found, found[0].scale, batch, gib * GIB, most)


@cache
def template() -> Way:
    (way, *_) = ways(asked("model=tiny", "mask=causal", "seqlen=1k", "cp=none", "scale=1x1"), Scale(1, 1), Predictor(MACHINE), {})
    return way


# -- every assignment, one by one ----------------------------------------------------------------------------------------


def played(by_stage: Sequence[Sequence[Way]], sequences: int, batches: int, per_node: int) -> tuple[float, float]:
    """Seconds and the largest bytes of a plan: micro-batches go from stage to stage, and memory comes and goes as in a step."""
    stages, took, ends, peaks = len(by_stage), [], [], []
    for number, own in enumerate(by_stage):
        stage = Stage(tuple(own), number, stages, sequences, batches, per_node, MACHINE)
        last = number == stages - 1
        seconds = sum(sequences / way.dp * (way.forward_s + way.backward_s) for way in own)
        seconds += sum(switch_s(a, b, sequences, per_node, MACHINE) for a, b in pairwise(own))
        seconds += hop_s(own[0], stage, number) + hop_s(own[-1], stage, number + 1)
        took.append(seconds + sequences / own[-1].dp * own[-1].head_s * last)
        ends.append(sum(way.end_s for way in own) + own[-1].head_end_s * last)
        peaks.append(held(own, sequences, batches, min(batches, stages - number), last))
    free = [0.0] * stages
    for _ in range(batches):
        ready = 0.0
        for number in range(stages):
            free[number] = ready = max(ready, free[number]) + took[number]
    return free[-1] + max(ends), max(peaks)


def held(own: Sequence[Way], sequences: int, batches: int, under_way: int, last: bool) -> float:
    """The most that a rank of a stage holds, moment by moment through the last micro-batch."""
    several = batches > 1
    now = sum(way.steady + several * way.gradient for way in own)
    now += last * (own[-1].head_steady + several * own[-1].head_gradient)
    now += (under_way - 1) * sum(sequences / way.dp * way.kept for way in own)
    now += sequences / own[0].dp * (own[0].given - own[0].inputs)
    now += sum(sequences / way.dp * way.kept for way in own)  # forward
    most = now
    if last:
        most = now + own[-1].head_moment + 2 * sequences / own[-1].dp * own[-1].x_bytes
        now += (not several) * own[-1].head_gradient
    for way in reversed(own):
        most = max(most, now + way.moment + 2 * sequences / way.dp * way.x_bytes)
        now += (not several) * way.gradient - sequences / way.dp * way.kept
    return most


def assignments(able: Sequence[Way], layers: int, stages: int) -> Iterator[list[tuple[Way, ...]]]:
    for cuts in combinations(range(1, layers), stages - 1):
        bounds = [0, *cuts, layers]
        for own in product(able, repeat=layers):
            yield [own[a:b] for a, b in pairwise(bounds)]


def every(able: Sequence[Way], a: Asked, stages: int, sequences: int) -> list[tuple[float, float]]:
    """Seconds and bytes of each assignment."""
    batches, per_node = a.batch // sequences, a.scale.gpus_per_node
    return [played(each, sequences, batches, per_node) for each in assignments(able, a.layers, stages)]


def made_up(draw: st.DrawFn, dp: int, order: str) -> Way:
    """A way of whole numbers, so that sums do not depend on their order."""
    numbers = {name: float(draw(st.integers(0, 20))) for name in SIZES} | {name: float(draw(st.integers(0, 9))) for name in TIMES}
    inputs = float(draw(st.integers(0, int(numbers["kept"]))))
    more = {"inputs": inputs, "given": inputs + draw(st.integers(0, 5)), "order": order, "dp": dp, "tp": 1, "cp": 2 // dp}
    return replace(template(), **numbers, **more)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Way], int, int, int, int]:
    """Ways, layers, stages, sequences of a micro-batch and sequences of a step."""
    able = [made_up(draw, *draw(st.sampled_from([(1, "a"), (1, "b"), (2, "c")]))) for _ in range(draw(st.integers(1, 4)))]
    layers = draw(st.integers(1, 4 if len(able) < 4 else 3))
    stages = draw(st.integers(1, min(layers, 3)))
    return able, layers, stages, 2, 2 * draw(st.integers(1, 3))


def a_model(layers: int, batch: int, budget: float) -> Asked:
    words = ("model=tiny", f"model.layers={layers}", "layers=1", "mask=causal", "seqlen=1k", "cp=none", "scale=1x1")
    return replace(asked(*words, batch=batch), budget=budget, scale=Scale(4, PER_NODE))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(problems(), st.floats(0.0, 1.2))
def test_a_plan_is_the_best_of_all_assignments(problem: tuple[list[Way], int, int, int, int], share: float) -> None:
    able, layers, stages, sequences, batch = problem
    a = a_model(layers, batch, 0.0)
    known = every(able, a, stages, sequences)
    sizes = [size for _, size in known]
    a = replace(a, budget=min(sizes) + share * (max(sizes) - min(sizes)) - 1e-6 * (share == 0))
    found = best(able, a, stages, sequences, MACHINE, float("inf"))
    wanted = min((seconds for seconds, size in known if size <= a.budget), default=None)
    assert (found is None) == (wanted is None)
    if found is not None:
        seconds, size = played([stage.ways for stage in found.stages], sequences, batch // sequences, PER_NODE)
        assert found.bytes == pytest.approx(size)
        assert size <= a.budget * (1 + 1e-12)
        assert found.seconds == pytest.approx(seconds, rel=1e-12)
        assert found.seconds == pytest.approx(wanted, rel=1e-12)
        assert best(able, a, stages, sequences, MACHINE, found.seconds * (1 - 1e-9)) is None
        assert sum(found.parts.values()) >= found.seconds * (1 - 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_a_plan_of_a_real_model_is_the_best_of_all_assignments(share: float) -> None:
    words = ("model=tiny", "model.layers=3", "layers=1", "mask=causal", "seqlen=64k", "cp=none,ring", "recompute=none,full")
    a, predictor = asked(*words, "scale=1x4", batch=2, tp=2), Predictor(MACHINE)
    ends: list[float] = []
    for stages in (1, 2):
        scale = stage_scale(a.scale, stages)
        assert scale is not None
        ends += [uniform(way, a, stages, way.dp, MACHINE).bytes for way in ways(a, scale, predictor, {})]
    a = replace(a, budget=min(ends) + share * (max(ends) - min(ends)) + 1)
    known = []
    for stages in (1, 2, 4):
        scale = stage_scale(a.scale, stages)
        if scale is None or stages > a.layers:
            continue
        able = ways(a, scale, predictor, {})
        for sequences in {way.dp for way in able}:
            own = [way for way in able if sequences % way.dp == 0]
            known += every(own, a, stages, sequences)
    wanted = min(seconds for seconds, size in known if size <= a.budget)
    found = plan(a, predictor)
    assert found.plan is not None
    assert found.plan.seconds == pytest.approx(wanted, rel=1e-9)
    assert found.plan.bytes <= a.budget


# -- uniform plans are cells ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ("model=llama3_8b", "mask=causal", "seqlen=128k", "kernel=flash_attn3"),
    ("model=qwen3_8b", "mask=causal_document", "seqlen=64k", "kernel=flash_attn2"),
    ("model=tiny_mha", "mask=full", "seqlen=4k"),
])  # fmt: skip
def test_a_uniform_plan_takes_what_its_block_is_predicted_to_take(words: tuple[str, ...]) -> None:
    a = asked(*words, "layers=1", "scale=1x4", "cp=none,ring,ulysses,usp", "recompute=none,selective,full,attention_out", batch=4)
    predictor, exact = Predictor(MACHINE), 0
    able = ways(a, a.scale, predictor, {})
    assert {(way.zero, way.recompute) for way in able} >= set(product((0, 3), ("none", "selective", "full", "attention_out")))
    for way in able[::3]:
        config = {**way.cell.config, "workload": {**way.cell.config["workload"], "layers": None}}
        block = predictor.predict(Cell.from_config(config))
        found = uniform(way, replace(a, batch=way.dp), 1, way.dp, MACHINE)
        assert found.batches == 1
        assert found.seconds == pytest.approx(block.seconds, rel=1e-9)
        flops = sum(block.flops.values())
        assert found.flops == pytest.approx(flops, rel=1e-9)
        # Where a layer's weights outweigh what it keeps, the block looks at the attention of its last layer alone.
        if way.kept >= way.gradient:
            exact += 1
            assert found.bytes == pytest.approx(block.needs_bytes, rel=1e-9, abs=64)
        else:
            assert block.needs_bytes <= found.bytes + 64 <= 1.5 * block.needs_bytes
    assert exact


def test_what_only_strategies_make_different_is_chosen_as_choose_does() -> None:
    words = ("model=llama3_8b", "layers=1", "mask=causal", "seqlen=128k", "kernel=flash_attn3", "cp=ring,ulysses,usp,allgather")
    a, predictor = asked(*words, "scale=2x8", tp=1, pp=1), Predictor(MACHINE)
    found = plan(a, predictor).plan
    assert found is not None
    (way,) = set(found.ways)
    fsdp = str(way.zero == 3).lower()
    grid = ["workload=block", "workload.optimizer=adamw", f"workload.fsdp={fsdp}", "site=plain", "scale=2x8", "layers=all"]
    first = rank(look([*grid, *(word for word in words if word != "layers=1")]).cells, predictor)[0]
    assert first.cell.config["cp"]["name"] == way.strategy
    assert first.prediction is not None
    assert found.seconds == pytest.approx(first.prediction.seconds, rel=1e-9)


def test_memory_that_binds_has_some_layers_compute_again() -> None:
    words = ("model=llama3_8b", "layers=1", "mask=causal", "seqlen=64k", "kernel=flash_attn3", "cp=ring", "recompute=none,full")
    a, predictor = asked(*words, "scale=1x8", tp=1, pp=1), Predictor(MACHINE)
    wide = plan(a, predictor).plan
    assert wide is not None
    assert {way.recompute for way in wide.ways} == {"none"}
    least = min(uniform(way, a, 1, way.dp, MACHINE).bytes for way in ways(a, a.scale, predictor, {}))
    counts = []
    for share in (0.25, 0.5, 0.75):
        tight = plan(replace(a, budget=least + share * (wide.bytes - least)), predictor).plan
        assert tight is not None
        assert tight.bytes <= least + share * (wide.bytes - least)
        assert tight.seconds > wide.seconds
        counts.append(sum(way.recompute == "full" for way in tight.ways))
    assert 32 > counts[0] > counts[1] > counts[2] > 0


# -- parts of it ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_holds_micro_batches_and_waits() -> None:
    way = replace(template(), dp=2, order="a")
    a = a_model(4, 8, 1e18)
    found = uniform(way, a, 4, 2, MACHINE)
    assert [stage.under_way for stage in found.stages] == [4, 3, 2, 1]
    assert found.batches == 4
    assert [len(stage.ways) for stage in uniform(way, a_model(4, 8, 1e18), 3, 2, MACHINE).stages] == [1, 1, 2]
    assert found.parts["bubble"] > 0
    assert sum(found.parts.values()) == pytest.approx(found.seconds)


def test_activations_move_between_layers_of_another_order_only() -> None:
    a, b = (replace(template(), dp=2, order=order, x_bytes=1e6) for order in ("a", "b"))
    assert switch_s(a, a, 2, PER_NODE, MACHINE) == 0
    small, large = (switch_s(a, replace(b, x_bytes=size), 2, PER_NODE, MACHINE) for size in (1e6, 1e9))
    assert 0 < small < large
    stage = Stage((a,), 1, 4, 2, 4, 4, MACHINE)
    assert hop_s(a, stage, 0) == hop_s(a, stage, 4) == 0
    assert hop_s(a, stage, 2) > hop_s(a, stage, 1) > 0  # out of the node, and inside of it


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=40))
def test_what_nothing_beats_is_kept(rows: list[tuple[int, ...]]) -> None:
    def beats(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
        return one != other and all(x <= y for x, y in zip(one, other, strict=True))

    kept = unbeaten(np.array(rows, dtype=float))
    assert {rows[at] for at in kept} == {row for row in rows if not any(beats(other, row) for other in rows)}
    assert len(kept) == len({rows[at] for at in kept})


def test_stages_lie_evenly_on_nodes() -> None:
    assert stage_scale(Scale(4, 8), 2) == Scale(2, 8)
    assert stage_scale(Scale(4, 8), 8) == Scale(1, 4)
    assert stage_scale(Scale(4, 8), 3) is None
    assert stage_scale(Scale(3, 8), 2) is None  # a node and a half
    assert stage_scale(Scale(3, 8), 3) == Scale(1, 8)


def test_every_number_of_a_way_is_counted() -> None:
    way = template()
    assert all(getattr(way, each.name) >= 0 for each in fields(way) if isinstance(getattr(way, each.name), float))
    assert isinstance(uniform(way, a_model(4, 1, 1e18), 1, 1, MACHINE), Plan)


# -- the command ---------------------------------------------------------------------------------------------------------

FAST = ("model=llama3_8b", "nodes=1", "seqlen=64k", "cp=none,ring,ulysses", "max_tp=2", "max_pp=2", "site=plain", "global_batch=8")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.slow
def test_the_command_prints_the_plan_and_what_it_was_up_against(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, *FAST, "memory_gib=30")
    assert code == 0
    assert "plan for machine h100, predicted, not measured: llama3_8b, mask causal, seqlen 64k, 8 sequences a step" in out
    assert "what it was up against" in out
    assert "it is the plan" in out or "more" in out
    assert "within a factor 2 in 95 % of cases; no fit" in out


@pytest.mark.slow
def test_json_has_every_layer_and_rival(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, *FAST, "memory_gib=30", "output=json")
    assert code == 0
    assert "plan for machine" in err
    found = json.loads(out)
    layers = [layer for stage in found["plan"]["stages"] for layer in stage["layers"]]
    assert sum(layer["last"] - layer["first"] + 1 for layer in layers) == 32
    assert found["plan"]["predicted"]["bytes"] <= 30 * GIB == found["budget_bytes"]
    assert found["plan"]["predicted"]["seconds"] <= min(r["predicted"]["seconds"] for r in found["rivals"] if r["fits"])
    assert 0 < found["plan"]["predicted"]["mfu"] < 1
    assert all(layer["tp"] <= 2 for layer in layers)


@pytest.mark.slow
def test_nothing_fits_and_what_comes_nearest_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, *FAST, "memory_gib=2")
    assert code == 1
    assert "no plan fits into 2 GiB a rank" in " ".join(out.split()).replace("2.00", "2")
    assert "nearest: pp=" in out
    assert "does not fit by" in out


@pytest.mark.parametrize(("words", "wanted"), [
    (("nodes=0",), "nodes=0 is no whole number of at least 1"),
    (("nodes=1", "scale=1x8"), "nodes=1 and scale= are two ways to say one thing"),
    (("global_batch=none",), "global_batch=none is no whole number of at least 1"),
    (("memory_gib=-1",), "memory_gib=-1 is no number above 0"),
    (("machine=abacus",), "machine=abacus is none of"),
    (("machine=this",), "machine=this has no memory of its own"),
    (("mesh.tp=2",), "mesh.tp=2 is not for a plan"),
    (("layers=2",), "layers=2 is not for a plan"),
    (("workload.fsdp=true",), "workload.fsdp=true is not for a plan"),
    (("seqlen=64k,128k",), "a plan is of one problem"),
    (("recompute=offload",), "recompute=offload moves activations to the host"),
    (("batch=4q8k",), "batch=4q8k is no training step"),
    (("direction=forward",), "direction=forward is no training step"),
    (("model=gpt9",), "gpt9"),
    (("quickly",), "'quickly' is no override"),
    (("dtype=float16",), "nothing of this can be run: workload block: dtype=float16"),
])  # fmt: skip
def test_bad_input_is_one_line(words: tuple[str, ...], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["model=llama3_8b", "site=plain", *(["seqlen=64k"] if not words[0].startswith(("seqlen", "batch")) else []), *words])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert wanted in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out
