"""Cells of linear attention on real gloo ranks, with their own check; faults that this check must find; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lcbench.cp.base import Strategy
from lcbench.cp.lasp import LASP
from lcbench.cp.lasp2 import LASP2
from lcbench.cp.none import Local
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.zeco import ZeCO
from lcbench.grid.command_line import look
from lcbench.kernels.chunked import Chunked, PreparedChunked
from lcbench.kernels.linear import Summary, Tokens
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.measure import recurrence
from lcbench.measure.bounds import Check
from lcbench.measure.cell import measure_again, measure_cell
from lcbench.measure.flops import linear_flops, pass_flops
from lcbench.measure.measured import Measured
from lcbench.measure.metrics import metric_of
from lcbench.measure.recurrence import Stretch
from lcbench.measure.session import Gang
from lcbench.predict.predictor import Predictor
from lcbench.problem import RULES, Batch, Heads, Mesh, Problem, Requests, Rule, Scale, Softmax
from lcbench.runs.worker import work_of
from lcbench.schedule import scan
from lcbench.schedule.groups import Groups
from lcbench.schedule.scan import ScanRun
from lcbench.testing import recurrence as oracle
from lcbench.testing.spawn import run_ranks
from lcbench.workloads import linear_check
from lcbench.workloads.base import Work
from lcbench.workloads.linear_attention import LinearAttention
from lcbench.workloads.linear_session import LinearSession, least_received
from tests.turns import due

ALONE = Mesh()
CPU = torch.device("cpu")
HEADS = Heads(8, 4, 8, 12)
SEQLEN = 96
SETTINGS = {"warmup": 1, "min_iterations": 2, "max_iterations": 2, "budget_s": 0.5, "precision": 1e-9, "timeline": True}


@dataclass(frozen=True)
class Cell:
    strategy: Strategy
    rule: Rule = "gla"
    dtype: str = "float64"
    mesh: Mesh = ALONE
    direction: str = "forward_backward"
    seqlen: int = SEQLEN
    long: bool = False  # the check looks at one head, and at the others by cheaper parts

    def work(self, ranks: int) -> Work:
        scale = Scale(1, ranks)
        heads, group = self.mesh.heads(HEADS), self.mesh.group_scale(scale)
        problem = Problem(self.seqlen, heads, group, self.dtype, self.direction, rule=self.rule)
        return Work(
            LinearAttention(self.rule), problem, lambda _: causal(self.seqlen), Chunked(chunk=16), self.strategy, SETTINGS, 5,
            mesh=self.mesh, scale=scale,
        )  # fmt: skip

    def measured(self, rank: int, ranks: int, groups: Groups, one: Callable[..., Measured] = measure_cell) -> Measured:
        with patch.object(linear_check, "WHOLE", 0 if self.long else linear_check.WHOLE):
            return one(self.work(ranks), Gang(rank, ranks, CPU, groups, []), lambda _: None)


def sound(ranks: int) -> list[Cell]:
    if ranks == 1:
        return [Cell(Local(), rule, dtype, long=long) for rule in RULES for dtype, long in (("float64", True), ("bfloat16", False))]
    if ranks == 4:
        return [Cell(LASP(), mesh=Mesh(tp=2)), Cell(Ulysses(), "gated_delta_rule", mesh=Mesh(dp=2)), Cell(LASP2(), seqlen=3)]
    every: list[Strategy] = [LASP(), ZeCO(2), LASP2(), Ulysses()]
    cells = [Cell(strategy, rule, long=True) for rule in RULES for strategy in every]
    cells += [Cell(strategy, rule, dtype, long=True) for strategy, rule, dtype in zip(
        every, ("gla", "gated_delta_rule") * 2, ("bfloat16", "float32", "bfloat16", "float16"), strict=False
    )]  # fmt: skip
    return [*cells, Cell(ZeCO(4), "gated_delta_rule"), Cell(LASP(), direction="forward", dtype="float16")]


def check_cells(rank: int, ranks: int) -> None:
    groups = Groups()
    for cell in due(sound(ranks)):
        found = cell.measured(rank, ranks, groups)
        assert found.unavailable is None, f"{cell}: {found.unavailable}"
        assert found.implausible is None, f"{cell}: {found.implausible}"
        assert found.check is not None
        assert not found.check.failures, f"{cell}: {found.check.failures}"
        assert found.check.whole != cell.long
        left = ("dk", "ddecay", "dbeta") if cell.rule == "gated_delta_rule" else ("ddecay",)
        assert list(found.check.unchecked) == [f"{name} of other heads" for name in left if cell.long]
        parts = {"reference", "reference, together", "last timed pass", "last pass"}
        parts |= {"along one direction"} if cell.long else set()
        parts |= {"factor"} if cell.long and cell.direction != "forward" else set()
        assert set(found.check.ratios) == parts, cell
        names = {"out"} | ({"dq", "dk", "dv", "ddecay"} if cell.direction != "forward" else set())
        names |= {"dbeta"} if cell.rule == "gated_delta_rule" else set()
        assert set(found.check.errors) == names
        if cell.dtype == "float64":
            assert max(found.check.errors.values()) <= 1e-12, cell
        check_metrics(cell, found, ranks)
    again = sound(ranks)[0].measured(rank, ranks, groups, measure_again)
    assert again.check is not None
    assert not again.check.failures


def check_metrics(cell: Cell, found: Measured, ranks: int) -> None:
    metrics, problem = found.metrics, cell.work(ranks).problem
    assert all(metric_of(key) for key in metrics)
    assert problem.rule is not None
    size = problem.scale.world_size
    flops = linear_flops(cell.mesh.count * problem.seqlen, problem.heads, problem.rule)
    rate = metrics["compute/forward/tflops_per_gpu"] * 1e12 * metrics["time/forward/median_s"] * ranks
    assert rate == pytest.approx(flops)
    assert metrics["mask/area"] == SEQLEN * (SEQLEN + 1) / 2 if cell.seqlen == SEQLEN else True
    state = problem.heads.kv * problem.heads.dim * problem.heads.v * max(4, problem.itemsize)
    if isinstance(cell.strategy, LASP | ZeCO):
        assert metrics["comm/forward/bytes"] == (state if size > 1 else 0)
    timeline = found.notes["timeline"]
    assert len(timeline) == ranks
    if size > 1:
        assert {"overlap/forward/compute_s", "overlap/forward/communication_s"} <= set(metrics)


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cells_are_checked(ranks: int) -> None:
    run_ranks(ranks, check_cells, ranks)


# -- faults ------------------------------------------------------------------------------------------------------------

BEFORE, WHOLE, LOCAL, ITEM = ScanRun._part_before, ScanRun._before, PreparedChunked.forward, ScanRun._item
Fault = Callable[[int], Any]  # by rank: what is patched


def faulty_state(change: Callable[[torch.Tensor, Any, int], torch.Tensor], *, backward: bool) -> Fault:
    """A state, or the gradient of one, that a rank puts together for its own tokens is another one."""

    def fault(rank: int) -> Any:
        def before(run: ScanRun, on: Any, group: int, place: int, time: int | None) -> torch.Tensor | None:
            state = BEFORE(run, on, group, place, time)
            return state if state is None or on.backward != backward else change(state, on, group)

        return patch.object(ScanRun, "_part_before", before)

    return fault


def lost(*, backward: bool) -> Fault:
    """A rank computes its tokens as if none were before them, or behind them in backward."""

    def fault(rank: int) -> Any:
        def before(run: ScanRun, on: Any, *where: Any) -> torch.Tensor | None:
            return None if on.backward == backward else WHOLE(run, on, *where)

        return patch.object(ScanRun, "_before", before)

    return fault


def zeros(state: torch.Tensor, on: Any, group: int) -> torch.Tensor:
    return torch.zeros_like(state)


def swapped(state: torch.Tensor, on: Any, group: int) -> torch.Tensor:
    return state.roll(1, 0)


def last_head_lost(state: torch.Tensor, on: Any, group: int) -> torch.Tensor:
    return torch.cat([state[:-1], torch.zeros_like(state[-1:])])


def second_block_lost(state: torch.Tensor, on: Any, group: int) -> torch.Tensor:
    return torch.zeros_like(state) if group == 1 else state


def a_tenth_too_much(state: torch.Tensor, on: Any, group: int) -> torch.Tensor:
    return 1.1 * state


def stale() -> Callable[[torch.Tensor, Any, int], torch.Tensor]:
    """What came with the pass before: of other inputs once these are negated."""
    known: dict[tuple[int, int], torch.Tensor] = {}

    def change(state: torch.Tensor, on: Any, group: int) -> torch.Tensor:
        on.calls = getattr(on, "calls", 0) + 1  # of this pass
        before = known.get((on.calls, group), state)
        known[on.calls, group] = state.clone()
        return before

    return change


def no_decay(rank: int) -> Any:
    """A summary of one's own tokens lets states through as they are."""

    def applied(summary: Summary, state: torch.Tensor) -> torch.Tensor:
        return summary.state + state

    return patch.object(scan, "applied", applied)


