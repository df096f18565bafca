"""The mask of a batch against one that is put together request by request, pair by pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lcbench.grid.build import build_mask
from lcbench.masks.band import Band, BandMask, DoesNotFit
from lcbench.masks.block import BlockMap, chosen
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.lengths import Uniform, document_bounds
from lcbench.masks.mask import Mask
from lcbench.masks.requests import of_requests
from lcbench.problem import Batch, Heads, Requests
from lcbench.testing.dense import dense_heads
from lcbench.testing.masks import names, small_config

HEADS = Heads(4, 2, 8)
BATCH = Batch((Requests(2, 1, 12), Requests(1, 7, 7), Requests(1, 5, 12)))


def batches(most: int = 12) -> st.SearchStrategy[Batch]:
    sizes = st.integers(1, most).flatmap(lambda total: st.tuples(st.integers(1, 3), st.integers(1, total), st.just(total)))
    return st.lists(sizes, min_size=1, max_size=4).map(lambda groups: Batch(tuple(Requests(*group) for group in groups)))


def assembled(batch: Batch, wholes: list[Mask]) -> NDArray[np.bool_]:
    """(heads, new tokens, all tokens), from each request's own mask, of which the last rows are taken."""
    found = np.zeros((HEADS.q, batch.queries, batch.tokens), dtype=bool)
    q = k = 0
    for whole, new, total in zip(wholes, batch.new.tolist(), batch.total.tolist(), strict=True):
        assert (whole.num_q, whole.num_k) == (total, total)
        found[:, q : q + new, k : k + total] = dense_heads(whole, HEADS.q)[:, total - new :]
        q, k = q + new, k + total
    assert (q, k) == (batch.queries, batch.tokens)
    return found


@given(batches())
def test_causal_requests_see_what_came_before_in_their_own(batch: Batch) -> None:
    mask = of_requests(batch, lambda total, number: causal(total), alike=True)
    number = np.repeat(np.arange(len(batch)), batch.total)
    position = np.concatenate([np.arange(total) for total in batch.total])
    of_query = np.repeat(np.arange(len(batch)), batch.new)
    queried = np.concatenate([np.arange(total - new, total) for new, total in zip(batch.new, batch.total, strict=True)])
    expected = (of_query[:, None] == number) & (position <= queried[:, None])
    assert (dense_heads(mask, 1)[0] == expected).all()
    assert mask.pairs(1) == int(expected.sum())
    assert isinstance(mask, BandMask)
    assert mask.overlap() is None


@given(batches(), st.integers(0, 3))
@pytest.mark.slow
def test_documents_of_each_request_are_its_own(batch: Batch, seed: int) -> None:
    def make(total: int, number: int) -> Mask:
        return causal_document(total, seed=(seed, 0, number), lengths=Uniform(1, 4))

    wholes = [make(total, number) for number, total in enumerate(batch.total.tolist())]
    assert (dense_heads(of_requests(batch, make, alike=False), HEADS.q) == assembled(batch, wholes)).all()


@pytest.mark.parametrize("name", names())
def test_every_mask_of_conf_has_one(name: str, tmp_path: Path) -> None:
    config = small_config(name, 12, HEADS, tmp_path)
    batch = Batch((Requests(3, 4, 12), Requests(1, 12, 12), Requests(2, 1, 12)))

    def make(total: int, number: int) -> Mask:
        return build_mask(config, total, HEADS, 5, 0, number)

    wholes = [make(total, number) for number, total in enumerate(batch.total.tolist())]
    mask = of_requests(batch, make, alike=False)
    assert type(mask) is type(wholes[0])
    expected = assembled(batch, wholes)
    assert (dense_heads(mask, HEADS.q) == expected).all()
    assert mask.pairs(HEADS.q) == int(expected.sum())


def test_equal_requests_have_one_mask_unless_it_is_drawn() -> None:
    asked: list[tuple[int, int]] = []

    def make(total: int, number: int) -> Mask:
        asked.append((total, number))
        return causal(total)

    of_requests(BATCH, make, alike=True)
    assert asked == [(12, 0), (7, 2)]
    asked.clear()
    of_requests(BATCH, make, alike=False)
    assert asked == [(12, 0), (12, 1), (7, 2), (12, 3)]


