"""Attention of few rows against many keys in Triton: keys of each sequence are split over programs, partial results merged by LSE.

It is flash decoding (Dao et al., "Flash-Decoding for long-context inference", 2023): with one row a request, blocks of rows
alone would leave most of a GPU idle. All programs get about equally many keys, whatever the lengths of the sequences. The query
heads of a key/value head are rows of one block, so keys are read once for them. Keys are read where a cache has them, contiguous
or in pages; numbers of float8 become the inputs' type in registers, and scales of heads are applied to scores and to results.
Latent values are the keys' first numbers: where these are a power of two, a tile is read once for both.

The code is compiled for CUDA. Under ``TRITON_INTERPRET=1`` it runs on a CPU, slowly; tests run it so.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from lcbench.kernels.base import LOG2_E, OutLse, accumulation_dtype
from lcbench.kernels.cache import Cache
from lcbench.kernels.requests import RequestCall
from lcbench.kernels.triton_shapes import Shape
from lcbench.problem import Heads

MERGE_WARPS = 4
# Programs that the keys are split over for each multiprocessor of a device; a CPU counts as one.
WAVES = 4
# A Triton kernel reads globals only if they are constexpr.
IN_LOG2: tl.constexpr = tl.constexpr(LOG2_E)


class Dims(NamedTuple):
    """How the numbers of a head lie in tiles: those of a key in two parts, since 576 padded to 1024 would be read in vain.

    Attributes:
        first: a power of two, the first numbers of a key, padded to at least 16.
        rest: what is left, padded; 0 where nothing is.
        value: the numbers of a value, padded.
    """

    first: int
    rest: int
    value: int

    @classmethod
    def of(cls, heads: Heads) -> Dims:
        whole = 1 << (heads.dim.bit_length() - 1)
        return cls(max(16, whole), padded(heads.dim - whole) if heads.dim > max(16, whole) else 0, padded(heads.v))


def padded(dim: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


class SplitRun:
    """A call made ready: what each program computes, and which rows are merged of what."""

    def __init__(self, call: RequestCall, heads: Heads, shape: Shape, split: int | None) -> None:
        """``split``: keys of a program, a multiple of ``shape.columns``; None: as few as keep the device busy."""
        self._call, self._heads, self._shape, self._dims = call, heads, shape, Dims.of(heads)
        own, group = call.sequences, heads.q // heads.kv
        device = call.cu_q.device
        blocks = -(-own.rows * group // shape.rows)
        self._split = split or _even_split(blocks * heads.kv, own.keys, shape.columns, device)
        parts = -(-own.keys // self._split)
        # Slots of partial results: parts x rows of each sequence that is split; the others are written in place.
        slots = np.where(parts > 1, parts * own.rows, 0)
        at = np.cumsum(slots) - slots
        number = np.repeat(np.arange(len(own.q)), blocks * parts)
        place = np.arange(len(number)) - np.repeat(np.cumsum(blocks * parts) - blocks * parts, blocks * parts)
        items = np.stack([number, place // parts[number] * shape.rows, place % parts[number]], axis=1)
        table = np.stack([own.q[:, 0], own.rows, own.k[:, 0], own.keys, own.first, at, parts], axis=1)
        merged = np.repeat(np.arange(len(own.q)), np.where(parts > 1, own.rows, 0))
        row = np.arange(len(merged)) - np.searchsorted(merged, merged)
        merges = np.stack([own.q[merged, 0] + row, at[merged] + row, own.rows[merged], parts[merged]], axis=1)

        def on_device(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)).to(device)

        self._items, self._sequences, self._merges = map(on_device, (items, table, merges))
        self._slots = int(slots.sum())

    def forward(self, q: torch.Tensor, cache: Cache, scale: float, softcap: float) -> OutLse:
        """out (T, Hq, Dv) in the inputs' type, and lse (T, Hq)."""
        heads, dims, shape, wide = self._heads, self._dims, self._shape, accumulation_dtype(q.dtype)
        out = torch.empty(*q.shape[:2], heads.v, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=wide, device=q.device)
        parts = torch.empty(self._slots, heads.q, heads.v, dtype=wide, device=q.device)
        part_lse = torch.empty(self._slots, heads.q, dtype=wide, device=q.device)
        k, v, page = cache.k, cache.v, cache.kind.page or 0
        table = self._items if self._call.table is None else self._call.table
        scales = (lse, lse) if cache.k_scale is None or cache.v_scale is None else (cache.k_scale, cache.v_scale)
        sums = tl.float64 if wide == torch.float64 else tl.float32
        if len(self._items):
            split_kernel[len(self._items), heads.kv](
                self._items, self._sequences, table, q, k, v, *scales, out, lse, parts, part_lse,
                *q.stride()[:2], *_strides(k), *_strides(v), *out.stride()[:2], *lse.stride(), table.stride(0), self._split,
                scale, softcap, GROUP=heads.q // heads.kv, D=heads.dim, FIRST=dims.first, REST=dims.rest, DV=heads.v,
                VALUE=dims.value, HEIGHT=shape.rows, WIDTH=shape.columns, PAGE=page, SCALED=cache.k_scale is not None,
                SHARED=heads.latent and dims.first == heads.v, CAPPED=softcap > 0, SUM=sums, num_warps=shape.warps,
                num_stages=shape.stages,
            )  # fmt: skip
        if len(self._merges):
            merge_parts_kernel[len(self._merges), heads.q](
                self._merges, parts, part_lse, out, lse, *out.stride()[:2], *lse.stride(),
                heads.q, DV=heads.v, VALUE=dims.value, SUM=sums, num_warps=MERGE_WARPS,
            )  # fmt: skip
        return out, lse


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    """Strides over pages, tokens and heads; a contiguous cache has no pages."""
    return tuple(x.stride()[:-1]) if x.dim() == 4 else (0, *x.stride()[:2])


