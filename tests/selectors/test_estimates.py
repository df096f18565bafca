"""SALE, AdaSpa and DSV against their definitions written down once more: loops over queries, blocks and keys, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.inputs.base import Wanted
from lcbench.inputs.structured import Structured
from lcbench.masks.band import Band, BandMask
from lcbench.masks.block import Keep
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.masks.sliding_window import sliding_window
from lcbench.problem import Heads, Problem, Scale, Softmax
from lcbench.selectors.adaspa import AdaSpa
from lcbench.selectors.base import Features, Rows, Selector, block_edges
from lcbench.selectors.dsv import Dsv, predictors
from lcbench.selectors.oracle import Oracle
from lcbench.selectors.partial import hide, runs
from lcbench.selectors.random import Random
from lcbench.selectors.sale import Sale, exact_products, quantised_keys, quantised_queries, unpacked
from lcbench.testing.selecting import choose, rows_of, told
from tests.selectors import dense
from tests.selectors.dense import Bools, Floats

HEADS = Heads(4, 2, 13)  # an odd number of 4 bits
MASKS: dict[str, Callable[[int], BandMask]] = {
    "causal": causal,
    "full": full,
    "window": lambda n: sliding_window(n, left=30, right=9),
}
LENGTHS = (96, 101, 5)  # whole blocks, ragged ones, less than one


def problem(seqlen: int, heads: Heads = HEADS, dtype: str = "float64", **options: Any) -> Problem:
    return Problem(seqlen, heads, Scale(1, 1), dtype, "forward", **options)


def inputs(seqlen: int, heads: Heads = HEADS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k whose mean is not 0: what smoothing is there for."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return tuple(1.5 * normal(seqlen, n, heads.dim) + 2 * normal(n, heads.dim) for n in (heads.q, heads.kv))


def known(selector: Selector, of: Problem, mask: BandMask, q: torch.Tensor, k: torch.Tensor) -> tuple[list[Rows], Features]:
    """All blocks of queries, and what ranks know before they choose."""
    edges, k_edges = block_edges(len(q), selector.q_block), block_edges(len(k), selector.k_block)
    rows, found = [rows_of(number, q, mask, edges, k_edges) for number in range(len(edges) - 1)], Features()
    for one in selector.rounds(of):
        found = one.all(found | told(one, rows, k, k_edges, found), k_edges)
    return rows, found


def lse_of(q: torch.Tensor, k: torch.Tensor, mask: BandMask, of: Problem) -> torch.Tensor:
    """(T, Hq), -inf for a query without keys."""
    each, cap = q.shape[1] // k.shape[1], of.softmax.softcap
    found = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(each, 1)) * of.softmax_scale
    found = cap * torch.tanh(found / cap) if cap else found
    return found.masked_fill(~torch.from_numpy(dense.visible(mask)), -torch.inf).logsumexp(-1).T


# SALE


def four_bits(rest: Floats) -> tuple[Floats, np.float32]:
    """Whole numbers -7 ... 7, a half to the even one, and their scale."""
    scale = np.float32(np.abs(rest).max(initial=0.0)) / np.float32(7)
    scale = scale if scale else np.float32(1)
    return np.rint(rest.astype(np.float32) / scale).astype(np.float64), scale


def estimates(q: Floats, k: Floats, q_block: int, k_block: int, scale: float, cap: float) -> Floats:
    """(Hq, queries, keys): scores of 4 bits as SALE's code has them."""
    each = q.shape[1] // k.shape[1]
    found = np.zeros((q.shape[1], len(q), len(k)))
    means = q.astype(np.float32).mean(0, dtype=np.float64), k.astype(np.float32).mean(0, dtype=np.float64)
    for h in range(q.shape[1]):
        for row in dense.blocks(len(q), q_block):
            for first in range(row.start, row.stop, 16):
                warp = range(first, min(first + 16, row.stop))
                mean = means[0][h].astype(np.float32)
                own, unit = four_bits(q[warp, h].astype(np.float32) - mean)
                for column in dense.blocks(len(k), k_block):
                    rest = k[column, h // each].astype(np.float32) - means[1][h // each].astype(np.float32)
                    others, step = four_bits(rest)
                    shift = np.rint((rest @ mean) / (unit * step))
                    found[h, warp.start : warp.stop, column.start : column.stop] = (own @ others.T + shift) * float(unit * step)
    found *= scale
    return cap * np.tanh(found / cap) if cap else found


def region_of(seen: Bools, rows: list[range], columns: list[range], sink: int, local: int) -> Bools:
    """(rows of blocks, columns of blocks): the first seen ones, and those near the queries' own tokens."""
    found = np.zeros_like(seen)
    for i, row in enumerate(rows):
        found[i, np.nonzero(seen[i])[0][:sink]] = True
        own = [j for j, column in enumerate(columns) if set(row) & set(column)]
        found[i] |= [any(abs(j - o) < local for o in own) and seen[i, j] for j in range(len(columns))]
    return found


def relative(scores: Floats, allowed: Bools, region: Bools, rows: list[range], columns: list[range]) -> Floats:
    """(Hq, rows of blocks, columns of blocks): logarithms of the highest relative attention scores."""
    found = np.full((len(scores), *region.shape), -np.inf)
    for h, i in np.ndindex(len(scores), len(rows)):
        for t in rows[i]:
            weights = [np.exp(scores[h, t, s]) for j in np.nonzero(region[i])[0] for s in columns[j] if allowed[t, s]]
            for j, column in enumerate(columns):
                for s in column:
                    if allowed[t, s]:
                        found[h, i, j] = max(found[h, i, j], scores[h, t, s] - np.log(sum(weights)) if weights else np.inf)
    return found


@pytest.mark.parametrize("per", ["q_head", "kv_head", "all_heads"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_sale_keeps_blocks_with_a_pair_above_the_threshold(seqlen: int, name: str, per: Any) -> None:
    """The threshold lies between two scores, so half of the blocks that are not always kept are."""
    mask, (q, k) = MASKS[name](seqlen), inputs(seqlen)
    of = problem(seqlen, softmax=Softmax(softcap=0.0 if per == "q_head" else 30.0))
    rows, columns, allowed = dense.blocks(seqlen, 24), dense.blocks(seqlen, 9), dense.visible(mask)
    seen = np.array([[allowed[np.ix_(row, column)].any() for column in columns] for row in rows])
    region = region_of(seen, rows, columns, 1, 1)
    scores = estimates(q.numpy(), k.numpy(), 24, 9, of.softmax_scale, of.softmax.softcap)
    wanted = relative(scores, allowed, region, rows, columns)
    wanted = wanted.reshape({"q_head": 4, "kv_head": 2, "all_heads": 1}[per], -1, *region.shape).max(1)
    others = np.sort(wanted[:, seen & ~region], axis=None)
    middle = float(others[len(others) // 2 - 1 :][:2].mean()) if len(others) else 0.0
    selector = Sale(threshold=float(np.exp(middle)), sink=1, local=1, q_block=24, k_block=9, per=per)
    blocks, features = known(selector, of, mask, q, k)
    found = np.stack([selector.score(row, features, block_edges(seqlen, 9), of).numpy() for row in blocks], 1)
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=0)
    kept = choose(selector, of, mask, q, k)
    np.testing.assert_array_equal(kept, (wanted >= middle) & seen | region)
    assert (kept & ~region).sum() == -(-len(others) // 2)


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 70),
    block=st.sampled_from((8, 16, 32)),
    dim=st.integers(1, 17),
    flat=st.booleans(),
)
def test_keys_of_four_bits_are_whole_and_near(tokens: int, block: int, dim: int, flat: bool) -> None:
    """Packed two in a byte and back; off by half a step at most, and by nothing where all are the same."""
    random = np.random.default_rng(tokens)
    k = (np.ones((tokens, 2, dim)) if flat else random.normal(size=(tokens, 2, dim))).astype(np.float32)
    mean = k.mean(0)
    edges = block_edges(tokens, block)
    told = quantised_keys(torch.from_numpy(k), np.diff(edges), {"k_mean": torch.from_numpy(mean), "q_mean": torch.zeros(4, dim)})
    assert told["k4"].dtype == torch.uint8
    assert told["k4"].shape == (tokens, 2, -(-dim // 2))  # half a byte a number
    found = unpacked(told | {"q_mean": torch.zeros(4, dim)}, (len(edges) - 1) * block, dim)
    whole, scale = found["k4"].numpy()[:, :tokens, :dim], found["k_scale"].numpy()
    for h in range(2):
        for j, column in enumerate(dense.blocks(tokens, block)):
            wanted, step = four_bits(k[column, h] - mean[h])
            np.testing.assert_array_equal(whole[h, column], wanted)
            assert scale[h, j] == step
            assert np.abs(wanted).max() == (7 if np.abs(k[column, h] - mean[h]).max() else 0)
            assert np.abs(wanted * float(step) - (k[column, h] - mean[h])).max() <= step * 0.5001


def test_queries_of_four_bits_have_a_scale_per_warp() -> None:
    random = np.random.default_rng(0)
    q, mean = random.normal(size=(41, 3, 13)).astype(np.float32), random.normal(size=(3, 13)).astype(np.float32)
    found, scale = quantised_queries(torch.from_numpy(q), torch.from_numpy(mean))
    assert (found.shape, scale.shape) == ((3, 48, 16), (3, 3))
    for h in range(3):
        for number, warp in enumerate(dense.blocks(41, 16)):
            wanted, step = four_bits(q[warp, h] - mean[h])
            np.testing.assert_array_equal(found[h, warp.start : warp.stop, :13].numpy(), wanted)
            assert scale[h, number] == step


def test_scores_of_four_bits_are_off_by_no_more_than_roundings_and_by_less_than_without_smoothing() -> None:
    """Half a step of each number, times the other one; and half a step of both scales for the mean query's product."""
    q, k = (x.numpy() for x in inputs(128, Heads(2, 1, 64)))
    rest_q, rest_k = q - q.mean(0), k[:, 0] - k[:, 0].mean(0)
    error = np.abs(estimates(q, k, 64, 32, 1.0, 0.0) - np.einsum("thd,sd->hts", q, rest_k))
    coarse = np.zeros_like(error)
    for h in range(2):
        for row in dense.blocks(128, 16):
            for column in dense.blocks(128, 32):
                tile = h, slice(row.start, row.stop), slice(column.start, column.stop)
                unit, step = (four_bits(x)[1] for x in (rest_q[row, h], rest_k[column]))
                sums = np.abs(rest_q[row, h]).sum(1)[:, None] * step + np.abs(rest_k[column]).sum(1) * unit
                assert (error[tile] <= 0.5 * (sums + unit * step * (1 + 64 / 2)) * 1.0001).all()
                (own, unit), (others, step) = four_bits(q[row, h]), four_bits(rest_k[column])
                coarse[tile] = np.abs(own @ others.T * float(unit * step) - q[row, h] @ rest_k[column].T)
    assert error.mean() < 0.7 * coarse.mean()


@pytest.mark.parametrize("dim", [8, 72, 1024])
def test_products_of_4_bits_are_exact(dim: int) -> None:
    random = torch.Generator().manual_seed(dim)
    a, b = (torch.randint(-8, 8, (rows, dim), dtype=torch.int8, generator=random) for rows in (17, 40))
    a[0], b[0] = -8, -8  # the largest sum there is
    found = exact_products(a, b)
    assert found.dtype == torch.int32
    assert torch.equal(found, torch._int_mm(a, b.T))
    assert torch.equal(found.long(), a.long() @ b.long().T)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [causal, full])
@pytest.mark.parametrize("per", ["q_head", "all_heads"])
def test_calibrated_thresholds_reach_the_density_of_the_samples_exactly_and_of_all_about(mask: Any, per: Any) -> None:
    of, (q, k) = problem(4096, Heads(4, 2, 32), "float32"), drawn(4096, Heads(4, 2, 32))
    seen = np.array([(row.pairs > 0).sum() for row in known(Sale(threshold=1.0), of, mask(4096), q, k)[0]])
    for density in (0.1, 0.3):
        wanted = np.maximum(1, np.round(density * seen))
        every = choose(Sale(density=density, sample=64, per=per), of, mask(4096), q, k)  # there are 64 blocks of queries
        np.testing.assert_array_equal(every.sum((1, 2)), np.full(len(every), wanted.sum()))
        some = choose(Sale(density=density, sample=32, per=per), of, mask(4096), q, k)
        np.testing.assert_allclose(some.sum((1, 2)) / wanted.sum(), 1, atol=0.15)
        rows = np.arange(1, 64, 2)  # evenly apart
        np.testing.assert_array_equal(some[:, rows].sum((1, 2)), np.full(len(some), wanted[rows].sum()))


def test_a_query_that_sees_nothing_of_the_region_keeps_what_it_sees() -> None:
    """Its weights have nothing to be compared with."""
    mask = BandMask.of(64, 64, [Band(0, 16, 32, 64), Band(16, 64, 0, 64)])
    q, k = inputs(64)
    kept = choose(Sale(threshold=1e6, sink=0, local=1, q_block=32, k_block=8), problem(64), mask, q, k)
    assert kept[:, 0, 4:].all()
    assert kept[:, 1].sum(1).tolist() == [4] * 4  # only its region: no score is so far above


# AdaSpa


@pytest.mark.parametrize("per", ["q_head", "kv_head", "all_heads"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_adaspa_keeps_as_few_blocks_as_have_the_weight(seqlen: int, name: str, per: Any) -> None:
    """Block sums by an LSE of other inputs, and the fewest of the highest; sinks and own blocks first."""
    mask, (q, k) = MASKS[name](seqlen), inputs(seqlen)
    of = problem(seqlen, softmax=Softmax(softcap=25.0))
    lse = lse_of(*inputs(seqlen, seed=1), mask, of)
    allowed, rows, columns = dense.visible(mask), dense.blocks(seqlen, 16), dense.blocks(seqlen, 8)
    scores = np.einsum("tgjd,sgd->gjts", q.numpy().reshape(seqlen, 2, 2, 13), k.numpy()).reshape(4, seqlen, seqlen)
    weights = np.where(allowed, np.exp(25 * np.tanh(scores * of.softmax_scale / 25) - lse.numpy().T[..., None]), 0)
    for sink, most in ((0, 1.0), (1, 0.4)):
        selector = AdaSpa(recall=0.7, density=most, sink=sink, local=sink, q_block=16, k_block=8, per=per)
        sums = dense.shared(dense.pooled(weights, 16, 8), selector.maps(HEADS))
        kept = choose(selector, of, mask, q, k, lse)
        seen = dense.pooled(allowed[None].astype(float), 16, 8)[0] > 0
        always = region_of(seen, rows, columns, sink, sink)
        for m, i in np.ndindex(kept.shape[:2]):
            budget = max(1, round(most * seen[i].sum()))
            order = sorted(np.nonzero(seen[i])[0], key=lambda j: (not always[i, j], -sums[m, i, j], j))
            fewest = next(n for n in range(1, len(order) + 1) if sums[m, i, order[:n]].sum() >= 0.7 * sums[m, i].sum())
            wanted = set(order[: max(always[i].sum(), min(fewest, budget))])
            if set(np.nonzero(kept[m, i])[0]) != wanted:  # more only where a query would have been left without a key
                have = [any(allowed[t, s] for j in wanted for s in columns[j]) for t in rows[i]]
                assert not all(got or not allowed[t].any() for got, t in zip(have, rows[i], strict=True))


def test_adaspa_with_the_lse_of_the_same_inputs_is_the_oracle() -> None:
    """Sums of exp(s - LSE) are softmax weights then, so as many blocks are the same ones."""
    for mask in (causal(301), full(301)):
        q, k = inputs(301)
        of, sizes = problem(301), {"q_block": 32, "k_block": 16}
        kept = choose(AdaSpa(recall=1, density=0.3, **sizes), of, mask, q, k, lse_of(q, k, mask, of))
        np.testing.assert_array_equal(kept, choose(Oracle(density=0.3, **sizes), of, mask, q, k))


def test_heads_keep_as_many_blocks_as_they_need() -> None:
    """A head whose weight is on few keys keeps few, one whose weight is on all keeps as large a share as it is to have."""
    q, k = inputs(512, Heads(2, 1, 16))
    q[:, 1] *= 0.01
    of, mask = problem(512, Heads(2, 1, 16)), full(512)
    kept = choose(AdaSpa(recall=0.9, q_block=64, k_block=16), of, mask, q, k, lse_of(q, k, mask, of))
    few, many = kept.sum((1, 2)) / kept[0].size
    assert few < 0.7
    assert 0.85 < many < 0.95


# DSV


@pytest.mark.parametrize("per", ["q_head", "kv_head", "all_heads"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_dsv_of_the_heads_own_rank_keeps_the_exact_critical_keys(seqlen: int, name: str, per: Any) -> None:
    """A group's mean query has its exact top keys, and blocks are kept by their softmax weights."""
    mask, (q, k) = MASKS[name](seqlen), inputs(seqlen)
    of = problem(seqlen)
    selector = Dsv(rank=13, critical=0.3, group=4, sample=7, density=0.4, q_block=18, k_block=8, per=per)
    allowed, columns = dense.visible(mask), dense.blocks(seqlen, 8)
    found = np.zeros((4, len(dense.blocks(seqlen, 18)), len(columns)))
    for h in range(4):
        for i, row in enumerate(dense.blocks(seqlen, 18)):
            for first in range(row.start, row.stop, 4):
                group = range(first, min(first + 4, row.stop))
                keys = np.nonzero(allowed[group].any(0))[0]
                scores = k.numpy()[keys, h // 2] @ q.numpy()[group, h].mean(0) * of.softmax_scale
                critical = np.argsort(-scores)[: max(1, round(0.3 * len(keys)))]
                weights = np.exp(scores[critical] - scores.max())
                np.add.at(found[h, i], keys[critical] // 8, weights / weights.sum())
    kept = choose(selector, of, mask, q, k)
    seen = dense.pooled(allowed[None].astype(float), 18, 8)[0] > 0
    wanted = dense.best(dense.shared(found, selector.maps(HEADS)), seen, lambda n: max(1, round(0.4 * n)), np.zeros_like(seen))
    different = np.nonzero((kept != wanted).any(2))
    for m, i in zip(*different, strict=True):  # only where a query would have been left without a key
        row = dense.blocks(seqlen, 18)[i]
        sees = [any(allowed[t, s] for j in np.nonzero(wanted[m, i])[0] for s in columns[j]) for t in row]
        assert not all(sees)
    assert len(different[0]) <= kept[:, :, 0].size // 3


@settings(max_examples=30)
@given(seed=st.integers(0, 99), rank=st.integers(1, 8))
def test_no_predictions_of_that_rank_are_nearer_in_the_mean(seed: int, rank: int) -> None:
    """The error is what the singular values that are left out say. Neither other matrices nor what keys alone say do better."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(2, 8, 8))
    q, k = (random.normal(size=(400, heads, 8)) @ mix[i] for i, heads in ((0, 2), (1, 1)))
    found = {name: x.numpy()[0] for name, x in predictors(torch.from_numpy(q), torch.from_numpy(k), rank).items()}
    centred = k[:, 0] - k[:, 0].mean(0)

    def error(w_q: Floats, w_k: Floats) -> float:
        return float(np.mean([np.square(q[:, h] @ (np.eye(8) - w_q @ w_k.T) @ centred.T).mean() for h in range(2)]))

    best = error(found["w_q"], found["w_k"])
    np.testing.assert_allclose(found["k_mean"][0], k[:, 0].mean(0))
    if rank == 8:
        assert best < 1e-12 * np.square(q).mean()
        return
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :rank]
    assert best <= error(axes, axes) * (1 + 1e-4)  # principal axes of the keys
    for _ in range(5):
        w_q, w_k = (found[name] + 0.05 * random.normal(size=(8, rank)) for name in ("w_q", "w_k"))
        assert best <= error(w_q, w_k) * (1 + 1e-4)
    of_q, of_k = (np.linalg.cholesky(x.T @ x / len(x)) for x in (q.reshape(-1, 8), centred))
    left = np.linalg.svd(of_q.T @ of_k)[1][rank:]
    np.testing.assert_allclose(best, np.square(left).sum(), rtol=1e-3)


def test_dsv_tells_only_low_ranks_and_a_sample() -> None:
    of, (q, k) = problem(320, Heads(4, 2, 16), "bfloat16"), (x.bfloat16() for x in inputs(320, Heads(4, 2, 16)))
    selector = Dsv(rank=4, sample=50, density=0.2, q_block=64, k_block=32)
    edges, found, sizes = block_edges(320, 32), Features(), []
    rows = [rows_of(number, q, causal(320), block_edges(320, 64), edges) for number in range(5)]
    for one in selector.rounds(of):
        now = told(one, rows, k, edges, found)
        sizes.append({name: (tuple(x.shape), x.dtype) for name, x in now.items()})
        found = one.all(found | now, edges)
    assert sizes == [
        {"k_sample": ((10, 5, 2, 16), torch.bfloat16), "q_sample": ((5, 10, 4, 16), torch.bfloat16)},
        {"k_low": ((320, 2, 4), torch.bfloat16)},
    ]


# All


@cache
def drawn(seqlen: int, heads: Heads, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k with structure, float32."""
    of = problem(seqlen, heads, "float32")
    wanted = [Wanted(name, np.arange(seqlen), of, 0, torch.device("cpu"), step=step) for name in ("q", "k")]
    return tuple(Structured().draw(one) for one in wanted)


def weight(kept: Keep, masses: Floats) -> float:
    """The share of the softmax weight (Hq, rows of blocks, columns of blocks) that is in blocks that are kept."""
    return float((masses * kept.repeat(len(masses) // len(kept), 0)).sum() / masses.sum())


@pytest.mark.slow
@pytest.mark.parametrize("mask", [causal, full])
@pytest.mark.parametrize("density", [0.1, 0.2])
def test_with_structure_each_finds_nearly_what_the_oracle_finds_and_far_more_than_chance(mask: Any, density: float) -> None:
    """Recall at the same number of blocks in each row of blocks as the oracle is given; AdaSpa with the LSE of a step before."""
    heads, sizes, shown = Heads(4, 2, 32), {"q_block": 64, "k_block": 32}, mask(2048)
    of, (q, k) = problem(2048, heads, "float32"), drawn(2048, heads)
    masses = dense.pooled(dense.weights(q.double().numpy(), k.double().numpy(), of.softmax_scale, dense.visible(shown)), 64, 32)
    before = lse_of(*drawn(2048, heads, step=1), shown, of)
    chance = weight(choose(Random(density=density, **sizes), of, shown, q, k), masses)
    selectors: dict[str, Selector] = {
        "sale": Sale(density=density, **sizes),
        "adaspa": AdaSpa(density=density, recall=1, **sizes),
        "dsv": Dsv(density=density, rank=8, **sizes),
    }
    for name, selector in selectors.items():
        kept = choose(selector, of, shown, q, k, before if selector.needs_lse else None)
        order = -np.sort(-masses, axis=2)
        most = sum(order[m, i, : kept[m, i].sum()].sum() for m, i in np.ndindex(kept.shape[:2])) / masses.sum()
        found = weight(kept, masses)
        said = f"{name}: {found:.3f} of {most:.3f}, by chance {chance:.3f}"
        assert chance + 0.25 < found <= most + 1e-9, said
        assert found > {"sale": 0.6, "adaspa": 0.97, "dsv": 0.85}[name] * most, said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": Sale, "threshold": 0.1, "density": 0.2}, "selector.threshold=0.1 and selector.density=0.2: set one of them"),
        ({"name": Sale}, "selector.threshold=null and selector.density=null: set one of them"),
        ({"name": Sale, "threshold": 0}, "selector.threshold=0 is no number above 0, such as 0.004"),
        ({"name": Sale, "threshold": "auto"}, "selector.threshold=auto is no number above 0"),
        ({"name": Sale, "density": 0}, "selector.density=0 is no share above 0"),
        ({"name": Sale, "density": 0.2, "sink": 0, "local": 0}, "selector.sink=0 and selector.local=0 leave no blocks"),
        ({"name": Sale, "density": 0.2, "sample": 0}, "selector.sample=0 is no whole number of at least 1"),
        ({"name": Sale, "density": 0.2, "local": -1}, "selector.local=-1 is no whole number of at least 0"),
        ({"name": AdaSpa, "recall": 0}, "selector.recall=0 is no share above 0"),
        ({"name": AdaSpa, "recall": 1.1}, "selector.recall=1.1 is no share above 0"),
        ({"name": Dsv, "density": 0.2, "rank": 0}, "selector.rank=0 is no whole number of at least 1"),
        ({"name": Dsv, "density": 0.2, "group": 0}, "selector.group=0 is no whole number"),
        ({"name": Dsv, "density": 0.2, "critical": 2}, "selector.critical=2 is no share above 0"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        options.pop("name")(**options)


def test_a_rank_above_the_heads_is_refused() -> None:
    of = problem(64)
    assert Dsv(density=0.5, rank=14).unsupported(of) == "selector.rank=14 is more than the 13 numbers of a head of heads=4x2x13"
    assert Dsv(density=0.5, rank=13).unsupported(replace(of)) is None


@settings(max_examples=50)
@given(seed=st.integers(0, 999), most=st.integers(1, 5))
def test_runs_are_adjacent_blocks_and_all_of_them(seed: int, most: int) -> None:
    blocks = np.random.default_rng(seed).random(20) < 0.6
    found = list(runs(blocks, most))
    assert [at for one in found for at in one] == np.nonzero(blocks)[0].tolist()
    assert all(1 <= len(one) <= most for one in found)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("name", MASKS)
def test_what_no_query_of_a_group_sees_is_hidden(name: str, group: int) -> None:
    mask, edges = MASKS[name](61), block_edges(61, 7)
    allowed = dense.visible(mask)
    for number, row in enumerate(dense.blocks(61, 18)):
        rows = rows_of(number, torch.zeros(61, 1, 1), mask, block_edges(61, 18), edges)
        groups = [allowed[row.start + at : min(row.start + at + group, row.stop)].any(0) for at in range(0, len(row), group)]
        for columns in (range(9), range(2, 6)):
            keys = slice(edges[columns.start], edges[columns.stop])
            x = torch.ones(2, len(groups), keys.stop - keys.start)
            found = hide(x, rows, edges, columns, -1.0, group)
            np.testing.assert_array_equal(found[1].numpy() == 1, np.array(groups)[:, keys])
