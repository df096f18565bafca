"""Flash attention in Triton over tables of tiles (``tile_tables``): forward, and backward from any out and LSE.

The online softmax is that of FlashAttention-2 (arXiv 2307.08691). Backward is two kernels, one over blocks of queries
for dq and one over blocks of keys for dk and dv, so nothing is added atomically and results repeat bit by bit. Layouts are
packed as in ``base``; tensors are read where they lie, whatever their strides over tokens and heads.

Compiled for CUDA; under ``TRITON_INTERPRET=1`` the same code runs on a CPU, slowly, which is how tests see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from lcbench.kernels.base import LOG2_E, accumulation_dtype, heads_whole
from lcbench.kernels.tile_tables import TileTables
from lcbench.problem import Heads

INT32 = np.iinfo(np.int32)


class Launch(NamedTuple):
    """How a kernel is laid on the machine: warps of a block, tiles in flight."""

    num_warps: int
    num_stages: int


# Not tuned on a device yet: what compiles for compute capability 9.0 at head dim 128 with few spills.
FORWARD, DQ, DKV, DELTA = Launch(8, 3), Launch(8, 2), Launch(8, 2), Launch(4, 1)
# What a kernel reads of this module has to be a constant of Triton's.
IN_LOG2: tl.constexpr = tl.constexpr(LOG2_E)


class Tables:
    """``TileTables`` on a device, as the arguments that every kernel below begins with."""

    def __init__(self, tables: TileTables, device: torch.device) -> None:
        # Bounds of a band reach at most a sequence beyond the plane, or bind nowhere.
        bands = tables.bands.clip(INT32.min, INT32.max)
        arrays = tables.rows, tables.order, tables.whole_at, tables.whole, tables.tested_at, tables.tested, bands
        self.arguments = tuple(torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)).to(device) for x in arrays)
        self.blocks, self.maps, self.height, self.width = len(tables.rows), len(tables.order), tables.height, tables.width
        self.tested = len(tables.tested) > 0


@dataclass
class PreparedTiles:
    """A mask as tables over blocks of queries and over blocks of keys."""

    queries: Tables
    keys: Tables
    heads: Heads
    calls: int = 1

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=accumulation_dtype(q.dtype), device=q.device)
        q, k, v = map(heads_whole, (q, k, v))
        forward_kernel[self.queries.blocks, q.shape[1]](
            *self.queries.arguments, q, k, v, out, lse, *_strides(q, k, v, out, lse), k.shape[0], softmax_scale * LOG2_E,
            **self._constants(self.queries, q), **FORWARD._asdict(),
        )  # fmt: skip
        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        dout, q, k, v, out = map(heads_whole, (dout, q, k, v, out))
        constants = self._constants(self.queries, q)
        delta_kernel[triton.cdiv(q.shape[0], self.queries.height), q.shape[1]](
            dout, out, delta, *_strides(dout, out, delta), q.shape[0],
            **{name: constants[name] for name in ("D", "PAD", "HEIGHT", "SUM")}, **DELTA._asdict(),
        )  # fmt: skip
        dq_kernel[self.queries.blocks, q.shape[1]](
            *self.queries.arguments, q, k, v, dout, lse, delta, dq, *_strides(q, k, v, dout, lse, delta, dq),
            k.shape[0], softmax_scale, softmax_scale * LOG2_E,
            **constants, **DQ._asdict(),
        )  # fmt: skip
        dkv_kernel[self.keys.blocks, k.shape[1]](
            *self.keys.arguments, q, k, v, dout, lse, delta, dk, dv, *_strides(q, k, v, dout, lse, delta, dk, dv),
            q.shape[0], softmax_scale, softmax_scale * LOG2_E,
            **self._constants(self.keys, q), **DKV._asdict(),
        )  # fmt: skip
        return dq, dk, dv

    def _constants(self, tables: Tables, q: torch.Tensor) -> dict[str, Any]:
        return {
            "GROUP": self.heads.q // self.heads.kv, "PER_MAP": self.heads.q // tables.maps, "D": q.shape[2],
            "PAD": max(16, triton.next_power_of_2(q.shape[2])), "HEIGHT": tables.height, "WIDTH": tables.width,
            "TESTED": tables.tested, "SUM": tl.float64 if q.dtype == torch.float64 else tl.float32,
        }  # fmt: skip


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [x.stride(i) for x in tensors for i in (0, 1)]


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
def _store(x, t, h, first, size, head, last, d, value, D: tl.constexpr):
    at = x + (tl.cast(first, tl.int64) * t + head * h) + (size[:, None] * t + d[None, :])
    tl.store(at, value.to(x.dtype.element_ty), mask=(first + size < last)[:, None] & (d < D)[None, :])


@triton.jit
def _in_bands(bands, first, last, rows, columns):
    """Which (row, column) one of the bands ``first ... last - 1`` has."""
    inside = (rows[:, None] < 0) & (columns[None, :] < 0)
    for i in range(first, last):
        at = bands + 6 * i
        r = (rows >= tl.load(at)) & (rows < tl.load(at + 1))
        c = (columns >= tl.load(at + 2)) & (columns < tl.load(at + 3))
        distance = columns[None, :] - rows[:, None]
        inside |= r[:, None] & c[None, :] & (distance >= tl.load(at + 4)) & (distance <= tl.load(at + 5))
    return inside


@triton.jit
def _attend(q, k, v, scale_log2, allowed, total, weight, top, MASKED: tl.constexpr, SUM: tl.constexpr):
    """One step of the online softmax, in powers of two."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=SUM) * scale_log2
    if MASKED:
        scores = tl.where(allowed, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet: the difference of two infinities is never taken.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee", out_dtype=SUM)
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
    block_rows, order, whole_at, whole, tested_at, tested, bands, q, k, v, out, lse,
    q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, l_t, l_h, num_k, scale_log2,
    GROUP: tl.constexpr, PER_MAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TESTED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out and LSE of one block of queries of one head."""
    head, entry, begin, end = _place(order, block_rows, PER_MAP)
    kv_head = head // GROUP
    size, columns, d = tl.arange(0, HEIGHT), tl.arange(0, WIDTH), tl.arange(0, PAD)
    queries = _block(q, q_t, q_h, begin, size, head, end, d, D, PAD, True)
    total = tl.zeros([HEIGHT, PAD], SUM)
    weight = tl.zeros([HEIGHT], SUM)
    top = tl.full([HEIGHT], float("-inf"), SUM)
    for i in range(tl.load(whole_at + entry), tl.load(whole_at + entry + 1)):
        first, last = tl.load(whole + 2 * i), tl.load(whole + 2 * i + 1)
        rest = (last - first) // WIDTH * WIDTH + first
        for at in range(first, rest, WIDTH):
            keys = _block(k, k_t, k_h, at, columns, kv_head, num_k, d, D, PAD, False)
            values = _block(v, v_t, v_h, at, columns, kv_head, num_k, d, D, PAD, False)
            total, weight, top = _attend(queries, keys, values, scale_log2, None, total, weight, top, False, SUM)
        if rest < last:
            keys = _block(k, k_t, k_h, rest, columns, kv_head, last, d, D, PAD, True)
            values = _block(v, v_t, v_h, rest, columns, kv_head, last, d, D, PAD, True)
            allowed = (rest + columns < last)[None, :]
            total, weight, top = _attend(queries, keys, values, scale_log2, allowed, total, weight, top, True, SUM)
    if TESTED:
        for i in range(tl.load(tested_at + entry), tl.load(tested_at + entry + 1)):
            stretch = tested + 4 * i
            for at in range(tl.load(stretch), tl.load(stretch + 1), WIDTH):
                keys = _block(k, k_t, k_h, at, columns, kv_head, num_k, d, D, PAD, True)
                values = _block(v, v_t, v_h, at, columns, kv_head, num_k, d, D, PAD, True)
                allowed = _in_bands(bands, tl.load(stretch + 2), tl.load(stretch + 3), begin + size, at + columns)
                total, weight, top = _attend(queries, keys, values, scale_log2, allowed, total, weight, top, True, SUM)
    seen = weight > 0
    _store(out, o_t, o_h, begin, size, head, end, d, total / tl.where(seen, weight, 1.0)[:, None], D)
    value = tl.where(seen, (top + tl.log2(tl.where(seen, weight, 1.0))) / IN_LOG2, float("-inf"))
    tl.store(lse + (tl.cast(begin, tl.int64) * l_t + head * l_h) + size * l_t, value, mask=begin + size < end)


@triton.jit
def _weights(q, k, dout, v, lse_log2, delta, scale_log2, allowed, MASKED: tl.constexpr, SUM: tl.constexpr):
    """(p, ds) of a tile, rows being queries; ds without the softmax scale."""
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=SUM) * scale_log2 - lse_log2[:, None])
    if MASKED:
        p = tl.where(allowed, p, 0.0)
    return p, p * (tl.dot(dout, tl.trans(v), input_precision="ieee", out_dtype=SUM) - delta[:, None])


@triton.jit
def _weights_t(k, q, v, dout, lse_log2, delta, scale_log2, allowed, MASKED: tl.constexpr, SUM: tl.constexpr):
    """The same, rows being keys."""
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=SUM) * scale_log2 - lse_log2[None, :])
    if MASKED:
        p = tl.where(allowed, p, 0.0)
    return p, p * (tl.dot(v, tl.trans(dout), input_precision="ieee", out_dtype=SUM) - delta[None, :])


@triton.jit
def _stats(lse, l_t, l_h, delta, e_t, e_h, first, size, head, last):
    """(LSE in powers of two, delta) of rows; beyond ``last`` and for rows without keys, LSE is such that their weights are 0."""
    inside = first + size < last
    value = tl.load(lse + (tl.cast(first, tl.int64) * l_t + head * l_h) + size * l_t, mask=inside, other=float("-inf"))
    value = tl.where(value == float("-inf"), float("inf"), value * IN_LOG2)
    return value, tl.load(delta + (tl.cast(first, tl.int64) * e_t + head * e_h) + size * e_t, mask=inside, other=0.0)


@triton.jit
def delta_kernel(
    dout, out, delta, g_t, g_h, o_t, o_h, e_t, e_h, num_q,
    D: tl.constexpr, PAD: tl.constexpr, HEIGHT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """rowsum(dout * out) of some rows of one head; out may be in a wider type than dout."""
    head = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * HEIGHT
    size, d = tl.arange(0, HEIGHT), tl.arange(0, PAD)
    douts = _block(dout, g_t, g_h, begin, size, head, num_q, d, D, PAD, True).to(SUM)
    outs = _block(out, o_t, o_h, begin, size, head, num_q, d, D, PAD, True).to(SUM)
    tl.store(delta + (tl.cast(begin, tl.int64) * e_t + head * e_h) + size * e_t, tl.sum(douts * outs, 1), mask=begin + size < num_q)


@triton.jit
def dq_kernel(
    block_rows, order, whole_at, whole, tested_at, tested, bands, q, k, v, dout, lse, delta, dq,
    q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, l_t, l_h, e_t, e_h, g_t, g_h, num_k, scale, scale_log2,
    GROUP: tl.constexpr, PER_MAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TESTED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head."""
    head, entry, begin, end = _place(order, block_rows, PER_MAP)
    kv_head = head // GROUP
    size, columns, d = tl.arange(0, HEIGHT), tl.arange(0, WIDTH), tl.arange(0, PAD)
    queries = _block(q, q_t, q_h, begin, size, head, end, d, D, PAD, True)
    douts = _block(dout, o_t, o_h, begin, size, head, end, d, D, PAD, True)
    lse_log2, deltas = _stats(lse, l_t, l_h, delta, e_t, e_h, begin, size, head, end)
    total = tl.zeros([HEIGHT, PAD], SUM)
    for i in range(tl.load(whole_at + entry), tl.load(whole_at + entry + 1)):
        first, last = tl.load(whole + 2 * i), tl.load(whole + 2 * i + 1)
        rest = (last - first) // WIDTH * WIDTH + first
        for at in range(first, rest, WIDTH):
            keys = _block(k, k_t, k_h, at, columns, kv_head, num_k, d, D, PAD, False)
            values = _block(v, v_t, v_h, at, columns, kv_head, num_k, d, D, PAD, False)
            p, ds = _weights(queries, keys, douts, values, lse_log2, deltas, scale_log2, None, False, SUM)
            total += tl.dot(ds.to(keys.dtype), keys, input_precision="ieee", out_dtype=SUM)
        if rest < last:
            keys = _block(k, k_t, k_h, rest, columns, kv_head, last, d, D, PAD, True)
            values = _block(v, v_t, v_h, rest, columns, kv_head, last, d, D, PAD, True)
            allowed = (rest + columns < last)[None, :]
            p, ds = _weights(queries, keys, douts, values, lse_log2, deltas, scale_log2, allowed, True, SUM)
            total += tl.dot(ds.to(keys.dtype), keys, input_precision="ieee", out_dtype=SUM)
    if TESTED:
        for i in range(tl.load(tested_at + entry), tl.load(tested_at + entry + 1)):
            stretch = tested + 4 * i
            for at in range(tl.load(stretch), tl.load(stretch + 1), WIDTH):
                keys = _block(k, k_t, k_h, at, columns, kv_head, num_k, d, D, PAD, True)
                values = _block(v, v_t, v_h, at, columns, kv_head, num_k, d, D, PAD, True)
                allowed = _in_bands(bands, tl.load(stretch + 2), tl.load(stretch + 3), begin + size, at + columns)
                p, ds = _weights(queries, keys, douts, values, lse_log2, deltas, scale_log2, allowed, True, SUM)
                total += tl.dot(ds.to(keys.dtype), keys, input_precision="ieee", out_dtype=SUM)
    _store(dq, g_t, g_h, begin, size, head, end, d, total * scale, D)


@triton.jit
def dkv_kernel(
    block_rows, order, whole_at, whole, tested_at, tested, bands, q, k, v, dout, lse, delta, dk, dv,
    q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, l_t, l_h, e_t, e_h, dk_t, dk_h, dv_t, dv_h, num_q, scale, scale_log2,
    GROUP: tl.constexpr, PER_MAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TESTED: tl.constexpr, SUM: tl.constexpr,
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
    for member in range(GROUP):
        head = kv_head * GROUP + member
        entry = head // PER_MAP * tl.num_programs(0) + block
        for i in range(tl.load(whole_at + entry), tl.load(whole_at + entry + 1)):
            first, last = tl.load(whole + 2 * i), tl.load(whole + 2 * i + 1)
            for at in range(first, last, WIDTH):
                # What lies beyond the stretch has weight 0, so it needs no mask.
                queries = _block(q, q_t, q_h, at, columns, head, last, d, D, PAD, True)
                douts = _block(dout, o_t, o_h, at, columns, head, last, d, D, PAD, True)
                lse_log2, deltas = _stats(lse, l_t, l_h, delta, e_t, e_h, at, columns, head, last)
                p, ds = _weights_t(keys, queries, values, douts, lse_log2, deltas, scale_log2, None, False, SUM)
                dv_total += tl.dot(p.to(douts.dtype), douts, input_precision="ieee", out_dtype=SUM)
                dk_total += tl.dot(ds.to(queries.dtype), queries, input_precision="ieee", out_dtype=SUM)
        if TESTED:
            for i in range(tl.load(tested_at + entry), tl.load(tested_at + entry + 1)):
                stretch = tested + 4 * i
                for at in range(tl.load(stretch), tl.load(stretch + 1), WIDTH):
                    queries = _block(q, q_t, q_h, at, columns, head, num_q, d, D, PAD, True)
                    douts = _block(dout, o_t, o_h, at, columns, head, num_q, d, D, PAD, True)
                    lse_log2, deltas = _stats(lse, l_t, l_h, delta, e_t, e_h, at, columns, head, num_q)
                    allowed = _in_bands(bands, tl.load(stretch + 2), tl.load(stretch + 3), begin + size, at + columns)
                    p, ds = _weights_t(keys, queries, values, douts, lse_log2, deltas, scale_log2, allowed, True, SUM)
                    dv_total += tl.dot(p.to(douts.dtype), douts, input_precision="ieee", out_dtype=SUM)
                    dk_total += tl.dot(ds.to(queries.dtype), queries, input_precision="ieee", out_dtype=SUM)
    _store(dk, dk_t, dk_h, begin, size, kv_head, end, d, dk_total * scale, D)
    _store(dv, dv_t, dv_h, begin, size, kv_head, end, d, dv_total, D)
