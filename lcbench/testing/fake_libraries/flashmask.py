# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for FlashMask's torch build."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from lcbench.testing.fake_libraries.common import Tensor, dense, dense_backward, one_dim, statistics, table, whole


def bounds(rows: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Of each column: where the lower hidden stretch begins and ends, and the upper one."""
    assert rows.shape == (1, 1, k.shape[1], 4)
    table(rows, like=q)
    return rows[0, 0].T.unbind()


def visible(rows: Tensor, q: Tensor, k: Tensor) -> Tensor:
    at = torch.arange(q.shape[1])[:, None]
    lower, lower_end, upper, upper_end = bounds(rows, q, k)
    return ~((at >= lower) & (at < lower_end) | (at >= upper) & (at < upper_end))


def walked(rows: Tensor, q: Tensor, k: Tensor, block_q: int, block_k: int) -> Tensor:
    """What backward sees: it walks blocks of rows for each block of columns, and asks the mask near the bounds only."""
    seen, tokens = visible(rows, q, k), q.shape[1]
    used, last = torch.zeros_like(seen), -(-tokens // block_q) - 1
    for begin in range(0, k.shape[1], block_k):
        own = slice(begin, begin + block_k)
        # The blocks of the least and the largest bound; a bound that no column has is in the first block.
        lows, highs = [], []
        for bound in bounds(rows, q, k):
            lows.append(int(bound[own].min()) // block_q)
            highs.append(max(int(bound[own].max()) - 1, 0) // block_q)
        (lower, lower_end, upper, upper_end), (lower_most, lower_end_most, upper_most, upper_end_most) = lows, highs
        computed: list[int] = []

        def walk(
            first: int, stop: int, asks: bool, computed: list[int] = computed, own: slice = own
        ) -> int:  # fmt: skip
            for block in range(first, stop):
                part = slice(block * block_q, (block + 1) * block_q)
                used[part, own] = seen[part, own] if asks else True
                computed.append(block)
            return max(first, stop)

        at = walk(0, min(upper, last + 1), False)
        at = walk(at, upper_most + 1, True)
        at = walk(max(at, upper_end), min(upper_end_most, last) + 1, True)
        at = walk(at, min(lower, last + 1), False)
        at = walk(at, min(lower_most, last) + 1, True)
        at = walk(max(at, lower_end), min(lower_end_most, last) + 1, True)
        walk(at, last + 1, False)
        # The warps that load rows and store dq skip by the bounds alone, and must meet the others at each block.
        loaded = list(range(upper_most + 1))
        loaded += range(max(len(loaded), upper_end), min(lower_most, last) + 1)
        loaded += range(max(loaded[-1] + 1, lower_end), last + 1)
        assert computed == loaded, "its warps wait for each other for ever"
    return used


def one(*tensors: Tensor) -> list[Tensor]:
    assert all(x.dim() == 4 and len(x) == 1 for x in tensors)
    return [x[0] for x in tensors]


def fwd(
    q: Tensor, k: Tensor, v: Tensor, k_new: Any = None, v_new: Any = None, q_v: Any = None, out: Any = None,
    cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, cu_seqlens_k_new: Any = None, seqused_q: Any = None,
    seqused_k: Any = None, max_seqlen_q: int | None = 0, max_seqlen_k: int | None = 0, page_table: Any = None,
    kv_batch_idx: Any = None, leftpad_k: Any = None, rotary_cos: Any = None, rotary_sin: Any = None, q_descale: Any = None,
    k_descale: Any = None, v_descale: Any = None, softmax_scale: float = 0.0, is_causal: bool = False,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    startend_row_indices: Tensor | None = None, block_mask: Any = None, is_rotary_interleaved: bool = True,
    scheduler_metadata: Any = None, num_splits: int = 1, pack_gqa: bool | None = False, sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    whole(q, k, v)
    dim, dim_v = q.shape[3], v.shape[3]
    assert dim == dim_v or (128 < dim <= 192 and 96 < dim_v <= 128) or (dim <= 64 and dim_v <= 512)
    assert not is_causal
    assert (window_size_left, window_size_right) == (-1, -1)
    assert block_mask is None
    assert startend_row_indices is not None
    found, lse = dense(*one(q, k, v), visible(startend_row_indices, q, k), softmax_scale, softcap)
    return found[None], lse[None]


def bwd(
    blocks: tuple[int, int],
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Any = None, dk: Any = None,
    dv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, seqused_q: Any = None, seqused_k: Any = None,
    startend_row_indices: Tensor | None = None, block_mask: Any = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, softmax_scale: float = 0.0, is_causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    whole(dout, q, k, v, out)
    one_dim(dout, q, k, v, out)
    assert not is_causal
    assert (window_size_left, window_size_right) == (-1, -1)
    assert block_mask is dq is dk is dv is None
    assert startend_row_indices is not None
    statistics(softmax_lse, q, 1, q.shape[2], q.shape[1])
    allowed = walked(startend_row_indices, q, k, *blocks)
    dq, dk, dv = dense_backward(*one(dout, q, k, v, out), softmax_lse[0], allowed, softmax_scale, softcap)
    return dq[None], dk[None], dv[None]


def operators(block_q: int = 64, block_k: int = 64) -> Any:
    """What ``torch.ops.flashmask`` holds; ``block_q`` rows and ``block_k`` columns are a block of its backward."""
    return SimpleNamespace(fwd=fwd, bwd=partial(bwd, (block_q, block_k)))
