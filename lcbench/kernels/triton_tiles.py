"""Flash attention in Triton over tables of tiles (``tile_tables``): forward, and backward from any out and LSE.

The online softmax is that of FlashAttention-2 (arXiv 2307.08691). Backward is two kernels, one over blocks of queries
for dq and one over blocks of keys for dk and dv, so nothing is added atomically and results repeat bit by bit. Layouts are
packed as in ``base``; tensors are read where they lie, whatever their strides over tokens and heads.

Queries and keys are read in two parts where that is narrower than one block (``triton_shapes.key_width``). Values are one part.

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
from lcbench.kernels.triton_shapes import Shape, Shapes, key_width, value_width
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

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        """(out, lse), out in the inputs' type.

        Raises:
            ValueError: ``softmax_scale`` is not above 0. The kernel looks for the largest score before it applies the scale.
        """
        if not softmax_scale > 0:
            raise ValueError(f"our Triton kernels take softmax scales above 0, not {softmax_scale}")
        q, k, v = map(heads_whole, (q, k, v))
        out = q.new_empty(*q.shape[:2], v.shape[2])
        lse = torch.empty(q.shape[:2], dtype=accumulation_dtype(q.dtype), device=q.device)
        launch_forward(self._forward, self._shapes.forward, self._heads, q, k, v, out, lse, softmax_scale, softcap)
        return out, lse

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float, softcap: float = 0.0) -> Gradients:
        q, k, v, out, lse = saved
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        dout, q, k, v, out = map(heads_whole, (dout, q, k, v, out))
        stats = row_stats(dout, out, lse, self._beyond)
        launch_dq(self._dq, self._shapes.dq, self._heads, q, k, v, dout, stats, dq, softmax_scale, softcap)
        launch_dkv(self._dkv, self._shapes.dkv, self._heads, q, k, v, dout, stats, dk, dv, softmax_scale, softcap)
        return dq, dk, dv


def launch_forward(
    tables: Tables, shape: Shape, heads: Heads, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, scale: float, softcap: float = 0.0,
) -> Any:  # fmt: skip
    """Write out and LSE into the tensors given. Returns the compiled kernel, None under the interpreter."""
    described, tiles = _tiles(tables, shape, *_parts(k), v)
    return forward_kernel[tables.blocks, q.shape[1]](
        *tables.arguments, *_parts(q), *tiles, out, lse, *_strides(q, k, v, out, lse), k.shape[0], *_scales(scale, softcap),
        **_constants(tables, shape, heads, q, softcap, described),
    )  # fmt: skip


def row_stats(dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, beyond: int) -> torch.Tensor:
    """What backward needs of each row and head: LSE in powers of two, and rowsum(dout * out).

    Returns (2, Hq, Tq + ``beyond`` or more), in the type of ``lse``. LSE is infinite for rows without keys and beyond the last
    row, so that their weights are 0.
    """
    tokens, heads, dim_v = dout.shape
    stats = torch.empty(2, heads, -(-(tokens + beyond) // DELTA_ROWS) * DELTA_ROWS, dtype=lse.dtype, device=lse.device)
    delta_kernel[stats.shape[2] // DELTA_ROWS, heads](
        dout, out, lse, stats, *_strides(dout, out, lse), tokens, stats.shape[2],
        DV=dim_v, PAD_V=value_width(dim_v), HEIGHT=DELTA_ROWS, SUM=_sum_type(lse), num_warps=DELTA_WARPS,
    )  # fmt: skip
    return stats


def launch_dq(
    tables: Tables, shape: Shape, heads: Heads, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor,
    stats: torch.Tensor, dq: torch.Tensor, scale: float, softcap: float = 0.0,
) -> Any:  # fmt: skip
    """Write dq into the tensor given. Returns as ``launch_forward``."""
    described, tiles = _tiles(tables, shape, *_parts(k), v)
    return dq_kernel[tables.blocks, q.shape[1]](
        *tables.arguments, *_parts(q), *tiles, dout, stats, *_parts(dq), *_strides(q, k, v, dout, dq), stats.shape[2],
        k.shape[0], scale, *_scales(scale, softcap), **_constants(tables, shape, heads, q, softcap, described),
    )  # fmt: skip


def launch_dkv(
    tables: Tables, shape: Shape, heads: Heads, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor,
    stats: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, scale: float, softcap: float = 0.0,
) -> Any:  # fmt: skip
    """Write dk and dv into the tensors given. Returns as ``launch_forward``."""
    described, tiles = _tiles(tables, shape, *_parts(q), dout)
    return dkv_kernel[tables.blocks, k.shape[1]](
        *tables.arguments, *_parts(k), v, *tiles, stats, *_parts(dk), dv, *_strides(q, k, v, dout, dk, dv), stats.shape[2],
        q.shape[0], scale, *_scales(scale, softcap), **_constants(tables, shape, heads, q, softcap, described),
    )  # fmt: skip


def _constants(
    tables: Tables, shape: Shape, heads: Heads, q: torch.Tensor, softcap: float, described: bool
) -> dict[str, Any]:  # fmt: skip
    width = key_width(heads.dim)
    return {
        "GROUP": heads.q // heads.kv, "PER_MAP": heads.q // tables.maps,
        "D": width.first, "PAD": width.padded, "REST": width.rest, "PAD_REST": width.rest_padded,
        "DV": heads.v, "PAD_V": value_width(heads.v), "CAPPED": softcap > 0,
        **tables.constants, "DESCRIBED": described, "SUM": _sum_type(q), "num_warps": shape.warps, "num_stages": shape.stages,
    }  # fmt: skip


def _scales(scale: float, softcap: float) -> tuple[float, float, float]:
    """What a score is multiplied with in an exponent of two; with a softcap, what a product is before tanh, and tanh after it."""
    return (LOG2_E, scale / softcap, softcap) if softcap else (scale * LOG2_E, 0.0, 0.0)


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts of queries or keys; the first one twice where there is one only, and then the second is not read."""
    width = key_width(x.shape[2])
    return (x[..., : width.first], x[..., width.first :]) if width.rest else (x, x)