def no_gates(rank: int) -> Any:
    """Tokens decay as if all were the first of them, on one rank."""

    def forward(self: Any, x: Tokens, state: Any, local: Any = None) -> Any:
        return LOCAL(self, x._replace(decay=x.decay[:1].expand_as(x.decay)) if rank == 1 else x, state)

    return patch.object(PreparedChunked, "forward", forward)


def wrong_gradient(name: str, rank_at: int) -> Fault:
    """A gradient of one head is half as large again on one rank."""

    def fault(rank: int) -> Any:
        backward = ScanRun.backward

        def wrong(run: ScanRun, *given: Any, **how: Any) -> Tokens:
            found = backward(run, *given, **how)
            if rank == rank_at:
                getattr(found, name)[:, 0] *= 1.5
            return found

        return patch.object(ScanRun, "backward", wrong)

    return fault


def of_heads_swapped(rank: int) -> Any:
    """What one rank sends is of the next head."""

    def item(run: ScanRun, on: Any, what: Any, time: int) -> torch.Tensor:
        found = ITEM(run, on, what, time)
        return found.view(HEADS.kv, -1).roll(1, 0).reshape(-1) if what[0] in ("state", "dstate") else found

    return patch.object(ScanRun, "_item", item)


FAULTS: dict[str, tuple[Strategy, Fault, str]] = {
    "hop lost": (LASP(), lost(backward=False), "out"),
    "state of zeros": (LASP2(), faulty_state(zeros, backward=False), "out"),
    "heads swapped": (LASP(), of_heads_swapped, "out"),
    "states of heads swapped": (LASP2(), faulty_state(swapped, backward=False), "out"),
    "one head lost": (LASP(), faulty_state(last_head_lost, backward=False), "out"),
    "block lost": (ZeCO(2), faulty_state(second_block_lost, backward=False), "out"),
    "state a tenth too large": (LASP(), faulty_state(a_tenth_too_much, backward=False), "out"),
    "state does not decay": (LASP(), no_decay, "out"),
    "summaries do not decay": (LASP2(), no_decay, "out"),
    "gates of another token": (LASP(), no_gates, "out"),
    "gradient of the state lost": (LASP(), lost(backward=True), "dv"),
    "gradient of one head lost": (LASP2(), faulty_state(last_head_lost, backward=True), "dv"),
    "gradient of a block lost": (ZeCO(2), faulty_state(second_block_lost, backward=True), "dv"),
    "gradients of heads swapped": (LASP2(), faulty_state(swapped, backward=True), "dv"),
    "dq wrong": (LASP(), wrong_gradient("q", 1), "dq"),
    "dk wrong": (LASP(), wrong_gradient("k", 0), "dk"),
    "dv wrong": (Ulysses(uneven_heads=True), wrong_gradient("v", 0), "dv"),
}
# Of heads that are not drawn only one block of timings or another sees these.
WHOLE_ONLY = {
    "ddecay wrong": (LASP(), wrong_gradient("decay", 1), "ddecay"),
    "dbeta wrong": (LASP(), wrong_gradient("beta", 1), "dbeta"),
}


