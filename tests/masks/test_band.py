"""The band algebra against dense matrices, exactly, on random masks, crops, runs and layouts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.masks.band import OPEN, Band, BandMask, Run
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.convert import pieces, varlen
from lcbench.masks.document import document, document_bounds
from lcbench.masks.full import full
from lcbench.masks.sliding_window import sliding_window
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
def runs(draw: st.DrawFn, tokens: int, stride: int) -> list[Run]:
    found = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, tokens - 1))
        found.append(Run(start, draw(st.integers(0, (tokens - 1 - start) // stride + 1)), stride))
    return found


def tokens_of(found: list[Run]) -> np.ndarray:
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


@given(bands(), st.data())
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


@pytest.mark.parametrize("seqlen", [1, 2, 17, 64])
def test_mask_families_match_their_one_line_formula(seqlen: int) -> None:
    q, k = np.arange(seqlen)[:, None], np.arange(seqlen)[None]
    bounds = document_bounds(seqlen, seed=5, mean_length=4, lengths=None)
    owner = np.searchsorted(bounds, np.arange(seqlen), side="right")
    same = owner[:, None] == owner[None]
    wanted = {
        "full": (full(seqlen), k >= 0),
        "causal": (causal(seqlen), k <= q),
        "window": (sliding_window(seqlen, left=3, right=0), (k <= q) & (k >= q - 3)),
        "both sides": (sliding_window(seqlen, left=3, right=2), (k <= q + 2) & (k >= q - 3)),
        "document": (document(seqlen, seed=5, mean_length=4), same),
        "causal document": (causal_document(seqlen, seed=5, mean_length=4), same & (k <= q)),
    }
    for name, (mask, dense) in wanted.items():
        assert (dense_mask(seqlen, seqlen, mask) == np.broadcast_to(dense, (seqlen, seqlen))).all(), name
        assert mask.area == np.broadcast_to(dense, (seqlen, seqlen)).sum(), name


def test_merge_turns_the_tiles_of_a_causal_step_into_one_call() -> None:
    tile = causal(64).tile([Run(0, 8), Run(56, 8)], [Run(0, 8), Run(56, 8)])
    assert list(tile.merged()) == [Band(0, 16, 0, 16, -15, 0)]


def test_documents_must_add_up() -> None:
    with pytest.raises(ValueError, match="add up to seqlen=10"):
        document(10, seed=0, mean_length=4, lengths=[4, 5])


def test_ten_million_tokens_have_an_exact_area() -> None:
    seqlen = 10 << 20
    assert causal(seqlen).area == seqlen * (seqlen + 1) // 2
    mask = causal_document(seqlen, seed=0, mean_length=100)
    lengths = np.diff(document_bounds(seqlen, seed=0, mean_length=100, lengths=None))
    assert mask.area == int((lengths * (lengths + 1) // 2).sum())
