"""Two partial results merged in place by one Triton kernel, which reads and writes each out once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Rows and warps of a block. They are not tuned: the kernel only moves memory, and a row of a head is several whole sectors.
ROWS, WARPS = 16, 4


def fused_merge_into(out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor) -> None:
    """``merge.merge_into`` on CUDA. Each head of ``out`` is contiguous; strides over tokens and heads may be any."""
    tokens, heads, dim = out.shape
    if not out.numel():
        return
    if other_out.stride(-1) != 1:
        other_out = other_out.contiguous()
    strides = (x.stride(i) for x in (out, lse, other_out, other_lse) for i in (0, 1))
    sums = tl.float64 if out.dtype == torch.float64 else tl.float32
    merge_kernel[triton.cdiv(tokens, ROWS), heads](
        out, lse, other_out, other_lse, *strides, tokens,
        D=dim, PAD=triton.next_power_of_2(dim), ROWS=ROWS, SUM=sums, num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def merge_kernel(
    out, lse, other, other_lse,
    out_t, out_h, lse_t, lse_h, other_t, other_h, other_lse_t, other_lse_h, tokens,
    D: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Merge ROWS rows of one head: program (block of rows, head). ``_t`` and ``_h``: strides over tokens and heads."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, PAD)
    inside = row < tokens
    whole = inside[:, None] & (column < D)[None, :]
    lse += row * lse_t + head * lse_h
    other_lse += row * other_lse_t + head * other_lse_h
    out += (row * out_t + head * out_h)[:, None] + column[None, :]
    other += (row * other_t + head * other_h)[:, None] + column[None, :]

    mine = tl.load(lse, mask=inside, other=0.0).to(SUM)
    theirs = tl.load(other_lse, mask=inside, other=0.0).to(SUM)
    top = tl.maximum(mine, theirs)
    shift = tl.where(top == float("-inf"), 0.0, top)
    own_weight, other_weight = tl.exp(mine - shift), tl.exp(theirs - shift)
    total = own_weight + other_weight
    some = total > 0
    scale = tl.where(some, total, 1.0)
    own_part = tl.load(out, mask=whole, other=0.0).to(SUM) * (own_weight / scale)[:, None]
    merged = own_part + tl.load(other, mask=whole, other=0.0).to(SUM) * (other_weight / scale)[:, None]
    tl.store(out, merged, mask=whole)
    tl.store(lse, tl.where(some, tl.log(scale) + shift, float("-inf")), mask=inside)