def check_faults(rank: int, ranks: int, dtype: str) -> None:
    groups, cases = Groups(), []
    for long in (False, True):
        for name, (strategy, fault, tensor) in (FAULTS if long else FAULTS | WHOLE_ONLY).items():
            for rule in RULES if "dbeta" not in tensor else ("gated_delta_rule",):
                if long and rule == "gated_delta_rule" and tensor == "dk":
                    continue
                if dtype != "float64" and "tenth" in name:
                    continue  # of the roundings of half types
                cases.append((name, Cell(strategy, rule, dtype, long=long), fault, tensor))
    for name, cell, fault, tensor in due(cases):
        with fault(rank):
            found = cell.measured(rank, ranks, groups).check
        assert found is not None
        assert any(failure.startswith(f"{tensor}:") for failure in found.failures), f"{cell} {name}: {said(found)}"
    check_stale(rank, ranks, groups, dtype)


def said(check: Check) -> str:
    return f"{check.failures} {check.ratios}"


def check_stale(rank: int, ranks: int, groups: Groups, dtype: str) -> None:
    """What came with the pass before is right in the first pass, and the negative of what it should be later."""
    for backward in (False, True):
        with faulty_state(stale(), backward=backward)(rank):
            found = Cell(LASP(), dtype=dtype).measured(rank, ranks, groups).check
        assert found is not None
        assert any(f.startswith("dv:" if backward else "out:") and "last timed pass" in f for f in found.failures), said(found)


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_faults_are_found(dtype: str) -> None:
    run_ranks(3, check_faults, 3, dtype)


