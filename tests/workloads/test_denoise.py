"""Steps of denoising: displaced and pipelined runs against a dense simulation of what they say that rows see, whole cells with
their own check on real gloo ranks, and faults that this check must find."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lcbench.cp.base import Place, Strategy
from lcbench.cp.displaced import Displaced, DisplacedRun, Stored
from lcbench.cp.dualparal import DualParal
from lcbench.cp.dualparal_run import Flow
from lcbench.cp.ring import Ring
from lcbench.cp.steps import STEADY, WARMUP, Layer, OverSteps
from lcbench.grid.build import build_strategy
from lcbench.grid.command_line import look
from lcbench.kernels.base import Kernel
from lcbench.kernels.reference import Reference
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.masks.mask import Mask
from lcbench.measure.cell import measure_again, measure_cell
from lcbench.measure.measured import Measured
from lcbench.measure.metrics import metric_of
from lcbench.measure.session import Gang
from lcbench.problem import Batch, Heads, Mesh, Problem, Requests, Scale, Softmax
from lcbench.schedule.groups import Groups
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.masks import load, small
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.base import Work
from lcbench.workloads.denoise import Denoise
from lcbench.workloads.denoising import DenoisingSession

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 8)
SEQLEN, STEPS, LAYERS = 48, 4, 4
BOUND = 1e-12
SETTINGS = {"warmup": 1, "min_iterations": 2, "max_iterations": 2, "budget_s": 0.5, "precision": 1e-9, "timeline": False}
Drawn = list[list[Layer]]  # [step][layer], all tokens


def problem_of(ranks: int, dtype: str = "float64", heads: Heads = HEADS) -> Problem:
    return Problem(SEQLEN, heads, Scale(1, ranks), dtype, "forward")


def inputs(drift: float = 0.5) -> Drawn:
    """Seeded inputs of all tokens."""
    generator = torch.Generator().manual_seed(3)

    def new() -> Layer:
        return Layer(*(torch.randn(SEQLEN, heads, HEADS.dim, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)))

    found = [[new() for _ in range(LAYERS)]]
    for _ in range(STEPS - 1):
        found.append([Layer(*((1 - drift) * x + drift * n for x, n in zip(old, new(), strict=True))) for old in found[-1]])
    return found


def masks() -> dict[str, Mask]:
    return {"full": full(SEQLEN), "causal": causal(SEQLEN), "dual_scope": small("dual_scope", SEQLEN, HEADS, Path(), seed=7)}


# -- against a dense simulation ----------------------------------------------------------------------------------------


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
    return dense_attention(q, k, v, mask, HEADS.dim**-0.5)[0]


def displaced_densely(drawn: Drawn, mask: Mask, ranks: int, warmup: int) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """The latent after each step, and what each layer of each step gives: rows take the other ranks' keys one step late."""
    dense, size = dense_heads(mask, HEADS.q), SEQLEN // ranks
    latent, latents, every = torch.zeros_like(drawn[0][0].q), [], []
    for step in range(STEPS):
        outs = []
        for layer in range(LAYERS):
            now, before = drawn[step][layer], drawn[step if step < warmup else step - 1][layer]
            out = torch.zeros_like(latent)
            for rank in range(ranks):
                own = slice(rank * size, (rank + 1) * size)
                k, v = before.k.clone(), before.v.clone()
                k[own], v[own] = now.k[own], now.v[own]
                out[own] = attended((now.q + latent)[own], k, v, dense[:, own])
            latent = latent + out
            outs.append(out)
        latents.append(latent)
        every.append(outs)
    return latents, every


