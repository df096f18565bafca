"""Decode context parallelism and Helix on real gloo ranks: out and LSE against dense float64, bytes against the formula."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lcbench.cp.base import Place
from lcbench.cp.dcp import DCP
from lcbench.cp.helix import Helix
from lcbench.cp.split_cache import split
from lcbench.grid.build import build_strategy
from lcbench.kernels.base import Kernel, OutLse, Platform, Prepared
from lcbench.kernels.cache import Cache, CacheKind
from lcbench.masks.band import Band, BandMask
from lcbench.masks.block_random import block_random
from lcbench.masks.causal import causal
from lcbench.problem import Batch, Heads, Problem, Requests, Scale, Softmax
from lcbench.schedule.build import ranks_of
from lcbench.schedule.groups import Groups
from lcbench.testing.dense import dense_heads
from lcbench.testing.masks import load
from lcbench.testing.spawn import run_ranks
from tests.cp.batches import BATCHES, BOUND, CPU, HEADS, NAIVE, SEES, dense, drawn, mask_of, near, seen


def given(run: Any, problem: Problem, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What a rank is given of all inputs, in the problem's type; values are a part of keys where they are latent."""
    dtype: torch.dtype = getattr(torch, problem.dtype)
    held = run.held
    q, k, v = (
        inputs[name][part.tokens][:, part.heads.start : part.heads.stop].to(dtype)
        for name, part in (("q", held.q), ("k", held.kv), ("v", held.kv))
    )
    return [q, k, k[..., : problem.heads.v] if problem.heads.latent else v, *([inputs["sink"]] if problem.softmax.sink else [])]


def strategies(ranks: int) -> list[DCP | Helix]:
    """Every option, with as many ranks to a group as there have to be, and with all."""
    found: list[DCP | Helix] = [DCP(), DCP(merge="all_to_all", interleave=4), Helix(), Helix(neighbours="tpa", interleave=3)]
    if ranks > 1:
        found += [DCP(ranks, merge="all_to_all"), DCP(ranks, interleave=2), Helix(ranks, interleave=1), Helix(ranks)]
    return found


def degree_of(strategy: DCP | Helix, problem: Problem) -> int:
    """Ranks of a group, by trying: the first number of groups, from the most on, that deals key/value heads out whole."""
    told = strategy.degree if isinstance(strategy, DCP) else strategy.kvp
    ranks = problem.scale.world_size
    groups = next(g for g in range(ranks, 0, -1) if ranks % g == 0 and problem.heads.kv % g == 0)
    return ranks // groups if told == "auto" else told


def formula(strategy: DCP | Helix, problem: Problem) -> int:
    """Bytes that a rank sends, as the docstrings of the strategies say."""
    heads, degree = problem.heads, degree_of(strategy, problem)
    h, b = heads.q // problem.scale.world_size, problem.itemsize
    s = max(b, 4)
    r = b if problem.reduce_dtype == "input" else s
    if isinstance(strategy, Helix):
        each = heads.v * r + s
    else:
        each = heads.dim * b + heads.v * r + (degree * s if strategy.merge == "reduce_scatter" else s)
    return (degree - 1) * h * each * problem.queries


def check_all(rank: int, ranks: int) -> None:
    groups = Groups()
    every = [
        (batch, heads, mask, sink)
        for number, (batch, heads) in enumerate((b, h) for b in BATCHES for h in HEADS)
        for mask, sink in [(["causal", "full", "window"][number % 3], bool(number % 2)), ("causal", not number % 2)]
    ]
    for batch_name, heads_name, mask_name, sink in every:
        batch, heads, (family, sees) = BATCHES[batch_name], HEADS[heads_name], SEES[mask_name]
        softmax = Softmax(sink=sink, scale=0.3 if sink else None)
        problem = Problem(batch.tokens, heads, Scale(1, ranks), "float64", "forward", batch=batch, softmax=softmax)
        inputs, mask = drawn(problem), mask_of(batch, family)
        want = dense(problem, seen(batch, sees), inputs)
        for strategy in strategies(ranks):
            case = f"{strategy} {batch_name} {heads_name} {mask_name} sink={sink} P={ranks}"
            check(strategy, problem, mask, inputs, want, Place(rank, CPU, groups), case)


