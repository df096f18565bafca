"""Tables of tiles hold every pair once; our Triton kernels read any strides, by descriptors and by pointers; launch shapes fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lcbench.kernels.base import Platform, Saved
from lcbench.kernels.tile_tables import TileTables, of_bands, of_blocks
from lcbench.kernels.triton_band import TritonBand
from lcbench.kernels.triton_block_sparse import TritonBlockSparse
from lcbench.kernels.triton_shapes import SHARED, TUNED, Shape, Shapes, key_width, value_width
from lcbench.masks.band import Band, BandMask
from lcbench.masks.block import BlockMap
from lcbench.masks.block_random import block_random
from lcbench.masks.mask import Mask
from lcbench.problem import Heads
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.masks import every_mask, small

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 16)


def counted(tables: TileTables, num_q: int, num_k: int) -> NDArray[np.int64]:
    """How often the tables visit each pair, (maps, num_q, num_k), tile by tile as a kernel walks them."""
    found = np.zeros((len(tables.order), num_q, num_k + tables.width), dtype=np.int64)
    q, k = np.arange(num_q)[:, None], np.arange(num_k + tables.width)[None, :]
    for entry in range(found.shape[0] * len(tables.rows)):
        one, rows = found[entry // len(tables.rows)], slice(*tables.rows[entry % len(tables.rows)])
        assert rows.stop - rows.start <= tables.height
        for at, list_, width in (
            (tables.whole_at, tables.whole, tables.width),
            (tables.tested_at, tables.tested, tables.tested_width),
        ):
            stretch, tiles = at[entry]
            while tiles:
                begin, end, *bands = list_[stretch]
                assert end > begin
                assert (end - begin) % width == 0
                seen = np.ones((num_q, num_k + tables.width), dtype=np.int64)
                if bands:
                    assert not tables.single or bands[1] - bands[0] == 1
                    seen = sum(
                        (q >= q0) & (q < q1) & (k >= k0) & (k < k1) & (k - q >= lo) & (k - q <= hi)
                        for q0, q1, k0, k1, lo, hi in tables.bands[slice(*bands)]
                    )
                one[rows, begin:end] += seen[rows, begin:end]
                stretch, tiles = stretch + 1, tiles - (end - begin) // width
            assert tiles == 0
    assert not found[:, :, num_k:].any()
    return found[:, :, :num_k]


@pytest.mark.parametrize("name", every_mask())
def test_tables_visit_every_pair_of_a_mask_once(name: str, tmp_path: Path) -> None:
    mask = small(name, 83, HEADS, tmp_path)
    for part in (mask, mask.transpose()):
        for tile in ((16, 16, 16), (32, 32, 16), (16, 64, 16), (64, 16, 16)):
            if isinstance(part, BlockMap):
                tables, want = of_blocks(part, *tile), dense_heads(part, part.maps)
            else:
                assert isinstance(part, BandMask)
                tables, want = of_bands(part, *tile), dense_heads(part, 1)
            assert np.array_equal(counted(tables, part.num_q, part.num_k), want), tile
            assert sorted(tables.order.flatten().tolist()) == sorted([*range(len(tables.rows))] * len(tables.order))


def pieces(tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(tokens, n, HEADS.dim, generator=generator, dtype=torch.float64).to(dtype) for n in (4, 2, 2, 4)]


def as_laid(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another place: as one of two packed tensors, heads first, or off the 16 bytes that descriptors need."""
    if layout == "packed":
        return torch.stack([x, torch.zeros_like(x)], 2)[:, :, 0]
    if layout == "heads first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "odd":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return torch.cat([x, x.new_zeros(*x.shape[:2], 3)], 2)[:, :, : x.shape[2]]


