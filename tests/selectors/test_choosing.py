"""What selectors share: budgets, the best blocks, queries that none is left without, and sums that do not depend on company."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.grid.build import build, check_options
from lcbench.masks.band import Band, BandMask
from lcbench.masks.causal import causal
from lcbench.problem import Heads, Problem, Scale
from lcbench.selectors.base import Rows, block_edges
from lcbench.selectors.choosing import (
    Budgeted,
    block_means,
    block_sums,
    covering,
    own_blocks,
    seen_blocks,
    seen_keys,
    seen_whole,
    sinks,
    steady,
    top,
)
from lcbench.selectors.moba import Moba
from lcbench.selectors.random import Random
from lcbench.testing.masks import load, names
from lcbench.testing.selecting import choose, rows_of
from tests.selectors import dense

BUDGETED = [name for name in names("selector") if {"density", "blocks"} <= set(load("selector", name))]


@st.composite
def masks(draw: st.DrawFn) -> BandMask:
    """Disjoint rectangles cut by diagonals: rows may see nothing, much, or pieces."""
    tokens = draw(st.integers(1, 40))
    bounds = sorted(draw(st.sets(st.integers(0, tokens), min_size=2, max_size=5)) | {0, tokens})
    bands = []
    for q0, q1 in pairwise(bounds):
        cut = draw(st.integers(0, tokens))
        for k0, k1 in ((0, cut), (cut, tokens)):
            if draw(st.booleans()):
                lo = draw(st.integers(-tokens, tokens))
                bands.append(Band(q0, q1, k0, k1, lo, draw(st.integers(lo, tokens))))
    return BandMask.of(tokens, tokens, bands)


def rows(mask: BandMask, q_block: int, k_block: int) -> list[Rows]:
    q_edges, k_edges = block_edges(mask.num_q, q_block), block_edges(mask.num_k, k_block)
    q = torch.zeros(mask.num_q, 1, 1)
    return [rows_of(number, q, mask, q_edges, k_edges) for number in range(len(q_edges) - 1)]


@given(st.data())
def test_top_keeps_the_highest_scores_the_lower_of_equal_ones_and_always_what_it_must(data: st.DataObject) -> None:
    maps, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    scores = np.array(data.draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0, np.inf, -np.inf]), min_size=maps * columns,
                                         max_size=maps * columns))).reshape(maps, columns)  # fmt: skip
    flags = st.lists(st.booleans(), min_size=columns, max_size=columns)
    seen = np.array(data.draw(flags))
    always = seen & data.draw(flags)
    counts = np.array(data.draw(st.lists(st.integers(0, columns), min_size=maps, max_size=maps)))
    kept = top(torch.from_numpy(scores), counts, always, seen)
    for m in range(maps):
        order = sorted(np.nonzero(seen)[0].tolist(), key=lambda j: (not always[j], -scores[m, j], j))
        assert np.nonzero(kept[m])[0].tolist() == sorted(order[: max(counts[m], int(always.sum()))])


@pytest.mark.slow
@given(
    masks(), st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(0, 2**32 - 1)
)
@settings(deadline=None)
def test_covering_leaves_no_query_without_a_key_and_adds_none_that_is_not_needed(
    mask: BandMask, q_block: int, k_block: int, counts: list[int], seed: int
) -> None:
    random, allowed, edges = np.random.default_rng(seed), dense.visible(mask), block_edges(mask.num_k, k_block)
    for one, row in zip(rows(mask, q_block, k_block), dense.blocks(mask.num_q, q_block), strict=True):
        scores = torch.from_numpy(random.integers(0, 3, (3, len(edges) - 1)).astype(float))
        seen = np.array([allowed[np.ix_(row, column)].any() for column in dense.blocks(mask.num_k, k_block)])
        always = seen & (random.random(len(seen)) < 0.2)
        kept = covering(scores, np.array(counts), always, one, edges)
        columns = np.repeat(kept, np.diff(edges), axis=1)
        own = allowed[row]
        assert ((own & columns[:, None]).any(2) == own.any(1)).all()
        assert not (kept & ~seen).any()
        assert kept[:, always].all()
        plain = top(scores, np.array(counts), always, seen)
        enough = ((own & np.repeat(plain, np.diff(edges), axis=1)[:, None]).any(2) == own.any(1)).all(1)
        np.testing.assert_array_equal(kept[enough], plain[enough])
        assert (kept.sum(1) >= plain.sum(1)).all()
        # Blocks are added one at a time, each for a query that has none: never more than there are queries.
        assert (kept.sum(1) <= np.maximum(plain.sum(1), always.sum() + len(row))).all()


@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 20), st.floats(0.01, 1.0), st.integers(0, 3), st.integers(0, 3))
@settings(deadline=None)
@pytest.mark.slow
def test_a_budget_is_kept_exactly_under_causal_masks(
    seqlen: int, q_block: int, k_block: int, density: float, sink: int, local: int
) -> None:
    """Blocks that are always kept are counted in; a causal mask never needs a block more than the budget."""
    problem, q = Problem(seqlen, Heads(2, 1, 4), Scale(1, 1), "float32", "forward"), torch.zeros(seqlen, 2, 4)
    selector = Random(density=density, q_block=q_block, k_block=k_block, sink=sink, local=local)
    kept = choose(selector, problem, causal(seqlen), q, q[:, :1])
    for i, row in enumerate(dense.blocks(seqlen, q_block)):
        columns = dense.blocks(seqlen, k_block)
        seen = [j for j, column in enumerate(columns) if column.start < row.stop]
        own = [j for j in seen if set(columns[j]) & set(row)]
        always = set(seen[:sink]) | {j for j in seen if local and own[0] - local < j < own[-1] + local}
        assert (kept[:, i].sum(1) == max(len(always), 1, round(density * len(seen)))).all()
        assert kept[:, i, sorted(always)].all()
        assert kept[:, i, : own[0] + 1].any(1).all()  # a block that the first query sees


@pytest.mark.slow
@given(masks(), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None)
def test_what_queries_see_is_what_the_mask_says(mask: BandMask, q_block: int, k_block: int) -> None:
    allowed, edges = dense.visible(mask), block_edges(mask.num_k, k_block)
    columns = dense.blocks(mask.num_k, k_block)
    for one, row in zip(rows(mask, q_block, k_block), dense.blocks(mask.num_q, q_block), strict=True):
        own = allowed[row]
        np.testing.assert_array_equal(seen_blocks(one, edges), np.stack([own[:, column].any(1) for column in columns], 1))
        np.testing.assert_array_equal(one.pairs, [own[:, column].sum() for column in columns])
        begin, end = int(edges[len(columns) // 2]), int(edges[-1])
        np.testing.assert_array_equal(seen_keys(one, begin, end, torch.device("cpu")).numpy(), own[:, begin:end])
        # Whole stretches, where the keys that a query sees are one interval: bands that touch are looked at one by one.
        whole = seen_whole(one, edges[:-1], edges[1:])
        truth = np.stack([own[:, column].all(1) for column in columns], 1)
        assert not (whole & ~truth).any()
        single = (np.diff(np.pad(own, ((0, 0), (1, 1))).astype(int), axis=1) == 1).sum(1) <= 1
        alone = np.bincount(one.sees.intervals(np.arange(len(row)))[0], minlength=len(row)) <= 1
        np.testing.assert_array_equal(whole[single & alone], truth[single & alone])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(deadline=None)
def test_sums_of_blocks_do_not_depend_on_the_others(sizes: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(sum(sizes), 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(len(sizes))).to(dtype)
    found = block_sums(x, np.array(sizes))
    parts = x.split(sizes)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found, torch.cat([block_sums(part, np.array([len(part)])) for part in parts]))
    torch.testing.assert_close(found.double(), torch.stack([part.double().sum(0) for part in parts]), rtol=0, atol=1e-5)
    if all(sizes):
        means = block_means(x, np.array(sizes))
        torch.testing.assert_close(means.double(), torch.stack([part.double().mean(0) for part in parts]), rtol=0, atol=1e-5)


def test_sinks_are_the_first_blocks_that_are_seen_and_own_blocks_those_around() -> None:
    mask = BandMask.of(32, 32, [Band(0, 32, 8, 32)])
    one, edges = rows(mask, 8, 4)[2], block_edges(32, 4)
    assert np.nonzero(sinks(one, 2))[0].tolist() == [2, 3]
    assert [np.nonzero(own_blocks(one, edges, 16, count))[0].tolist() for count in (0, 1, 2)] == [[], [4, 5], [3, 4, 5, 6]]
    assert np.nonzero(own_blocks(rows(causal(32), 8, 4)[0], edges, 0, 3))[0].tolist() == [0, 1]


def test_steady_products_are_of_one_thread_and_threads_come_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with suppress(KeyError), steady(torch.device("cpu")):
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"blocks": 4}, "selector.density=0.2 and selector.blocks=4 both say how many blocks are kept; set one of them to null"),
        ({"density": None}, "selector.density=null and selector.blocks=null"),
        ({"density": 0}, "is no share above 0 and up to 1, such as 0.2"),
        ({"density": 1.5}, "selector.density=1.5 is no share"),
        ({"density": "much"}, "selector.density=much is not one of a number, null"),
        ({"density": None, "blocks": 0}, "selector.blocks=0 is no whole number of at least 1"),
        ({"density": None, "blocks": 2.5}, "selector.blocks=2.5 is not one of a whole number"),
        ({"sink": -1}, "selector.sink=-1 is no whole number of at least 0"),
        ({"local": "x"}, "selector.local=x is not one of a whole number"),
        ({"q_block": 0}, "selector.q_block=0 is no whole number of at least 1"),
        ({"k_block": -16}, "is no whole number of at least 1"),
        ({"every": 0}, "selector.every=0 is no whole number of at least 1"),
        ({"per": "head"}, "selector.per=head is not one of"),
        ({"topp": 1}, "has no option 'topp'"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        check_options("selector", {**load("selector", name), "density": 0.2, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("random", {"seed": -1}, "selector.seed=-1 is no whole number of at least 0"),
        ("topk", {"pool": "mean"}, "selector.pool=mean is not one of max, sum"),
        ("topk", {"dim": 0}, "selector.dim=0 is no whole number of at least 1"),
        ("nsa", {"stride": 0}, "selector.stride=0 is no whole number of at least 1"),
        ("nsa", {"compress": 24}, "selector.compress=24 is no multiple of selector.stride=16"),
        ("nsa", {"k_block": 40}, "selector.k_block=40 is no multiple of selector.stride=16"),
    ],
)  # fmt: skip
def test_wrong_options_of_one_method_are_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_options("selector", {**load("selector", name), **options})


def test_budgeted_selectors_say_all_their_options() -> None:
    """An option that a YAML leaves out cannot be found by reading it."""
    assert {"moba", "nsa", "oracle", "random", "topk"} <= set(BUDGETED)
    for name in BUDGETED:
        config = load("selector", name)
        owner = type(build(check_options("selector", config)))
        assert issubclass(owner, Budgeted)
        assert {one.name for one in fields(owner)} == set(config) - {"name", "_target_"}


def test_counts_may_be_said_instead_of_shares() -> None:
    checked = check_options("selector", {**load("selector", "moba"), "density": None, "blocks": "3"})
    assert (checked["density"], checked["blocks"]) == (None, 3)
    problem = Problem(64, Heads(1, 1, 4), Scale(1, 1), "float32", "forward")
    q = torch.randn(64, 1, 4, generator=torch.Generator().manual_seed(0))
    kept = choose(Moba(blocks=3, q_block=8, k_block=8), problem, causal(64), q, q)
    assert kept.sum(-1).tolist() == [[min(3, i + 1) for i in range(8)]]