def test_a_request_whose_mask_cannot_be_is_named() -> None:
    def make(total: int, number: int) -> Mask:
        if total < 10:
            raise DoesNotFit(f"seqlen={total} has no 10 parts")
        return causal(total)

    with pytest.raises(DoesNotFit, match=r"^request 3 of 4, q7: seqlen=7 has no 10 parts$"):
        of_requests(BATCH, make, alike=True)


def drawn(total: int, maps: int = 2, size: int = 4) -> BlockMap:
    edges = np.unique([*range(0, total, size), total])
    keep = np.random.default_rng(total).random((maps, len(edges) - 1, len(edges) - 1)) < 0.5
    return BlockMap(edges, edges, maps, lambda number: keep[number])


@given(batches())
@pytest.mark.slow
def test_block_maps_of_requests_are_one(batch: Batch) -> None:
    mask = of_requests(batch, lambda total, number: drawn(total), alike=True)
    wholes: list[Mask] = [drawn(total) for total in batch.total.tolist()]
    assert isinstance(mask, BlockMap)
    assert (dense_heads(mask, HEADS.q) == assembled(batch, wholes)).all()


@pytest.mark.slow
@given(batches(), st.integers(1, 12))
def test_block_maps_within_masks_are_one_where_any_is_within_one(batch: Batch, most: int) -> None:
    """Short requests have maps alone, long ones causal maps, by which every row sees what it sees in its own."""

    def make(total: int, number: int) -> Mask:
        whole = drawn(total)
        return whole if total < most else chosen(whole.keeps(), whole.q_edges, whole.k_edges, causal(total))

    mask = of_requests(batch, make, alike=True)
    wholes = [make(total, 0) for total in batch.total.tolist()]
    expected = assembled(batch, wholes)
    assert (dense_heads(mask, HEADS.q) == expected).all()
    assert mask.pairs(HEADS.q) == int(expected.sum())


def test_nothing_is_drawn_before_it_is_asked_for_and_the_requests_keep_nothing() -> None:
    held: list[BlockMap] = []

    def make(total: int, number: int) -> Mask:
        held.append(drawn(total))
        return held[-1]

    mask = of_requests(BATCH, make, alike=True)
    assert isinstance(mask, BlockMap)
    assert mask.keeps().any()
    assert [one._drawn for one in held] == [{}, {}]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda total, number: drawn(total, 1 + number % 2), ValueError, "have 1 and 2 block maps; all have as many"),
        (
            lambda total, number: causal(total) if number else drawn(total),
            ValueError,
            "3 requests .* bands and 1 a block map",
        ),
    ],
)
def test_requests_that_make_no_one_mask_are_refused(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        of_requests(BATCH, make, alike=False)


def test_more_blocks_than_can_be_held_do_not_fit() -> None:
    edges = np.arange((1 << 12) + 1)
    whole = BlockMap(edges, edges, 1, lambda number: pytest.fail("drawn"))
    batch = Batch((Requests(16, 1 << 12, 1 << 12),))
    with pytest.raises(DoesNotFit, match="65536 x 65536 blocks of 16 requests are more than"):
        of_requests(batch, lambda total, number: whole, alike=True)


def test_many_requests_have_the_area_of_each() -> None:
    batch = Batch((Requests(10000, 3, 1000), Requests(5000, 1, 64)))
    mask = of_requests(batch, lambda total, number: causal(total), alike=True)
    assert isinstance(mask, BandMask)
    assert len(mask) == 15000
    assert mask.area == 10000 * (998 + 999 + 1000) + 5000 * 64


def test_a_document_without_a_token_is_none() -> None:
    class Empty:
        def sample(self, seqlen: int, random: np.random.Generator) -> NDArray[np.int64]:
            return np.array([3, 0, seqlen], dtype=np.int64)

    with pytest.raises(ValueError, match="a document of 0 tokens"):
        document_bounds(8, Empty(), (0, 0))


def test_a_band_of_one_row_stays_where_it_is() -> None:
    batch = Batch((Requests(1, 1, 1), Requests(2, 1, 4)))
    mask = of_requests(batch, lambda total, number: causal(total), alike=True)
    assert isinstance(mask, BandMask)
    assert [(b.q0, b.q1, b.k0, b.k1) for b in mask] == [(0, 1, 0, 1), (1, 2, 1, 5), (2, 3, 5, 9)]
    assert next(iter(mask)) == Band(0, 1, 0, 1, 0, 0)
