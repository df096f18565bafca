"""Star Attention on real gloo ranks, against dense float64 of the mask that defines it, written here point by point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lcbench.cp.base import Place
from lcbench.cp.star import Star
from lcbench.kernels.base import Gradients, Kernel, OutLse, Platform, Prepared, Saved
from lcbench.kernels.cache import Cache, CacheKind
from lcbench.kernels.reference import PreparedReference, Reference
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import Band, BandMask
from lcbench.masks.block_random import block_random
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.problem import PLAIN, Batch, Heads, Problem, Requests, Scale, Softmax
from lcbench.schedule.groups import Groups
from lcbench.schedule.verify import verify
from lcbench.testing.dense import dense_attention, dense_mask
from lcbench.testing.masks import causal_batch
from lcbench.testing.spawn import run_ranks

BOUND = 1e-12
CPU = torch.device("cpu")
BATCHES = {
    "prompt": Batch((Requests(1, 61, 61),)),
    "prompts": Batch((Requests(1, 17, 17), Requests(1, 40, 40), Requests(2, 9, 9))),
    "decode": Batch((Requests(3, 1, 33), Requests(1, 1, 2), Requests(1, 1, 1))),
    "chunks": Batch((Requests(1, 5, 30), Requests(2, 3, 50))),
    "mixed": Batch((Requests(1, 19, 19), Requests(2, 1, 14), Requests(1, 23, 23), Requests(1, 4, 9))),
}
SHAPES = {
    "MHA": (Heads(4, 4, 8), PLAIN),
    "GQA, sink": (Heads(4, 2, 8), Softmax(sink=True)),
    "MLA, own scale": (Heads(4, 4, 12, 8), Softmax(scale=0.3)),
    "latent, sink": (Heads(4, 1, 12, 8, latent=True), Softmax(sink=True)),
    "softcap": (Heads(4, 2, 8), Softmax(softcap=2.0)),
}


@dataclass(frozen=True)
class Capped(Kernel):
    """Attention by a whole matrix of scores, capped where it is asked for."""

    softcaps: ClassVar[bool] = True

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return None

    def prepare(self, mask: Any, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        return CappedCall(dense_mask(mask.num_q, mask.num_k, mask))


@dataclass(frozen=True)
class CappedCall(Prepared):
    allowed: NDArray[np.bool_]
    calls: int = 1

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        return dense_attention(q, k, v, self.allowed, softmax_scale, softcap=softcap)

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float) -> Gradients:
        raise NotImplementedError


def cuts(total: int, ranks: int) -> list[int]:
    """Where the blocks of so many tokens begin, and the end."""
    return [total * rank // ranks for rank in range(ranks + 1)]


def is_prompt(new: int, total: int, ranks: int) -> bool:
    return new == total >= ranks


def star_mask(problem: Problem, allowed: NDArray[np.bool_], anchor: int | None) -> NDArray[np.bool_]:
    """What is left of a dense mask of a problem: of a prompt a token's block and anchor, of any other request everything."""
    ranks = problem.scale.world_size
    batch = problem.batch or Batch((Requests(1, problem.seqlen, problem.seqlen),))
    found = np.zeros_like(allowed)
    for i, (new, total) in enumerate(zip(batch.new.tolist(), batch.total.tolist(), strict=True)):
        q0, k0 = int(batch.q_bounds[i]), int(batch.k_bounds[i])
        edges = cuts(total, ranks)
        for row in range(new):
            for key in range(total):
                block = next(r for r in range(ranks) if key < edges[r + 1] or r == ranks - 1)
                near = edges[block] <= row < edges[block + 1] or key < (edges[1] if anchor is None else anchor)
                found[q0 + row, k0 + key] = near or not is_prompt(new, total, ranks)
    return found & allowed


def dense(
    problem: Problem, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], allowed: NDArray[np.bool_]
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and LSE of a problem's tensors; ``allowed``: (queries, keys), or by query head."""
    q, k, v, sink = given
    return dense_attention(q, k, v, allowed, problem.softmax_scale, softcap=problem.softmax.softcap, sink=sink)


