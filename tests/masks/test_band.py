"""The band algebra against dense matrices, exactly, on random masks, crops, runs and layouts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.masks.band import OPEN, Band, BandMask, TokenSpan
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.convert import block_areas, pieces, slices, varlen
from lcbench.masks.lengths import Uniform, document_bounds
from lcbench.schedule.layout import contiguous, striped, zigzag
from lcbench.testing.dense import dense_mask

LENGTHS = st.integers(1, 18)


@st.composite
def bands(draw: st.DrawFn) -> tuple[int, int, list[Band]]:
    """Disjoint rectangles that tile part of the plane, each with its own diagonal bounds."""
    num_q, num_k = draw(LENGTHS), draw(LENGTHS)
    cuts_q = sorted({0, num_q, *draw(st.lists(st.integers(0, num_q), max_size=3))})
    found = []
    for q0, q1 in pairwise(cuts_q):
        cuts_k = sorted({0, num_k, *draw(st.lists(st.integers(0, num_k), max_size=3))})
        for k0, k1 in pairwise(cuts_k):
            if draw(st.booleans()):
                lo = draw(st.one_of(st.just(-OPEN), st.integers(-num_q, num_k)))
                hi = draw(st.one_of(st.just(OPEN), st.integers(-num_q, num_k)))
                found.append(Band(q0, q1, k0, k1, lo, hi))
    return num_q, num_k, found


@st.composite
def runs(draw: st.DrawFn, tokens: int, stride: int) -> list[TokenSpan]:
    found = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, tokens - 1))
        found.append(TokenSpan(start, draw(st.integers(0, (tokens - 1 - start) // stride + 1)), stride))
    return found


def tokens_of(found: list[TokenSpan]) -> np.ndarray:
    return np.concatenate([run.start + run.stride * np.arange(run.size) for run in found])


@given(bands())
def test_area_normal_form_merge_and_transpose_match_dense(case: tuple[int, int, list[Band]]) -> None:
    num_q, num_k, found = case
    dense = dense_mask(num_q, num_k, found)
    mask = BandMask.of(num_q, num_k, found)
    assert mask.area == dense.sum()
    assert (dense_mask(num_q, num_k, mask) == dense).all()
    assert (dense_mask(num_q, num_k, mask.merged()) == dense).all()
    assert (dense_mask(num_k, num_q, mask.transpose()) == dense.T).all()
    for band in mask:  # tight: every row and column of a rectangle is touched
        one = dense_mask(num_q, num_k, [band])[band.q0 : band.q1, band.k0 : band.k1]
        assert one.any(axis=0).all()
        assert one.any(axis=1).all()


def test_runs_of_a_tile_may_share_tokens() -> None:
    mask = BandMask.of(20, 20, [Band(0, 20, 0, 20, -OPEN, 0), Band(8, 16, 9, 20, 1, OPEN)])
    shared, every = [TokenSpan(1, 1), TokenSpan(0, 9), TokenSpan(7, 2)], [TokenSpan(0, 20)]
    rows = tokens_of(shared)
    dense = dense_mask(20, 20, mask)
    assert (dense_mask(12, 20, mask.tile(shared, every)) == dense[rows]).all()
    assert (dense_mask(20, 12, mask.tile(every, shared)) == dense[:, rows]).all()


@given(bands(), st.data())
@pytest.mark.slow
def test_crop_and_tile_match_dense(case: tuple[int, int, list[Band]], data: st.DataObject) -> None:
    num_q, num_k, found = case
    dense, mask = dense_mask(num_q, num_k, found), BandMask.of(num_q, num_k, found)
    q0, q1 = sorted(data.draw(st.tuples(st.integers(0, num_q), st.integers(0, num_q))))
    k0, k1 = sorted(data.draw(st.tuples(st.integers(0, num_k), st.integers(0, num_k))))
    assert (dense_mask(q1 - q0, k1 - k0, mask.crop(q0, q1, k0, k1)) == dense[q0:q1, k0:k1]).all()
    stride = data.draw(st.integers(1, 3))
    q_runs, k_runs = data.draw(runs(num_q, stride)), data.draw(runs(num_k, stride))
    tile = mask.tile(q_runs, k_runs)
    wanted = dense[np.ix_(tokens_of(q_runs), tokens_of(k_runs))]
    assert (dense_mask(tile.num_q, tile.num_k, tile) == wanted).all()
    assert mask.row_area(q_runs) == dense[tokens_of(q_runs)].sum()


@pytest.mark.slow
@given(bands())
@settings(max_examples=300)
def test_kernel_forms_match_dense(case: tuple[int, int, list[Band]]) -> None:
    num_q, num_k, found = case
    dense, mask = dense_mask(num_q, num_k, found), BandMask.of(num_q, num_k, found)
    count = np.zeros((num_q, num_k), dtype=int)
    for kind, q0, q1, k0, k1 in pieces(mask):
        i, j = np.arange(q1 - q0)[:, None], np.arange(k1 - k0)[None]
        inside = {"full": i + j >= 0, "causal": j <= i, "inverse": (k1 - k0 - 1 - j) <= (q1 - q0 - 1 - i)}[kind]
        count[q0:q1, k0:k1] += inside
    assert (count == dense).all()
    count[:] = 0
    for group in varlen(mask):
        assert (group.cu_q[-1], group.cu_k[-1]) == (num_q, num_k)
        left, right = group.window
        for a, b, c, d in zip(group.cu_q, group.cu_q[1:], group.cu_k, group.cu_k[1:], strict=False):
            i, j = np.arange(b - a)[:, None], np.arange(d - c)[None]
            corner = i + (d - c) - (b - a)  # aligned to the bottom right
            count[a:b, c:d] += ((left < 0) | (j >= corner - left)) & ((right < 0) | (j <= corner + right))
    assert (count == dense).all()


@given(bands())
def test_slices_match_dense_and_are_at_most_three_a_band(case: tuple[int, int, list[Band]]) -> None:
    num_q, num_k, found = case
    mask = BandMask.of(num_q, num_k, found)
    count = np.zeros((num_q, num_k), dtype=int)
    for q0, q1, k0, k1, kind in slices(mask):
        q, k = np.arange(q0, q1)[:, None], np.arange(k0, k1)[None]
        below, above = k - q <= (k1 - 1) - (q1 - 1), k - q >= k0 - q0
        count[q0:q1, k0:k1] += {"full": q == q, "causal": below, "inverse": above, "both": below & above}[kind]
    assert (count == dense_mask(num_q, num_k, found)).all()
    assert len(slices(mask)) <= 3 * len(mask)


@given(bands(), st.data())
def test_block_areas_intervals_and_extents_match_dense(case: tuple[int, int, list[Band]], data: st.DataObject) -> None:
    num_q, num_k, found = case
    dense, mask = dense_mask(num_q, num_k, found), BandMask.of(num_q, num_k, found)
    edges = [np.array(sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4))})) for n in (num_q, num_k)]
    grid = np.zeros((len(edges[0]) - 1, len(edges[1]) - 1), dtype=int)
    for row, column, area in zip(*block_areas(mask, *edges), strict=True):
        assert area > 0
        grid[row, column] += area
    assert (grid == np.add.reduceat(np.add.reduceat(dense, edges[0][:-1]), edges[1][:-1], axis=1)).all()
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, num_q - 1)))), dtype=np.int64)
    seen = np.zeros((len(rows), num_k), dtype=int)
    for at, begin, end in zip(*mask.intervals(rows), strict=True):
        seen[at, begin:end] += 1
    assert (seen == dense[rows]).all()
    first, last = mask.extents(rows)
    for row, a, b in zip(rows, first, last, strict=True):
        keys = np.nonzero(dense[row])[0]
        assert (a, b) == ((keys[0], keys[-1] + 1) if len(keys) else (0, 0))


@given(bands(), bands())
def test_overlap_is_found_exactly(one: tuple[int, int, list[Band]], two: tuple[int, int, list[Band]]) -> None:
    num_q, num_k = max(one[0], two[0]), max(one[1], two[1])
    dense = [dense_mask(num_q, num_k, found) for _, _, found in (one, two)]
    shared = BandMask.of(num_q, num_k, [*one[2], *two[2]]).overlap()
    assert (shared is not None) == (dense[0] & dense[1]).any()
    if shared is not None:
        assert all(dense_mask(num_q, num_k, [band]).any() for band in shared)


@given(bands(), st.integers(1, 4), st.sampled_from([contiguous, zigzag, striped]))
@pytest.mark.slow
def test_the_tiles_of_a_layout_hold_every_pair_once(case: tuple[int, int, list[Band]], shards: int, deal: object) -> None:
    assert callable(deal)
    num_q, _, found = case
    mask = BandMask.of(num_q, num_q, [Band(*b[:2], min(b.k0, num_q), min(b.k1, num_q), b.lo, b.hi) for b in found])
    dense = dense_mask(num_q, num_q, mask)
    layout = deal(num_q, shards)
    count = np.zeros((num_q, num_q), dtype=int)
    for i in range(shards):
        for j in range(shards):
            tile = layout.tile(mask, i, j)
            assert tile.area == dense_mask(tile.num_q, tile.num_k, tile).sum()
            count[np.ix_(layout.tokens(i), layout.tokens(j))] += dense_mask(tile.num_q, tile.num_k, tile)
    assert (count == dense).all()
    assert layout.areas(mask) == [int(dense[layout.tokens(i)].sum()) for i in range(shards)]


@given(bands())
def test_merging_never_adds_bands(case: tuple[int, int, list[Band]]) -> None:
    num_q, num_k, found = case
    mask = BandMask.of(num_q, num_k, found)
    assert len(mask.merged()) <= len(mask)


def test_many_adjacent_bands_become_one() -> None:
    rows = BandMask.of(1000, 1000, [Band(i, i + 1, 0, 1000, hi=0) for i in range(1000)])
    assert list(rows.merged()) == list(causal(1000))
    columns = BandMask.of(1000, 1000, [Band(0, 1000, i, i + 10) for i in range(0, 1000, 10)])
    assert list(columns.merged()) == [Band(0, 1000, 0, 1000, -999, 999)]


def test_merge_turns_the_tiles_of_a_causal_step_into_one_call() -> None:
    tile = causal(64).tile([TokenSpan(0, 8), TokenSpan(56, 8)], [TokenSpan(0, 8), TokenSpan(56, 8)])
    assert list(tile.merged()) == [Band(0, 16, 0, 16, -15, 0)]


def test_ten_million_tokens_have_an_exact_area() -> None:
    seqlen = 10 << 20
    assert causal(seqlen).area == seqlen * (seqlen + 1) // 2
    mask = causal_document(seqlen, seed=(0, 0), lengths=Uniform(1, 200))
    lengths = np.diff(document_bounds(seqlen, Uniform(1, 200), (0, 0)))
    assert mask.area == int((lengths * (lengths + 1) // 2).sum())
    assert mask.overlap() is None


@given(st.data())
def test_a_tile_of_runs_of_different_strides_is_what_it_is_point_by_point(data: st.DataObject) -> None:
    num_q, num_k = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))
    cut = data.draw(st.integers(0, num_q))
    lo = data.draw(st.integers(-24, 24))
    mask = BandMask.of(
        num_q, num_k, [Band(0, cut, 0, num_k, lo, lo + data.draw(st.integers(0, 24))), Band(cut, num_q, 0, num_k, hi=lo)]
    )
    runs = []
    for count in (num_q, num_k):
        stride, start = data.draw(st.integers(1, 5)), data.draw(st.integers(0, count - 1))
        runs.append(TokenSpan(start, data.draw(st.integers(0, 1 + (count - 1 - start) // stride)), stride))
    q, k = (run.start + run.stride * np.arange(run.size) for run in runs)
    tile = mask.tile([runs[0]], [runs[1]])
    want = dense_mask(num_q, num_k, mask)[np.ix_(q, k)]
    assert np.array_equal(dense_mask(tile.num_q, tile.num_k, tile.merged()), want)
    assert tile.area == want.sum()


@given(bands(), st.data())
@pytest.mark.slow
def test_a_tile_of_many_runs_of_any_stride_is_what_it_is_point_by_point(
    case: tuple[int, int, list[Band]], data: st.DataObject
) -> None:
    num_q, num_k, found = case
    q_runs, k_runs = (
        [run for _ in range(data.draw(st.integers(1, 3))) for run in data.draw(runs(count, data.draw(st.integers(1, 4))))]
        for count in (num_q, num_k)
    )
    tile = BandMask.of(num_q, num_k, found).tile(q_runs, k_runs)
    want = dense_mask(num_q, num_k, found)[np.ix_(tokens_of(q_runs), tokens_of(k_runs))]
    assert (dense_mask(tile.num_q, tile.num_k, tile) == want).all()
