"""Every selector of conf/selector does what ``lcbench.selectors.base`` asks of one: bit for bit the same choice however the blocks
are dealt to ranks, no query left without a key, nothing kept that is not seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from lcbench.grid.build import build, check_options
from lcbench.masks.band import Band, BandMask
from lcbench.masks.block import Keep
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.masks.sliding_window import sliding_window
from lcbench.problem import PLAIN, Heads, Problem, Scale, Softmax
from lcbench.selectors.base import Features, Round, Rows, Selector, block_edges
from lcbench.testing.masks import load, names
from lcbench.testing.selecting import choose, rows_of
from tests.selectors import dense

HEADS, SIZES = Heads(4, 2, 32), {"q_block": 32, "k_block": 16}
DTYPES = ("float64", "float32", "bfloat16")
SELECTORS = names("selector")


def documents(seqlen: int) -> BandMask:
    """Causal documents, and the first tokens see nothing."""
    bounds = [seqlen // 8, seqlen // 3, seqlen // 2 + 3, seqlen]
    return BandMask.of(seqlen, seqlen, [Band(a, b, a, b, hi=0) for a, b in pairwise(bounds) if a < b])


MASKS = {"causal": causal, "full": full, "documents": documents, "window": lambda n: sliding_window(n, left=n // 5, right=0)}


@cache
def small(name: str) -> Selector:
    """The selector of a YAML, with blocks as small as a test wants them."""
    config = load("selector", name)
    return build(check_options("selector", {**config, **{key: size for key, size in SIZES.items() if key in config}}))


def problem_of(seqlen: int, dtype: str, softmax: Softmax = PLAIN) -> Problem:
    return Problem(seqlen, HEADS, Scale(1, 1), dtype, "forward", softmax=softmax)


def inputs(problem: Problem, mask: BandMask, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and LSE (S, Hq)."""
    generator, shape = torch.Generator().manual_seed(seed), (problem.seqlen, HEADS.q + HEADS.kv, HEADS.dim)
    both = torch.randn(shape, dtype=torch.float64, generator=generator).to(getattr(torch, problem.dtype))
    q, k = both[:, : HEADS.q].clone(), both[:, HEADS.q :].clone()
    each = HEADS.q // HEADS.kv
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(each, 1)) * problem.softmax_scale
    seen = torch.from_numpy(dense.visible(mask))
    return (
        q,
        k,
        scores.masked_fill(~seen, -torch.inf).logsumexp(-1).T.to(torch.float64 if q.dtype == torch.float64 else torch.float32),
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def elsewhere(x: torch.Tensor, by: int) -> torch.Tensor:
    """The same numbers in memory that begins so many elements further on."""
    memory = x.new_empty(x.numel() + by)
    memory[by:] = x.reshape(-1)
    return memory[by:].view(x.shape)


class Dealt:
    """Blocks of keys and of queries dealt at random to ranks that have other numbers of threads, and other memory."""

    def __init__(self, selector: Selector, problem: Problem, mask: BandMask, seed: int) -> None:
        self.selector, self.problem, self.seed = selector, problem, seed
        q, k, lse = inputs(problem, mask)
        self.q_edges, self.k_edges = (block_edges(problem.seqlen, size) for size in (selector.q_block, selector.k_block))
        self.random = np.random.default_rng(seed)
        self.k = k
        given = lse if selector.needs_lse else None
        rows = [rows_of(number, q, mask, self.q_edges, self.k_edges, given) for number in range(len(self.q_edges) - 1)]
        self.rows = [
            Rows(one.number, elsewhere(one.q, seed + 1), one.pairs, one.sees, None if one.lse is None else elsewhere(one.lse, seed))
            for one in rows
        ]

    def told(self, one: Round, known: Features) -> Features:
        found: Features = {}
        if one.keys is not None:
            blocks = len(self.k_edges) - 1
            ranks = self.random.integers(0, 3, blocks)
            parts: list[tuple[np.ndarray, Features]] = []
            for rank in range(3):
                own = np.nonzero(ranks == rank)[0]
                if not len(own):
                    continue
                k = torch.cat([self.k[self.k_edges[i] : self.k_edges[i + 1]] for i in own])
                with threads(1 + rank % 2):
                    parts.append((own, one.keys(elsewhere(k, rank + self.seed), np.diff(self.k_edges)[own], known)))
            for name in parts[0][1]:
                rows: list[torch.Tensor] = [torch.empty(0)] * blocks
                for own, features in parts:
                    sizes = np.ones(len(own), int) if name in one.by_block else np.diff(self.k_edges)[own]
                    assert len(features[name]) == sizes.sum(), f"{name} has {len(features[name])} rows"
                    for i, x in zip(own, features[name].split(sizes.tolist()), strict=True):
                        rows[i] = x
                found[name] = torch.cat(rows)
        if one.queries is not None:
            wanted = one.blocks(len(self.rows))
            assert (np.diff(wanted) > 0).all()
            parts_q: dict[int, Features] = {}
            for number in self.random.permutation(wanted):
                with threads(1 + int(number) % 2):
                    parts_q[number] = one.queries(self.rows[number], known)
            for name in parts_q[wanted[0]]:
                assert all(len(each[name]) == 1 for each in parts_q.values()), f"{name} has not one row"
                found[name] = torch.cat([parts_q[number][name] for number in wanted])
        return found

    def choose(self) -> Keep:
        known: Features = {}
        for number, one in enumerate(self.selector.rounds(self.problem)):
            told = self.told(one, known)
            assert not set(told) & set(known)
            with threads(1 + number % 2):
                known = one.all(known | told, self.k_edges)
        before = {name: x.clone() for name, x in known.items()}
        kept = {}
        for number in self.random.permutation(len(self.rows)):
            with threads(1 + int(number) % 2):
                kept[number] = self.selector.keep(self.rows[number], known, self.k_edges, self.problem)
        assert all(torch.equal(before[name], x) for name, x in known.items()), "what is known was changed by choosing"
        return np.stack([kept[number] for number in range(len(kept))], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", SELECTORS)
def test_a_choice_does_not_depend_on_who_has_which_blocks(name: str, mask: str, dtype: str) -> None:
    """Threads, memory, order and what else a rank has are not the choice's business."""
    for seqlen in (301, 64) if dtype == "float32" else (301,):
        selector, problem, shown = small(name), problem_of(seqlen, dtype), MASKS[mask](seqlen)
        q, k, lse = inputs(problem, shown)
        with threads(1):
            wanted = choose(selector, problem, shown, q, k, lse if selector.needs_lse else None)
        for seed in range(2):
            np.testing.assert_array_equal(Dealt(selector, problem, shown, seed).choose(), wanted)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("per", ["q_head", "kv_head", "all_heads"])
@pytest.mark.parametrize("name", SELECTORS)
def test_every_query_sees_a_key_of_what_is_kept_and_nothing_unseen_is(name: str, per: str, mask: str) -> None:
    selector = small(name)
    if not selector.dense:
        config = load("selector", name)
        selector = build(check_options("selector", {**config, **SIZES, "per": per}))
    for seqlen in (301, 128, 17, 1):
        problem, shown = problem_of(seqlen, "float32"), MASKS[mask](seqlen)
        q, k, lse = inputs(problem, shown, seed=seqlen)
        kept = choose(selector, problem, shown, q, k, lse if selector.needs_lse else None)
        allowed = dense.visible(shown)
        rows, columns = dense.blocks(seqlen, selector.q_block), dense.blocks(seqlen, selector.k_block)
        assert kept.dtype == bool
        assert kept.shape == (selector.maps(HEADS), len(rows), len(columns))
        whole = kept.repeat([len(row) for row in rows], 1).repeat([len(column) for column in columns], 2)
        assert ((whole & allowed).any(2) == allowed.any(1)).all()
        seen = np.array([[allowed[np.ix_(row, column)].any() for column in columns] for row in rows])
        assert not (kept & ~seen).any()


@pytest.mark.parametrize("name", SELECTORS)
def test_negated_queries_and_keys_choose_the_same(name: str) -> None:
    """A later pass negates both, and is checked against the choice of the first one."""
    selector, problem, shown = small(name), problem_of(301, "float32"), causal(301)
    q, k, lse = inputs(problem, shown)
    given = lse if selector.needs_lse else None
    np.testing.assert_array_equal(choose(selector, problem, shown, -q, -k, given), choose(selector, problem, shown, q, k, given))


@pytest.mark.parametrize("name", [name for name in SELECTORS if name not in ("none", "random")])
def test_a_choice_depends_on_q_and_on_k(name: str) -> None:
    problem, shown, config = problem_of(1024, "float32"), causal(1024), load("selector", name)
    more = {"density": 0.6} if "density" in config else {}  # than what is always kept
    selector = build(check_options("selector", {**config, **SIZES, **more}))
    q, k, lse = inputs(problem, shown)
    given = lse if selector.needs_lse else None
    kept = choose(selector, problem, shown, q, k, given)
    assert (choose(selector, problem, shown, q.flip(1), k, given) != kept).any()
    assert (choose(selector, problem, shown, q, k.flip(0), given) != kept).any()


@pytest.mark.parametrize("name", SELECTORS)
def test_softcapped_scores_are_chosen_from_or_refused(name: str) -> None:
    selector, problem = small(name), problem_of(301, "float64", Softmax(softcap=5.0))
    if selector.unsupported(problem) is None:
        q, k, lse = inputs(problem, causal(301))
        assert choose(selector, problem, causal(301), q, k, lse if selector.needs_lse else None).any()