def _even_split(blocks: np.ndarray, keys: np.ndarray, columns: int, device: torch.device) -> int:
    """Keys of a program, so that there are about ``WAVES`` programs for each multiprocessor, at least four tiles each."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    each = int((blocks * keys).sum()) // (WAVES * processors)
    return columns * max(4, -(-each // columns))


@triton.jit
def _rows_of(x, places, inside, d, begin, END: tl.constexpr):
    """Numbers ``begin + d`` of the tokens at ``places``, which count numbers; zeros where there is none."""
    return tl.load(x + places[:, None] + (begin + d)[None, :], mask=inside[:, None] & (begin + d < END)[None, :], other=0.0)


@triton.jit
def _like(x, q, SCALED: tl.constexpr):
    """Stored numbers in the type of q. Those of float8 go by float16, which has them all and which hardware converts them to."""
    if SCALED:
        x = x.to(tl.float16)
    return x.to(q.dtype.element_ty)


@triton.jit
def _place(pages, begin, column, inside, PAGE: tl.constexpr):
    """(page, token within it) of keys of a sequence; a contiguous cache is one page, where the sequence begins at ``begin``."""
    if PAGE > 0:
        return tl.load(pages + column // PAGE, mask=inside, other=0).to(tl.int64), (column % PAGE).to(tl.int64)
    else:
        return (column * 0).to(tl.int64), (begin + column).to(tl.int64)


@triton.jit
def _add(scores, values, total, weight, top, SUM: tl.constexpr):
    """One step of the online softmax (arXiv 2307.08691); scores are in powers of two, -inf where nothing is seen."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(top - shift)
    total = tl.dot(p.to(values.dtype), values, total * decay[:, None], input_precision="ieee", out_dtype=SUM)
    return total, weight * decay + tl.sum(p, 1), new_top