def pipelined_densely(
    drawn: Drawn, mask: Mask, blocks: int, context: float
) -> tuple[list[torch.Tensor], dict[tuple[int, int], list[torch.Tensor]]]:
    """The latent after each step, and by step and block what each layer gives for the rows of the block and those before it.

    Block after block of each round, one process, no queue: what a block needs of others is looked up by its step.
    """
    dense, size = dense_heads(mask, HEADS.q), SEQLEN // blocks
    seen = int(context * size)
    latents = [torch.zeros_like(drawn[0][0].q) for _ in range(STEPS + 1)]  # before each step
    outs: dict[tuple[int, int], list[torch.Tensor]] = {}
    for turn in range(STEPS + blocks - 1):
        for block in range(blocks - 1, -1, -1):
            step = turn - block
            if not 0 <= step < STEPS:
                continue
            begin, end = block * size, (block + 1) * size
            first, behind = max(0, begin - seen), min(SEQLEN, end + seen) if step else end
            h = torch.cat((latents[step + 1][first:begin], latents[step][begin:end]))
            for layer in range(LAYERS):
                now, old = drawn[step][layer], drawn[max(step - 1, 0)][layer]
                k, v = (torch.cat((x[first:end], y[end:behind])) for x, y in ((now.k, old.k), (now.v, old.v)))
                out = attended(now.q[first:end] + h, k, v, dense[:, first:end, first:behind])
                h = h + out
                outs.setdefault((step, block), []).append(out)
            latents[step + 1][begin:end] = h[begin - first :]
    return latents[1:], outs


def check_runs(rank: int, ranks: int) -> None:
    drawn, problem = inputs(), problem_of(ranks)
    kept: list[Any] = []
    for name, mask in masks().items():
        # As where a backend takes no tensors of the device.
        place = Place(rank, CPU, Groups(through_host=name == "causal"))
        for warmup in (1, 2):
            want, every = displaced_densely(drawn, mask, ranks, warmup)
            kernel: Kernel = Reference() if warmup == 1 else SDPAFlash()
            run = Displaced(warmup).start_steps(problem, mask, kernel, place, STEPS, LAYERS)
            own = [[Layer(*(x[run.given] for x in layer)) for layer in layers] for layers in drawn]
            kept, passed, sent = [], [], {}
            for phase, steps in run.phases().items():
                passed += run.advance(steps, own, passed, kept.append)
                counters = run.counters()
                assert counters is not None
                sent[phase] = counters.bytes_sent
            near(passed, [x[run.tokens] for x in want], f"displaced {name} {warmup}")
            near([out for one in kept for out in one.outs], [x[run.tokens] for outs in every for x in outs], f"layers {name}")
            once = (ranks - 1) * SEQLEN // ranks * 2 * HEADS.kv * HEADS.dim * 8 * LAYERS
            # The last step sends nothing: no step reads it.
            assert sent == {WARMUP: warmup * once, STEADY: (STEPS - warmup - 1) * once}
            if (silent := run.bare(compute=True, communicate=False)) is not None:
                silent.advance(range(STEPS), own, [], None)
            near([run.forward(*own[0][0])[0]], [every[0][0][run.tokens]], f"a layer behind passes without messages {name}")
        for blocks, context in ((6, 0.5), (3, 1.0), (4, 0.0), (1, 0.5))[: 4 if name == "dual_scope" else 1]:
            case = f"dualparal {name} {blocks} {context}"
            want, outs = pipelined_densely(drawn, mask, blocks, context)
            run = DualParal(blocks, context).start_steps(problem, mask, SDPAFlash(), place, STEPS, LAYERS)
            own = [[layers[layer] for layer in run.layers] for layers in drawn]
            kept = []
            passed = run.advance(range(STEPS), own, [], kept.append)
            assert len(kept) == STEPS * blocks
            for one in kept:
                near(one.outs, [outs[one.step, one.part][layer] for layer in run.layers], f"{case} {one.step} {one.part}")
            near(passed, [x[run.tokens] for x in want], case)
            size = SEQLEN // blocks
            row, seen = HEADS.q * HEADS.dim * 8, int(context * size)
            counters = run.counters()
            assert counters is not None
            through = STEPS * (SEQLEN + (blocks - 1) * seen) * row
            assert counters.bytes_sent == (0 if ranks == 1 else STEPS * SEQLEN * row if rank == ranks - 1 else through), case