def check(
    strategy: DCP | Helix, problem: Problem, mask: Any, inputs: dict[str, torch.Tensor], want: Any, place: Place, case: str,
    kernel: Kernel = NAIVE, bound: float = BOUND,
) -> None:  # fmt: skip
    assert strategy.unsupported(problem, mask) is None, case
    run = strategy.start(problem, mask, kernel, place)
    mine = given(run, problem, inputs)
    out, saved = run.forward(*mine)
    own = run.held.out
    assert own.heads is not None
    for got, whole in zip((out, run.lse(saved)), want, strict=True):
        near(case, got, whole[own.tokens][:, own.heads.start : own.heads.stop], bound)
    counters = run.counters()
    assert counters.bytes_sent == formula(strategy, problem), case
    pairs = torch.tensor(counters.pairs)
    dist.all_reduce(pairs)
    assert pairs == mask.pairs(problem.heads.q), case
    again, _ = run.forward(*mine)
    assert torch.equal(again, out), case
    bare = run.replay(compute=False, communicate=True)
    assert (bare is None) == (degree_of(strategy, problem) == 1), case
    if bare is not None:
        bare.forward(*mine)
        assert run.counters().bytes_sent == counters.bytes_sent, case
        silent = run.replay(compute=True, communicate=False)
        assert silent is not None
        silent.forward(*mine)
        assert run.counters().bytes_sent == 0, case


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [1, 2, 3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (4, 8))])
def test_results_are_those_of_dense_attention_and_bytes_those_of_the_formula(ranks: int) -> None:
    run_ranks(ranks, check_all, ranks)


def check_whole_sequences(rank: int, ranks: int) -> None:
    """Problems without requests: a sequence of odd length, rows and ranks that see nothing, heads with masks of their own."""
    groups = Groups()
    problem = Problem(29, Heads(8, 4, 8), Scale(1, ranks), "float64", "forward")
    inputs = drawn(problem)
    masks = {
        "causal": causal(29), "holes": BandMask.of(29, 29, [Band(3, 9, 0, 2), Band(14, 27, 4, 14, hi=-2)]),
        "blocks": block_random(29, density=0.4, block_size=4, sizes="uniform", per="q_head", heads=problem.heads, seed=(1, 2)),
    }  # fmt: skip
    for name, mask in masks.items():
        want = dense(problem, torch.from_numpy(np.array(dense_heads(mask, 8))), inputs)
        for strategy in strategies(ranks):
            check(strategy, problem, mask, inputs, want, Place(rank, CPU, groups), f"{strategy} {name} P={ranks}")


def check_types(rank: int, ranks: int) -> None:
    """Half types: partial results travel as ``reduce_dtype`` says, and the error is that of rounding."""
    groups = Groups()
    batch = BATCHES["mixed"]
    mask = mask_of(batch, causal)
    for dtype, reduce_dtype, bound in (("bfloat16", "input", 0.05), ("bfloat16", "float32", 0.02), ("float32", "float32", 1e-5)):
        problem = Problem(batch.tokens, Heads(8, 2, 8), Scale(1, ranks), dtype, "forward", reduce_dtype, batch)
        inputs = {name: x.to(getattr(torch, dtype)).double() for name, x in drawn(problem).items()}
        want = dense(problem, seen(batch, SEES["causal"][1]), inputs)
        for strategy in strategies(ranks):
            case = f"{strategy} {dtype} {reduce_dtype}"
            check(strategy, problem, mask, inputs, want, Place(rank, CPU, groups), case, bound=bound)


