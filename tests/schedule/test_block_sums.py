"""Sums over block maps, and sums in stretches, against the dense product and against themselves in one piece."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.cp.base import Scheduled
from lcbench.cp.hybrid import Hybrid
from lcbench.cp.ring import Ring
from lcbench.grid.build import build_strategy
from lcbench.masks.band import BandMask, Ints, TokenSpan
from lcbench.masks.block import BlockMap
from lcbench.masks.causal_document import causal_document
from lcbench.masks.document import document
from lcbench.masks.lengths import Uniform
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule import block_sums, tiling
from lcbench.schedule.adjoint import SPARSE, Table
from lcbench.schedule.block_sums import BlockSums
from lcbench.schedule.layout import Layout, contiguous, striped, zigzag
from lcbench.schedule.machine import Tiles
from lcbench.schedule.schedule import Schedule, Step, head_groups, rows
from lcbench.testing.masks import load, names, small

HEADS = Heads(2, 2, 4)
LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}


def drawn(random: np.random.Generator, seqlen: int, *, even: bool) -> BlockMap:
    edges = [np.unique([0, *random.integers(1, seqlen, 9), seqlen]) for _ in range(2)]
    if even:
        edges = [np.minimum(np.arange(-(-seqlen // 8) + 1) * 8, seqlen)] * 2
    shape = (2, len(edges[0]) - 1, len(edges[1]) - 1)
    keep = random.random(shape) < 0.5
    return BlockMap(edges[0], edges[1], 2, lambda number: keep[number])


def dense(mask: BlockMap, number: int) -> Ints:
    return np.repeat(np.repeat(mask.keep(number), np.diff(mask.q_edges), 0), np.diff(mask.k_edges), 1).astype(np.int64)


@pytest.mark.slow
@pytest.mark.parametrize("small", [False, True], ids=["at once", "in parts"])
@settings(deadline=None, max_examples=60)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)), shards=st.integers(1, 7), seqlen=st.integers(30, 200), even=st.booleans(),
    seed=st.integers(0, 1 << 20),
)  # fmt: skip
def test_sums_over_a_block_map_are_those_of_its_points(
    small: bool, layout: str, shards: int, seqlen: int, even: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    mask, dealt = drawn(random, seqlen, even=even), LAYOUTS[layout](seqlen, shards)
    bundles = tuple(tuple(sorted(random.choice(shards, random.integers(1, shards + 1), replace=False))) for _ in range(4))
    q, k = (each.ravel() for each in np.meshgrid(range(4), range(4)))
    schedule = Schedule.of(1, dealt, np.zeros(shards, dtype=np.int64), head_groups(HEADS, 1), bundles, (Step(rows(0, 0, q, k)),))
    sides = [tiling.Operands.of(schedule.q, each) for each in (q, k)]
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(block_sums, "STEP", 3)
            patch.setattr(block_sums, "PORTION", 16)
        counts = (side.tokens_in(edges) for side, edges in zip(sides, (mask.q_edges, mask.k_edges), strict=True))
        sums = BlockSums(sides[0].inside(), *counts, 8)
        found = [sums.of(1, sums.shape[0], mask.keep(number)) for number in range(2)]
    for number in range(2):
        points = dense(mask, number)
        for bundle in range(1, len(found[number][0]) + 1):
            members = [unit for unit, times in enumerate(sides[0].inside().toarray()[bundle]) for _ in range(int(times))]
            for unit in range(sums.shape[1]):
                rows_of, columns = ([_tokens(side, u) for u in of] for side, of in zip(sides, (members, [unit]), strict=True))
                want = sum(int(points[np.ix_(own, columns[0])].sum()) for own in rows_of)
                assert found[number][0, bundle - 1, unit] == want
                assert found[number][1, bundle - 1, unit] == sum(_filled(mask, number, own, columns[0]) for own in rows_of)
                assert found[number][2, bundle - 1, unit] == sum(_pieces(mask, number, own, columns[0]) for own in rows_of)


def _tokens(side: tiling.Operands, unit: int) -> Ints:
    return side.start[unit] + side.stride[unit] * np.arange(side.size[unit])


def _counts(edges: Ints, tokens: Ints) -> Ints:
    return np.bincount(np.searchsorted(edges, tokens, side="right") - 1, minlength=len(edges) - 1)


def _filled(mask: BlockMap, number: int, own: Ints, columns: Ints) -> int:
    """Pairs where each block is filled up to whole ones of 8 x 8."""
    tall, wide = (-(-_counts(edges, of) // 8) * 8 for edges, of in ((mask.q_edges, own), (mask.k_edges, columns)))
    return int(tall @ mask.keep(number).astype(np.int64) @ wide)


def _pieces(mask: BlockMap, number: int, own: Ints, columns: Ints) -> int:
    """Stretches of kept blocks that begin in a block of these."""
    keep = mask.keep(number)
    begins = keep & ~np.pad(keep, ((0, 0), (1, 0)))[:, :-1]
    return int(begins[np.ix_(_counts(mask.q_edges, own) > 0, _counts(mask.k_edges, columns) > 0)].sum())


@pytest.mark.parametrize("strategy", [Hybrid(), Hybrid(groups=[1, 3]), Ring(layout="documents"), Ring(layout="zigzag")], ids=str)
def test_tiles_of_many_units_are_the_same_in_stretches(strategy: Hybrid | Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    of = Problem(2000, HEADS, Scale(1, 4), "float32", "forward")
    mask = causal_document(of.seqlen, seed=(0, 0), lengths=Uniform(1, 300))
    schedule = strategy.schedule(of, mask)
    whole = tiling.tiling(schedule, mask).tiles
    monkeypatch.setattr(tiling, "CACHED", 4 * 7)
    monkeypatch.setattr(block_sums, "PORTION", 16)
    parts = tiling.tiling(schedule, mask).tiles
    assert parts.pairs.tolist() == whole.pairs.tolist()
    assert parts.pieces.tolist() == whole.pieces.tolist()
    assert parts.covered == pytest.approx(whole.covered, rel=1e-12)


@pytest.mark.parametrize("name", names())
def test_tiles_are_the_same_part_by_part(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = Problem(211, Heads(8, 4, 16), Scale(2, 2), "float32", "forward")
    mask = small(name, of.seqlen, of.heads, tmp_path)
    if not isinstance(mask, BandMask):
        pytest.skip("a block map is not summed by bands")
    built = [build_strategy(load("cp", each)) for each in names("cp")]
    found = [*(each for each in built if isinstance(each, Scheduled)), Ring("documents"), Hybrid(groups=(1, 3))]
    schedules = [each.schedule(of, mask) for each in found if not each.unsupported(of, mask)]
    made: list[list[Tiles]] = []
    for scattered, alike in ((np.inf, np.inf), (0, np.inf), (np.inf, 0)):  # neither of both, and always one of them
        monkeypatch.setattr(tiling, "SCATTERED", scattered)
        monkeypatch.setattr(tiling, "ALIKE", alike)
        made.append([tiling.tiling(schedule, mask).tiles for schedule in schedules])
    monkeypatch.setattr(tiling, "CACHED", 50)
    made.append([tiling.tiling(schedule, mask).tiles for schedule in schedules])
    for whole, *others in zip(*made, strict=True):
        for parts in others:
            assert parts.pairs.tolist() == whole.pairs.tolist()
            assert parts.pieces.tolist() == whole.pieces.tolist()
            assert parts.covered == pytest.approx(whole.covered, rel=1e-12)


def test_short_documents_in_many_stretches_are_looked_at_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    added = tiling._Scattered._added
    monkeypatch.setattr(tiling._Scattered, "_added", lambda self, here, *rest: looked.append(len(here)) or added(self, here, *rest))
    for lengths, wanted in ((Uniform(1, 20), True), (Uniform(4096, 4096), False)):
        of = Problem(4096, HEADS, Scale(2, 8), "float32", "forward")
        mask = causal_document(of.seqlen, seed=(0, 0), lengths=lengths)
        looked.clear()
        tiling.tiling(Hybrid().schedule(of, mask), mask)
        assert bool(looked) is wanted
        assert sum(looked) <= of.seqlen  # a token of queries each, or some that lie together


def test_documents_whose_tokens_all_meet_are_summed_once_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[tuple[int, ...]] = []
    call = tiling._Alike.__call__
    monkeypatch.setattr(tiling._Alike, "__call__", lambda self, *of: looked.append(self._tables[0][3].shape) or call(self, *of))
    of = Problem(4096, HEADS, Scale(2, 8), "float32", "forward")
    for make, wanted in ((document, True), (causal_document, False)):
        mask = make(of.seqlen, seed=(0, 0), lengths=Uniform(256, 512))
        looked.clear()
        tiling.tiling(Hybrid().schedule(of, mask), mask)
        assert looked[:1] == ([(len(mask), 16)] if wanted else [])


@given(values=st.lists(st.integers(0, 60), max_size=40), times=st.sampled_from([1, 1000]))
def test_values_are_ranked_by_place_as_by_sorting(values: list[int], times: int) -> None:
    every = times * np.array(values, dtype=np.int64)
    want = np.unique(every, return_inverse=True)
    assert [each.tolist() for each in tiling._ranked(every)] == [each.tolist() for each in want]


@given(shards=st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=6).filter(any))
def test_a_layout_of_stretches_is_that_of_their_runs(shards: list[list[int]]) -> None:
    size = np.array([each for runs in shards for each in runs], dtype=np.int64)
    shard = np.repeat(np.arange(len(shards)), [len(runs) for runs in shards])
    start = np.cumsum(size)[::-1] - size
    found = Layout.of_stretches(shard, start, size, len(shards))
    runs = [
        tuple(TokenSpan(a, n) for a, n, s in zip(start.tolist(), size.tolist(), shard, strict=True) if s == i)
        for i in range(len(shards))
    ]
    want = Layout(tuple(each or (TokenSpan(0, 0),) for each in runs))
    assert tuple(found.shards) == want.shards == found.shards[:]
    assert found.shards[-1] == want.shards[-1]
    for one, other in zip(found.stretches, want.stretches, strict=True):
        assert one.tolist() == other.tolist()
    assert [found.size(i) for i in range(len(found))] == [want.size(i) for i in range(len(want))]
    assert not found.striped
    with pytest.raises(IndexError):
        found.shards[len(shards)]


@given(seed=st.integers(0, 1 << 20), count=st.integers(0, 40), times=st.sampled_from([1, SPARSE, 4 * SPARSE]))
def test_a_table_finds_its_keys_by_place_as_by_search(seed: int, count: int, times: int) -> None:
    space = max(1, count * times)
    keys = np.sort(np.random.default_rng(seed).choice(space, count, replace=False))
    place, known = Table(keys, keys, space).find(np.arange(space))
    assert known.tolist() == np.isin(np.arange(space), keys).tolist()
    assert keys[place[known]].tolist() == np.nonzero(known)[0].tolist()


@pytest.mark.parametrize("groups", [(4,), (1, 3), (3, 2, 1)], ids=str)
def test_a_hybrid_deals_each_document_out_in_zigzag_and_begins_at_another_rank_each_time(groups: tuple[int, ...]) -> None:
    of = Problem(400, HEADS, Scale(1, sum(groups)), "float32", "forward")
    lengths = [5, 1, 120, 77, 2, 3, 100, 92]
    bounds = np.cumsum([0, *lengths])
    bands = np.array([[a, b, a, b, -(1 << 61), 0] for a, b in pairwise(bounds)])
    mask = causal_document(of.seqlen, seed=(0, 0), lengths=Uniform(1, 300)).of(400, 400, bands)
    chosen = [number % len(groups) for number in range(len(lengths))]
    strategy = Hybrid(groups=groups, documents=chosen)
    want: list[list[TokenSpan]] = [[] for _ in range(sum(groups))]
    for number, group in enumerate(chosen):
        for place, pieces in enumerate(zigzag(lengths[number], groups[group]).shards):
            own = want[sum(groups[:group]) + (place + number) % groups[group]]
            own += [TokenSpan(int(bounds[number]) + run.start, run.size) for run in pieces if run.size]
    assert strategy.unsupported(of, mask) is None
    assert list(map(tuple, strategy.schedule(of, mask).q.shards.shards)) == list(map(tuple, want))