def near(got: list[torch.Tensor], want: list[torch.Tensor], case: str) -> None:
    assert len(got) == len(want), case
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape, case
        if one.numel():
            assert float((one - other).abs().max()) <= BOUND, case


def check_lag(rank: int, ranks: int) -> None:
    """Values count steps, and all scores are equal: a row's result tells of which steps its keys were."""
    place, size = Place(rank, CPU, Groups()), SEQLEN // ranks
    run = Displaced(2).start_steps(problem_of(ranks), full(SEQLEN), SDPAFlash(), place, STEPS, LAYERS)
    assert isinstance(run, DisplacedRun)
    zeros = torch.zeros(size, HEADS.kv, HEADS.dim, dtype=torch.float64)
    counted = [[Layer(torch.zeros(size, HEADS.q, HEADS.dim).double(), zeros, zeros + step)] * LAYERS for step in range(STEPS)]
    kept: list[Any] = []
    passed = run.advance(range(2), counted, [], kept.append)
    run.advance(range(2, STEPS), counted, passed, kept.append)
    for one in kept:
        lag = 0 if one.step < 2 else 1
        for out in one.outs:
            assert torch.allclose(out, torch.full_like(out, one.step - lag * (ranks - 1) / ranks), rtol=0, atol=BOUND)


def check_static(rank: int, ranks: int) -> None:
    """Inputs that do not change: stale keys are those of now, to the bit."""
    place = Place(rank, CPU, Groups())
    drawn = [inputs()[0]] * STEPS
    found = []
    for warmup in (1, STEPS - 1):
        run = Displaced(warmup).start_steps(problem_of(ranks), causal(SEQLEN), SDPAFlash(), place, STEPS, LAYERS)
        own = [[Layer(*(x[run.given] for x in layer)) for layer in layers] for layers in drawn]
        passed: list[torch.Tensor] = []
        for steps in run.phases().values():
            passed += run.advance(steps, own, passed, None)
        found.append(passed)
    assert all(torch.equal(stale, fresh) for stale, fresh in zip(*found, strict=True))


# -- whole cells -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    cp: Strategy | str
    dtype: str = "float64"
    mask: str = "full"
    drift: float = 0.05
    mesh: Mesh = field(default_factory=Mesh)

    @property
    def strategy(self) -> Strategy:
        return build_strategy(load("cp", self.cp)) if isinstance(self.cp, str) else self.cp

    def measured(self, rank: int, ranks: int, groups: Groups, one: Callable[..., Measured] = measure_cell) -> Measured:
        scale = Scale(1, ranks)
        problem = Problem(SEQLEN, self.mesh.heads(HEADS), self.mesh.group_scale(scale), self.dtype, "forward")
        work = Work(
            Denoise(STEPS, LAYERS, self.drift), problem, lambda _: masks()[self.mask], SDPAFlash(), self.strategy, SETTINGS, 5,
            mesh=self.mesh, scale=scale,
        )  # fmt: skip
        return one(work, Gang(rank, ranks, CPU, groups, []), lambda _: None)


def check_cells(rank: int, ranks: int) -> None:
    groups = Groups()
    for cell in sound(ranks):
        found = cell.measured(rank, ranks, groups)
        assert found.unavailable is None, f"{cell}: {found.unavailable}"
        assert found.implausible is None, f"{cell}: {found.implausible}"
        assert found.check is not None
        assert not found.check.failures, f"{cell}: {found.check.failures}"
        assert found.check.whole
        assert set(found.check.ratios) >= {"reference", "between layers", "last timed pass", "last pass"}
        if cell.dtype == "float64":
            assert found.check.errors["out"] <= BOUND, cell
        check_metrics(cell, found.metrics, ranks)
        if cell.mask == "full":
            continue
        again = cell.measured(rank, ranks, groups, measure_again)
        assert again.check is not None
        assert not again.check.failures, f"{cell}: {again.check.failures}"