@triton.jit
def split_kernel(
    items, sequences, table, q, k, v, k_scales, v_scales, out, lse, parts, part_lse,
    q_t, q_h, k_p, k_t, k_h, v_p, v_t, v_h, o_t, o_h, l_t, l_h, table_t, split, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, DV: tl.constexpr, VALUE: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr, SHARED: tl.constexpr,
    CAPPED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (item, key/value head): one part of the keys of a sequence for one block of its rows with all their heads."""
    item, kv_head = items + 3 * tl.program_id(0), tl.program_id(1).to(tl.int64)
    number, top_row, part = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    of = sequences + 7 * number
    begin, rows, key_begin, keys = tl.load(of), tl.load(of + 1), tl.load(of + 2), tl.load(of + 3)
    seen_first, slot, count = tl.load(of + 4), tl.load(of + 5), tl.load(of + 6)

    packed = top_row + tl.arange(0, HEIGHT)
    row, own = packed // GROUP, packed % GROUP
    there = row < rows
    head = kv_head * GROUP + own
    first_d, rest_d, value_d = tl.arange(0, FIRST), tl.arange(0, REST if REST > 0 else 16), tl.arange(0, VALUE)
    q_at = (begin + row).to(tl.int64) * q_t + head * q_h
    q_first = _rows_of(q, q_at, there, first_d, 0, D)
    q_rest = _rows_of(q, q_at, there, rest_d, FIRST, D) if REST > 0 else q_first

    sees = tl.minimum(keys, seen_first + row)
    at, stop = part * split, tl.minimum(tl.minimum(keys, (part + 1) * split), seen_first + (top_row + HEIGHT - 1) // GROUP)
    total, weight = tl.zeros([HEIGHT, VALUE], SUM), tl.zeros([HEIGHT], SUM)
    top = tl.full([HEIGHT], float("-inf"), SUM)
    for tile in range(at, stop, WIDTH):
        column = tile + tl.arange(0, WIDTH)
        inside = column < stop
        page, token = _place(table + number.to(tl.int64) * table_t, key_begin, column, inside, PAGE)
        k_at, v_at = page * k_p + token * k_t + kv_head * k_h, page * v_p + token * v_t + kv_head * v_h
        k_first = _like(_rows_of(k, k_at, inside, first_d, 0, D), q, SCALED)
        scores = tl.dot(q_first, tl.trans(k_first), input_precision="ieee", out_dtype=SUM)
        if REST > 0:
            k_rest = _like(_rows_of(k, k_at, inside, rest_d, FIRST, D), q, SCALED)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee", out_dtype=SUM)
        scores = scores * scale
        if SCALED:
            scores = scores * tl.load(k_scales + kv_head)
        if CAPPED:
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * IN_LOG2 / softcap)) + 1.0))
        scores = tl.where(inside[None, :] & (column[None, :] < sees[:, None]), scores * IN_LOG2, float("-inf"))
        values = k_first if SHARED else _like(_rows_of(v, v_at, inside, value_d, 0, DV), q, SCALED)
        total, weight, top = _add(scores, values, total, weight, top, SUM)

    some = weight > 0
    result = total / tl.where(some, weight, 1.0)[:, None]
    if SCALED:
        result = result * tl.load(v_scales + kv_head)
    value = tl.where(some, (top + tl.log2(tl.where(some, weight, 1.0))) / IN_LOG2, float("-inf"))
    whole = there[:, None] & (value_d < DV)[None, :]
    if count > 1:
        place = (slot + part * rows + row).to(tl.int64) * (tl.num_programs(1) * GROUP) + head
        tl.store(parts + place[:, None] * DV + value_d[None, :], result, mask=whole)
        tl.store(part_lse + place, value, mask=there)
    else:
        place = (begin + row).to(tl.int64)
        tl.store(out + (place * o_t + head * o_h)[:, None] + value_d[None, :], result.to(out.dtype.element_ty), mask=whole)
        tl.store(lse + place * l_t + head * l_h, value, mask=there)


@triton.jit
def merge_parts_kernel(
    merges, parts, part_lse, out, lse, o_t, o_h, l_t, l_h, heads,
    DV: tl.constexpr, VALUE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (row that was split, query head): its partial results as one."""
    of = merges + 4 * tl.program_id(0)
    row, slot, step, count = tl.load(of), tl.load(of + 1), tl.load(of + 2), tl.load(of + 3)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, VALUE)
    total = tl.zeros([VALUE], SUM)
    weight = tl.sum(total, 0)
    top = weight + float("-inf")
    for i in range(count):
        place = (slot + i * step).to(tl.int64) * heads + head
        value = tl.load(part_lse + place).to(SUM)
        new_top = tl.maximum(top, value)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay, own = tl.exp(top - shift), tl.exp(value - shift)
        total = total * decay + tl.load(parts + place * DV + d, mask=d < DV, other=0.0).to(SUM) * own
        weight, top = weight * decay + own, new_top
    some = weight > 0
    scale = tl.where(some, weight, 1.0)
    place = row.to(tl.int64)
    tl.store(out + place * o_t + head * o_h + d, (total / scale).to(out.dtype.element_ty), mask=d < DV)
    tl.store(lse + place * l_t + head * l_h, tl.where(some, top + tl.log(scale), float("-inf")))
