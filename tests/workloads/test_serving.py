"""A pass over a cache: every strategy of ours that takes a batch, contiguous and in pages, against dense float64; what is stored in
fewer bits; what its metrics say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lcbench.cp.base import Place, Strategy
from lcbench.grid.build import build_strategy
from lcbench.kernels.base import Kernel, OutLse, Platform
from lcbench.kernels.cache import Cache, CacheKind
from lcbench.kernels.reference import Reference
from lcbench.masks.mask import Mask
from lcbench.measure.cell import measure_cell
from lcbench.measure.ranks import EVERY
from lcbench.measure.session import Gang
from lcbench.problem import Heads, Problem, Requests, Scale, Softmax
from lcbench.schedule.groups import Groups
from lcbench.testing.dense import dense_attention, dense_mask
from lcbench.testing.masks import causal_batch, load, names
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.base import Work
from lcbench.workloads.cached import CachedRun
from lcbench.workloads.serving import Serving
from tests.measure.faults import SETTINGS
from tests.schedule.test_sides import BATCHES, near

CPU = torch.device("cpu")
READS_NONE = Reference()
SHAPES = {
    "MHA": Heads(8, 8, 6),
    "GQA": Heads(8, 2, 6),
    "MLA": Heads(8, 8, 9, 6),
    "latent": Heads(8, 1, 9, 6, latent=True),
}
# Strategies of ours that take a batch against a cache; each has to run with every kind of batch on some number of ranks.
SERVES = {"dcp", "helix", "kvp", "pcp", "ring", "allgather", "ulysses", "usp", "loongtrain", "tokenring", "groupcast"}


def ours() -> dict[str, Strategy]:
    """By name; without libraries."""
    built = {name: build_strategy(load("cp", name)) for name in names("cp")}
    return {name: each for name, each in built.items() if not type(each).__module__.startswith("lcbench.cp.peers.")}


def check(rank: int, ranks: int) -> None:
    place, random = Place(rank, CPU, Groups()), torch.Generator().manual_seed(3)
    ran: set[tuple[str, str]] = set()
    for number, (name, batch) in enumerate(BATCHES.items()):
        mask = causal_batch(batch)
        allowed = dense_mask(mask.num_q, mask.num_k, mask)
        for turn, heads in enumerate(SHAPES.values()):
            if ranks > 4 and (number + turn) % 2:
                continue
            softmax = Softmax(sink=bool((number + turn) % 2))
            of = Problem(batch.tokens, heads, Scale(1, ranks), "float64", "forward", batch=batch, softmax=softmax)
            q, k = (
                torch.randn(n, h, heads.dim, dtype=torch.float64, generator=random)
                for n, h in ((batch.queries, heads.q), (batch.tokens, heads.kv))
            )
            v = (
                k[..., : heads.v]
                if heads.latent
                else torch.randn(batch.tokens, heads.kv, heads.v, dtype=torch.float64, generator=random)
            )
            sink = torch.randn(heads.q, dtype=torch.float64, generator=random) if softmax.sink else None
            want = dense_attention(q, k, v, allowed, of.softmax_scale, sink=sink)
            for strategy_name, strategy in ours().items():
                if strategy.unsupported(of, mask) or strategy.only_in_a_step() or strategy.computes(of, mask) is not mask:
                    continue
                run = strategy.start(of, mask, Reference(), place)
                held = run.held
                for kind in (CacheKind(), CacheKind(page=4)):
                    case = f"{strategy_name} {name} {heads} {kind} P={ranks}"
                    cached = CachedRun(run, of, kind, 7, EVERY)
                    own_q, own_k = (of_heads(x[part.tokens], part.heads) for x, part in ((q, held.q), (k, held.kv)))
                    own_v = own_k[..., : heads.v] if heads.latent else of_heads(v[held.kv.tokens], held.kv.heads)
                    got, saved = cached.forward(own_q, own_k, own_v, sink)
                    again, _ = cached.read(own_q, sink)
                    assert torch.equal(got, again), case
                    for what, one, whole in (("out", got, want[0]), ("lse", cached.lse(saved), want[1])):
                        near(case, what, one, of_heads(whole[held.out.tokens], held.out.heads))
                ran.add((strategy_name, name))
    every: list[set[tuple[str, str]]] = [set() for _ in range(ranks)]
    dist.all_gather_object(every, ran)
    missing = {(s, b) for s in SERVES for b in ("decode", "chunk", "mixed")} - ran
    # On one rank, or an odd number, some have nothing to share out, or cannot share out the heads.
    assert ranks in (1, 3) or {s for s, _ in missing} <= {"groupcast", "usp", "loongtrain", "ulysses", "helix", "dcp"}, missing
    assert ranks != 2 or not {s for s, b in missing if b == "mixed"}, missing
    dist.barrier()


def of_heads(x: torch.Tensor, heads: range | None) -> torch.Tensor:
    return x if heads is None else x[:, heads.start : heads.stop]


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_strategy_reads_a_cache_as_dense_attention_does(ranks: int) -> None:
    run_ranks(ranks, check, ranks)


@dataclass(frozen=True)
class Reads(Reference):
    """A kernel that reads any cache."""

    def reads(self, kind: CacheKind, problem: Problem, platform: Platform) -> str | None:
        return None

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Any:
        prepared = super().prepare(mask, heads, dtype, device)

        def forward_cache(q: torch.Tensor, cache: Cache, **softmax: float) -> OutLse:
            return prepared.forward(q, *cache.read(), **softmax)

        prepared.forward_cache = forward_cache  # type: ignore[attr-defined]
        return prepared


def cell(rank: int, serving: Serving, name: str, heads: Heads, dtype: str, ranks: int, kernel: Kernel = READS_NONE) -> None:
    """A whole cell, checked, with its metrics."""
    batch = replace(BATCHES["mixed"], groups=(Requests(3, 1, 40), Requests(1, 8, 24)))
    mask, of = causal_batch(batch), Problem(batch.tokens, heads, Scale(1, ranks), dtype, "forward", batch=batch)
    work = Work(serving, of, lambda _: mask, kernel, build_strategy(load("cp", name)), SETTINGS, 3)
    measured = measure_cell(work, Gang(rank, ranks, CPU, Groups(), []), lambda _: None)
    case = f"{name} {serving} {heads} {dtype}"
    assert measured.check is not None, case
    assert not measured.check.failures, f"{case}: {measured.check.failures}"
    metrics, size = measured.metrics, {"float64": 8, "float32": 4}[dtype]
    stored = {"input": size, "bfloat16": 2, "float8": 1}[serving.storage]
    assert metrics["serving/new_tokens"] == batch.queries
    dense_bytes = batch.tokens * heads.kv * heads.kv_width * stored
    total = metrics["serving/cache_bytes_per_token"] * batch.queries
    # Scales of heads, and entries of the table, are the rest.
    assert dense_bytes <= total <= dense_bytes + ranks * (8 * heads.kv + 4 * batch.tokens), case
    seconds = metrics["time/forward/median_s"]
    assert metrics["serving/us_per_token"] == pytest.approx(1e6 * seconds / batch.queries)
    assert metrics["serving/tokens_per_s_per_gpu"] == pytest.approx(batch.queries / seconds / ranks)
    assert metrics["serving/cache_gb_per_s"] == pytest.approx(metrics["serving/cache_bytes"] / seconds / 1e9)
    assert metrics["serving/bytes_sent_per_token"] > 0, case
    where_it_lies = isinstance(kernel, Reads) and name != "ring"  # whose keys and values move
    assert ("read where it lies" in measured.notes["cache"]) == where_it_lies, case
    assert "overlap/forward/compute_s" in metrics, case
    told = "every row and column" in measured.check.unchecked
    assert told == (stored != size), case


def cells(rank: int, ranks: int) -> None:
    gqa, latent = Heads(4, 1, 16), Heads(4, 1, 24, 16, latent=True)
    cell(rank, Serving(), "kvp", gqa, "float64", ranks)
    cell(rank, Serving(page=16), "helix", gqa, "float64", ranks)
    cell(rank, Serving(page=16, storage="float8"), "dcp", gqa, "float32", ranks)
    cell(rank, Serving(storage="float8"), "kvp", latent, "float32", ranks)
    cell(rank, Serving(page=8, storage="bfloat16"), "ring", gqa, "float32", ranks)
    for name in ("kvp", "dcp", "star", "ring"):
        cell(rank, Serving(page=8), name, gqa, "float64", ranks, Reads())


@dataclass(frozen=True)
class ReadsOnOne(Reads):
    """A kernel that reads caches on the first rank alone."""

    def reads(self, kind: CacheKind, problem: Problem, platform: Platform) -> str | None:
        return f"rank {dist.get_rank()} has none" if dist.get_rank() else None


def differing(rank: int, ranks: int) -> None:
    """Ranks of which one cannot read its cache all copy theirs, and measure a timeline together."""
    batch = BATCHES["mixed"]
    mask, of = causal_batch(batch), Problem(batch.tokens, Heads(4, 1, 16), Scale(1, ranks), "float64", "forward", batch=batch)
    settings = SETTINGS | {"timeline": True}
    work = Work(Serving(page=8), of, lambda _: mask, ReadsOnOne(), build_strategy(load("cp", "kvp")), settings, 3)
    measured = measure_cell(work, Gang(rank, ranks, CPU, Groups(), []), lambda _: None)
    assert measured.check is not None
    assert not measured.check.failures, measured.check.failures
    assert measured.notes["cache"].endswith("copied out in each pass: rank 1 has none")
    assert len(measured.notes["timeline"]) == ranks


@pytest.mark.gloo
@pytest.mark.slow
def test_ranks_that_differ_in_what_they_read_do_the_same() -> None:
    run_ranks(2, differing, 2)


@pytest.mark.slow
@pytest.mark.gloo
def test_a_serving_cell_is_checked_on_what_is_stored_and_says_what_it_read() -> None:
    run_ranks(2, cells, 2)


def lossy(rank: int, ranks: int) -> None:
    """A cache whose last page is lost is found, whatever it is stored as."""
    batch = BATCHES["decode"]
    mask, heads = causal_batch(batch), Heads(4, 2, 16)
    of = Problem(batch.tokens, heads, Scale(1, ranks), "float32", "forward", batch=batch)
    for storage in ("input", "float8"):
        serving = Serving(page=4, storage=storage)  # type: ignore[arg-type]
        work = Work(serving, of, lambda _: mask, Reference(), Lost(build_strategy(load("cp", "kvp"))), SETTINGS, 3)
        measured = measure_cell(work, Gang(rank, ranks, CPU, Groups(), []), lambda _: None)
        assert measured.check is not None
        assert measured.check.failures, storage


class Lost(Strategy):
    """A strategy whose caches lose their last token."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def unsupported(self, problem: Problem, mask: object) -> str | None:
        return None

    def start(self, *args: object) -> object:  # type: ignore[override]
        run = self._strategy.start(*args)  # type: ignore[arg-type]
        forward = run.forward

        def lossy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: torch.Tensor) -> object:
            k = k.clone()
            k[-1] = k[0]
            return forward(q, k, v, *more)

        run.forward = lossy  # type: ignore[method-assign, assignment]
        return run


@pytest.mark.gloo
def test_a_cache_that_loses_its_last_token_fails_the_check() -> None:
    run_ranks(2, lossy, 2)


def test_backward_is_refused_and_a_storage_that_there_is_not() -> None:
    batch = BATCHES["decode"]
    of = Problem(batch.tokens, Heads(4, 2, 8), Scale(1, 1), "float32", "forward_backward", batch=batch)
    strategy = build_strategy(load("cp", "none"))
    assert (
        Serving().unsupported(of, causal_batch(batch), Reference(), strategy, None)
        == "workload=serving has no backward: write direction=forward"
    )
    assert Serving().unsupported(replace(of, direction="forward"), causal_batch(batch), Reference(), strategy, None) is None
    with pytest.raises(ValueError, match="input, bfloat16, float8"):
        Serving(storage="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a page of 0 tokens"):
        Serving(page=0)
