"""Every strategy on real gloo ranks: out, LSE and gradients against dense float64, bytes against the formula."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Scheduled
from lcbench.cp.groupcast import GroupCast
from lcbench.cp.hybrid import Hybrid
from lcbench.cp.loongtrain import LoongTrain
from lcbench.cp.none import Local
from lcbench.cp.ring import Ring
from lcbench.cp.tokenring import TokenRing
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.usp import USP
from lcbench.inputs.drawing import draw
from lcbench.kernels.reference import Reference
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import Band, BandMask, DoesNotFit
from lcbench.masks.causal_document import causal_document
from lcbench.masks.lengths import Explicit
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule import program
from lcbench.schedule.adjoint import traffic
from lcbench.schedule.execute import Executor
from lcbench.schedule.groups import Groups
from lcbench.schedule.lowering import OPERATIONS, collectives
from lcbench.schedule.schedule import Schedule
from lcbench.schedule.verify import verify
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.masks import every_mask, small, trained_by
from lcbench.testing.spawn import run_ranks

BOUND = 1e-12


def masks(seqlen: int, heads: Heads, folder: Path) -> dict[str, Mask]:
    """Every mask of conf/mask that fits, maps within masks, and hard ones."""
    found: dict[str, Mask] = {}
    for name in every_mask():
        with suppress(DoesNotFit):
            found[name] = small(name, seqlen, heads, folder, seed=7)
    lengths = [10, 16, 5, 1, 1]  # documents shorter than P, none a multiple of 2P
    if seqlen > sum(lengths):
        found["odd documents"] = causal_document(seqlen, seed=(0, 0), lengths=Explicit([*lengths, seqlen - sum(lengths)]))
        # Rows, and whole ranks, without a single key.
        bands = [Band(3, 9, 0, 5), Band(seqlen // 2, seqlen - 3, 4, seqlen // 2, hi=-2)]
        found["holes"] = BandMask.of(seqlen, seqlen, bands)
    return found


# The part of all pairs of strategy and mask that a test runs, (which, of how many), by ranks and heads; all where it is not here.
# Tests of 3 ranks have each pair once together, and so have those of 4, and those of 6 and 8.
SHARES = {
    (3, "equal"): (0, 2), (3, "grouped"): (1, 2), (4, "equal"): (0, 2), (4, "grouped"): (1, 2),
    (6, "equal"): (0, 3), (8, "equal"): (1, 3), (8, "grouped"): (2, 3),
}  # fmt: skip


def strategies(world_size: int, heads: Heads) -> tuple[list[Scheduled], list[Scheduled]]:
    """Every strategy of conf/cp as it is there, and, with grouped-query heads, their options."""
    named = list(trained_by().values())
    if heads.q == heads.kv:
        return named, []
    degrees = [u for u in range(2, world_size) if world_size % u == 0]
    more: list[Scheduled] = [Ring("contiguous"), Ring("striped"), Ulysses(uneven_heads=True), Ulysses(stages=2)]
    more += [AllGather(heads_per_step=1), GroupCast(stages=4, solver="swap"), TokenRing("striped")]
    for degree in degrees:
        more += [USP(degree), USP(degree, ulysses="outside"), LoongTrain(degree), LoongTrain(degree, placement="context_first")]
    more += [LoongTrain(1, window=w) for w in degrees]
    if world_size > 2:
        more.append(Hybrid(groups=[world_size - 2, 1, 1]))
    return named, more


@dataclass(frozen=True)
class Case:
    """A strategy on a mask.

    Attributes:
        expected: out, LSE, dq, dk and dv of all tokens by dense attention.
        counts: the rank that compares its counters with those of the proof.
    """

    mask_name: str
    mask: Mask
    strategy: Scheduled
    schedule: Schedule
    expected: list[torch.Tensor]
    counts: int


@dataclass(frozen=True)
class Cases:
    """What all ranks run, with q, k, v and dout of all tokens."""

    problem: Problem
    inputs: list[torch.Tensor]
    cases: list[Case]


def all_cases(world_size: int, seqlen: int, heads: Heads, folder: Path) -> Cases:
    """Every strategy on every mask."""
    problem = Problem(seqlen, heads, Scale(1, world_size), "float64", "forward_backward")
    everything = np.arange(seqlen)
    q, k, v, dout = (draw(name, everything, problem, 7, torch.device("cpu")) for name in ("q", "k", "v", "dout"))
    cases, due = [], set()
    named, options = strategies(world_size, heads)
    which, parts = SHARES.get((world_size, "equal" if heads.q == heads.kv else "grouped"), (0, 1))
    for number, (mask_name, mask) in enumerate(masks(seqlen, heads, folder).items()):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = dense_attention(*leaves, dense_heads(mask, heads.q), problem.softmax_scale)
        expected = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]
        for place, strategy in enumerate([*named, *options]):
            # At many ranks the options take turns at the masks: each meets a third of them, and each mask a third of the options.
            if world_size > 3 and place >= len(named) and (place + number) % 3:
                continue
            if place < len(named) and (place + number) % parts != which:
                continue
            if place < len(named) and not (world_size > 1 and isinstance(strategy, Local)):
                due.add((mask_name, type(strategy).__name__))
            if strategy.unsupported(problem, mask):
                continue
            schedule = strategy.schedule(problem, mask)
            collectives(schedule, traffic(schedule, backward=True), problem, OPERATIONS["gloo"])  # which ranks find in it
            cases.append(Case(mask_name, mask, strategy, schedule, expected, number % world_size))
    if problem.seqlen >= 2 * world_size:
        ran = {(case.mask_name, type(case.strategy).__name__) for case in cases}
        assert not due - ran, due - ran
    return Cases(problem, [q, k, v, dout], cases)


def check_all(rank: int, found: Cases) -> None:
    groups, device, problem = Groups(), torch.device("cpu"), found.problem
    if (world_size := problem.scale.world_size) > 3:
        program.ROUND = 2  # so that sums come in several rounds, as they do at many ranks
    q, k, v, dout = found.inputs
    for of in found.cases:
        kernel = SDPAFlash() if of.strategy != Ring() else Reference()
        case = f"{of.strategy} {kernel} {of.mask_name} P={world_size}"
        own = of.schedule.q.tokens(rank)
        executor = Executor(of.schedule, of.mask, kernel, problem, rank=rank, device=device, groups=groups)
        shards = [x[own] for x in (q, k, v)]
        got_out, saved = executor.forward(*shards)
        forward_bytes = executor.bytes_sent
        grads = executor.backward(dout[own], saved)
        if of.counts == rank:  # ranks share the work of counting
            report = verify(of.schedule, of.mask, problem)
            assert executor.pairs == report.rank_pairs[rank], case
            assert forward_bytes == report.forward_bytes[rank], case
            assert executor.bytes_sent == report.backward_bytes[rank], case
            assert executor.buffer_bytes == report.buffer_bytes(rank, OPERATIONS["gloo"]), case
        for got, want in zip([got_out, executor.lse(saved), *grads], of.expected, strict=True):
            assert got.shape == want[own].shape, case
            if got.numel():
                both = torch.isinf(got) & torch.isinf(want[own])
                error = torch.where(both, 0.0, got - want[own]).abs().max()
                assert error <= BOUND, f"{case}: {error}"
        if of.mask_name in ("causal", "holes"):
            again, saved_again = executor.forward(*shards)
            assert torch.equal(again, got_out), case
            repeated = executor.backward(dout[own], saved_again)
            assert all(torch.equal(a, b) for a, b in zip(repeated, grads, strict=True)), case
    dist.barrier()


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "seqlen", "heads"),
    [
        (1, 1, Heads(4, 2, 8)),  # one token: what fits at this length
        (1, 41, Heads(4, 2, 8)),
        (2, 53, Heads(4, 4, 8)),
        (2, 53, Heads(8, 2, 8)),
        (3, 47, Heads(6, 3, 8)),
        (3, 47, Heads(6, 6, 8)),
        (4, 67, Heads(8, 8, 8)),
        (4, 67, Heads(8, 2, 8)),  # fewer KV heads than Ulysses ranks
        (6, 59, Heads(12, 12, 8)),
        (8, 83, Heads(16, 16, 8)),
        (8, 83, Heads(16, 1, 8)),
    ],
    ids=str,
)
def test_every_strategy_and_mask_matches_dense_attention(world_size: int, seqlen: int, heads: Heads, tmp_path: Path) -> None:
    run_ranks(world_size, check_all, world_size, seqlen, heads, tmp_path, prepare=all_cases)
