"""Impossible numbers: the bounds hold for every strategy on every mask, are near what strategies move, and say what is wrong."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Scheduled
from lcbench.cp.ring import Ring
from lcbench.cp.tokenring import TokenRing
from lcbench.cp.ulysses import Ulysses
from lcbench.grid.build import build_strategy
from lcbench.inputs.drawing import draw
from lcbench.kernels.base import Saved
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.full import full
from lcbench.masks.mask import Mask
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.measure.peak import measured_limit
from lcbench.measure.plausible import MARGIN, implausible, lower_bound_bytes, lower_bound_memory, lower_bound_sent
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.adjoint import traffic
from lcbench.schedule.schedule import Schedule
from lcbench.testing.dense import dense_heads
from lcbench.testing.masks import causal_batch, every_mask, load, small, trained_by
from tests.measure.sides import BATCHES, SHAPES
from tests.measure.sides import problem as of_batch

HEADS = [Heads(8, 8, 16), Heads(8, 2, 16), Heads(24, 1, 8), Heads(70, 35, 8)]


def crossing(schedule: Schedule, problem: Problem) -> np.ndarray:
    """(2, 2, ranks): bytes that each rank sends and receives in forward, and in backward, by its messages."""
    moves, found = traffic(schedule, backward=True), np.zeros((2, 2, schedule.world_size))
    for transfer in moves.transfers:
        sent, received = found[int(transfer.begin >= moves.steps)]
        np.add.at(sent, transfer.rows[:, 0], transfer.bytes(schedule, problem))
        np.add.at(received, transfer.rows[:, 1], transfer.bytes(schedule, problem))
    return found


def bounds(schedule: Schedule, mask: Mask, problem: Problem, seen: np.ndarray | None = None) -> list[float]:
    """By the dense matrix, (Hq, Nq, Nk), pair by pair."""
    seen = dense_heads(mask, problem.heads.q) if seen is None else seen
    found = []
    for rank in range(schedule.world_size):
        own, keys = schedule.q.tokens(rank), schedule.k.tokens(rank)
        remote = seen[:, own].copy()
        remote[:, :, keys] = False
        found.append(lower_bound_bytes(len(own), remote.sum(), mask.num_k - len(keys), problem.heads, problem.itemsize))
    return found


SEQLEN = 83
Drawn = Callable[[str, Heads], tuple[Mask, np.ndarray]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A mask and its dense matrix, made once: all strategies at all numbers of ranks look at the same."""

    @cache
    def make(name: str, heads: Heads) -> tuple[Mask, np.ndarray]:
        mask = small(name, SEQLEN, heads, tmp_path_factory.mktemp("mask"))
        return mask, dense_heads(mask, heads.q)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", trained_by())
def test_every_strategy_moves_what_a_mask_needs_at_least(name: str, drawn: Drawn) -> None:
    strategy = build_strategy(load("cp", name))
    assert isinstance(strategy, Scheduled)
    tried: set[int] = set()
    for ranks in range(2, 9):
        for number, mask_name in enumerate(every_mask()):
            # Masks take turns with heads and types: each mask meets each number of ranks, with the next heads that fit it.
            turns = [*HEADS[(number + ranks) % len(HEADS) :], *HEADS[: (number + ranks) % len(HEADS)]]
            dtype, reduce_dtype = (("bfloat16", "input"), ("bfloat16", "float32"), ("float64", "float32"))[number % 3]
            for heads in turns:
                problem = Problem(SEQLEN, heads, Scale(1, ranks), dtype, "forward_backward", reduce_dtype)
                mask, seen = drawn(mask_name, heads)
                if not strategy.unsupported(problem, mask):
                    break
            else:
                continue
            tried.add(ranks)
            schedule = strategy.schedule(problem, mask)
            least = bounds(schedule, mask, problem, seen)
            for backward, (sent, received) in enumerate(crossing(schedule, problem)):
                assert (sent + received >= least).all(), (ranks, heads, mask_name, backward)
                assert sent.max() >= lower_bound_sent(least)
    assert tried == (set() if name == "none" else set(range(2, 9)))