def _sum_type(x: torch.Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [x.stride(i) for x in tensors for i in (0, 1)]


def _tiles(tables: Tables, shape: Shape, *tensors: torch.Tensor) -> tuple[bool, list[Any]]:
    """Whether tensor descriptors can read tiles of the tensors; then a descriptor each, tested tiles last, else the tensors twice.

    A descriptor is of the matrix (tokens, heads and dims). A head begins at column ``head * stride``, whatever lies between heads.
    ``tensors`` are two parts and a whole, as kernels take them; a part without numbers has no blocks.
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
        and x.element_size() * x.shape[2] <= 256 and x.shape[2] == value_width(x.shape[2])
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
def _rest(x, t, h, first, size, head, last, REST: tl.constexpr, PAD_REST: tl.constexpr, CUT: tl.constexpr, otherwise):
    """A block of the second part of queries or keys; without one ``otherwise``, of which nothing is used."""
    if REST > 0:
        return _block(x, t, h, first, size, head, last, tl.arange(0, PAD_REST), REST, PAD_REST, CUT)
    else:
        return otherwise


@triton.jit
def _rest_tile(
    x, t, h, first, size, head, last,
    REST: tl.constexpr, PAD_REST: tl.constexpr, CUT: tl.constexpr, DESCRIBED: tl.constexpr, otherwise,
):  # fmt: skip
    """A tile of the second part, as ``_tile``; without one as ``_rest``."""
    if REST > 0:
        return _tile(x, t, h, first, size, head, last, tl.arange(0, PAD_REST), REST, PAD_REST, CUT, DESCRIBED)
    else:
        return otherwise


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
def _products(a, a_rest, b, b_rest, REST: tl.constexpr, SUM: tl.constexpr):
    """Products of each row of a with each row of b, over both parts of them."""
    found = tl.dot(a, tl.trans(b), input_precision="ieee", out_dtype=SUM)
    if REST > 0:
        found = tl.dot(a_rest, tl.trans(b_rest), found, input_precision="ieee", out_dtype=SUM)
    return found


@triton.jit
def _bent(products, scale_in):
    """tanh of scaled products, by an exponential that does not overflow."""
    x = products * scale_in
    e = tl.exp2(tl.abs(x) * (IN_LOG2 * -2.0))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)


@triton.jit
def _attend(
    scores, v, scale_log2, scale_in, scale_out, allowed, total, weight, top,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax; ``top`` is the largest score before it is scaled, so that scaling is part of the exponent."""
    if CAPPED:
        scores = _bent(scores, scale_in) * scale_out
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
    block_rows, order, whole_at, whole, tested_at, tested, bands, q, q_rest, k_tiles, k_rest_tiles, v_tiles,
    k_narrow, k_rest_narrow, v_narrow, out, lse,
    q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, l_t, l_h, num_k, scale_log2, scale_in, scale_out,
    GROUP: tl.constexpr, PER_MAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, REST: tl.constexpr, PAD_REST: tl.constexpr,
    DV: tl.constexpr, PAD_V: tl.constexpr, CAPPED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TESTED: tl.constexpr, SINGLE: tl.constexpr, DESCRIBED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out and LSE of one block of queries of one head."""
    head, entry, begin, end = _place(order, block_rows, PER_MAP)
    kv_head = head // GROUP
    size, columns, d, dv = tl.arange(0, HEIGHT), tl.arange(0, WIDTH), tl.arange(0, PAD), tl.arange(0, PAD_V)
    queries = _block(q, q_t, q_h, begin, size, head, end, d, D, PAD, True)
    queries_rest = _rest(q_rest, q_t, q_h, begin, size, head, end, REST, PAD_REST, True, queries)
    total = tl.zeros([HEIGHT, PAD_V], SUM)
    weight = tl.zeros([HEIGHT], SUM)
    top = tl.full([HEIGHT], float("-inf"), SUM)
    tiles, i, at, stop = _begin(whole_at, whole, entry, 2)
    for _ in range(tiles):
        keys = _tile(k_tiles, k_t, k_h, at, columns, kv_head, num_k, d, D, PAD, False, DESCRIBED)
        rest = _rest_tile(k_rest_tiles, k_t, k_h, at, columns, kv_head, num_k, REST, PAD_REST, False, DESCRIBED, keys)
        values = _tile(v_tiles, v_t, v_h, at, columns, kv_head, num_k, dv, DV, PAD_V, False, DESCRIBED)
        scores = _products(queries, queries_rest, keys, rest, REST, SUM)
        total, weight, top = _attend(
            scores, values, scale_log2, scale_in, scale_out, None, total, weight, top, False, CAPPED, SUM
        )  # fmt: skip
        i, at, stop = _walk(whole, i, at, stop, WIDTH, 2)
    if TESTED > 0:
        narrow = tl.arange(0, TESTED)
        tiles, i, at, stop = _begin(tested_at, tested, entry, 4)
        for _ in range(tiles):
            keys = _tile(k_narrow, k_t, k_h, at, narrow, kv_head, num_k, d, D, PAD, True, DESCRIBED)
            rest = _rest_tile(k_rest_narrow, k_t, k_h, at, narrow, kv_head, num_k, REST, PAD_REST, True, DESCRIBED, keys)
            values = _tile(v_narrow, v_t, v_h, at, narrow, kv_head, num_k, dv, DV, PAD_V, True, DESCRIBED)
            allowed = _in_bands(bands, tested + 4 * i, begin + size, at + narrow, SINGLE)
            scores = _products(queries, queries_rest, keys, rest, REST, SUM)
            total, weight, top = _attend(
                scores, values, scale_log2, scale_in, scale_out, allowed, total, weight, top, True, CAPPED, SUM
            )  # fmt: skip
            i, at, stop = _walk(tested, i, at, stop, TESTED, 4)
    seen = weight > 0
    _store(out, o_t, o_h, begin, size, head, end, dv, total / tl.where(seen, weight, 1.0)[:, None], DV)
    value = tl.where(seen, (top * scale_log2 + tl.log2(tl.where(seen, weight, 1.0))) / IN_LOG2, float("-inf"))
    tl.store(lse + (tl.cast(begin, tl.int64) * l_t + head * l_h) + size * l_t, value, mask=begin + size < end)


@triton.jit
def _weights(
    products, lse_log2, scale_log2, scale_in, scale_out, allowed, MASKED: tl.constexpr, CAPPED: tl.constexpr
):  # fmt: skip
    """Weights of a tile, and the slopes of its softcapped scores; without a softcap products, of which nothing is used."""
    slopes = products
    if CAPPED:
        bent = _bent(products, scale_in)
        products = bent * scale_out
        slopes = 1.0 - bent * bent
    p = tl.exp2(products * scale_log2 - lse_log2)
    if MASKED:
        p = tl.where(allowed, p, 0.0)
    return p, slopes


@triton.jit
def delta_kernel(
    dout, out, lse, stats, g_t, g_h, o_t, o_h, l_t, l_h, num_q, padded_q,
    DV: tl.constexpr, PAD_V: tl.constexpr, HEIGHT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Some rows of one head of ``row_stats``; out may be in a wider type than dout."""
    head = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * HEIGHT
    size, d = tl.arange(0, HEIGHT), tl.arange(0, PAD_V)
    douts = _block(dout, g_t, g_h, begin, size, head, num_q, d, DV, PAD_V, True).to(SUM)
    outs = _block(out, o_t, o_h, begin, size, head, num_q, d, DV, PAD_V, True).to(SUM)
    at = lse + (tl.cast(begin, tl.int64) * l_t + head * l_h) + size * l_t
    value = tl.load(at, mask=begin + size < num_q, other=float("-inf"))
    to = stats + (head * padded_q + begin) + size
    tl.store(to, tl.where(value == float("-inf"), float("inf"), value * IN_LOG2))
    tl.store(to + tl.num_programs(1).to(tl.int64) * padded_q, tl.sum(douts * outs, 1))


@triton.jit
def _add_dq(
    queries, queries_rest, keys, rest, douts, values, lse_log2, deltas, scale_log2, scale_in, scale_out, allowed, total, total_rest,
    REST: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """dq of a tile, without the softmax scale, added to the sums of both its parts."""
    products = _products(queries, queries_rest, keys, rest, REST, SUM)
    p, slopes = _weights(products, lse_log2[:, None], scale_log2, scale_in, scale_out, allowed, MASKED, CAPPED)
    ds = p * (tl.dot(douts, tl.trans(values), input_precision="ieee", out_dtype=SUM) - deltas[:, None])
    if CAPPED:
        ds *= slopes
    ds = ds.to(keys.dtype)
    total = tl.dot(ds, keys, total, input_precision="ieee", out_dtype=SUM)
    if REST > 0:
        total_rest = tl.dot(ds, rest, total_rest, input_precision="ieee", out_dtype=SUM)
    return total, total_rest


@triton.jit
def dq_kernel(
    block_rows, order, whole_at, whole, tested_at, tested, bands, q, q_rest, k_tiles, k_rest_tiles, v_tiles,
    k_narrow, k_rest_narrow, v_narrow, dout, stats, dq, dq_rest,
    q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, g_t, g_h, padded_q, num_k, scale, scale_log2, scale_in, scale_out,
    GROUP: tl.constexpr, PER_MAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, REST: tl.constexpr, PAD_REST: tl.constexpr,
    DV: tl.constexpr, PAD_V: tl.constexpr, CAPPED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TESTED: tl.constexpr, SINGLE: tl.constexpr, DESCRIBED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head."""
    head, entry, begin, end = _place(order, block_rows, PER_MAP)
    kv_head = head // GROUP
    size, columns, d, dv = tl.arange(0, HEIGHT), tl.arange(0, WIDTH), tl.arange(0, PAD), tl.arange(0, PAD_V)
    queries = _block(q, q_t, q_h, begin, size, head, end, d, D, PAD, True)
    queries_rest = _rest(q_rest, q_t, q_h, begin, size, head, end, REST, PAD_REST, True, queries)
    douts = _block(dout, o_t, o_h, begin, size, head, end, dv, DV, PAD_V, True)
    of_rows = stats + (head * padded_q + begin) + size
    lse_log2, deltas = tl.load(of_rows), tl.load(of_rows + tl.num_programs(1).to(tl.int64) * padded_q)
    total = tl.zeros([HEIGHT, PAD], SUM)
    total_rest = tl.zeros([HEIGHT, PAD_REST if REST > 0 else 1], SUM)
    tiles, i, at, stop = _begin(whole_at, whole, entry, 2)
    for _ in range(tiles):
        keys = _tile(k_tiles, k_t, k_h, at, columns, kv_head, num_k, d, D, PAD, False, DESCRIBED)
        rest = _rest_tile(k_rest_tiles, k_t, k_h, at, columns, kv_head, num_k, REST, PAD_REST, False, DESCRIBED, keys)
        values = _tile(v_tiles, v_t, v_h, at, columns, kv_head, num_k, dv, DV, PAD_V, False, DESCRIBED)
        total, total_rest = _add_dq(
            queries, queries_rest, keys, rest, douts, values, lse_log2, deltas, scale_log2, scale_in, scale_out, None,
            total, total_rest, REST, False, CAPPED, SUM,
        )  # fmt: skip
        i, at, stop = _walk(whole, i, at, stop, WIDTH, 2)
    if TESTED > 0:
        narrow = tl.arange(0, TESTED)
        tiles, i, at, stop = _begin(tested_at, tested, entry, 4)
        for _ in range(tiles):
            keys = _tile(k_narrow, k_t, k_h, at, narrow, kv_head, num_k, d, D, PAD, True, DESCRIBED)
            rest = _rest_tile(k_rest_narrow, k_t, k_h, at, narrow, kv_head, num_k, REST, PAD_REST, True, DESCRIBED, keys)
            values = _tile(v_narrow, v_t, v_h, at, narrow, kv_head, num_k, dv, DV, PAD_V, True, DESCRIBED)
            allowed = _in_bands(bands, tested + 4 * i, begin + size, at + narrow, SINGLE)
            total, total_rest = _add_dq(
                queries, queries_rest, keys, rest, douts, values, lse_log2, deltas, scale_log2, scale_in, scale_out, allowed,
                total, total_rest, REST, True, CAPPED, SUM,
            )  # fmt: skip
            i, at, stop = _walk(tested, i, at, stop, TESTED, 4)
    _store(dq, g_t, g_h, begin, size, head, end, d, total * scale, D)
    if REST > 0:
        _store(dq_rest, g_t, g_h, begin, size, head, end, tl.arange(0, PAD_REST), total_rest * scale, REST)


@triton.jit
def _add_dkv(
    keys, keys_rest, queries, rest, values, douts, lse_log2, deltas, scale_log2, scale_in, scale_out, allowed,
    dk, dk_rest, dv, REST: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """dk (without the softmax scale) and dv of a tile, rows being keys, added to their sums."""
    products = _products(keys, keys_rest, queries, rest, REST, SUM)
    p, slopes = _weights(products, lse_log2[None, :], scale_log2, scale_in, scale_out, allowed, MASKED, CAPPED)
    dv = tl.dot(p.to(douts.dtype), douts, dv, input_precision="ieee", out_dtype=SUM)
    ds = p * (tl.dot(values, tl.trans(douts), input_precision="ieee", out_dtype=SUM) - deltas[None, :])
    if CAPPED:
        ds *= slopes
    ds = ds.to(queries.dtype)
    dk = tl.dot(ds, queries, dk, input_precision="ieee", out_dtype=SUM)
    if REST > 0:
        dk_rest = tl.dot(ds, rest, dk_rest, input_precision="ieee", out_dtype=SUM)
    return dk, dk_rest, dv


@triton.jit
def dkv_kernel(
    block_rows, order, whole_at, whole, tested_at, tested, bands, k, k_rest, v, q_tiles, q_rest_tiles, dout_tiles,
    q_narrow, q_rest_narrow, dout_narrow, stats, dk, dk_rest, dv,
    q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, dk_t, dk_h, dv_t, dv_h, padded_q, num_q, scale, scale_log2, scale_in, scale_out,
    GROUP: tl.constexpr, PER_MAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, REST: tl.constexpr, PAD_REST: tl.constexpr,
    DV: tl.constexpr, PAD_V: tl.constexpr, CAPPED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TESTED: tl.constexpr, SINGLE: tl.constexpr, DESCRIBED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key/value head, over all query heads that read it; of the transposed mask."""
    kv_head = tl.program_id(1).to(tl.int64)
    # Blocks are taken in the order of the first map that reads this head.
    block = tl.load(order + tl.program_id(1) * GROUP // PER_MAP * tl.num_programs(0) + tl.program_id(0))
    begin, end = tl.load(block_rows + 2 * block), tl.load(block_rows + 2 * block + 1)
    size, columns, d, d_v = tl.arange(0, HEIGHT), tl.arange(0, WIDTH), tl.arange(0, PAD), tl.arange(0, PAD_V)
    keys = _block(k, k_t, k_h, begin, size, kv_head, end, d, D, PAD, True)
    keys_rest = _rest(k_rest, k_t, k_h, begin, size, kv_head, end, REST, PAD_REST, True, keys)
    values = _block(v, v_t, v_h, begin, size, kv_head, end, d_v, DV, PAD_V, True)
    dk_total, dv_total = tl.zeros([HEIGHT, PAD], SUM), tl.zeros([HEIGHT, PAD_V], SUM)
    dk_rest_total = tl.zeros([HEIGHT, PAD_REST if REST > 0 else 1], SUM)
    deltas_at = tl.num_programs(1).to(tl.int64) * GROUP * padded_q
    # The sums fill the registers: what does not change in a loop is better computed in it again than kept.
    for member in range(GROUP):
        head = kv_head * GROUP + member
        entry = (head // PER_MAP).to(tl.int32) * tl.num_programs(0) + block
        of_head = stats + head * padded_q
        tiles, i, at, stop = _begin(whole_at, whole, entry, 2)
        for _ in tl.range(tiles, disable_licm=True):
            queries = _tile(q_tiles, q_t, q_h, at, columns, head, num_q, d, D, PAD, False, DESCRIBED)
            rest = _rest_tile(q_rest_tiles, q_t, q_h, at, columns, head, num_q, REST, PAD_REST, False, DESCRIBED, queries)
            douts = _tile(dout_tiles, o_t, o_h, at, columns, head, num_q, d_v, DV, PAD_V, False, DESCRIBED)
            lse_log2, deltas = tl.load(of_head + at + columns), tl.load(of_head + deltas_at + at + columns)
            dk_total, dk_rest_total, dv_total = _add_dkv(
                keys, keys_rest, queries, rest, values, douts, lse_log2, deltas, scale_log2, scale_in, scale_out, None,
                dk_total, dk_rest_total, dv_total, REST, False, CAPPED, SUM,
            )  # fmt: skip
            i, at, stop = _walk(whole, i, at, stop, WIDTH, 2)
        if TESTED > 0:
            narrow = tl.arange(0, TESTED)
            tiles, i, at, stop = _begin(tested_at, tested, entry, 4)
            for _ in tl.range(tiles, disable_licm=True):
                queries = _tile(q_narrow, q_t, q_h, at, narrow, head, num_q, d, D, PAD, True, DESCRIBED)
                rest = _rest_tile(q_rest_narrow, q_t, q_h, at, narrow, head, num_q, REST, PAD_REST, True, DESCRIBED, queries)
                douts = _tile(dout_narrow, o_t, o_h, at, narrow, head, num_q, d_v, DV, PAD_V, True, DESCRIBED)
                lse_log2, deltas = tl.load(of_head + at + narrow), tl.load(of_head + deltas_at + at + narrow)
                allowed = _in_bands(bands, tested + 4 * i, begin + size, at + narrow, SINGLE)
                dk_total, dk_rest_total, dv_total = _add_dkv(
                    keys, keys_rest, queries, rest, values, douts, lse_log2, deltas, scale_log2, scale_in, scale_out, allowed,
                    dk_total, dk_rest_total, dv_total, REST, True, CAPPED, SUM,
                )  # fmt: skip
                i, at, stop = _walk(tested, i, at, stop, TESTED, 4)
    _store(dk, dk_t, dk_h, begin, size, kv_head, end, d, dk_total * scale, D)
    if REST > 0:
        _store(dk_rest, dk_t, dk_h, begin, size, kv_head, end, tl.arange(0, PAD_REST), dk_rest_total * scale, REST)
    _store(dv, dv_t, dv_h, begin, size, kv_head, end, d_v, dv_total, DV)
