"""Linear attention over real gloo ranks: every strategy is the float64 recurrence, forward and backward, at any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import pytest
import torch

from lcbench.cp.base import Place, Scheduled
from lcbench.cp.lasp import LASP
from lcbench.cp.lasp2 import LASP2
from lcbench.cp.none import Local
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.zeco import ZeCO
from lcbench.kernels.chunked import Chunked
from lcbench.kernels.linear import LinearKernel, Tokens
from lcbench.kernels.triton_chunk import TritonChunk
from lcbench.masks.causal import causal
from lcbench.problem import RULES, Heads, Problem, Rule, Scale
from lcbench.schedule import scan
from lcbench.schedule.groups import Groups
from lcbench.schedule.scan import ScanRun
from lcbench.schedule.verify import ScheduleCost, verify
from lcbench.testing.recurrence import draw, recurrence, recurrence_backward
from lcbench.testing.spawn import run_ranks

pytestmark = pytest.mark.gloo
CPU = torch.device("cpu")
BOUND = 1e-12
# Grouped queries with values of another dim, heads of their own, one key/value head that several ranks of Ulysses have.
HEADS = (Heads(4, 2, 8, 6), Heads(8, 8, 4), Heads(6, 1, 4))


def strategies() -> list[Scheduled]:
    return [
        Local(), LASP(), ZeCO(1), ZeCO(2), ZeCO(7), LASP2(), LASP2(lowering="p2p"), Ulysses(uneven_heads=True),
        Ulysses(uneven_heads=True, stages=2), Ulysses(uneven_heads=True, lowering="p2p"),
    ]  # fmt: skip


def problems(ranks: int) -> Iterator[tuple[Scheduled, Problem]]:
    for heads in HEADS:
        for rule in RULES:
            for seqlen in (1, 5, 37):
                problem = Problem(seqlen, heads, Scale(1, ranks), "float64", "forward_backward", rule=rule)
                yield from ((s, problem) for s in strategies() if s.unsupported(problem, causal(seqlen)) is None)


def of_rank(x: Tokens, run: ScanRun) -> Tokens:
    rows = torch.from_numpy(run.held.q.tokens)
    return Tokens(*(None if part is None else part[rows] for part in x))  # type: ignore[arg-type]


def started(strategy: Scheduled, problem: Problem, rank: int, groups: Groups, kernel: LinearKernel | None = None) -> ScanRun:
    return strategy.start_linear(problem, causal(problem.seqlen), kernel or Chunked(chunk=4), Place(rank, CPU, groups))


@cache
def known(rule: Rule, problem: Problem) -> tuple[Tokens, torch.Tensor, torch.Tensor, Tokens]:
    """Tokens, dout, out and gradients of the whole sequence."""
    x, scale = draw(rule, problem.seqlen, problem.heads, seed=problem.seqlen), problem.softmax_scale
    dout = torch.randn(
        problem.seqlen, problem.heads.q, problem.heads.v, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    return x, dout, recurrence(rule, x, scale=scale)[0], recurrence_backward(rule, x, dout, scale=scale)[0]


@cache
def report_of(strategy: Scheduled, problem: Problem) -> ScheduleCost:
    mask = causal(problem.seqlen)
    return verify(strategy.schedule(problem, mask), mask, problem)


def worked_out(ranks: int) -> int:
    """Once for all ranks, which are forked from the process that knows it then."""
    for strategy, problem in problems(ranks):
        assert problem.rule is not None
        known(problem.rule, problem)
        report_of(strategy, problem)
    return ranks


def check_numbers(
    found: Sequence[torch.Tensor | None], known: Sequence[torch.Tensor | None], rows: torch.Tensor, where: str
) -> None:
    """out and gradients of own tokens against those of the whole sequence."""
    for name, got, want in zip(("out", *Tokens._fields), found, known, strict=True):
        assert (got is None) == (want is None), f"{where}: {name}"
        if got is None or want is None:
            continue
        assert got.shape == want[rows].shape
        assert got.dtype == torch.float64
        error = (got - want[rows]).abs().max().item() if len(rows) else 0.0
        assert error <= BOUND, f"{where}: {name} is off by {error}"


def check_strategies(rank: int, ranks: int) -> None:
    groups, seen = Groups(), set()
    for strategy, problem in problems(ranks):
        assert problem.rule is not None
        report = report_of(strategy, problem)
        run = started(strategy, problem, rank, groups)
        x, dout, out, gradients = known(problem.rule, problem)
        mine, rows = of_rank(x, run), torch.from_numpy(run.held.q.tokens)
        for _ in range(2):  # a run is used again
            found, kept = run.forward(mine)
            assert run.bytes_sent == report.forward_bytes[rank], strategy
            given = run.backward(dout[rows], kept)
            assert run.bytes_sent == report.backward_bytes[rank], strategy
            assert run.counters().buffer_bytes == report.buffer_bytes(rank)
            assert run.counters().pairs == report.rank_pairs[rank]
            check_numbers((found, *given), (out, *gradients), rows, f"{strategy} {problem}")
        seen.add(type(strategy))
    assert seen == {LASP, ZeCO, LASP2, Ulysses, *([Local] if ranks == 1 else [])}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_strategy_is_the_recurrence(ranks: int) -> None:
    run_ranks(ranks, check_strategies, ranks, prepare=worked_out)


def check_triton_chunk(rank: int, ranks: int) -> None:
    groups, heads, rule = Groups(), Heads(ranks if ranks > 2 else 2, 2, 4, 6), RULES[1]
    problem = Problem(9, heads, Scale(1, ranks), "float64", "forward_backward", rule=rule)
    x, dout, out, gradients = known(rule, problem)
    for strategy in (LASP(), ZeCO(2), LASP2(), Ulysses(uneven_heads=True)):
        run = started(strategy, problem, rank, groups, TritonChunk())
        rows = torch.from_numpy(run.held.q.tokens)
        found, kept = run.forward(of_rank(x, run))
        check_numbers((found, *run.backward(dout[rows], kept)), (out, *gradients), rows, f"{strategy}")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_triton_chunk_gives_strategies_what_they_need(ranks: int) -> None:
    """Summaries with matrices, states and their gradients as they move, under the interpreter."""
    run_ranks(ranks, check_triton_chunk, ranks)


def check_runs(rank: int, ranks: int) -> None:
    groups = Groups()
    for rule in RULES:
        for strategy in (LASP(), ZeCO(2), LASP2(), Ulysses(uneven_heads=True)):
            check_half(strategy, rule, rank, ranks, groups)
            check_parts(strategy, rule, rank, ranks, groups)


def check_half(strategy: Scheduled, rule: Rule, rank: int, ranks: int, groups: Groups) -> None:
    """Inputs of bfloat16 give results of it, gates' gradients in float32, and states travel in float32."""
    heads = Heads(4, 2, 8, 6)
    problem = Problem(23, heads, Scale(1, ranks), "bfloat16", "forward_backward", rule=rule)
    mask = causal(problem.seqlen)
    run = started(strategy, problem, rank, groups)
    report = verify(strategy.schedule(problem, mask), mask, problem)
    x, scale = draw(rule, problem.seqlen, heads, dtype=torch.bfloat16), problem.softmax_scale
    mine, rows = of_rank(x, run), torch.from_numpy(run.held.q.tokens)
    out, kept = run.forward(mine)
    assert run.bytes_sent == report.forward_bytes[rank]
    dout = torch.ones(problem.seqlen, heads.q, heads.v, dtype=torch.bfloat16)
    gradients = run.backward(dout[rows], kept)
    assert run.bytes_sent == report.backward_bytes[rank]
    assert out.dtype == torch.bfloat16
    want = recurrence(rule, x, scale=scale)[0]
    assert (out - want[rows]).abs().max() <= 2e-2
    for got, exact, of in zip(gradients, recurrence_backward(rule, x, dout, scale=scale)[0], x, strict=False):
        if got is not None:
            assert of is not None
            assert exact is not None
            assert got.dtype == of.dtype
            assert (got - exact[rows]).abs().max() <= 2e-2 * exact.abs().max()


