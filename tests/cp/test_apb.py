"""APB on real gloo ranks: what each rank chooses, and results against dense float64 of the mask that these choices define."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lcbench.cp.apb import APB, APBRun
from lcbench.cp.base import Place
from lcbench.cp.compressors.base import Compressor
from lcbench.cp.compressors.key_norm import KeyNorm
from lcbench.cp.compressors.oracle import Oracle
from lcbench.cp.compressors.random import Random
from lcbench.cp.compressors.retaining_heads import RetainingHeads
from lcbench.kernels.base import Kernel, Unsupported
from lcbench.kernels.reference import Reference
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import Band, BandMask
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.problem import Batch, Heads, Problem, Requests, Scale
from lcbench.schedule.groups import Groups
from lcbench.testing.dense import dense_attention, dense_mask
from lcbench.testing.masks import causal_batch
from lcbench.testing.spawn import run_ranks
from tests.cp.test_star import BATCHES, BOUND, CPU, SHAPES, Capped, check_given, cuts, dense, is_prompt, summed, tensors

# Blocks of at least 4 tokens with an anchor of 2 and 2 that are passed, on up to 4 ranks; twice as long on 8.
PROMPTS = {
    "prompt": Batch((Requests(1, 61, 61),)),
    "prompts": Batch((Requests(1, 19, 19), Requests(1, 40, 40), Requests(2, 17, 17))),
    "decode": BATCHES["decode"],
    "mixed": Batch((Requests(1, 19, 19), Requests(2, 1, 14), Requests(1, 23, 23), Requests(1, 4, 9))),
}
LONGER = {
    "prompts": Batch((Requests(1, 90, 90), Requests(1, 43, 43))),
    "mixed": Batch((Requests(1, 39, 39), Requests(2, 1, 14), Requests(1, 83, 83))),
}
Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Expected = Callable[[Problem, Sample, NDArray[np.bool_], int, int], torch.Tensor]


def norms(problem: Problem, qkv: Sample, allowed: NDArray[np.bool_], begin: int, end: int) -> torch.Tensor:
    """(T, Hk)."""
    return -qkv[1][begin:end].square().sum(-1)


def masses(problem: Problem, qkv: Sample, allowed: NDArray[np.bool_], begin: int, end: int) -> torch.Tensor:
    """Softmax weight over the whole prompt from its last three queries, by one matrix of scores."""
    q, k, _ = qkv
    each = problem.heads.q // problem.heads.kv
    scores = torch.einsum("qhd,khd->hqk", q[-3:], k.repeat_interleave(each, 1)) * problem.softmax_scale
    if problem.softmax.softcap:
        scores = problem.softmax.softcap * torch.tanh(scores / problem.softmax.softcap)
    weights = torch.softmax(scores.masked_fill(~torch.from_numpy(allowed[-3:]), -torch.inf), -1)
    return weights.unflatten(0, (-1, each)).sum((1, 2)).T[begin:end]


def choices(problem: Problem, given: Sample, allowed: NDArray[np.bool_], apb: APB, expected: Expected) -> NDArray[np.bool_]:
    """bool (Hk, queries, keys): which keys each query sees because they were passed on, by the scores of ``expected``."""
    q, k, v = given
    ranks, batch, heads = problem.scale.world_size, problem.batch, problem.heads
    assert batch is not None
    found = np.zeros((heads.kv, problem.queries, problem.seqlen), dtype=bool)
    for i, (new, total) in enumerate(zip(batch.new.tolist(), batch.total.tolist(), strict=True)):
        if not is_prompt(new, total, ranks) or ranks == 1:
            continue
        q0, k0 = int(batch.q_bounds[i]), int(batch.k_bounds[i])
        rows, keys = slice(q0, q0 + new), slice(k0, k0 + total)
        edges = cuts(total, ranks)
        for rank in range(ranks - 1):
            begin, end = edges[rank] + (0 if rank else apb.anchor), edges[rank + 1]
            scores = expected(problem, (q[rows], k[keys], v[keys]), allowed[rows, keys], begin, end)
            for head in range(heads.kv):
                best = torch.argsort(scores[:, head], descending=True)[: apb.passing].numpy() + begin + k0
                found[head, q0 + end : q0 + total, best] = True
    return found


def near(problem: Problem, allowed: NDArray[np.bool_], apb: APB) -> NDArray[np.bool_]:
    """What each query sees of itself: block and anchor, or all of a request with a cache."""
    ranks, batch = problem.scale.world_size, problem.batch
    assert batch is not None
    found = allowed.copy()
    for i, (new, total) in enumerate(zip(batch.new.tolist(), batch.total.tolist(), strict=True)):
        q0, k0, edges = int(batch.q_bounds[i]), int(batch.k_bounds[i]), cuts(total, ranks)
        for rank in range(1, ranks if is_prompt(new, total, ranks) else 0):
            found[q0 + edges[rank] : q0 + edges[rank + 1], k0 + apb.anchor : k0 + edges[rank]] = False
    return found


def check(
    rank: int, problem: Problem, mask: BandMask, apb: APB, kernel: Kernel, groups: Groups, case: str, expected: Expected | None
) -> APBRun:
    ranks, heads = problem.scale.world_size, problem.heads
    assert apb.unsupported(problem, mask) is None, case
    q, k, v, sink = tensors(problem)
    allowed = dense_mask(mask.num_q, mask.num_k, mask)
    run = apb.start(problem, apb.computes(problem, mask), kernel, Place(rank, CPU, groups))
    held = run.held
    check_given(held.out.tokens, problem)
    assert len(set(held.q.tokens.tolist())) == len(held.q.tokens)
    given = q[held.q.tokens], k[held.kv.tokens], v[held.kv.tokens]
    out, saved = run.forward(*given, sink)
    counters = run.counters()
    chosen = run.chosen(saved)
    assert chosen is not None
    assert run.counters() == counters, case  # asking is no part of a pass
    by_head = np.stack([dense_mask(m.num_q, m.num_k, m) for m in chosen.masks])
    by_head = np.repeat(by_head, heads.kv // len(by_head), 0)
    base = near(problem, allowed, apb)
    assert not (base & ~by_head).any(), case
    passed = by_head & ~base
    if expected is not None:
        assert np.array_equal(passed, choices(problem, (q, k, v), allowed, apb, expected)), case
    check_passed(problem, passed, allowed, apb, case)
    want = dense(problem, (q, k, v, sink), np.repeat(by_head, heads.q // heads.kv, 0))
    for name, got, exact in (("out", out, want[0]), ("lse", run.lse(saved), want[1])):
        exact = exact[held.out.tokens]
        assert got.shape == exact.shape, (case, name)
        assert torch.allclose(got, exact, rtol=0, atol=BOUND), (case, name, (got - exact).abs().max())
    again, _ = run.forward(*given, sink)
    assert torch.equal(out, again), case
    assert summed(counters.pairs, ranks) == int(by_head.sum()) * heads.q // heads.kv, case
    assert counters.bytes_sent == bytes_of(problem, apb), case
    if run.negates and sink is None:
        negative, _ = run.forward(*(-x for x in given[:2]), -given[1][..., : heads.v] if heads.latent else -given[2])
        assert torch.equal(negative, -out), case
    for compute in (True, False):
        alone = run.replay(compute=compute, communicate=not compute)
        if alone is not None:
            alone.forward(*given, sink)
            prompts_only = 0 if compute else counters.bytes_sent - scores_bytes(problem, apb)
            assert run.counters().bytes_sent == prompts_only, case
    return run


def check_passed(problem: Problem, passed: NDArray[np.bool_], allowed: NDArray[np.bool_], apb: APB, case: str) -> None:
    """A query of block r sees ``passing`` keys of each block before it, none of them of the anchor; no other request sees any."""
    batch, ranks = problem.batch, problem.scale.world_size
    assert batch is not None
    assert not (passed & ~allowed).any(), case
    for i, (new, total) in enumerate(zip(batch.new.tolist(), batch.total.tolist(), strict=True)):
        q0, k0, edges = int(batch.q_bounds[i]), int(batch.k_bounds[i]), cuts(total, ranks)
        rows = passed[:, q0 : q0 + new]
        if not is_prompt(new, total, ranks):
            assert not rows.any(), case
            continue
        assert not rows[..., k0 : k0 + apb.anchor].any(), case
        for rank in range(ranks):
            for before in range(ranks):
                keys = slice(k0 + edges[before], k0 + edges[before + 1])
                count = rows[:, edges[rank] : edges[rank + 1], keys].sum(-1)
                assert (count == (apb.passing if before < rank else 0)).all(), (case, i, rank, before)


def prompts_of(problem: Problem) -> list[int]:
    """Tokens of each prompt."""
    batch = problem.batch
    assert batch is not None
    pairs = zip(batch.new.tolist(), batch.total.tolist(), strict=True)
    return [total for new, total in pairs if is_prompt(new, total, problem.scale.world_size)]


def scores_bytes(problem: Problem, apb: APB) -> int:
    asked = sum(min(apb.compressor.asks, total) for total in prompts_of(problem))
    return (problem.scale.world_size - 1) * asked * problem.heads.q * 8


def bytes_of(problem: Problem, apb: APB) -> int:
    """(P-1) passing Hk (D + Dv) b of each prompt, what the oracle tells, and partial results of requests with a cache."""
    heads, ranks, batch = problem.heads, problem.scale.world_size, problem.batch
    assert batch is not None
    values = 0 if heads.latent else heads.v
    passed = len(prompts_of(problem)) * apb.passing * heads.kv * (heads.dim + values) * 8
    others = problem.queries - sum(prompts_of(problem))
    return (ranks - 1) * (passed + others * heads.q * (heads.v + 1) * 8) + scores_bytes(problem, apb)


def everything(rank: int, ranks: int) -> None:
    groups, scale = Groups(), Scale(1, ranks)
    compressors: list[tuple[Compressor, Expected | None]] = [(Oracle(3), masses), (KeyNorm(), norms), (Random(1), None)]
    for place, (shape, (heads, softmax)) in enumerate(SHAPES.items()):
        kernel: Kernel = Capped() if softmax.softcap else Reference()
        for number, (name, batch) in enumerate((LONGER if ranks == 8 else PROMPTS).items()):
            problem = Problem(batch.tokens, heads, scale, "float64", "forward", batch=batch, softmax=softmax)
            for turn, (compressor, expected) in enumerate(compressors):
                if ranks > 2 and (turn + place + number) % 3 and turn:
                    continue  # the oracle meets every case, the others a third of them
                apb = APB(2, 2, compressor)
                check(rank, problem, causal_batch(batch), apb, kernel, groups, f"{apb} {shape} {name} P={ranks}", expected)
    draws(rank, ranks, groups)
    whole(rank, ranks, groups)


def draws(rank: int, ranks: int, groups: Groups) -> None:
    """Random keys follow from the seed alone: not from the inputs, and of each prompt, block and head they are others."""
    batch = Batch((Requests(2, 16 * ranks, 16 * ranks),))
    problem = Problem(batch.tokens, Heads(4, 4, 8), Scale(1, ranks), "float64", "forward", batch=batch)
    found = {}
    for seed in (0, 1):
        for data in (0, 1):
            run = APB(2, 5, Random(seed)).start(problem, causal_batch(batch), Reference(), Place(rank, CPU, groups))
            q, k, v, _ = tensors(problem, data)
            _, saved = run.forward(q[run.held.q.tokens], k[run.held.kv.tokens], v[run.held.kv.tokens])
            found[seed, data] = saved.passed
    if ranks == 1:
        assert found[0, 0] is None
        return
    assert torch.equal(found[0, 0], found[0, 1])
    assert not torch.equal(found[0, 0], found[1, 0])
    assert found[0, 0] is not None
    first, second = found[0, 0].sort(0).values.split(5)
    length = 16 + (18 - 16 if rank else 0)
    assert not torch.equal(first[:, 0], first[:, 1])
    assert not torch.equal(first, second - length)


def trained(rank: int, ranks: int, folder: Path) -> None:
    """The retaining heads of one layer of a file, against the same MLP written here."""
    from safetensors.torch import save_file

    groups, heads, batch = Groups(), Heads(4, 2, 12, 8), PROMPTS["mixed"]
    width = 4 * 12 + 2 * (12 + 8)
    problem = Problem(batch.tokens, heads, Scale(1, ranks), "float64", "forward", batch=batch)
    generator = torch.Generator().manual_seed(3)
    shapes = ("0", "fc1", (32, width)), ("0", "fc2", (2, 32)), ("1", "fc1", (32, width)), ("1", "fc2", (2, 32))
    weights = {
        f"model.layers.{layer}.self_attn.{name}.weight": torch.randn(shape, generator=generator, dtype=torch.float64) / 4
        for layer, name, shape in shapes
    }
    path = folder / f"heads{rank}.safetensors"
    save_file(weights, path)
    first, second = (weights[f"model.layers.1.self_attn.{name}.weight"] for name in ("fc1", "fc2"))
    apb = APB(2, 2, RetainingHeads(str(path), 1))
    mask = causal_batch(batch)
    run = check(rank, problem, mask, apb, Reference(), groups, f"{apb} P={ranks}", None)
    assert not run.negates
    q, k, v, _ = tensors(problem)
    _, saved = run.forward(q[run.held.q.tokens], k[run.held.kv.tokens], v[run.held.kv.tokens])
    assert saved.passed is not None
    passed = torch.from_numpy(run.held.kv.tokens)[saved.passed]
    total = int(batch.total[0])
    start, end = cuts(total, ranks)[rank : rank + 2]
    # A rank sees its own block alone: that of the first has the anchor in it, which counts in the pool and is not passed on.
    x = torch.cat([x[start:end].flatten(1) for x in (q, k, v)], 1) @ first.T
    scores = (x * torch.sigmoid(x)) @ second.T
    pooled = torch.stack([scores[max(0, i - 2) : i + 3].amax(0) for i in range(len(scores))])
    anchor = 0 if rank else 2
    for head in range(2):
        # Neighbours share a maximum, and any of them will do: the scores of what was chosen are compared.
        mine, best = pooled[passed[:2, head] - start, head], pooled[anchor:, head].topk(2).values
        assert torch.allclose(mine.sort(descending=True).values, best, rtol=0, atol=1e-12)
    for bad, words in (
        (RetainingHeads(str(path), 7), "has 0 weights"),
        (RetainingHeads(str(folder / "none.safetensors")), "is no file of safetensors"),
    ):
        with pytest.raises(Unsupported, match=words):
            APB(2, 2, bad).start(problem, mask, Reference(), Place(rank, CPU, groups))
    with pytest.raises(Unsupported, match="have 64 numbers in q, k and v"):
        apb.start(replace(problem, heads=Heads(4, 2, 8)), mask, Reference(), Place(rank, CPU, groups))
    dist.barrier()


def whole(rank: int, ranks: int, groups: Groups) -> None:
    """With all keys passed on it is the cell's own mask; a sequence that is no batch, in float32, on a kernel that takes pieces."""
    seqlen = 8 * ranks
    problem = Problem(seqlen, Heads(4, 2, 8), Scale(1, ranks), "float32", "forward")
    q, k, v, _ = tensors(problem)
    for mask in (causal(seqlen), full(seqlen)):
        apb = APB(2, 6, KeyNorm())
        run = apb.start(problem, mask, SDPAFlash(), Place(rank, CPU, groups))
        parts = [x.float() for x in (q[run.held.q.tokens], k[run.held.kv.tokens], v[run.held.kv.tokens])]
        out, saved = run.forward(*parts)
        chosen = run.chosen(saved)
        assert chosen is not None
        allowed = np.stack([dense_mask(m.num_q, m.num_k, m) for m in chosen.masks])
        block = np.arange(seqlen) // 8
        # Of the first block all but the anchor can be passed on, of the others six of eight.
        lower = allowed[:, 8:16, :8] if ranks > 1 else allowed
        assert ranks == 1 or lower.all()
        if ranks == 1:
            assert np.array_equal(allowed[0], dense_mask(seqlen, seqlen, mask))
        assert not allowed[:, block[:, None] < block].any(), "blocks after one's own are not seen"
        want, _ = dense_attention(q, k, v, np.repeat(allowed, 4 // len(allowed), 0), q.shape[-1] ** -0.5)
        assert torch.allclose(out.double(), want[run.held.out.tokens], atol=1e-5)


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_apb_matches_the_mask_that_its_choices_define(ranks: int) -> None:
    run_ranks(ranks, everything, ranks)


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [3])
def test_retaining_heads_score_as_their_weights_say(ranks: int, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    run_ranks(ranks, trained, ranks, tmp_path)


def test_apb_refuses_what_it_cannot_do() -> None:
    problem = Problem(64, Heads(4, 2, 8), Scale(1, 4), "float64", "forward")
    mask = causal(64)
    assert APB(4, 12).unsupported(problem, mask) is None
    assert APB(4, 13).unsupported(problem, mask) == "passing=13 is more than the 12 keys of a prompt's block beside its anchor"
    assert APB(17, 2).unsupported(problem, mask) == "anchor=17 is longer than the first block of a prompt, which has 16 tokens"
    assert "direction=forward" in str(APB(4, 2).unsupported(replace(problem, direction="forward_backward"), mask))
    window = BandMask.of(64, 64, [Band(0, 64, 0, 64, -40, 0)])
    assert "see all keys before their block" in str(APB(4, 2).unsupported(problem, window))
    assert APB(4, 2).unsupported(replace(problem, scale=Scale(1, 1)), window) is None
    decode = replace(problem, seqlen=128, batch=Batch((Requests(2, 1, 64),)))
    assert APB(4000, 2000).unsupported(decode, causal_batch(Batch((Requests(2, 1, 64),)))) is None
    for options, words in (((0, 2), "cp.anchor=0"), ((4, 0), "cp.passing=0")):
        with pytest.raises(ValueError, match=words):
            APB(*options)
    for wrong, words in (
        (lambda: Oracle(0), "compressor.sample=0"),
        (lambda: Random(-1), "compressor.seed=-1"),
        (lambda: RetainingHeads("x", -1), "compressor.layer=-1"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