# -- what the check rests on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cuts", [(0, 23), (0, 7, 23), (0, 0, 5, 5, 23)])
def test_stretches_of_the_reference_are_the_recurrence(rule: Rule, cuts: tuple[int, ...]) -> None:
    """Whatever the stretches, their effects put together give the states, and their results those of the whole."""
    heads, scale = Heads(6, 2, 5, 7), 0.3
    x = oracle.draw(rule, cuts[-1], heads)
    dout = torch.randn(cuts[-1], heads.q, heads.v, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out, _ = oracle.recurrence(rule, x, scale=scale)
    gradients, _ = oracle.recurrence_backward(rule, x, dout, scale=scale)
    stretches, douts = [], []
    for begin, end in pairwise(cuts):
        part = Tokens(*(None if one is None else one[begin:end] for one in x))  # type: ignore[arg-type]
        stretches.append(Stretch.of(rule, *part, heads=range(heads.kv), scale=scale))
        douts.append(dout[begin:end].unflatten(1, (heads.kv, -1)).permute(1, 2, 0, 3))
    effects = [recurrence.effect(one) for one in stretches]
    backs = [recurrence.effect_backward(one, given) for one, given in zip(stretches, douts, strict=True)]
    for place, (begin, end) in enumerate(pairwise(cuts)):
        state = dstate = stretches[0].zeros
        for effect in effects[:place]:
            state = effect.on(state)
        for effect, back in reversed(list(zip(effects, backs, strict=True))[place + 1 :]):
            dstate = effect.back(back, dstate)
        found = {"q": recurrence.outputs(stretches[place], state)}
        got = found["q"].value.permute(2, 0, 1, 3).flatten(1, 2)
        assert torch.allclose(got, out[begin:end], rtol=0, atol=1e-13)
        exact = recurrence.gradients(stretches[place], douts[place], state, dstate)
        assert torch.allclose(exact["dq"].value.permute(2, 0, 1, 3).flatten(1, 2), gradients.q[begin:end], rtol=0, atol=1e-13)
        for name, want in zip(("dk", "dv", "ddecay", "dbeta"), gradients[1:], strict=True):
            if want is not None:
                one = exact[name].value.transpose(0, 1).reshape(want[begin:end].shape)
                assert torch.allclose(one, want[begin:end], rtol=0, atol=1e-13), name
                assert (exact[name].spread >= 0).all()
        values = recurrence.value_gradients(stretches[place], douts[place], dstate)
        assert torch.equal(values.value, exact["dv"].value)
        direction = torch.arange(1.0, heads.v + 1, dtype=torch.float64)
        along = recurrence.outputs(stretches[place].along(direction), (state @ direction)[..., None])
        assert torch.allclose(along.value[..., 0], found["q"].value @ direction, rtol=0, atol=1e-12)


# -- counts and refusals -----------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_recurrence() -> None:
    """Products of the recurrence, counted one by one."""
    heads = Heads(8, 4, 16, 32)
    product = 2 * heads.dim * heads.v
    assert linear_flops(10, heads, "gla") == 10 * (heads.kv + heads.q) * product
    assert linear_flops(10, heads, "gated_delta_rule") == 10 * (2 * heads.kv + heads.q) * product
    problem = Problem(100, heads, Scale(1, 1), "float32", "forward_backward", rule="gla")
    pairs = causal(100).pairs(heads.q)
    assert pass_flops("forward", 3 * pairs, problem) == pytest.approx(linear_flops(300, heads, "gla"))
    assert pass_flops("backward", pairs, problem) == 2 * pass_flops("forward", pairs, problem)


def test_what_a_rank_gets_at_the_least() -> None:
    heads = Heads(4, 2, 8, 16)
    assert least_received(0, 5, heads) == least_received(5, 0, heads) == 0
    assert least_received(1, 100, heads) == 2 * (8 + 16 - 1)  # a matrix of rank one
    assert least_received(100, 100, heads) == 2 * 8 * 16  # a state
    assert least_received(100, 1, heads) == 2 * 16  # one row of it


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mask": ({"mask": full(64)}, "it takes mask=causal"),
    "batch": ({"problem": {"batch": Batch((Requests(1, 64, 64),))}}, "it takes seqlen, no batch"),
    "sink": ({"problem": {"softmax": Softmax(sink=True)}}, "has no softmax"),
    "latent": ({"problem": {"heads": Heads(4, 1, 8, 4, latent=True)}}, "heads are not latent"),
    "rule": ({"kernel": "gla only"}, "not workload.rule=gated_delta_rule"),
}


