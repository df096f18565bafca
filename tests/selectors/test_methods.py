"""Each method keeps what its paper's equations keep, written down once more; the oracle keeps the best there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from lcbench.masks.band import BandMask
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.masks.sliding_window import sliding_window
from lcbench.problem import Heads, Problem, Scale, Softmax
from lcbench.selectors.choosing import Budgeted
from lcbench.selectors.moba import Moba
from lcbench.selectors.nsa import Nsa
from lcbench.selectors.oracle import Oracle
from lcbench.selectors.random import Random
from lcbench.selectors.topk import TopK, rotation
from lcbench.testing.selecting import choose
from tests.selectors import dense
from tests.selectors.dense import Bools, Floats

HEADS = Heads(4, 2, 16)
MASKS: dict[str, Callable[[int], BandMask]] = {
    "causal": causal,
    "full": full,
    "window": lambda n: sliding_window(n, left=40, right=0),
}
LENGTHS = (96, 101, 5)  # whole blocks, ragged ones, less than one


def problem(seqlen: int, heads: Heads = HEADS, **options: Any) -> Problem:
    return Problem(seqlen, heads, Scale(1, 1), "float64", "forward", **options)


def inputs(seqlen: int, heads: Heads = HEADS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(seqlen, n, heads.dim, dtype=torch.float64, generator=generator) * 1.5 for n in (heads.q, heads.kv))


def expected(selector: Budgeted, scores: Floats, mask: BandMask) -> Bools:
    """What is to be kept by dense scores of query heads, or maps."""
    scores = dense.shared(scores, selector.maps(HEADS))
    rows, columns = dense.blocks(mask.num_q, selector.q_block), dense.blocks(mask.num_k, selector.k_block)
    allowed = dense.visible(mask)
    seen = np.array([[allowed[np.ix_(row, column)].any() for column in columns] for row in rows])
    always = np.zeros_like(seen)
    for i, row in enumerate(rows):
        always[i, np.nonzero(seen[i])[0][: selector.sink]] = True
        own = [j for j, column in enumerate(columns) if set(row) & set(column)]
        for j in range(len(columns)):
            near = selector.local and any(abs(j - o) < selector.local for o in own)
            always[i, j] |= bool(near and seen[i, j])
    wanted = (lambda n: selector.blocks) if selector.blocks else (lambda n: max(1, round(selector.density * n)))
    return dense.best(scores, seen, wanted, always)


@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("per", ["q_head", "kv_head", "all_heads"])
def test_oracle_keeps_what_dense_softmax_says(seqlen: int, name: str, per: Any) -> None:
    mask, of = MASKS[name](seqlen), problem(seqlen, softmax=Softmax(softcap=20.0))
    q, k = inputs(seqlen)
    selector = Oracle(density=0.4, q_block=8, k_block=8, per=per)
    scores = np.einsum("tgjd,sgd->gjts", q.numpy().reshape(seqlen, 2, 2, 16), k.numpy()).reshape(4, seqlen, seqlen) / 4
    masses = dense.pooled(dense.softmax(20 * np.tanh(scores / 20), dense.visible(mask)), 8, 8)
    np.testing.assert_array_equal(choose(selector, of, mask, q, k), expected(selector, masses, mask))


@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("name", MASKS)
def test_moba_keeps_what_its_gate_says(seqlen: int, name: str) -> None:
    mask, (q, k) = MASKS[name](seqlen), inputs(seqlen)
    selector = Moba(blocks=3, local=1, q_block=16, k_block=16)
    scores = dense.moba(q.numpy(), k.numpy(), 16, 16)
    np.testing.assert_array_equal(choose(selector, problem(seqlen), mask, q, k), expected(selector, scores, mask))


def test_a_block_of_one_query_has_the_gate_of_the_paper() -> None:
    """Equations 5 to 7: the top blocks of one query, no block of the future, the own one always."""
    (q, k), seqlen = inputs(40), 40
    kept = choose(Moba(blocks=2, local=1, q_block=1, k_block=8), problem(seqlen), causal(seqlen), q, k)
    means = k.numpy().reshape(5, 8, 2, 16).mean(1)
    for t in range(seqlen):
        for h in range(4):
            gate = means[:, h // 2] @ q[t, h].numpy()
            gate[t // 8], gate[t // 8 + 1 :] = np.inf, -np.inf
            wanted = np.argsort(-gate)[: min(2, t // 8 + 1)]
            assert set(np.nonzero(kept[h, t])[0]) == set(wanted)


@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", [(8, 4), (4, 4), (12, 4), (8, 8)])
def test_nsa_keeps_what_compressed_keys_say(seqlen: int, name: str, sizes: tuple[int, int]) -> None:
    mask, (q, k), (compress, stride) = MASKS[name](seqlen), inputs(seqlen), sizes
    selector = Nsa(density=0.5, sink=1, local=2, q_block=16, k_block=8, per="kv_head", compress=compress, stride=stride)
    scores = dense.nsa(q.numpy(), k.numpy(), 0.25, dense.visible(mask), 16, 8, compress, stride)
    np.testing.assert_array_equal(choose(selector, problem(seqlen), mask, q, k), expected(selector, scores, mask))


@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("per", ["q_head", "kv_head", "all_heads"])
@pytest.mark.parametrize("pool", ["max", "sum"])
def test_topk_keeps_what_its_indexer_says(seqlen: int, name: str, per: Any, pool: Any) -> None:
    mask, (q, k) = MASKS[name](seqlen), inputs(seqlen)
    selector = TopK(density=0.4, q_block=8, k_block=8, per=per, dim=6, pool=pool, seed=3)
    turn = rotation(16, 6, 3)
    maps = selector.maps(HEADS)
    scores = dense.indexer(
        q.numpy() @ turn, k.numpy() @ turn, dense.visible(mask), 8, 8, maps, {"max": np.max, "sum": np.sum}[pool]
    )
    np.testing.assert_array_equal(choose(selector, problem(seqlen), mask, q, k), expected(selector, scores, mask))


@pytest.mark.parametrize("numbers", [1, 16, 24, 64])
def test_a_rotation_is_signs_and_a_hadamard_matrix(numbers: int) -> None:
    size = 1 << (numbers - 1).bit_length()
    turn = rotation(numbers, numbers, 5) * np.sqrt(numbers)
    # A product of two columns has no signs, and columns of a Hadamard matrix times one of them are its columns again.
    plain = {tuple(column) for column in hadamard(size)[:numbers].T}
    assert {tuple(column) for column in (turn * turn[:, :1]).round().T} <= plain
    np.testing.assert_allclose(np.abs(turn), 1.0)
    if numbers == size:
        np.testing.assert_allclose(turn @ turn.T, numbers * np.eye(numbers), atol=1e-12)
    assert not np.array_equal(rotation(64, 8, 0), rotation(64, 8, 1))


def test_an_indexer_of_the_heads_own_dimension_makes_no_error() -> None:
    q, k = inputs(64)
    turn = rotation(16, 16, 0)
    np.testing.assert_allclose((q.numpy() @ turn)[:, 0] @ (k.numpy() @ turn)[:, 0].T, (q[:, 0] @ k[:, 0].T).numpy(), atol=1e-12)


def test_random_blocks_are_others_by_seed_row_and_map_and_the_same_in_every_pass() -> None:
    q, k = inputs(256)
    kept = [choose(Random(density=0.3, q_block=8, k_block=8, seed=seed), problem(256), full(256), q, k) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(kept[0], kept[1])
    assert (kept[0] != kept[2]).any()
    flat = kept[0].reshape(-1, kept[0].shape[-1])
    assert len(np.unique(flat, axis=0)) == len(flat)
    assert (flat.sum(1) == round(0.3 * 32)).all()
    assert flat.mean(0).std() < 0.08  # each block about as often as another


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (4, 8), (6, 4)])
@pytest.mark.parametrize("per", ["q_head", "kv_head", "all_heads"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_map_of_as_many_blocks_has_more_weight_than_the_oracles(seed: int, sizes: tuple[int, int], per: Any, count: int) -> None:
    """All choices of so many blocks are tried, of those that leave no query without a key."""
    seqlen, (q_block, k_block) = 22, sizes
    q, k = inputs(seqlen, seed=seed)
    mask = (causal if seed % 2 else full)(seqlen)
    allowed = dense.visible(mask)
    selector = Oracle(blocks=count, q_block=q_block, k_block=k_block, per=per)
    kept = choose(selector, problem(seqlen), mask, q, k)
    masses = dense.shared(dense.pooled(dense.weights(q.numpy(), k.numpy(), 0.25, allowed), q_block, k_block), len(kept))
    columns = dense.blocks(seqlen, k_block)
    for i, row in enumerate(dense.blocks(seqlen, q_block)):
        sees = np.array([[allowed[t, column].any() for column in columns] for t in row])
        many = min(count, int(sees.any(0).sum()))
        choices = [list(c) for c in combinations(range(len(columns)), many) if sees[:, list(c)].any(1).all()]
        for m in range(len(kept)):
            assert kept[m, i].sum() == many
            assert masses[m, i][kept[m, i]].sum() >= max(masses[m, i][c].sum() for c in choices) - 1e-12


def test_the_oracle_refuses_sinks_and_the_indexer_more_numbers_than_heads_have() -> None:
    of = problem(64)
    assert "softmax=sink" in str(Oracle(density=0.5).unsupported(replace(of, softmax=Softmax(sink=True))))
    assert TopK(density=0.5, dim=17).unsupported(of) == "selector.dim=17 is more than the 16 numbers of a head of heads=4x2x16"
    assert Oracle(density=0.5).unsupported(of) is None is TopK(density=0.5, dim=16).unsupported(of)
