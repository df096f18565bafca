"""Every strategy on real gloo ranks: out, LSE and gradients against dense float64, bytes against the formula."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lcbench.cp.base import Strategy
from lcbench.cp.execute import Executor, Groups
from lcbench.cp.none import Local
from lcbench.cp.ring import Ring
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.usp import USP
from lcbench.cp.verify import verify
from lcbench.kernels.base import Kernel
from lcbench.kernels.reference import Reference
from lcbench.kernels.sdpa import SDPA
from lcbench.masks.band import Band, BandMask, DoesNotFit
from lcbench.masks.causal_document import causal_document
from lcbench.masks.lengths import Explicit
from lcbench.masks.mask import Mask
from lcbench.measure.inputs import draw
from lcbench.problem import Heads, Problem, Scale
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.masks import names, small
from lcbench.testing.spawn import run_ranks

BOUND = 1e-12


def masks(seqlen: int, heads: Heads, folder: Path) -> dict[str, Mask]:
    """Every mask of conf/mask that fits, and hard ones."""
    found: dict[str, Mask] = {}
    for name in names():
        with suppress(DoesNotFit):
            found[name] = small(name, seqlen, heads, folder, seed=7)
    lengths = [10, 16, 5, 1, 1]  # documents shorter than P, none a multiple of 2P
    if seqlen > sum(lengths):
        found["odd documents"] = causal_document(seqlen, seed=(0, 0), lengths=Explicit([*lengths, seqlen - sum(lengths)]))
        # Rows, and whole ranks, without a single key.
        bands = [Band(3, 9, 0, 5), Band(seqlen // 2, seqlen - 3, 4, seqlen // 2, hi=-2)]
        found["holes"] = BandMask.of(seqlen, seqlen, bands)
    return found


def cases(world_size: int) -> list[tuple[Strategy, Kernel]]:
    degrees = [u for u in range(2, world_size) if world_size % u == 0]
    orders: list[Strategy] = [Ring("contiguous"), Ring("striped")]
    strategies: list[Strategy] = [Local(), Ring("zigzag"), Ulysses(), *(USP(ulysses_degree=u) for u in degrees)]
    return [(s, SDPA()) for s in strategies + orders] + [(s, Reference()) for s in strategies]


def check_all(rank: int, world_size: int, seqlen: int, heads: Heads, folder: Path) -> None:
    groups = Groups()
    device = torch.device("cpu")
    problem = Problem(seqlen, heads, Scale(1, world_size), "float64", "forward_backward")
    everything = np.arange(seqlen)
    q, k, v, dout = (draw(name, everything, problem, 7, device) for name in ("q", "k", "v", "dout"))
    own_folder = folder / str(rank)
    own_folder.mkdir()
    ran = set()
    for mask_name, mask in masks(seqlen, heads, own_folder).items():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = dense_attention(*leaves, dense_heads(mask, heads.q), problem.softmax_scale)
        expected = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]
        for strategy, kernel in cases(world_size):
            if strategy.unsupported(problem, mask):
                continue
            case = f"{strategy} {kernel} {mask_name} P={world_size}"
            schedule = strategy.schedule(problem, mask)
            report = verify(schedule, mask, heads, 8)
            own = schedule.layout.tokens(rank)
            executor = Executor(schedule, mask, kernel, problem, rank=rank, device=device, groups=groups)
            assert executor.pairs == report.rank_pairs[rank], case
            shards = [x[own] for x in (q, k, v)]
            got_out, saved = executor.forward(*shards)
            assert executor.bytes_sent == report.forward_bytes[rank], case
            grads = executor.backward(dout[own], saved)
            assert executor.bytes_sent == report.backward_bytes[rank], case
            for got, want in zip([got_out, executor.lse(saved), *grads], expected, strict=True):
                assert got.shape == want[own].shape, case
                if got.numel():
                    both = torch.isinf(got) & torch.isinf(want[own])
                    error = torch.where(both, 0.0, got - want[own]).abs().max()
                    assert error <= BOUND, f"{case}: {error}"
            again, saved_again = executor.forward(*shards)
            assert torch.equal(again, got_out), case
            repeated = executor.backward(dout[own], saved_again)
            assert all(torch.equal(a, b) for a, b in zip(repeated, grads, strict=True)), case
            ran.add((mask_name, type(strategy).__name__, type(kernel).__name__))
    wanted = {"Local"} if world_size == 1 else {"Ring", "Ulysses", "USP"} if world_size > 3 else {"Ring", "Ulysses"}
    if seqlen >= 2 * world_size:
        assert {(m, s, kernel) for m in masks(seqlen, heads, own_folder) for s in wanted for kernel in ("SDPA", "Reference")} <= ran
    dist.barrier()


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "seqlen", "heads"),
    [
        (1, 1, Heads(4, 2, 8)),  # one token: what fits at this length
        (1, 41, Heads(4, 2, 8)),
        (2, 53, Heads(4, 4, 8)),
        (3, 47, Heads(6, 3, 8)),
        (4, 67, Heads(8, 2, 8)),  # fewer KV heads than Ulysses ranks
        (6, 59, Heads(12, 3, 8)),
        (8, 83, Heads(8, 1, 8)),
    ],
    ids=str,
)
def test_every_strategy_and_mask_matches_dense_attention(world_size: int, seqlen: int, heads: Heads, tmp_path: Path) -> None:
    run_ranks(world_size, check_all, world_size, seqlen, heads, tmp_path)