def sound(ranks: int) -> list[Cell]:
    cells = [Cell(Displaced(2), dtype, mask) for dtype, mask in (("float64", "causal"), ("bfloat16", "full"))]
    cells += [Cell(DualParal(6), "float64", "dual_scope"), Cell(DualParal(3, 1.0), "float32"), Cell(Displaced(1), drift=0.0)]
    if ranks == 1:
        return [*cells, Cell("none")]
    if ranks == 4:
        return [*cells[:1], *cells[2:3], Cell(Displaced(2), "float64", "causal", mesh=Mesh(tp=2)), Cell("ulysses", mesh=Mesh(dp=2))]
    return [*cells, Cell("ring", mask="causal"), Cell("ulysses", "bfloat16"), Cell("allgather", mask="dual_scope")]


def check_metrics(cell: Cell, metrics: dict[str, float], ranks: int) -> None:
    assert all(metric_of(key) for key in metrics)
    phases = {WARMUP: cell.strategy.warmup} if isinstance(cell.strategy, Displaced) else {}
    phases[STEADY] = STEPS - sum(phases.values())
    for phase, steps in phases.items():
        assert metrics[f"denoise/{phase}/steps"] == steps
        assert metrics[f"denoise/{phase}/step_s"] == pytest.approx(metrics[f"time/{phase}/median_s"] / steps)
    assert ("denoise/warmup/steps" in metrics) == (WARMUP in phases)
    if not isinstance(cell.strategy, OverSteps):
        assert "check/distance" not in metrics
        return
    if isinstance(cell.strategy, Displaced):
        assert (metrics["check/distance"] > 0.02) == (ranks > 1 and cell.drift > 0), cell
        itemsize = 2 if cell.dtype == "bfloat16" else 8
        ranks //= cell.mesh.tp
        once = (ranks - 1) * SEQLEN // ranks * 2 * HEADS.kv // cell.mesh.tp * HEADS.dim * itemsize * LAYERS
        assert metrics["comm/warmup/bytes"] == cell.strategy.warmup * once
        assert metrics["comm/steady/bytes"] == (phases[STEADY] - 1) * once
    else:
        assert metrics["check/distance"] > 1e-3


# -- faults ------------------------------------------------------------------------------------------------------------


def twice_as_old(run: DisplacedRun, layer: int, k: torch.Tensor, v: torch.Tensor, *, more: bool) -> None:
    """What arrives is read a step too late."""
    for work in run._under_way[layer]:
        work.wait()
    old = run._read[layer]
    waiting = run.__dict__.setdefault("waiting", {})
    if run._under_way[layer]:
        arrived = Stored(run._problem, SDPAFlash(), CPU)
        arrived.planes[0].copy_(run._arriving[layer].planes[0])
        if layer in waiting:
            old.planes[0].copy_(waiting[layer].planes[0])
        waiting[layer] = arrived
    run._put(layer, k, v)
    run._under_way[layer] = run._sent(layer, run._arriving[layer]) if more else []


def always_fresh(run: DisplacedRun, layer: int, k: torch.Tensor, v: torch.Tensor, *, more: bool) -> None:
    run._fill(layer, k, v)


def one_rank_never_refreshed(run: DisplacedRun, layer: int, k: torch.Tensor, v: torch.Tensor, *, more: bool) -> None:
    size = SEQLEN // 2
    last = run._read[layer].planes[0][size:].clone()
    RENEW(run, layer, k, v, more=more)
    if run._rank == 0:
        run._read[layer].planes[0][size:] = last


RENEW, WITH_CACHED, ENTERING = DisplacedRun._renew, Flow._with_cached, Flow._entering
THROUGH, PASSED_ON = Flow._through, Flow._passed_on


