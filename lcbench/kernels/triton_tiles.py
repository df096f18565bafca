"""Flash attention in Triton over tables of tiles (``tile_tables``): forward, and backward from any out and LSE.

The online softmax is that of FlashAttention-2 (arXiv 2307.08691). Backward is two kernels, one over blocks of queries
for dq and one over blocks of keys for dk and dv, so nothing is added atomically and results repeat bit by bit. Layouts are
packed as in ``base``; tensors are read where they lie, whatever their strides over tokens and heads.

A kernel walks the stretches of its block in one loop over tiles. So it reads the next tile ahead across the end of a stretch too.
Tiles that are tested against bands have a loop of their own, with narrower tiles, which keeps registers from spilling.

The code is compiled for CUDA. Under ``TRITON_INTERPRET=1`` it runs on a CPU, slowly; tests run it so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lcbench.kernels.base import LOG2_E, Gradients, OutLse, Saved, accumulation_dtype, heads_whole
from lcbench.kernels.tile_tables import MakeTables, TileTables
from lcbench.kernels.triton_shapes import Shape, Shapes
from lcbench.problem import Heads

INT32 = np.iinfo(np.int32)
# Rows of a block of ``delta_kernel``, and its warps.
DELTA_ROWS, DELTA_WARPS = 64, 4
# A Triton kernel reads globals only if they are constexpr.
IN_LOG2: tl.constexpr = tl.constexpr(LOG2_E)


class Tables:
    """``TileTables`` on a device, as the arguments that every kernel below begins with."""

    def __init__(self, tables: TileTables, device: torch.device) -> None:
        # Bounds of a band reach at most a sequence beyond the plane, or bind nowhere.
        bands = tables.bands.clip(INT32.min, INT32.max)
        # Kernels read the stretch after the last one, and use nothing of it.
        whole, tested = (np.concatenate([x, np.zeros_like(x, shape=(1, x.shape[1]))]) for x in (tables.whole, tables.tested))
        arrays = tables.rows, tables.order, tables.whole_at, whole, tables.tested_at, tested, bands
        self.arguments = tuple(torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)).to(device) for x in arrays)
        self.blocks, self.maps = len(tables.rows), len(tables.order)
        tested_tiles = len(tables.tested) > 0
        self.constants = {
            "HEIGHT": tables.height, "WIDTH": tables.width, "TESTED": tables.tested_width if tested_tiles else 0,
            "SINGLE": tables.single,
        }  # fmt: skip


class PreparedTiles:
    """A mask as tables over blocks of queries and over blocks of keys."""

    calls = 1

    def __init__(self, tables: MakeTables, transposed: MakeTables, shapes: Shapes, heads: Heads, device: torch.device) -> None:
        """``tables`` are made of the mask, ``transposed`` of its transpose."""
        self._shapes, self._heads = shapes, heads

        def made(make: MakeTables, shape: Shape) -> Tables:
            return Tables(make(shape.rows, shape.columns, shape.tested), device)

        alike = shapes.forward[:3] == shapes.dq[:3]
        self._forward, self._dkv = made(tables, shapes.forward), made(transposed, shapes.dkv)
        self._dq = self._forward if alike else made(tables, shapes.dq)
        # The most tokens that a tile may reach beyond the last query.
        self._beyond = max(x for shape in (shapes.dq, shapes.dkv) for x in (shape.rows, shape.columns, DELTA_ROWS))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float) -> OutLse:
        """(out, lse), out in the inputs' type.

        Raises:
            ValueError: ``softmax_scale`` is not above 0. The kernel looks for the largest score before it applies the scale.
        """
        if not softmax_scale > 0:
            raise ValueError(f"our Triton kernels take softmax scales above 0, not {softmax_scale}")
        q, k, v = map(heads_whole, (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=accumulation_dtype(q.dtype), device=q.device)
        launch_forward(self._forward, self._shapes.forward, self._heads, q, k, v, out, lse, softmax_scale)
        return out, lse

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float) -> Gradients:
        q, k, v, out, lse = saved
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        dout, q, k, v, out = map(heads_whole, (dout, q, k, v, out))
        stats = row_stats(dout, out, lse, self._beyond)
        launch_dq(self._dq, self._shapes.dq, self._heads, q, k, v, dout, stats, dq, softmax_scale)
        launch_dkv(self._dkv, self._shapes.dkv, self._heads, q, k, v, dout, stats, dk, dv, softmax_scale)
        return dq, dk, dv


def launch_forward(
    tables: Tables, shape: Shape, heads: Heads, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, scale: float,
) -> Any:  # fmt: skip
    """Write out and LSE into the tensors given. Returns the compiled kernel, None under the interpreter."""
    described, tiles = _tiles(tables, shape, k, v)
    return forward_kernel[tables.blocks, q.shape[1]](
        *tables.arguments, q, *tiles, out, lse, *_strides(q, k, v, out, lse), k.shape[0], scale * LOG2_E,
        **_constants(tables, shape, heads, q, described),
    )  # fmt: skip


def row_stats(dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, beyond: int) -> torch.Tensor:
    """What backward needs of each row and head: LSE in powers of two, and rowsum(dout * out).

    Returns (2, Hq, Tq + ``beyond`` or more), in the type of ``lse``. LSE is infinite for rows without keys and beyond the last
    row, so that their weights are 0.
    """
    tokens, heads, dim = dout.shape
    stats = torch.empty(2, heads, -(-(tokens + beyond) // DELTA_ROWS) * DELTA_ROWS, dtype=lse.dtype, device=lse.device)
    delta_kernel[stats.shape[2] // DELTA_ROWS, heads](
        dout, out, lse, stats, *_strides(dout, out, lse), tokens, stats.shape[2],
        D=dim, PAD=_padded(dim), HEIGHT=DELTA_ROWS, SUM=_sum_type(lse), num_warps=DELTA_WARPS,
    )  # fmt: skip
    return stats


def launch_dq(
    tables: Tables, shape: Shape, heads: Heads, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor,
    stats: torch.Tensor, dq: torch.Tensor, scale: float,
) -> Any:  # fmt: skip
    """Write dq into the tensor given. Returns as ``launch_forward``."""
    described, tiles = _tiles(tables, shape, k, v)
    return dq_kernel[tables.blocks, q.shape[1]](
        *tables.arguments, q, *tiles, dout, stats, dq, *_strides(q, k, v, dout, dq), stats.shape[2],
        k.shape[0], scale, scale * LOG2_E, **_constants(tables, shape, heads, q, described),
    )  # fmt: skip


def launch_dkv(
    tables: Tables, shape: Shape, heads: Heads, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor,
    stats: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, scale: float,
) -> Any:  # fmt: skip
    """Write dk and dv into the tensors given. Returns as ``launch_forward``."""
    described, tiles = _tiles(tables, shape, q, dout)
    return dkv_kernel[tables.blocks, k.shape[1]](
        *tables.arguments, k, v, *tiles, stats, dk, dv, *_strides(q, k, v, dout, dk, dv), stats.shape[2],
        q.shape[0], scale, scale * LOG2_E, **_constants(tables, shape, heads, q, described),
    )  # fmt: skip


def _constants(tables: Tables, shape: Shape, heads: Heads, q: torch.Tensor, described: bool) -> dict[str, Any]:
    return {
        "GROUP": heads.q // heads.kv, "PER_MAP": heads.q // tables.maps, "D": q.shape[2], "PAD": _padded(q.shape[2]),
        **tables.constants, "DESCRIBED": described, "SUM": _sum_type(q), "num_warps": shape.warps, "num_stages": shape.stages,
    }  # fmt: skip


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _sum_type(x: torch.Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [x.stride(i) for x in tensors for i in (0, 1)]


def _tiles(tables: Tables, shape: Shape, *tensors: torch.Tensor) -> tuple[bool, list[Any]]:
    """Whether tensor descriptors can read tiles of the tensors; then a descriptor each, tested tiles last, else the tensors twice.

    A descriptor is of the matrix (tokens, heads and dims). A head begins at column ``head * stride``, whatever lies between heads.
    """
    if not (shape.described and all(_describable(x) for x in tensors)):
        return False, [*tensors, *tensors]
    widths = tables.constants["WIDTH"], tables.constants["TESTED"] or tables.constants["WIDTH"]
    return True, [
        TensorDescriptor(x, [x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]], [x.stride(0), 1], [width, x.shape[2]])
        for width in widths
        for x in tensors
    ]


def _describable(x: torch.Tensor) -> bool:
    """What the tensor memory accelerator addresses (cuTensorMapEncodeTiled): strides and a base of 16-byte multiples."""
    strides = [x.stride(i) * x.element_size() for i in (0, 1)]
    return (
        x.numel() > 0
        and (x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (9, 0))
        and x.element_size() * x.shape[2] <= 256 and x.shape[2] == _padded(x.shape[2])
        and x.data_ptr() % 16 == 0 and all(stride % 16 == 0 and 0 < stride < 1 << 40 for stride in strides)
        and x.shape[1] * x.stride(1) < INT32.max
    )  # fmt: skip


@triton.jit
def _block(x, t, h, first, size, head, last, d, D: tl.constexpr, PAD: tl.constexpr, CUT: tl.constexpr):
    """Rows ``first + size`` of one head; zeros from ``last`` on where a tile may be cut."""
    at = x + (tl.cast(first, tl.int64) * t + head * h) + (size[:, None] * t + d[None, :])
    if CUT:
        return tl.load(at, mask=(first + size < last)[:, None] & (d < D)[None, :], other=0.0)
    if D < PAD:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _tile(x, t, h, first, size, head, last, d, D: tl.constexpr, PAD: tl.constexpr, CUT: tl.constexpr, DESCRIBED: tl.constexpr):
    """A tile by a tensor descriptor, zeros beyond the last token, or by pointers as ``_block``."""
    if DESCRIBED:
        return x.load([first, (head * h).to(tl.int32)])
    else:
        return _block(x, t, h, first, size, head, last, d, D, PAD, CUT)


@triton.jit
def _store(x, t, h, first, size, head, last, d, value, D: tl.constexpr):
    at = x + (tl.cast(first, tl.int64) * t + head * h) + (size[:, None] * t + d[None, :])
    tl.store(at, value.to(x.dtype.element_ty), mask=(first + size < last)[:, None] & (d < D)[None, :])


@triton.jit
def _begin(ats, stretches, entry, FIELDS: tl.constexpr):
    """(tiles, first stretch, its first column, its last column + 1) of an entry of the tables."""
    i = tl.load(ats + 2 * entry)
    return tl.load(ats + 2 * entry + 1), i, tl.load(stretches + FIELDS * i), tl.load(stretches + FIELDS * i + 1)


@triton.jit
def _walk(stretches, i, at, stop, WIDTH: tl.constexpr, FIELDS: tl.constexpr):
    """The tile after one at ``at``: of the same stretch, or the first of the next one."""
    at += WIDTH
    over = at >= stop
    i = tl.where(over, i + 1, i)
    stretch = stretches + FIELDS * i
    return i, tl.where(over, tl.load(stretch), at), tl.load(stretch + 1)


@triton.jit
def _in_band(at, rows, columns):
    """Which (row, column) a band has."""
    r = (rows >= tl.load(at)) & (rows < tl.load(at + 1))
    c = (columns >= tl.load(at + 2)) & (columns < tl.load(at + 3))
    distance = columns[None, :] - rows[:, None]
    return r[:, None] & c[None, :] & (distance >= tl.load(at + 4)) & (distance <= tl.load(at + 5))


@triton.jit
def _in_bands(bands, stretch, rows, columns, SINGLE: tl.constexpr):
    """Which (row, column) one of the bands of a stretch has."""
    first = tl.load(stretch + 2)
    inside = _in_band(bands + 6 * first, rows, columns)
    if not SINGLE:
        for i in range(first + 1, tl.load(stretch + 3)):
            inside |= _in_band(bands + 6 * i, rows, columns)
    return inside


@triton.jit
def _attend(q, k, v, scale_log2, allowed, total, weight, top, MASKED: tl.constexpr, SUM: tl.constexpr):
    """One step of the online softmax; ``top`` is the largest score before it is scaled, so that scaling is part of the exponent."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=SUM)
    if MASKED:
        scores = tl.where(allowed, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet: the difference of two infinities is never taken.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = tl.exp2(scores * scale_log2 - (shift * scale_log2)[:, None])
    decay = tl.exp2((top - shift) * scale_log2)
    total = tl.dot(p.to(v.dtype), v, total * decay[:, None], input_precision="ieee", out_dtype=SUM)
    return total, weight * decay + tl.sum(p, 1), new_top


@triton.jit
def _place(order, block_rows, PER_MAP: tl.constexpr):
    """(query head, entry in the tables, first row, last row + 1) of a program that is one block of queries of one head."""
    head = tl.program_id(1)
    first_entry = head // PER_MAP * tl.num_programs(0)
    block = tl.load(order + first_entry + tl.program_id(0))
    return head.to(tl.int64), first_entry + block, tl.load(block_rows + 2 * block), tl.load(block_rows + 2 * block + 1)


@triton.jit
def forward_kernel(
    block_rows, order, whole_at, whole, tested_at, tested, bands, q, k_tiles, v_tiles, k_narrow, v_narrow, out, lse,
    q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, l_t, l_h, num_k, scale_log2,
    GROUP: tl.constexpr, PER_MAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TESTED: tl.constexpr, SINGLE: tl.constexpr, DESCRIBED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out and LSE of one block of queries of one head."""
    head, entry, begin, end = _place(order, block_rows, PER_MAP)
    kv_head = head // GROUP
    size, columns, d = tl.arange(0, HEIGHT), tl.arange(0, WIDTH), tl.arange(0, PAD)
    queries = _block(q, q_t, q_h, begin, size, head, end, d, D, PAD, True)
    total = tl.zeros([HEIGHT, PAD], SUM)
    weight = tl.zeros([HEIGHT], SUM)
    top = tl.full([HEIGHT], float("-inf"), SUM)
    tiles, i, at, stop = _begin(whole_at, whole, entry, 2)
    for _ in range(tiles):
        keys = _tile(k_tiles, k_t, k_h, at, columns, kv_head, num_k, d, D, PAD, False, DESCRIBED)
        values = _tile(v_tiles, v_t, v_h, at, columns, kv_head, num_k, d, D, PAD, False, DESCRIBED)
        total, weight, top = _attend(queries, keys, values, scale_log2, None, total, weight, top, False, SUM)
        i, at, stop = _walk(whole, i, at, stop, WIDTH, 2)
    if TESTED > 0:
        narrow = tl.arange(0, TESTED)
        tiles, i, at, stop = _begin(tested_at, tested, entry, 4)
        for _ in range(tiles):
            keys = _tile(k_narrow, k_t, k_h, at, narrow, kv_head, num_k, d, D, PAD, True, DESCRIBED)
            values = _tile(v_narrow, v_t, v_h, at, narrow, kv_head, num_k, d, D, PAD, True, DESCRIBED)
            allowed = _in_bands(bands, tested + 4 * i, begin + size, at + narrow, SINGLE)
            total, weight, top = _attend(queries, keys, values, scale_log2, allowed, total, weight, top, True, SUM)
            i, at, stop = _walk(tested, i, at, stop, TESTED, 4)
    seen = weight > 0
    _store(out, o_t, o_h, begin, size, head, end, d, total / tl.where(seen, weight, 1.0)[:, None], D)
    value = tl.where(seen, (top * scale_log2 + tl.log2(tl.where(seen, weight, 1.0))) / IN_LOG2, float("-inf"))
    tl.store(lse + (tl.cast(begin, tl.int64) * l_t + head * l_h) + size * l_t, value, mask=begin + size < end)


@triton.jit
def _weights(q, k, dout, v, lse_log2, delta, scale_log2, allowed, MASKED: tl.constexpr, SUM: tl.constexpr):
    """(p, ds) of a tile, rows being queries; ds without the softmax scale."""
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=SUM) * scale_log2 - lse_log2[:, None])
    if MASKED:
        p = tl.where(allowed, p, 0.0)
    return p, p * (tl.dot(dout, tl.trans(v), input_precision="ieee", out_dtype=SUM) - delta[:, None])


@triton.jit
def _add_gradients(
    k, q, v, dout, lse_log2, delta, scale_log2, allowed, dk, dv, MASKED: tl.constexpr, SUM: tl.constexpr
):  # fmt: skip
    """dk (without the softmax scale) and dv of a tile, rows being keys, added to their sums."""
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=SUM) * scale_log2 - lse_log2[None, :])
    if MASKED:
        p = tl.where(allowed, p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee", out_dtype=SUM)
    ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee", out_dtype=SUM) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee", out_dtype=SUM), dv


@triton.jit
def delta_kernel(
    dout, out, lse, stats, g_t, g_h, o_t, o_h, l_t, l_h, num_q, padded_q,
    D: tl.constexpr, PAD: tl.constexpr, HEIGHT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Some rows of one head of ``row_stats``; out may be in a wider type than dout."""
    head = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * HEIGHT
    size, d = tl.arange(0, HEIGHT), tl.arange(0, PAD)
    douts = _block(dout, g_t, g_h, begin, size, head, num_q, d, D, PAD, True).to(SUM)
    outs = _block(out, o_t, o_h, begin, size, head, num_q, d, D, PAD, True).to(SUM)
    at = lse + (tl.cast(begin, tl.int64) * l_t + head * l_h) + size * l_t
    value = tl.load(at, mask=begin + size < num_q, other=float("-inf"))
    to = stats + (head * padded_q + begin) + size
    tl.store(to, tl.where(value == float("-inf"), float("inf"), value * IN_LOG2))
    tl.store(to + tl.num_programs(1).to(tl.int64) * padded_q, tl.sum(douts * outs, 1))


@triton.jit
def dq_kernel(
    block_rows, order, whole_at, whole, tested_at, tested, bands, q, k_tiles, v_tiles, k_narrow, v_narrow, dout, stats, dq,
    q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, g_t, g_h, padded_q, num_k, scale, scale_log2,
    GROUP: tl.constexpr, PER_MAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TESTED: tl.constexpr, SINGLE: tl.constexpr, DESCRIBED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head."""
    head, entry, begin, end = _place(order, block_rows, PER_MAP)
    kv_head = head // GROUP
    size, columns, d = tl.arange(0, HEIGHT), tl.arange(0, WIDTH), tl.arange(0, PAD)
    queries = _block(q, q_t, q_h, begin, size, head, end, d, D, PAD, True)
    douts = _block(dout, o_t, o_h, begin, size, head, end, d, D, PAD, True)
    of_rows = stats + (head * padded_q + begin) + size
    lse_log2, deltas = tl.load(of_rows), tl.load(of_rows + tl.num_programs(1).to(tl.int64) * padded_q)
    total = tl.zeros([HEIGHT, PAD], SUM)
    tiles, i, at, stop = _begin(whole_at, whole, entry, 2)
    for _ in range(tiles):
        keys = _tile(k_tiles, k_t, k_h, at, columns, kv_head, num_k, d, D, PAD, False, DESCRIBED)
        values = _tile(v_tiles, v_t, v_h, at, columns, kv_head, num_k, d, D, PAD, False, DESCRIBED)
        p, ds = _weights(queries, keys, douts, values, lse_log2, deltas, scale_log2, None, False, SUM)
        total = tl.dot(ds.to(keys.dtype), keys, total, input_precision="ieee", out_dtype=SUM)
        i, at, stop = _walk(whole, i, at, stop, WIDTH, 2)
    if TESTED > 0:
        narrow = tl.arange(0, TESTED)
        tiles, i, at, stop = _begin(tested_at, tested, entry, 4)
        for _ in range(tiles):
            keys = _tile(k_narrow, k_t, k_h, at, narrow, kv_head, num_k, d, D, PAD, True, DESCRIBED)
            values = _tile(v_narrow, v_t, v_h, at, narrow, kv_head, num_k, d, D, PAD, True, DESCRIBED)
            allowed = _in_bands(bands, tested + 4 * i, begin + size, at + narrow, SINGLE)
            p, ds = _weights(queries, keys, douts, values, lse_log2, deltas, scale_log2, allowed, True, SUM)
            total = tl.dot(ds.to(keys.dtype), keys, total, input_precision="ieee", out_dtype=SUM)
            i, at, stop = _walk(tested, i, at, stop, TESTED, 4)
    _store(dq, g_t, g_h, begin, size, head, end, d, total * scale, D)


@triton.jit
def dkv_kernel(
    block_rows, order, whole_at, whole, tested_at, tested, bands, k, v, q_tiles, dout_tiles, q_narrow, dout_narrow, stats, dk, dv,
    q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, dk_t, dk_h, dv_t, dv_h, padded_q, num_q, scale, scale_log2,
    GROUP: tl.constexpr, PER_MAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TESTED: tl.constexpr, SINGLE: tl.constexpr, DESCRIBED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key/value head, over all query heads that read it; of the transposed mask."""
    kv_head = tl.program_id(1).to(tl.int64)
    # Blocks are taken in the order of the first map that reads this head.
    block = tl.load(order + tl.program_id(1) * GROUP // PER_MAP * tl.num_programs(0) + tl.program_id(0))
    begin, end = tl.load(block_rows + 2 * block), tl.load(block_rows + 2 * block + 1)
    size, columns, d = tl.arange(0, HEIGHT), tl.arange(0, WIDTH), tl.arange(0, PAD)
    keys = _block(k, k_t, k_h, begin, size, kv_head, end, d, D, PAD, True)
    values = _block(v, v_t, v_h, begin, size, kv_head, end, d, D, PAD, True)
    dk_total, dv_total = tl.zeros([HEIGHT, PAD], SUM), tl.zeros([HEIGHT, PAD], SUM)
    deltas_at = tl.num_programs(1).to(tl.int64) * GROUP * padded_q
    # Two sums fill the registers: what does not change in a loop is better computed in it again than kept.
    for member in range(GROUP):
        head = kv_head * GROUP + member
        entry = (head // PER_MAP).to(tl.int32) * tl.num_programs(0) + block
        of_head = stats + head * padded_q
        tiles, i, at, stop = _begin(whole_at, whole, entry, 2)
        for _ in tl.range(tiles, disable_licm=True):
            queries = _tile(q_tiles, q_t, q_h, at, columns, head, num_q, d, D, PAD, False, DESCRIBED)
            douts = _tile(dout_tiles, o_t, o_h, at, columns, head, num_q, d, D, PAD, False, DESCRIBED)
            lse_log2, deltas = tl.load(of_head + at + columns), tl.load(of_head + deltas_at + at + columns)
            dk_total, dv_total = _add_gradients(
                keys, queries, values, douts, lse_log2, deltas, scale_log2, None, dk_total, dv_total, False, SUM
            )
            i, at, stop = _walk(whole, i, at, stop, WIDTH, 2)
        if TESTED > 0:
            narrow = tl.arange(0, TESTED)
            tiles, i, at, stop = _begin(tested_at, tested, entry, 4)
            for _ in tl.range(tiles, disable_licm=True):
                queries = _tile(q_narrow, q_t, q_h, at, narrow, head, num_q, d, D, PAD, True, DESCRIBED)
                douts = _tile(dout_narrow, o_t, o_h, at, narrow, head, num_q, d, D, PAD, True, DESCRIBED)
                lse_log2, deltas = tl.load(of_head + at + narrow), tl.load(of_head + deltas_at + at + narrow)
                allowed = _in_bands(bands, tested + 4 * i, begin + size, at + narrow, SINGLE)
                dk_total, dv_total = _add_gradients(
                    keys, queries, values, douts, lse_log2, deltas, scale_log2, allowed, dk_total, dv_total, True, SUM
                )
                i, at, stop = _walk(tested, i, at, stop, TESTED, 4)
    _store(dk, dk_t, dk_h, begin, size, kv_head, end, d, dk_total * scale, D)
    _store(dv, dv_t, dv_h, begin, size, kv_head, end, d, dv_total, D)
