"""Queries against a cache, values of another dimension than keys, latent heads, sinks: every schedule on real gloo ranks against
dense float64, and its bytes against what the proof counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Scheduled
from lcbench.cp.ring import Ring
from lcbench.cp.tokenring import TokenRing
from lcbench.cp.ulysses import Ulysses
from lcbench.grid.build import build_strategy
from lcbench.kernels.base import Kernel
from lcbench.kernels.reference import Reference
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.mask import Mask
from lcbench.problem import PLAIN, Batch, Heads, Problem, Requests, Scale, Softmax
from lcbench.schedule.adjoint import traffic
from lcbench.schedule.execute import Executor
from lcbench.schedule.groups import Groups
from lcbench.schedule.lowering import OPERATIONS, collectives
from lcbench.schedule.schedule import Schedule
from lcbench.schedule.tiling import tiling
from lcbench.schedule.verify import verify
from lcbench.testing.dense import dense_attention, dense_mask
from lcbench.testing.masks import causal_batch, load, names
from lcbench.testing.spawn import run_ranks

BOUND = 1e-12
BATCHES = {
    "decode": Batch((Requests(3, 1, 13), Requests(1, 1, 1), Requests(2, 1, 7))),
    "chunk": Batch((Requests(1, 11, 47),)),
    "mixed": Batch((Requests(2, 6, 6), Requests(3, 1, 9), Requests(1, 5, 20))),
    "prompts": Batch((Requests(1, 17, 17), Requests(2, 8, 8))),
}
SHAPES = {
    "MHA": (Heads(8, 8, 6), PLAIN),
    "GQA, sink": (Heads(8, 2, 6), Softmax(sink=True)),
    "MLA": (Heads(8, 8, 9, 6), PLAIN),
    "MLA, sink, own scale": (Heads(8, 4, 9, 6), Softmax(sink=True, scale=0.3)),
    "latent": (Heads(8, 1, 9, 6, latent=True), Softmax(sink=True)),
}


def strategies(ranks: int) -> list[Scheduled]:
    """Every strategy of conf/cp that is a schedule, and layouts of a batch."""
    named = [s for name in names("cp") if isinstance(s := build_strategy(load("cp", name)), Scheduled)]
    return [*named, Ring("documents"), Ring("zigzag"), Ring("striped"), *([Ulysses(stages=2)] if ranks < 8 else [])]


@dataclass(frozen=True)
class Case:
    """A batch with heads and a softmax, and the schedules that take it.

    Attributes:
        counts: the rank that compares its counters with those of the proof.
        want: out, LSE and gradients by dense attention.
    """

    name: str
    counts: int
    problem: Problem
    mask: Mask
    kernel: Kernel
    inputs: list[torch.Tensor]
    sink: torch.Tensor | None
    want: list[torch.Tensor]
    schedules: list[tuple[Scheduled, Schedule]]


def all_cases(ranks: int) -> list[Case]:
    """Every batch with every shape; of more than four ranks every second of these."""
    random, cases = torch.Generator().manual_seed(5), []
    for number, (name, batch) in enumerate(BATCHES.items()):
        mask = causal_batch(batch)
        allowed = dense_mask(mask.num_q, mask.num_k, mask)
        for place, (shape, (heads, softmax)) in enumerate(SHAPES.items()):
            if ranks > 4 and (number + place) % 2:
                continue
            of = Problem(batch.tokens, heads, Scale(1, ranks), "float64", "forward_backward", batch=batch, softmax=softmax)
            q, k, v, dout = (
                torch.randn(*sizes, dtype=torch.float64, generator=random)
                for sizes in (
                    (batch.queries, heads.q, heads.dim), (batch.tokens, heads.kv, heads.dim), (batch.tokens, heads.kv, heads.v),
                    (batch.queries, heads.q, heads.v),
                )
            )  # fmt: skip
            sink = torch.randn(heads.q, dtype=torch.float64, generator=random) if softmax.sink else None
            leaves = [
                x.clone().requires_grad_() for x in (q, k, *(() if heads.latent else (v,)), *(() if sink is None else (sink,)))
            ]
            values = leaves[1][..., : heads.v] if heads.latent else leaves[2]
            out, lse = dense_attention(
                leaves[0], leaves[1], values, allowed, of.softmax_scale, sink=None if sink is None else leaves[-1]
            )
            want = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]
            schedules = [(s, s.schedule(of, mask)) for s in strategies(ranks) if not s.unsupported(of, mask)]
            for _, schedule in schedules:
                collectives(schedule, traffic(schedule, backward=True), of, OPERATIONS["gloo"])  # which ranks find in it
            inputs = [q, k, k[..., : heads.v] if heads.latent else v, dout]
            kernel = SDPAFlash() if heads.dim == heads.v and place % 2 == 0 else Reference()
            cases.append(Case(f"{name} {shape}", (number + place) % ranks, of, mask, kernel, inputs, sink, want, schedules))
    for name in BATCHES:
        for needed in (Ring, AllGather, TokenRing):
            assert any(
                case.name.startswith(name) and any(type(strategy) is needed for strategy, _ in case.schedules) for case in cases
            ), (name, needed)
    return cases


def check(rank: int, cases: list[Case]) -> None:
    groups, device = Groups(), torch.device("cpu")
    for of in cases:
        problem = of.problem
        q, k, v, dout = of.inputs
        out, lse, dq, *others = of.want
        for strategy, schedule in of.schedules:
            case = f"{strategy} {of.name} P={problem.scale.world_size}"
            run = Executor(schedule, of.mask, of.kernel, problem, rank=rank, device=device, groups=groups)
            queries, keys = run.held.q.tokens, run.held.kv.tokens
            got, saved = run.forward(q[queries], k[keys], v[keys], of.sink)
            forward_bytes = run.bytes_sent
            grads = run.backward(dout[queries], saved)
            if of.counts == rank:
                report = verify(schedule, of.mask, problem)
                assert run.pairs == report.rank_pairs[rank], case
                assert forward_bytes == report.forward_bytes[rank], case
                assert run.bytes_sent == report.backward_bytes[rank], case
                assert run.buffer_bytes == report.buffer_bytes(rank, OPERATIONS["gloo"]), case
            near(case, "out", got, out[queries])
            near(case, "lse", run.lse(saved), lse[queries])
            near(case, "dq", grads[0], dq[queries])
            for what, one, whole in zip(("dk", "dv"), grads[1:], others[: 1 if problem.heads.latent else 2], strict=False):
                near(case, what, one, whole[keys])
            assert len(grads) == 1 + len(others), case
            if of.sink is not None:
                total = grads[-1].clone()
                dist.all_reduce(total)
                near(case, "dsink", total, others[-1])
    dist.barrier()


def near(case: str, what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape, f"{case}: {what} {tuple(got.shape)} for {tuple(want.shape)}"
    if got.numel():
        error = torch.where(got == want, 0.0, got - want).abs().max()
        assert error <= BOUND, f"{case}: {what} is off by {error}"


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_schedule_on_two_sides_is_dense_attention(ranks: int) -> None:
    run_ranks(ranks, check, ranks, prepare=all_cases)


def test_a_strategy_that_shares_queries_and_keys_together_says_that_it_cannot_take_a_cache() -> None:
    batch = BATCHES["chunk"]
    of = Problem(batch.tokens, Heads(4, 4, 4), Scale(1, 2), "float64", "forward", batch=batch)
    for name in ("lightseq", "hybrid"):
        refused = build_strategy(load("cp", name)).unsupported(of, causal_batch(batch))
        assert refused == "needs a query for every key: a batch has 11 new tokens of 47", name
    whole = replace(of, seqlen=11, batch=Batch((Requests(1, 11, 11),)))
    assert build_strategy(load("cp", "lightseq")).unsupported(whole, causal_batch(Batch((Requests(1, 11, 11),)))) is None


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.slow
def test_tiles_of_two_sides_have_the_pairs_that_the_proof_counts(ranks: int) -> None:
    for name, batch in BATCHES.items():
        mask = causal_batch(batch)
        of = Problem(batch.tokens, Heads(8, 2, 6), Scale(1, ranks), "float32", "forward_backward", batch=batch)
        for strategy in strategies(ranks):
            if strategy.unsupported(of, mask):
                continue
            schedule = strategy.schedule(of, mask)
            made, want = tiling(schedule, mask), verify(schedule, mask, of).step_pairs
            found = np.zeros(want.shape)
            np.add.at(found, (made.step, made.rank), made.tiles.pairs * made.tiles.q_heads)
            assert found == pytest.approx(want), f"{strategy} {name}"