def check_parts(strategy: Scheduled, rule: Rule, rank: int, ranks: int, groups: Groups) -> None:
    """Passes without kernels send what whole ones send; those without messages send nothing; and a timeline has all times."""
    problem = Problem(23, Heads(4, 2, 8, 6), Scale(1, ranks), "float64", "forward_backward", rule=rule)
    run = started(strategy, problem, rank, groups)
    x, dout, _, _ = known(rule, problem)
    mine, rows = of_rank(x, run), torch.from_numpy(run.held.q.tokens)
    out, kept = run.forward(mine)
    forward = run.bytes_sent
    gradients = run.backward(dout[rows], kept)
    backward = run.bytes_sent
    bare, silent = run.replay(compute=False, communicate=True), run.replay(compute=True, communicate=False)
    assert bare is not None
    assert silent is not None
    assert bare.forward(mine)[0].shape == out.shape
    assert run.bytes_sent == forward
    assert bare.backward(dout[rows], kept).q.shape == gradients.q.shape
    assert run.bytes_sent == backward
    silent.forward(mine)
    assert run.bytes_sent == 0
    silent.backward(dout[rows], kept)
    assert run.bytes_sent == 0
    assert torch.equal(run.forward(mine)[0], out)  # bitwise, again
    times = run.timeline(mine, dout[rows])
    steps = len(run.schedule.steps)
    assert [row[0] for row in times] == list(range(2 * steps + 1))
    assert all(row[1:] == sorted(row[1:]) for row in times)


@pytest.mark.slow
def test_types_parts_and_timelines() -> None:
    run_ranks(3, check_runs, 3)


def check_scan_is_needed(rank: int) -> None:
    """Were the state of other ranks left out, results would be far from the recurrence: lengths and decays let states through."""
    heads = Heads(2, 2, 8)
    problem = Problem(16, heads, Scale(1, 2), "float64", "forward_backward", rule="gla")
    run = started(LASP(), problem, rank, Groups())
    x, _, out, _ = known("gla", problem)
    scan.ScanRun._before = lambda *args: None  # type: ignore[method-assign, assignment]
    found, _ = run.forward(of_rank(x, run))
    assert ((found - out[8 * rank : 8 * rank + 8]).abs().max() > 0.05) == (rank == 1)


@pytest.mark.slow
def test_states_of_others_matter() -> None:
    run_ranks(2, check_scan_is_needed)
