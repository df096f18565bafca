"""Block maps: every operation against the dense matrix, what the patterns promise, and files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.masks.band import Band, BandMask, DoesNotFit, TokenSpan
from lcbench.masks.block import BlockMap, chosen
from lcbench.masks.block_file import block_file
from lcbench.masks.block_local_sink import block_local_sink
from lcbench.masks.block_random import block_random
from lcbench.masks.block_slash import block_slash
from lcbench.masks.block_vertical import block_vertical
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.masks.sliding_window import sliding_window
from lcbench.problem import Heads
from lcbench.selectors.base import block_edges
from lcbench.testing.dense import dense_heads, dense_mask
from lcbench.testing.masks import names, small
from tests.masks.test_band import bands

HEADS = Heads(6, 3, 8)


@st.composite
def maps(draw: st.DrawFn, *, within: bool | None = None) -> BlockMap:
    """Maps of any blocks, half of them within bands of any kind; ``within``: all of them, or none."""
    num_q, num_k, found = draw(bands())
    edges = [np.array(sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=4))})) for n in (num_q, num_k)]
    count = draw(st.sampled_from([1, 2, 3, 6]))
    seed = draw(st.integers(0, 99))
    shape = (count, len(edges[0]) - 1, len(edges[1]) - 1)
    keep = np.random.default_rng(seed).random(shape) < draw(st.sampled_from([0.5, 0.9]))
    if draw(st.booleans()) if within is None else within:
        return chosen(keep, *edges, BandMask.of(num_q, num_k, found))
    return BlockMap(edges[0], edges[1], count, lambda i: keep[i])


@st.composite
def runs(draw: st.DrawFn, tokens: int) -> list[TokenSpan]:
    found = []
    for _ in range(draw(st.integers(1, 3))):
        start, stride = draw(st.integers(0, tokens - 1)), draw(st.integers(1, 3))
        found.append(TokenSpan(start, draw(st.integers(0, (tokens - 1 - start) // stride + 1)), stride))
    return found


def tokens_of(found: list[TokenSpan]) -> np.ndarray:
    return np.concatenate([run.start + run.stride * np.arange(run.size) for run in found])


@given(maps(), st.data())
@pytest.mark.slow
def test_block_maps_are_closed_under_the_algebra(mask: BlockMap, data: st.DataObject) -> None:
    dense = dense_heads(mask, 6)
    assert mask.pairs(6) == dense.sum()
    assert mask.density == pytest.approx(dense.mean())
    assert (dense_heads(mask.transpose(), 6) == dense.transpose(0, 2, 1)).all()
    q_runs, k_runs = data.draw(runs(mask.num_q)), data.draw(runs(mask.num_k))
    tile = mask.tile(q_runs, k_runs)
    wanted = dense[:, tokens_of(q_runs)][:, :, tokens_of(k_runs)]
    assert (dense_heads(tile, 6) == wanted).all()
    assert (len(tile) > 0) == wanted.any()
    assert mask.row_area(q_runs) * (6 // mask.maps) == dense[:, tokens_of(q_runs)].sum()
    first = data.draw(st.integers(0, 5))
    count = data.draw(st.integers(1, 6 - first))
    part = mask.of_heads(first, count, 6)
    assert (dense_heads(part, count) == dense[first : first + count]).all()
    # And so are those operations of one another.
    assert (dense_heads(tile.transpose().merged(), 6) == wanted.transpose(0, 2, 1)).all()
    assert tile.pairs(6) == tile.transpose().pairs(6) == wanted.sum()


@given(maps())
@pytest.mark.slow
def test_bands_and_index_lists_hold_the_same_blocks(mask: BlockMap) -> None:
    for number in range(mask.maps):
        dense = dense_heads(mask, mask.maps)[number]
        assert (dense_mask(mask.num_q, mask.num_k, mask.bands(number)) == dense).all()
        blocks = [[dense[q0:q1, k0:k1] for k0, k1 in pairwise(mask.k_edges.tolist())] for q0, q1 in pairwise(mask.q_edges.tolist())]
        assert mask.keep(number).tolist() == [[bool(block.any()) for block in row] for row in blocks]
        assert mask.whole(number).tolist() == [[bool(block.all()) for block in row] for row in blocks]
        cut = [(i, j, int(b.sum())) for i, row in enumerate(blocks) for j, b in enumerate(row) if b.any() and not b.all()]
        assert list(zip(*(part.tolist() for part in mask.cut(number)), strict=True)) == cut
        indptr, indices = mask.csr(number)
        assert len(indptr) == len(mask.q_edges)
        for row, (begin, end) in enumerate(pairwise(indptr)):
            assert indices[begin:end].tolist() == np.nonzero(mask.keep(number)[row])[0].tolist()


STATIC = [name for name in names() if not name.startswith("block_") or name.startswith("block_causal")]


@pytest.mark.parametrize("name", STATIC)
@given(st.data())
@settings(max_examples=8)
def test_blocks_within_a_mask_of_any_family_are_what_both_say(name: str, tmp_path_factory: Any, data: st.DataObject) -> None:
    seqlen = data.draw(st.sampled_from([24, 61]))
    within = small(name, seqlen, HEADS, tmp_path_factory.mktemp("masks"), seed=data.draw(st.integers(0, 3)))
    assert isinstance(within, BandMask)
    edges = [np.unique([0, seqlen, *data.draw(st.lists(st.integers(1, seqlen - 1), max_size=6))]) for _ in range(2)]
    keep = np.random.default_rng(data.draw(st.integers(0, 99))).random((3, len(edges[0]) - 1, len(edges[1]) - 1)) < 0.6
    mask = chosen(keep, *edges, within)
    blocks = np.repeat(np.repeat(keep, np.diff(edges[0]), 1), np.diff(edges[1]), 2)
    dense = np.repeat(blocks, 2, 0) & dense_mask(seqlen, seqlen, within)
    stride = data.draw(st.integers(1, 3))
    q_runs, k_runs = ([run._replace(stride=1) for run in data.draw(runs(seqlen))], [TokenSpan(0, -(-seqlen // stride), stride)])
    for part, wanted in (
        (mask, dense),
        (mask.transpose(), dense.transpose(0, 2, 1)),
        (mask.tile(q_runs, k_runs), dense[:, tokens_of(q_runs)][:, :, tokens_of(k_runs)]),
        (mask.of_heads(2, 4, 6), np.repeat(dense[2:6], [2, 1, 2, 1], 0)),
    ):
        each = len(wanted) // part.maps
        assert part.pairs(len(wanted)) == wanted.sum()
        for number in range(part.maps):
            assert (dense_mask(part.num_q, part.num_k, part.bands(number)) == wanted[number * each]).all()
    every = [TokenSpan(data.draw(st.integers(0, 3)), (seqlen - 4) // stride, stride)]
    assert mask.row_area(every) * 2 == dense[:, tokens_of(every)].sum()


def test_bands_within_a_mask_are_as_few_as_can_be() -> None:
    seqlen = 512
    edges = block_edges(seqlen, 64)
    every = np.ones((1, 8, 8), dtype=bool)
    assert list(chosen(every, edges, edges, causal(seqlen)).bands(0)) == list(causal(seqlen))
    window = sliding_window(seqlen, left=150, right=0)
    assert list(chosen(every, edges, edges, window).bands(0)) == list(window)
    # A sink and the block of the diagonal with that before it: a rectangle and two bands, of which the first row has one.
    i, j = np.arange(8)[:, None], np.arange(8)[None, :]
    local = chosen(((j == 0) | (i == j) | (i == j + 1))[None], edges, edges, causal(seqlen))
    assert local.blocks_cut == 8
    assert [band for band in local.bands(0) if not (band.cuts_below or band.cuts_above)] == [Band(192, 512, 0, 64, -511, -129)]
    assert len(local.bands(0)) == 1 + 1 + 5
    # Nothing is cut off the diagonal: rectangles, as without a mask.
    below = chosen((j < i)[None], edges, edges, causal(seqlen))
    free = BlockMap(edges, edges, 1, lambda _: j < i)
    assert list(below.bands(0)) == list(free.bands(0))
    assert below.blocks_cut == 0


def test_a_mask_that_takes_no_pair_is_none() -> None:
    edges = block_edges(100, 30)
    assert chosen(np.ones((1, 4, 4), dtype=bool), edges, edges, full(100)).within is None
    mask = chosen(np.ones((1, 4, 4), dtype=bool), edges, edges, causal(100))
    assert mask.tile([TokenSpan(50, 50)], [TokenSpan(0, 50)]).within is None
    assert mask.tile([TokenSpan(50, 50)], [TokenSpan(0, 52)]).within is not None
    with pytest.raises(ValueError, match="100 x 100 tokens within a mask of 99 x 99"):
        chosen(np.ones((1, 4, 4), dtype=bool), edges, edges, causal(99))


def test_pairs_of_a_long_map_within_a_mask_are_exact() -> None:
    """By counting block by block with the closed form of a causal mask."""
    seqlen, size = 1 << 16, 128
    edges, count = block_edges(seqlen, size), seqlen // size
    keep = np.random.default_rng(0).random((4, count, count)) < 0.3
    i, j = np.arange(count)[:, None], np.arange(count)[None, :]
    pairs = np.where(j < i, size * size, np.where(i == j, size * (size + 1) // 2, 0))
    mask = chosen(keep, edges, edges, causal(seqlen))
    assert mask.pairs(8) == 2 * (keep * pairs).sum()
    assert mask.row_area([TokenSpan(0, seqlen // 2)]) == (keep * pairs)[:, : count // 2].sum()
    assert len(mask) == (keep & (j <= i)).sum()


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 1.0])
def test_random_blocks_have_the_density_that_was_asked_for(block_size: int, density: float) -> None:
    mask = block_random(8192, heads=HEADS, seed=(3, 0), density=density, block_size=block_size, sizes="uniform", per="q_head")
    assert mask.maps == 6
    columns = 8192 // block_size
    for i in range(6):
        assert set(mask.keep(i).sum(1).tolist()) == {round(density * columns)}
    assert mask.density == pytest.approx(round(density * columns) / columns)
    assert (mask.keep(0) != mask.keep(1)).any() or density == 1.0


def test_variable_blocks_vary_and_the_area_is_what_was_drawn() -> None:
    mask = block_random(8000, heads=HEADS, seed=(3, 0), density=0.3, block_size=128, sizes="variable", per="all_heads")
    sizes = np.diff(mask.q_edges)[:-1]
    assert sizes.min() < 100 < 150 < sizes.max()
    assert sizes.min() >= 64
    assert sizes.max() <= 192
    assert (np.diff(mask.q_edges)[:20] != np.diff(mask.k_edges)[:20]).any()
    assert mask.pairs(1) == dense_heads(mask, 1).sum()


def test_patterns_are_what_their_names_say() -> None:
    def options(density: float) -> dict[str, object]:
        return {"heads": HEADS, "seed": (0, 0), "density": density, "block_size": 64, "sizes": "uniform", "per": "kv_head"}

    local = block_local_sink(2048, local=3, sink=2, **options(0.5)).keep(0)  # type: ignore[arg-type]
    i = np.arange(32)
    assert local[:, :2].all()
    assert local[i, i].all()
    assert local[i[1:], i[1:] - 1].all()
    assert set(local.sum(1).tolist()) == {16}
    vertical = block_vertical(2048, **options(0.25)).keep(1)  # type: ignore[arg-type]
    assert vertical.all(axis=0).sum() == 8
    assert (vertical.sum(1) <= 9).all()
    slash = block_slash(2048, **options(0.25)).keep(2)  # type: ignore[arg-type]
    assert slash[i, i].all()
    assert set(slash.sum(1).tolist()) == {8}
    assert all((slash[i, (i + d) % 32] == slash[0, d]).all() for d in range(32))


def options_of(**changed: object) -> dict[str, Any]:
    return {"heads": HEADS, "seed": (0, 0), "density": 0.01, "block_size": 64, "sizes": "uniform", "per": "all_heads", **changed}


@pytest.mark.parametrize("local", [*range(8), 15, 16, 17, 31, 32, 33, 1 << 40])
@pytest.mark.parametrize("sink", [0, 1, 2, 16, 17, 1 << 40])
def test_as_many_local_and_sink_blocks_are_kept_as_asked_for(local: int, sink: int) -> None:
    """Row by row: the first ``local`` places by distance, the earlier of two before the later, without those outside."""
    columns = 16
    keep = block_local_sink(64 * columns, local=local, sink=sink, **options_of(density=1e-9)).keep(0)
    for row in range(columns):
        # Far more places than columns on either side: what lies outside of the sequence counts as taken.
        nearest = sorted(range(row - 2 * columns, row + 2 * columns), key=lambda place: (abs(place - row), place))[:local]
        wanted = {place for place in nearest if 0 <= place < columns} | set(range(min(sink, columns)))
        if wanted:
            assert set(np.nonzero(keep[row])[0].tolist()) == wanted, (row, local, sink)
        else:
            assert keep[row].sum() == 1  # the density's one block at least
        if local // 2 <= row < columns - local // 2 and not sink:
            assert keep[row].sum() == max(local, 1)


def test_odd_local_blocks_are_what_they_always_were() -> None:
    """Of stored cells: as many before the diagonal's block as after it, random ones drawn in the same order."""
    for local in (1, 3, 5, 7):
        keep = block_local_sink(2048, local=local, sink=1, **options_of(density=0.4)).keep(0)
        random, i = np.random.default_rng((0, 0, 1)), np.arange(32)
        wanted = abs(i[:, None] - i) <= (local - 1) // 2
        wanted[:, :1] = True
        for row in wanted:
            free = np.nonzero(~row)[0]
            row[random.choice(free, 13 - int(row.sum()), replace=False)] = True
        assert (keep == wanted).all()


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 8, 64, 127, 1000, 5000])
@pytest.mark.parametrize("density", [1e-9, 0.05, 0.25, 0.5, 0.999, 1.0])
def test_densities_are_of_whole_blocks_and_at_least_one(block_size: int, density: float) -> None:
    seqlen = min(1000, 40 * block_size)
    columns = -(-seqlen // block_size)
    count = max(1, round(density * columns))
    more = options_of(density=density, block_size=block_size)
    assert set(block_random(seqlen, **more).keep(0).sum(1).tolist()) == {count}
    assert set(block_slash(seqlen, **more).keep(0).sum(1).tolist()) == {count}
    vertical = block_vertical(seqlen, **more).keep(0)
    assert count <= vertical.all(0).sum() <= count + 1  # the diagonal makes a last column whole
    assert vertical.diagonal().all()
    assert set(vertical.sum(1).tolist()) <= {count, count + 1}
    for local, sink in ((0, 0), (2, 0), (3, 1), (4, 2)):
        keep = block_local_sink(seqlen, local=local, sink=sink, **more).keep(0)
        near = np.array([[-(local // 2) <= j - i <= (local - 1) // 2 or j < sink for j in range(columns)] for i in range(columns)])
        assert keep[near].all()
        assert (keep.sum(1) == np.maximum(near.sum(1), count)).all()


@pytest.mark.parametrize("block_size", [1, 2, 3, 64, 127, 128])
def test_variable_blocks_have_the_mean_that_was_asked_for(block_size: int) -> None:
    mask = block_random(4000 * block_size, **options_of(sizes="variable", block_size=block_size, density=1e-9))
    for edges in (mask.q_edges, mask.k_edges):
        sizes = np.diff(edges)[:-1]
        low = max(1, block_size // 2)
        assert (sizes.min(), sizes.max()) == (low, 2 * block_size - low)
        assert sizes.mean() == pytest.approx(block_size, rel=0.03)


@pytest.mark.slow
def test_heads_share_maps_as_asked() -> None:
    for per, maps in (("all_heads", 1), ("kv_head", 3), ("q_head", 6)):
        mask = block_random(4096, **options_of(per=per, density=0.3))
        assert mask.maps == maps
        dense = dense_heads(mask, 6)
        assert all((dense[i] == dense[j]).all() == (i * maps // 6 == j * maps // 6) for i in range(6) for j in range(6))


def test_nothing_is_drawn_before_it_is_asked_for() -> None:
    def refuse(number: int) -> np.ndarray:
        raise AssertionError("drawn")

    edges = np.arange(0, 1025, 64)
    mask = BlockMap(edges, edges, 4, refuse)
    part = mask.tile([TokenSpan(0, 100)], [TokenSpan(3, 50)]).of_heads(0, 2, 8).transpose()
    assert (part.num_q, part.num_k, part.maps) == (50, 100, 1)


def test_bad_options_are_named() -> None:
    def build(**changed: object) -> BlockMap:
        options = {"density": 0.2, "block_size": 64, "sizes": "uniform", "per": "kv_head", **changed}
        return block_random(4096, heads=HEADS, seed=(0, 0), **options)  # type: ignore[arg-type]

    for changed, words in (
        ({"density": 0}, "density=0"),
        ({"sizes": "x"}, "uniform, variable"),
        ({"per": "x"}, "all_heads, kv_head, q_head"),
    ):
        with pytest.raises(ValueError, match=words):
            build(**changed)
    with pytest.raises(DoesNotFit, match="take larger blocks"):
        block_random(1 << 24, heads=HEADS, seed=(0, 0), density=0.1, block_size=64, sizes="uniform", per="kv_head")


def test_a_map_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    keep = np.eye(2, dtype=bool)[None].repeat(3, 0)
    np.savez(path, q_edges=[0, 3, 8], k_edges=[0, 4, 8], keep=keep)
    mask = block_file(8, heads=HEADS, file=str(path))
    assert mask.pairs(6) == 6 * (3 * 4 + 5 * 4)
    with pytest.raises(DoesNotFit, match="8 x 8 tokens, seqlen is 9"):
        block_file(9, heads=HEADS, file=str(path))
    with pytest.raises(DoesNotFit, match="4 query heads are no multiple of the 3 maps"):
        block_file(8, heads=Heads(4, 2, 8), file=str(path))
    np.savez(path, q_edges=[0, 8, 3], k_edges=[0, 4, 8], keep=keep)
    with pytest.raises(ValueError, match="rising from 0"):
        block_file(8, heads=HEADS, file=str(path))
    path.write_text("no archive")
    with pytest.raises(ValueError, match="does not hold"):
        block_file(8, heads=HEADS, file=str(path))