class OneRule(Chunked):
    rules = ("gla",)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_linear_attention_is_refused(name: str) -> None:
    change, reason = REFUSED[name]
    rule: Rule = "gated_delta_rule"
    problem = replace(Problem(64, HEADS, Scale(1, 2), "float32", "forward_backward", rule=rule), **change.get("problem", {}))
    kernel = OneRule() if "kernel" in change else Chunked()
    found = LinearAttention(rule).unsupported(problem, change.get("mask", causal(64)), kernel, LASP(), None)
    assert reason in str(found)
    assert LinearAttention(rule).unsupported(replace(problem, heads=HEADS, batch=None, softmax=Softmax(scale=0.5)), causal(64),
                                             Chunked(), LASP(), None) is None  # fmt: skip


def test_a_rule_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"workload\.rule=rwkv is not one of gla, gated_delta_rule"):
        LinearAttention("rwkv")  # type: ignore[arg-type]


def planned(*words: str) -> Any:
    (found,) = look(["site=local", "workload=linear_attention", "scale=1x2", "seqlen=8k", *words]).cells
    return found


def test_who_says_only_the_workload_is_told_what_else_to_say() -> None:
    for words, of in (((), "kernel sdpa_flash"), (("kernel=chunked",), "cp ring")):
        skip = planned(*words).skip
        assert skip.startswith(f"{of}: is for softmax attention, and the workload's is linear; for linear attention there are ")
        assert "kernel=chunked|" in skip
        assert "cp=lasp|lasp2|none|ulysses|zeco" in skip
    (other,) = look(["site=local", "cp=zeco", "scale=1x2"]).cells
    assert str(other.skip).endswith("for linear attention there are workload=linear_attention")


def test_a_cell_is_what_its_words_say() -> None:
    cell = planned("kernel=chunked", "cp=zeco", "workload.rule=gated_delta_rule", "heads=8x8x64").cell
    assert cell.problem.rule == "gated_delta_rule"
    work = work_of(cell)
    assert isinstance(work.workload, LinearAttention)
    assert work.workload.rule == "gated_delta_rule"
    heads = cell.problem.heads
    per_token = (heads.q * (heads.dim + heads.v) + heads.kv * heads.kv_width) * 2 + heads.kv * 2 * 4
    assert work.workload.input_bytes(cell.problem) == 8192 * per_token / 2


@pytest.mark.parametrize("rule", RULES)
def test_cells_are_predicted(rule: Rule) -> None:
    """The time of linear attention grows as its tokens; what is sent does not; and its FLOPs are the recurrence's."""
    found = {
        seqlen: Predictor.of("h100").predict(
            planned("kernel=chunked", "cp=lasp", "heads=8x8x128", f"workload.rule={rule}", f"seqlen={seqlen}").cell
        )
        for seqlen in (1 << 20, 1 << 21)
    }
    short, long = found[1 << 20], found[1 << 21]
    assert long.seconds / short.seconds == pytest.approx(2, rel=0.05)
    assert long.buffer_bytes == short.buffer_bytes == 8 * 128 * 128 * 4
    assert short.flops["forward"] == pytest.approx(linear_flops(1 << 20, short.cell.heads, rule))
    assert short.flops["backward"] == 2 * short.flops["forward"]
    assert "guessed" in short.basis
    assert short.peak_bytes > 0


def test_inputs_are_drawn_by_tokens_and_keys_of_the_delta_rule_have_unit_length() -> None:
    drawn = {}
    for rule in RULES:
        session = LinearSession(Cell(Local(), rule, "float32").work(1), 0, Gang(0, 1, CPU, Groups(), []))
        x = drawn[rule] = session.x
        assert (x.decay <= 0).all()
        assert x.decay.shape == ((SEQLEN, 4, 8) if rule == "gla" else (SEQLEN, 4))
        assert session.input_bytes == sum(t.numel() * t.element_size() for t in (*x, session.dout) if t is not None)
        assert session.variants() == {}
    beta = drawn["gated_delta_rule"].beta
    assert beta is not None
    assert ((beta > 0) & (beta < 1)).all()
    assert torch.allclose(drawn["gated_delta_rule"].k.norm(dim=-1), torch.ones(SEQLEN, 4))
    assert torch.equal(drawn["gla"].q, drawn["gated_delta_rule"].q)