def tensors(problem: Problem, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q, k, v of the whole problem, and the sink if it has one."""
    generator, heads = torch.Generator().manual_seed(seed), problem.heads

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    q, k = drawn(problem.queries, heads.q, heads.dim), drawn(problem.seqlen, heads.kv, heads.dim)
    v = k[..., : heads.v] if heads.latent else drawn(problem.seqlen, heads.kv, heads.v)
    return q, k, v, drawn(heads.q) if problem.softmax.sink else None


def check_given(tokens: NDArray[np.int64], problem: Problem) -> None:
    """Each result is given by one rank."""
    every: list[Any] = [None] * problem.scale.world_size
    dist.all_gather_object(every, tokens)
    assert sorted(np.concatenate(every).tolist()) == list(range(problem.queries))


def summed(number: int, ranks: int) -> int:
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, number)
    return sum(every)


def check(rank: int, problem: Problem, mask: BandMask, star: Star, kernel: Kernel, groups: Groups, case: str) -> None:
    ranks, heads = problem.scale.world_size, problem.heads
    assert star.unsupported(problem, mask) is None, case
    computed = star.computes(problem, mask)
    assert isinstance(computed, BandMask)
    allowed = star_mask(problem, dense_mask(mask.num_q, mask.num_k, mask), star.anchor)
    assert np.array_equal(dense_mask(mask.num_q, mask.num_k, computed), allowed), case
    q, k, v, sink = tensors(problem)
    want = dense(problem, (q, k, v, sink), allowed)
    run = star.start(problem, computed, kernel, Place(rank, CPU, groups))
    held = run.held
    check_given(held.out.tokens, problem)
    given = q[held.q.tokens], k[held.kv.tokens], v[held.kv.tokens]
    out, saved = run.forward(*given, sink)
    for name, got, exact in (("out", out, want[0]), ("lse", run.lse(saved), want[1])):
        exact = exact[held.out.tokens]
        assert got.shape == exact.shape, (case, name)
        assert torch.allclose(got, exact, rtol=0, atol=BOUND), (case, name, (got - exact).abs().max())
    again, _ = run.forward(*given, sink)
    assert torch.equal(out, again), case
    counters = run.counters()
    others = sum(new for new, total in zip(*_sizes(problem), strict=True) if not is_prompt(new, total, ranks))
    assert counters.bytes_sent == (ranks - 1) * others * heads.q * (heads.v + 1) * 8, case
    assert counters.bytes_between_nodes == counters.bytes_sent // max(1, ranks - 1) * _elsewhere(problem), case
    assert summed(counters.pairs, ranks) == heads.q * int(allowed.sum()), case
    alone = run.replay(compute=False, communicate=True)
    assert (alone is not None) == (ranks > 1 and others > 0), case
    if alone is not None:
        alone.forward(*given, sink)
        sent = run.counters().bytes_sent
        assert sent == counters.bytes_sent, case
        quiet = run.replay(compute=True, communicate=False)
        assert quiet is not None
        quiet.forward(*given, sink)
        assert run.counters().bytes_sent == 0


def _sizes(problem: Problem) -> tuple[list[int], list[int]]:
    batch = problem.batch or Batch((Requests(1, problem.seqlen, problem.seqlen),))
    return batch.new.tolist(), batch.total.tolist()


def _elsewhere(problem: Problem) -> int:
    return problem.scale.world_size - problem.scale.gpus_per_node


@dataclass(frozen=True)
class OfCache(Reference):
    """The reference on what a cache holds, as a kernel that reads it where it lies."""

    def reads(self, kind: CacheKind, problem: Problem, platform: Platform) -> str | None:
        return None if kind.storage == "input" else "of another type"

    def prepare(self, mask: Any, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        return OfCacheCall(mask)


class OfCacheCall(PreparedReference):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        raise AssertionError("there is a cache")

    def forward_cache(self, q: torch.Tensor, cache: Cache, *, softmax_scale: float) -> OutLse:
        return PreparedReference.forward(self, q, *cache.read(), softmax_scale=softmax_scale)


def caches(rank: int, problem: Problem, groups: Groups) -> None:
    """Pages are read where they lie by a kernel that can; a copy of them by others, and where there are prompts."""
    for name in ("chunks", "mixed"):
        batch = BATCHES[name]
        problem = replace(problem, seqlen=batch.tokens, batch=batch)
        q, k, v, _ = tensors(problem)
        for kernel in (Reference(), OfCache()):
            run = Star().start(problem, causal_batch(batch), kernel, Place(rank, CPU, groups))
            q_own, k_own, v_own = q[run.held.q.tokens], k[run.held.kv.tokens], v[run.held.kv.tokens]
            kind = CacheKind(page=4)
            native = name == "chunks" and isinstance(kernel, OfCache)
            assert (run.reads(kind) is None) == native, (name, kernel)
            assert run.reads(CacheKind(storage="bfloat16")) is not None
            if name == "mixed" and isinstance(kernel, OfCache):
                continue  # without a cache it has nothing to read
            lengths = np.bincount(np.searchsorted(batch.k_bounds, run.held.kv.tokens, side="right") - 1, minlength=len(batch))
            cache = Cache.of(k_own, v_own, tuple(lengths.tolist()), kind)
            out, saved = run.forward_cache(q_own, cache)
            plain = Star().start(problem, causal_batch(batch), Reference(), Place(rank, CPU, groups))
            want, lse = plain.forward(q_own, k_own, v_own)
            assert torch.equal(out, want), (name, kernel)
            assert torch.equal(run.lse(saved), plain.lse(lse)), (name, kernel)


def everything(rank: int, ranks: int) -> None:
    groups = Groups()
    scale = Scale(2, ranks // 2) if ranks % 2 == 0 else Scale(1, ranks)
    for place, (shape, (heads, softmax)) in enumerate(SHAPES.items()):
        kernel: Kernel = Capped() if softmax.softcap else Reference()
        for name, batch in BATCHES.items():
            problem = Problem(batch.tokens, heads, scale, "float64", "forward", batch=batch, softmax=softmax)
            anchor = None if place % 2 else 1
            check(rank, problem, causal_batch(batch), Star(anchor), kernel, groups, f"{shape} {name} anchor={anchor} P={ranks}")
    # Sequences that are no batch, and masks that leave rows without keys or cut into blocks.
    problem = Problem(53, Heads(4, 2, 8), scale, "float64", "forward")
    holes = BandMask.of(53, 53, [Band(3, 9, 0, 5), Band(26, 50, 4, 26, hi=-2)])
    window = BandMask.of(53, 53, [Band(0, 53, 0, 53, -7, 2)])
    for name, mask in (("causal", causal(53)), ("full", full(53)), ("holes", holes), ("window", window)):
        for star in (Star(), Star(3)):
            check(rank, problem, mask, star, Reference(), groups, f"{name} {star} P={ranks}")
    flash(rank, replace(problem, dtype="float32"), groups)
    caches(rank, problem, groups)


def flash(rank: int, problem: Problem, groups: Groups) -> None:
    """In float32, on a kernel that takes pieces, partial results travel as reduce_dtype says."""
    batch = BATCHES["mixed"]
    mask = causal_batch(batch)
    problem = replace(problem, seqlen=batch.tokens, batch=batch)
    q, k, v, _ = tensors(problem)
    allowed = star_mask(problem, dense_mask(mask.num_q, mask.num_k, mask), None)
    want, _ = dense_attention(q, k, v, allowed, q.shape[-1] ** -0.5)
    others = sum(new for new, total in zip(*_sizes(problem), strict=True) if new < total)
    for dtype, reduce_dtype, size in (("float32", "float32", 4), ("bfloat16", "float32", 4), ("bfloat16", "input", 2)):
        kernel = SDPAFlash() if dtype == "float32" else Reference()
        cell = replace(problem, dtype=dtype, reduce_dtype=reduce_dtype)
        run = Star().start(cell, mask, kernel, Place(rank, CPU, groups))
        parts = [x.to(getattr(torch, dtype)) for x in (q[run.held.q.tokens], k[run.held.kv.tokens], v[run.held.kv.tokens])]
        out, saved = run.forward(*parts)
        assert out.dtype == parts[0].dtype
        assert run.lse(saved).dtype == torch.float32
        error = (out.double() - want[run.held.out.tokens]).abs().max() if len(out) else torch.zeros(())
        assert error <= (1e-5 if dtype == "float32" else 5e-2), (dtype, reduce_dtype, error)
        assert run.counters().bytes_sent == (problem.scale.world_size - 1) * others * 4 * (8 * size + 4)


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_star_attention_matches_the_mask_that_defines_it(ranks: int) -> None:
    run_ranks(ranks, everything, ranks)


def test_star_attention_refuses_what_it_cannot_do() -> None:
    problem = Problem(64, Heads(4, 2, 8), Scale(1, 4), "float64", "forward")
    assert Star().unsupported(problem, causal(64)) is None
    assert Star().unsupported(replace(problem, direction="forward_backward"), causal(64)) == (
        "is for inference and has no backward; direction=forward runs it"
    )
    assert Star(17).unsupported(problem, causal(64)) == "anchor=17 is longer than the first block of a prompt, which has 16 tokens"
    assert Star(16).unsupported(problem, causal(64)) is None
    blocks = block_random(64, heads=problem.heads, seed=(0, 0), density=0.5, block_size=8, sizes="uniform", per="all_heads")
    assert "dynamic block mask" in str(Star().unsupported(problem, blocks))
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"cp.anchor={bad} is no number of at least 1"):
            Star(bad)  # type: ignore[arg-type]


def test_the_work_of_a_prompt_is_a_share_of_full_attention() -> None:
    """At P ranks the middle blocks see one block whole and half of another: about 3 / P of the pairs of a causal mask."""
    for ranks in (4, 16, 64):
        problem = Problem(1 << 17, Heads(8, 8, 128), Scale(1, ranks), "bfloat16", "forward")
        mask = causal(problem.seqlen)
        computed = Star().computes(problem, mask)
        assert isinstance(computed, BandMask)
        block = problem.seqlen // ranks
        assert computed.area == (ranks - 1) * block**2 + ranks * block * (block + 1) // 2
        assert len(computed) <= 2 * ranks


@pytest.mark.parametrize("anchor", [None, 3])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_prompts_are_modelled_by_a_schedule_that_is_proven(anchor: int | None, ranks: int) -> None:
    """It has the pairs of the blocks, and those of the anchor's own queries on every rank but the first."""
    for batch in (None, BATCHES["prompts"]):
        seqlen = 61 if batch is None else batch.tokens
        mask = causal(61) if batch is None else causal_batch(batch)
        problem = Problem(seqlen, Heads(4, 2, 8), Scale(1, ranks), "bfloat16", "forward", batch=batch)
        star = Star(anchor and min(anchor, 9 // ranks))
        found = star.modelled(problem, mask)
        assert found is not None
        cost = verify(found.schedule, found.mask, found.problem)
        blocks = [total // ranks for total in (batch.total.tolist() if batch else [61])]
        anchors = [block if star.anchor is None else star.anchor for block in blocks]
        again = (ranks - 1) * sum(anchor * (anchor + 1) // 2 for anchor in anchors)
        computed = star.computes(problem, mask)
        assert isinstance(computed, BandMask)
        assert cost.rank_pairs.sum() == 4 * (computed.area + again)
        assert not cost.forward_bytes.any()
    batch = BATCHES["decode"]
    assert Star().modelled(replace(problem, seqlen=batch.tokens, batch=batch), causal_batch(batch)) is None