@pytest.mark.slow
def test_any_layout_and_narrow_tested_tiles_give_what_dense_attention_gives() -> None:
    from lcbench.kernels.triton_tiles import PreparedTiles, _describable
    from lcbench.testing.gpu_tune import tables_of

    tokens, scale = 70, 0.4
    bands = BandMask.of(tokens, tokens, [Band(0, 50, 0, 70, -60, 0), Band(50, 64, 0, 9), Band(50, 64, 20, 70)])
    blocks = block_random(tokens, heads=HEADS, seed=(1, 0), density=0.5, block_size=24, sizes="variable", per="kv_head")
    masks: list[Mask] = [bands, blocks, bands, blocks]
    for mask, (layout, described) in zip(
        masks, {"packed": True, "heads first": True, "odd": False, "padded": False}.items(), strict=True
    ):
        q, k, v, dout = pieces(tokens, torch.float64)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        want, want_lse = dense_attention(leaves[0], leaves[1], leaves[2], dense_heads(mask, 4), scale)
        grads = torch.autograd.grad(want, leaves, dout)
        laid = [as_laid(x, layout) for x in (q, k, v, dout)]
        assert all(_describable(x) == described for x in laid)

        shapes = Shapes(Shape(32, 32, 16, 4, 2), Shape(16, 64, 16, 4, 2), Shape(32, 32, 16, 4, 2))
        # What cannot be described is read by pointers whatever shapes say.
        ways = [shapes, *([Shapes(*(replace_described(shape) for shape in shapes))] if described else [])]
        results = []
        for using in ways:
            prepared = PreparedTiles(tables_of(mask), tables_of(mask.transpose()), using, HEADS, CPU)
            out, lse = prepared.forward(laid[0], laid[1], laid[2], softmax_scale=scale)
            results.append([out, lse, *prepared.backward(laid[3], Saved(laid[0], laid[1], laid[2], out, lse), softmax_scale=scale)])
        for name, got, by_pointers, wanted in zip(
            ("out", "lse", "dq", "dk", "dv"), results[0], results[-1], (want.detach(), want_lse.detach(), *grads), strict=True
        ):
            assert torch.equal(got, by_pointers), name
            assert torch.equal(got == -torch.inf, wanted == -torch.inf)
            seen = wanted != -torch.inf
            assert (got[seen] - wanted[seen]).abs().max() <= 1e-12, (layout, name)
        with pytest.raises(ValueError, match="softmax scales above 0"):
            prepared.forward(q, k, v, softmax_scale=-scale)


def replace_described(shape: Shape) -> Shape:
    return shape._replace(described=False)


@pytest.mark.slow
def test_out_may_be_wider_than_the_inputs() -> None:
    mask = BandMask.of(40, 40, [Band(0, 40, 0, 40, -40, 0)])
    q, k, v, dout = pieces(40, torch.float32)
    prepared = TritonBand(16, 16, 16, 16).prepare(mask, HEADS, torch.float32, CPU)
    out, lse = prepared.forward(q, k, v, softmax_scale=0.3)
    narrow = prepared.backward(dout, Saved(q, k, v, out, lse), softmax_scale=0.3)
    wide = prepared.backward(dout, Saved(q, k, v, out.double(), lse), softmax_scale=0.3)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(narrow, wide, strict=True))


def heads_of(dim: int) -> Heads:
    return Heads(8, 2, dim)


def bytes_of(shape: Shape, kept: int, dim: int, itemsize: int) -> int:
    """Shared memory of a block that keeps queries, or two kinds of tensors."""
    key, value = key_width(dim).whole, value_width(dim)
    return (shape.rows * (key if kept == 1 else key + value) + shape.stages * shape.columns * (key + value)) * itemsize


def test_launch_shapes_are_the_tuned_ones_or_fit_the_device_and_results_say_which() -> None:
    hopper = Platform("cuda", (9, 0))
    for kernel in (TritonBand(), TritonBlockSparse()):
        for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
            for dim in (64, 80, 128, 256):
                for itemsize in (2, 4):
                    for shape, kept in zip(kernel.shapes(heads_of(dim), itemsize, capability), (1, 2, 2), strict=True):
                        assert shape.columns % shape.tested == 0
                        assert shape.stages >= 1
                        assert bytes_of(shape, kept, dim, itemsize) <= SHARED.get(capability, 99) << 10
        told = kernel.launch(Heads(8, 2, 128), "bfloat16", hopper)
        assert told == {k: v._asdict() for k, v in kernel.shapes(heads_of(128), 2, (9, 0))._asdict().items()}
    assert TritonBand().shapes(heads_of(128), 2, (9, 0)) == TUNED[9, 0][128]
    assert TritonBand().launch(Heads(8, 2, 128), "float32", hopper)["forward"]["rows"] == 64
    # Blocks may be of 64 tokens: a larger tile would be half empty.
    assert all(max(shape[:2]) <= 64 for dim in (64, 128) for shape in TritonBlockSparse().shapes(heads_of(dim), 2, (9, 0)))
    # What is said is kept; what is left open is not changed by it.
    said = replace(TritonBand(), block_q=128, block_k=32).shapes(heads_of(128), 2, (9, 0))
    assert [shape[:2] for shape in said[:2]] == [(128, 32)] * 2
    assert said.dkv == TUNED[9, 0][128].dkv