@dataclass(frozen=True)
class Capped(Kernel):
    """A kernel with a softcap, of one call."""

    softcaps = True

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return None

    def prepare(self, mask: Any, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        return PreparedCapped(torch.from_numpy(np.array(dense_heads(mask, heads.q))), heads)


@dataclass
class PreparedCapped:
    allowed: torch.Tensor
    heads: Heads
    calls: int = 1

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        softmax = Softmax(softcap=softcap, scale=softmax_scale)
        problem = Problem(len(k), self.heads, Scale(1, 1), "float64", "forward", softmax=softmax)
        return dense(problem, self.allowed, {"q": q, "k": k, "v": v})

    def backward(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError


def check_softcap(rank: int, ranks: int) -> None:
    groups, batch = Groups(), BATCHES["mixed"]
    softmax = Softmax(sink=True, softcap=2.0)
    problem = Problem(batch.tokens, Heads(8, 2, 8), Scale(1, ranks), "float64", "forward", batch=batch, softmax=softmax)
    inputs = drawn(problem)
    want = dense(problem, seen(batch, SEES["causal"][1]), inputs)
    for strategy in strategies(ranks):
        check(strategy, problem, mask_of(batch, causal), inputs, want, Place(rank, CPU, groups), str(strategy), Capped())


@dataclass(frozen=True)
class Reader(Capped):
    """A kernel that reads contiguous caches alone."""

    def reads(self, kind: CacheKind, problem: Problem, platform: Platform) -> str | None:
        assert (problem.heads.q, problem.heads.kv) == (8, 2)  # of the row: one of all ranks
        return None if kind.page is None else "reads no pages"

    def prepare(self, mask: Any, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        return PreparedReader(torch.from_numpy(np.array(dense_heads(mask, heads.q))), heads)


class PreparedReader(PreparedCapped):
    def forward_cache(self, q: torch.Tensor, cache: Cache, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        assert cache.kind.page is None
        return self.forward(q, *cache.read(), softmax_scale=softmax_scale, softcap=softcap)


def check_caches(rank: int, ranks: int) -> None:
    """A cache is read where it lies by a kernel that can, and as a copy otherwise, with the same results."""
    groups, batch = Groups(), BATCHES["mixed"]
    softmax = Softmax(sink=True, softcap=2.0)
    problem = Problem(batch.tokens, Heads(8, 2, 8), Scale(1, ranks), "float64", "forward", batch=batch, softmax=softmax)
    inputs = drawn(problem)
    for strategy in (DCP(ranks, interleave=4), DCP(ranks, merge="all_to_all"), Helix(ranks)):
        for kernel in (Reader(), Capped()):
            run = strategy.start(problem, mask_of(batch, causal), kernel, Place(rank, CPU, groups))
            q, k, v, sink = given(run, problem, inputs)
            want, saved = run.forward(q, k, v, sink)
            edges = np.searchsorted(run.held.kv.tokens, batch.k_bounds)
            for page in (None, 4):
                cache = Cache.of(k, v, tuple(np.diff(edges).tolist()), CacheKind(page))
                assert (run.reads(cache.kind) is None) == (page is None and isinstance(kernel, Reader))
                got, again = run.forward_cache(q, cache, sink)
                near(f"{strategy} {kernel} {page}", got, want)
                near(f"{strategy} {kernel} {page}", run.lse(again), run.lse(saved))
                sent = run.counters().bytes_sent
                for bare in (run.replay(compute=compute, communicate=not compute) for compute in (True, False)):
                    assert bare is not None
                    bare.forward_cache(q, cache, sink)
                assert run.counters().bytes_sent == sent > 0


def check_the_rest(rank: int, ranks: int) -> None:
    check_whole_sequences(rank, ranks)
    check_types(rank, ranks)
    check_softcap(rank, ranks)
    check_caches(rank, ranks)
    check_bytes(rank, ranks)


@pytest.mark.slow
@pytest.mark.gloo
def test_whole_sequences_half_types_softcaps_caches_and_long_contexts() -> None:
    run_ranks(4, check_the_rest, 4)


def check_bytes(rank: int, ranks: int) -> None:
    """Bytes of a decoded token are the same at 4k and at 1m tokens of context, on two nodes, and the formula's."""
    groups = Groups()
    heads = Heads(4, 1, 8)
    for strategy in (DCP(), DCP(merge="all_to_all"), Helix()):
        sent = set()
        for total in (4 << 10, 1 << 20):
            batch = Batch((Requests(1, 1, total),))
            problem = Problem(batch.tokens, heads, Scale(2, ranks // 2), "float32", "forward", batch=batch)
            run = strategy.start(problem, mask_of(batch, causal), NAIVE, Place(rank, CPU, groups))
            assert len(run.held.kv.tokens) == total // ranks
            run.forward(
                *(torch.zeros(n, h, 8) for n, h in ((1, 1 if isinstance(strategy, DCP) else 4), *[(total // ranks, 1)] * 2))
            )
            counters = run.counters()
            assert counters.bytes_sent == formula(strategy, problem)
            assert counters.bytes_between_nodes * 3 == counters.bytes_sent * 2  # two of three others are on the other node
            sent.add(counters.bytes_sent)
        assert len(sent) == 1, strategy


@pytest.mark.parametrize("strategy", strategies(8), ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_every_key_is_held_and_every_result_given_once(strategy: DCP | Helix, heads: Heads, batch: Batch) -> None:
    problem = Problem(batch.tokens, heads, Scale(1, 8), "float64", "forward", batch=batch)
    grid = ranks_of(8, degree_of(strategy, problem), outside=False)
    kv, out = np.zeros((batch.tokens, heads.kv), dtype=int), np.zeros((batch.queries, heads.q), dtype=int)
    for rank in range(8):
        held = split(problem, grid, rank, strategy.interleave, gathers=isinstance(strategy, DCP)).held
        for count, part in ((kv, held.kv), (out, held.out)):
            assert part.heads is not None
            count[np.ix_(part.tokens, np.array(part.heads))] += 1
        assert set(held.out.heads or ()) <= set(held.q.heads or ())
        each = heads.q // heads.kv
        assert {head // each for head in held.q.heads or ()} <= set(held.kv.heads or ())
    assert (kv == 1).all()
    assert (out == 1).all()


def test_key_value_heads_are_held_twice_only_where_more_groups_are_asked_for() -> None:
    problem = Problem(64, Heads(8, 2, 8), Scale(1, 8), "float64", "forward")
    held = [split(problem, ranks_of(8, 2, outside=False), rank, 1, gathers=True).held for rank in range(8)]
    assert [part.kv.heads for part in held] == [range(0, 1)] * 4 + [range(1, 2)] * 4
    assert [part.kv.tokens[:2].tolist() for part in held[:2]] == [[0, 2], [1, 3]]


EIGHT = Problem(64, Heads(8, 2, 8), Scale(1, 4), "float64", "forward")


@pytest.mark.parametrize(
    ("strategy", "problem", "reason"),
    [
        (DCP(3), EIGHT, "degree=3 does not divide the 4 ranks of scale=1x4"),
        (Helix(3), EIGHT, "kvp=3 does not divide the 4 ranks of scale=1x4"),
        (DCP(), replace(EIGHT, scale=Scale(1, 3)), "cannot split 8 query heads evenly over 3 ranks"),
        (DCP(1), replace(EIGHT, heads=Heads(12, 6, 8)), "cannot split or replicate 6 key/value heads evenly over 4 ranks"),
        (
            Helix(),
            replace(EIGHT, direction="forward_backward"),
            "is for inference and has no backward; direction=forward runs it",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_reason(strategy: DCP | Helix, problem: Problem, reason: str) -> None:
    assert strategy.unsupported(problem, causal(64)) == reason
    assert (
        strategy.unsupported(replace(problem, heads=Heads(12, 12, 8), scale=Scale(1, 12), direction="forward"), causal(64)) is None
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dcp", {"degree": 0}, "cp.degree=0 is no number of at least 1"),
        ("dcp", {"interleave": 0}, "cp.interleave=0 is no number of at least 1"),
        ("dcp", {"merge": "ring"}, "cp.merge=ring is not one of reduce_scatter, all_to_all"),
        ("helix", {"kvp": -1}, "cp.kvp=-1 is no number of at least 1"),
        ("helix", {"interleave": 0}, "cp.interleave=0 is no number of at least 1"),
        ("helix", {"neighbours": "dp"}, "cp.neighbours=dp is not one of kvp, tpa"),
    ],
)
def test_bad_options_name_the_value(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_strategy({**load("cp", name), **options})
