"""Every strategy on real gloo ranks: out, LSE and gradients against dense float64, bytes against the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lcbench.cp.execute import Executor, Groups
from lcbench.cp.none import Local
from lcbench.cp.ring import Ring
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.usp import USP
from lcbench.cp.verify import verify
from lcbench.kernels.reference import Reference
from lcbench.kernels.sdpa import SDPA
from lcbench.masks.band import Band, BandMask
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.document import document
from lcbench.masks.full import full
from lcbench.masks.sliding_window import sliding_window
from lcbench.measure.inputs import draw
from lcbench.problem import Heads, Problem, Scale
from lcbench.testing.dense import dense_attention, dense_mask
from lcbench.testing.spawn import run_ranks

BOUND = 1e-12


def masks(seqlen: int) -> dict[str, BandMask]:
    lengths = [10, 16, 5, 1, 1]  # documents shorter than P, none a multiple of 2P
    lengths.append(seqlen - sum(lengths))
    return {
        "full": full(seqlen),
        "causal": causal(seqlen),
        "window": sliding_window(seqlen, left=9, right=0),
        "two-sided window": sliding_window(seqlen, left=5, right=7),
        "document": document(seqlen, seed=1, mean_length=8),
        "causal document": causal_document(seqlen, seed=1, mean_length=8, lengths=lengths),
        # Rows, and whole ranks, without a single key.
        "holes": BandMask.of(seqlen, seqlen, [Band(3, 9, 0, 5), Band(seqlen // 2, seqlen - 3, 4, seqlen // 2, hi=-2)]),
    }


def strategies(world_size: int) -> list[object]:
    degrees = [u for u in range(1, world_size + 1) if world_size % u == 0]
    return [Local(), Ring("zigzag"), Ring("contiguous"), Ulysses(), *(USP(ulysses_degree=u) for u in degrees)]


def check_all(rank: int, world_size: int, seqlen: int, heads: Heads) -> None:
    groups = Groups()
    device = torch.device("cpu")
    problem = Problem(seqlen, heads, Scale(1, world_size), "float64", "forward_backward")
    everything = np.arange(seqlen)
    q, k, v, dout = (draw(name, everything, problem, 7, device) for name in ("q", "k", "v", "dout"))
    ran = 0
    for mask_name, mask in masks(seqlen).items():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = dense_attention(*leaves, dense_mask(seqlen, seqlen, mask), problem.softmax_scale)
        expected = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]
        for strategy in strategies(world_size):
            if strategy.unsupported(problem, mask):
                continue
            for kernel in (SDPA(), Reference()):
                case = f"{strategy} {kernel} {mask_name} P={world_size}"
                schedule = strategy.schedule(problem, mask)
                report = verify(schedule, mask, heads, 8)
                own = schedule.layout.tokens(rank)
                executor = Executor(schedule, mask, kernel, problem, rank=rank, device=device, groups=groups)
                shards = [x[own] for x in (q, k, v)]
                got_out, saved = executor.forward(*shards)
                assert executor.bytes_sent == report.forward_bytes[rank], case
                grads = executor.backward(dout[own], saved)
                assert executor.bytes_sent == report.backward_bytes[rank], case
                for got, want in zip([got_out, executor.lse(saved), *grads], expected, strict=True):
                    assert got.shape == want[own].shape, case
                    both = torch.isinf(got) & torch.isinf(want[own])
                    error = torch.where(both, 0.0, got - want[own]).abs().max()
                    assert error <= BOUND, f"{case}: {error}"
                again, saved_again = executor.forward(*shards)
                assert torch.equal(again, got_out), case
                repeated = executor.backward(dout[own], saved_again)
                assert all(torch.equal(a, b) for a, b in zip(repeated, grads, strict=True)), case
                ran += 1
    assert ran >= 2 * len(masks(seqlen))
    dist.barrier()


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("world_size", "seqlen", "heads"),
    [
        (1, 41, Heads(4, 2, 8)),
        (2, 53, Heads(4, 4, 8)),
        (3, 47, Heads(6, 2, 8)),
        (4, 67, Heads(8, 2, 8)),  # fewer KV heads than Ulysses ranks
        (6, 59, Heads(12, 3, 8)),
        (8, 83, Heads(8, 1, 8)),
    ],
    ids=str,
)
def test_every_strategy_matches_dense_attention(world_size: int, seqlen: int, heads: Heads) -> None:
    run_ranks(world_size, check_all, world_size, seqlen, heads)