@pytest.mark.parametrize("strategy", [Ring(), AllGather(), Ulysses()], ids=str)
def test_the_bound_is_not_far_below(strategy: Scheduled) -> None:
    """Two ranks and a full mask: the bound is what comes in; as much goes out, for the other."""
    problem = Problem(256, Heads(4, 4, 16), Scale(1, 2), "bfloat16", "forward")
    schedule = strategy.schedule(problem, full(256))
    sent, received = crossing(schedule, problem)[0]
    assert (sent + received == 2 * np.array(bounds(schedule, full(256), problem))).all()


@pytest.mark.parametrize("strategy", [Ring("zigzag"), Ring("striped"), AllGather(), TokenRing()], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_bound_holds_on_two_sides(strategy: Scheduled, batch: str) -> None:
    """Few queries are sent to many keys, and values may be shorter than keys or in them."""
    tried = 0
    for ranks in (2, 3, 4):
        for shape in SHAPES:
            problem, mask = of_batch(BATCHES[batch], shape, "bfloat16", ranks=ranks), causal_batch(BATCHES[batch])
            if strategy.unsupported(problem, mask):
                continue
            schedule = strategy.schedule(problem, mask)
            least = bounds(schedule, mask, problem)
            assert any(least)
            for backward, (sent, received) in enumerate(crossing(schedule, problem)):
                assert (sent + received >= np.array(least) * (1 - 1e-12)).all(), (ranks, shape, backward)
            tried += 1
    assert tried == 3 * len(SHAPES)


def test_no_remote_pair_needs_no_byte() -> None:
    heads = Heads(4, 2, 8)
    assert lower_bound_bytes(10, 0, 0, heads, 2) == lower_bound_bytes(0, 0.0, 5, heads, 2) == 0
    # One row sees three keys of others: four heads of q and of out are fewer vectors than three keys' two heads of k and of v.
    assert lower_bound_bytes(1, 4 * 3, 3, heads, 2) == 2 * 8 * 2 * 4
    assert lower_bound_bytes(1, 2 * 3, 3, heads, 2) == 8 * 2 * 4  # half of the heads see them
    # Where other ranks have the queries too, results alone come back.
    assert lower_bound_bytes(1, 4 * 3, 3, heads, 2, queries_elsewhere=True) == 8 * 2 * 4
    # One row of 16 heads of 24 numbers, and as many of out of 16, or latent keys of 24 numbers in all.
    latent = Heads(16, 1, 24, 16, latent=True)
    assert lower_bound_bytes(1, 16 * 3, 3, latent, 2) == 3 * 24 * 2
    assert lower_bound_bytes(1, 16 * 100, 100, latent, 2) == 16 * (24 + 16) * 2
    assert lower_bound_sent([100, 300]) == 100


def test_memory_is_each_tensor_once() -> None:
    heads = Heads(8, 2, 16)
    q, k = 100 * 8 * 16 * 2, 50 * 2 * 16 * 2
    assert lower_bound_memory(100 * 8, 100 * 8, 50 * 2, heads, 2, backward=False) == 2 * q + 2 * k  # q, out; k, v
    assert lower_bound_memory(100 * 8, 100 * 8, 50 * 2, heads, 2, backward=True) == 3 * q + 4 * k  # q, dout, dq; k, v, dk, dv
    assert lower_bound_memory(0, 0, 0, heads, 2, backward=True) == 0
    absorbed = Heads(8, 1, 24, 16, latent=True)  # values are in keys
    assert lower_bound_memory(8, 8, 50, absorbed, 2, backward=False) == 2 * (8 * 24 + 8 * 16 + 50 * 24)


def test_what_computes_nothing_is_named() -> None:
    """A kernel that computes nothing at all, on two cores of a CPU."""
    heads, pairs = Heads(1, 1, 16), float(1 << 40)
    source = "matrix product measured on AMD EPYC"
    said = implausible("forward", seconds=0.2, flops=forward_flops(pairs, heads), peak_tflops=0.12, peak_source=source)
    assert said == f"forward: 352 TFLOP/s per device is 2.93e+03 times the peak of 0.12 ({source})"
    for flops, refused in ((0.12e12 * MARGIN * 0.999, False), (0.12e12 * MARGIN * 1.001, True), (0.0, False)):
        assert bool(implausible("forward", seconds=1.0, flops=flops, peak_tflops=0.12, peak_source=source)) == refused
    assert "in no time" in str(implausible("backward", seconds=0.0, flops=1.0, peak_tflops=0.12, peak_source=source))


def test_what_receives_nothing_and_what_is_faster_than_its_links_and_its_memory_is_named() -> None:
    def said(seconds: float, **more: float | None) -> str | None:
        return implausible("backward", seconds=seconds, flops=1e9, peak_tflops=1000.0, peak_source="conf/device entry", **more)  # type: ignore[arg-type]

    assert (
        said(1.0, bytes_sent=0, least_bytes_sent=10)
        == "backward: the busiest rank sent 0 bytes, the mask needs 10 from it at least"
    )
    assert said(1.0, bytes_sent=10, least_bytes_sent=10) is None
    assert said(1.0, bytes_sent=None, least_bytes_sent=10) is None  # a peer: nobody counted
    assert said(1.0, bytes_sent=460e9, link_gbytes_per_s=450) == (
        "backward: 1 s is less than the 1.02 s of 4.6e+11 bytes over links at 450 GB/s"
    )
    assert said(1.0, bytes_sent=450e9, link_gbytes_per_s=450) is None
    assert said(1.0, bytes_sent=None, least_bytes_sent=460e9, link_gbytes_per_s=450) is not None  # what a peer sends at least
    assert said(1.0, bytes_sent=1e15, link_gbytes_per_s=None) is None
    assert said(1.0, memory_bytes=4000e9, memory_gbytes_per_s=3350, cache_bytes=50e6) == (
        "backward: 1 s is less than the 1.19 s of 4e+12 bytes over memory at 3350 GB/s"
    )
    assert said(1.0, memory_bytes=4000e9) is None
    # What fits into the cache twice, from one iteration to the next, asks nothing of memory.
    assert said(1e-6, memory_bytes=100e6, memory_gbytes_per_s=3350, cache_bytes=50e6) is None
    assert said(1e-6, memory_bytes=110e6, memory_gbytes_per_s=3350, cache_bytes=50e6) is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.slow
def test_a_sound_kernel_passes_and_one_that_does_nothing_does_not(dtype: str) -> None:
    cpu, heads, tokens = torch.device("cpu"), Heads(2, 2, 128), 768
    problem = Problem(tokens, heads, Scale(1, 1), dtype, "forward_backward")
    q, k, v, dout = (draw(name, np.arange(tokens), problem, 0, cpu) for name in ("q", "k", "v", "dout"))
    prepared = SDPAFlash().prepare(full(tokens), heads, q.dtype, cpu)
    out, lse = prepared.forward(q, k, v, softmax_scale=problem.softmax_scale)
    out = out.to(q.dtype)
    passes = {
        "forward": lambda: prepared.forward(q, k, v, softmax_scale=problem.softmax_scale),
        "backward": lambda: prepared.backward(dout, Saved(q, k, v, out, lse), softmax_scale=problem.softmax_scale),
    }
    pairs = float(tokens**2 * heads.q)
    for phase, flops in (("forward", forward_flops(pairs, heads)), ("backward", backward_flops(pairs, heads))):
        peak = measured_limit(q.dtype, cpu)
        seconds = min(timeit.repeat(passes[phase], number=1, repeat=10))
        assert implausible(phase, seconds=seconds, flops=flops, peak_tflops=peak, peak_source="here") is None
        assert implausible(phase, seconds=1e-6, flops=flops, peak_tflops=peak, peak_source="here") is not None