def another_layers_cache(flow: Flow, place: int, k: torch.Tensor, v: torch.Tensor, after: int) -> Any:
    return WITH_CACHED(flow, (place + 1) % 2, k, v, after)


def cache_never_renewed(flow: Flow, step: int, block: int, before: torch.Tensor) -> torch.Tensor:
    """Of each round, the cache is what its first block left."""
    cache = list(flow._cache)
    found = THROUGH(flow, step, block, before)
    if all(each is not None for each in cache):
        flow._cache = cache
    return found


def latents_of_the_round_before(flow: Flow, step: int, block: int) -> torch.Tensor:
    """The block begins with what the block after it has."""
    found = ENTERING(flow, step, block)
    return found.roll(1, 0) if flow._run.rank == 1 and block == 2 else found


def without_what_a_layer_gives(flow: Flow, latent: torch.Tensor) -> torch.Tensor:
    return PASSED_ON(flow, latent) * (0.5 if flow._run.rank == 1 else 1.0)


FAULTS: dict[str, tuple[Any, str, Any, Strategy, str]] = {
    "two steps old": (DisplacedRun, "_renew", twice_as_old, Displaced(1), "reference"),
    "fresh instead of stale": (DisplacedRun, "_renew", always_fresh, Displaced(1), "reference"),
    "a rank never refreshed": (DisplacedRun, "_renew", one_rank_never_refreshed, Displaced(1), "reference"),
    "another layer's cache": (Flow, "_with_cached", another_layers_cache, DualParal(6), "reference"),
    "a cache never renewed": (Flow, "_through", cache_never_renewed, DualParal(6), "reference"),
    "rows of a message swapped": (Flow, "_entering", latents_of_the_round_before, DualParal(6), "between layers"),
    "half of what is passed on": (Flow, "_passed_on", without_what_a_layer_gives, DualParal(6), "between layers"),
}


def check_faults(rank: int, ranks: int) -> None:
    groups = Groups()
    for dtype in ("float64", "bfloat16"):
        for name, (owner, method, fault, strategy, part) in FAULTS.items():
            with patch.object(owner, method, fault):
                found = Cell(strategy, dtype, "dual_scope" if rank < 0 else "full").measured(rank, ranks, groups)
            assert found.check is not None, name
            assert any(part in failure for failure in found.check.failures), f"{name} {dtype}: {found.check.failures}"


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusal(*words: str, workload: str = "denoise", direction: str = "forward") -> str | None:
    """Why the cell of these words cannot run."""
    sizes = "model=tiny" if workload == "block" else "heads=4x4x8"
    base = ["kernel=naive", "mask=full", "seqlen=64", "scale=1x2", sizes, "dtype=float32"]
    (cell,) = look([*base, f"workload={workload}", f"direction={direction}", *words]).cells
    return cell.skip


STALE = "takes keys and values of the step before"
BOTH = {"direction": "forward_backward"}


