# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for flash-attn-4, with its block sparsity."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch

from lcbench.testing.fake_libraries.common import (
    OPEN,
    Tensor,
    dense,
    dense_backward,
    modules_of,
    sequences,
    statistics,
    table,
    whole,
)


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Any = None
    cu_block_idx_offsets: Any = None
    block_size: tuple[int, int] | None = None

    def allowed(self, heads: int, rows: int, columns: int) -> Tensor:
        """(H, rows, columns) of full blocks."""
        assert self.block_size == (128, 128)
        assert self.full_block_cnt is not None
        assert self.full_block_idx is not None
        assert int(self.mask_block_cnt.sum()) == 0
        assert self.full_block_cnt.shape[:2] in ((1, 1), (1, heads))
        table(self.mask_block_cnt, self.mask_block_idx, self.full_block_cnt, self.full_block_idx)
        for count, index in ((self.mask_block_cnt, self.mask_block_idx), (self.full_block_cnt, self.full_block_idx)):
            assert count.shape[2] == -(-rows // 128)
            assert index.shape == (*count.shape, -(-columns // 128))
        found = torch.zeros((heads, rows, columns), dtype=torch.bool)
        for head in range(heads):
            own = head if self.full_block_cnt.shape[1] > 1 else 0
            for row, count in enumerate(self.full_block_cnt[0, own].tolist()):
                listed = self.full_block_idx[0, own, row, :count].tolist()
                assert listed == sorted(set(listed)), "blocks ascend"
                for column in listed:
                    found[head, row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128] = True
        return found


def window(causal: bool, left: int | None, right: int | None) -> tuple[int, int]:
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    right = 0 if causal else right
    return OPEN if left is None else left, OPEN if right is None else right


def _flash_attn_fwd(
    q: Tensor, k: Tensor, v: Tensor, qv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, seqused_q: Any = None,
    seqused_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None, min_seqlen_k: Any = None,
    page_table: Any = None, softmax_scale: Any = None, causal: bool = False, softcap: Any = None,
    window_size_left: int | None = None, window_size_right: int | None = None, *, block_sparse_tensors: Any = None,
    return_lse: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    whole(q, k, v)
    assert max(q.shape[-1], v.shape[-1]) <= 256, "on Hopper"
    softcap = softcap or 0.0
    if block_sparse_tensors is not None:
        assert cu_seqlens_q is cu_seqlens_k is max_seqlen_q is max_seqlen_k is None, "batches, not packed sequences"
        allowed = block_sparse_tensors.allowed(q.shape[2], q.shape[1], k.shape[1])
        out, lse = dense(q[0], k[0], v[0], allowed, softmax_scale, softcap)
        return out[None], lse[None], None, None, None
    allowed = sequences(cu_seqlens_q, cu_seqlens_k, (len(q), len(k)), *window(causal, window_size_left, window_size_right))
    out, lse = dense(q, k, v, allowed, softmax_scale, softcap)
    return out, lse if return_lse else None, None, None, None


def _flash_attn_bwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, softmax_scale: Any = None, causal: bool = False,
    softcap: float = 0.0, window_size_left: int | None = None, window_size_right: int | None = None, *,
    cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None,
    block_sparse_tensors: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    whole(dout, q, k, v, out)
    statistics(lse, q, *((q.shape[0], q.shape[2], q.shape[1]) if block_sparse_tensors else (q.shape[1], q.shape[0])))
    if block_sparse_tensors is not None:  # lists of query blocks for each block of keys
        allowed = block_sparse_tensors.allowed(q.shape[2], k.shape[1], q.shape[1]).transpose(1, 2)
        return tuple(x[None] for x in dense_backward(dout[0], q[0], k[0], v[0], out[0], lse[0], allowed, softmax_scale, softcap))
    allowed = sequences(cu_seqlens_q, cu_seqlens_k, (len(q), len(k)), *window(causal, window_size_left, window_size_right))
    return dense_backward(dout, q, k, v, out, lse, allowed, softmax_scale, softcap)


def modules() -> dict[str, ModuleType]:
    """The library's modules by name, for ``sys.modules``."""
    return modules_of("flash_attn.cute.interface", _flash_attn_fwd, _flash_attn_bwd) | modules_of(
        "flash_attn.cute.block_sparsity", BlockSparseTensorsTorch
    )