@pytest.mark.parametrize(
    ("words", "options", "reason"),
    [
        (["cp=ring"], {}, None),
        (["cp=displaced"], {}, None),
        (["cp=dualparal"], {}, None),
        (["cp=displaced"], {"workload": "attention"}, f"cp displaced: {STALE}, and attention alone has one step: workload=denoise"),
        (["cp=dualparal"], {"workload": "attention"}, f"cp dualparal: {STALE}, and attention alone has one step: workload=denoise"),
        (["cp=displaced"], BOTH, f"cp displaced: {STALE}, so it has no backward pass"),
        (
            ["cp=displaced"],
            {"workload": "block", "direction": "forward_backward"},
            f"cp displaced: {STALE}, so it has no backward pass",
        ),
        (["cp=ring"], BOTH, "workload denoise: direction=forward_backward: denoising has no backward"),
        (["cp=displaced", "workload.steps=4"], {}, "workload denoise: workload.steps=4 leaves no step behind the 4 of cp.warmup=4"),
        (["cp=displaced", "seqlen=65"], {}, "cp displaced: has equal patches, and 2 ranks do not divide seqlen=65"),
        (["cp=dualparal", "seqlen=68"], {}, "cp dualparal: has equal blocks, and cp.blocks=8 does not divide seqlen=68"),
        (["cp=dualparal", "layers=1"], {}, "workload denoise: is a pipeline of 2 ranks, and layers=1 leaves one without a layer"),
        (["cp=ulysses", "cp.async_projections=true"], {}, "workload denoise: cp.async_projections=true needs the projections"),
    ],
)
def test_what_does_not_go_together_is_refused_with_its_reason(
    words: list[str], options: dict[str, str], reason: str | None
) -> None:
    found = refusal(*words, **options)
    assert found == reason if reason is None else str(found).startswith(reason)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Denoise(steps=0), "workload.steps=0 is no number of at least 1"),
        (lambda: Denoise(layers=None), "workload.layers=all is no number of at least 1"),
        (lambda: Denoise(drift=1.5), "workload.drift=1.5 is no share, 0 to 1"),
        (lambda: Displaced(0), "cp.warmup=0 is no number of at least 1"),
        (lambda: DualParal(0), "cp.blocks=0 is no number of at least 1"),
        (lambda: DualParal(2, -0.5), "cp.context=-0.5 is no share of a block, 0 to 1"),
    ],
)
def test_bad_options_are_refused(make: Callable[[], Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        make()


def test_problems_that_no_diffusion_model_has_are_refused() -> None:
    problem, mask = problem_of(2), full(SEQLEN)

    def reason(**changes: Any) -> str:
        return str(Denoise().unsupported(replace(problem, **changes), mask, Reference(), Ring(), None))

    assert reason(heads=Heads(4, 2, 8, 4)).startswith("heads=4x2x8:4: a layer's result is added to what its queries come from")
    assert reason(softmax=Softmax(sink=True)) == "softmax=sink: no diffusion model has a sink or a softcap"
    assert reason(softmax=Softmax(scale=0.1)) == "None"
    assert reason(batch=Batch((Requests(1, 16, SEQLEN),))).startswith("denoising is of one sequence")
    queries = replace(problem, batch=Batch((Requests(1, 16, SEQLEN),)))
    assert str(Displaced().unsupported(queries, mask)) == f"every token has a query in a step, and here 16 of {SEQLEN} have one"


def test_neighbouring_steps_have_the_correlation_that_drift_says() -> None:
    work = Work(Denoise(3, 1, 0.19), problem_of(1), lambda _: full(SEQLEN), SDPAFlash(), Displaced(1), SETTINGS, 5)
    session = work.start(0, Gang(0, 1, CPU, Groups(), []))
    assert isinstance(session, DenoisingSession)
    (first,), (second,), (third,) = session.inputs
    for one, other, share in ((first, second, 0.9), (second, third, 0.9), (first, third, 0.81)):
        both = torch.stack([one.q.flatten(), other.q.flatten()])
        assert torch.corrcoef(both)[0, 1] == pytest.approx(share, abs=0.03)
        assert both.square().mean(1).tolist() == pytest.approx([1.0, 1.0], abs=0.15)


# -- what runs ---------------------------------------------------------------------------------------------------------


def check_all(rank: int, ranks: int) -> None:
    check_runs(rank, ranks)
    check_lag(rank, ranks)
    check_static(rank, ranks)
    check_cells(rank, ranks)


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_runs_match_a_dense_simulation_and_cells_pass_their_check(ranks: int) -> None:
    run_ranks(ranks, check_all, ranks)


@pytest.mark.slow
@pytest.mark.gloo
def test_every_fault_is_found() -> None:
    run_ranks(2, check_faults, 2)
