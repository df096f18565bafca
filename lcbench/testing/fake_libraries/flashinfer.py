# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for flashinfer: ragged prefill and variable block-sparse attention."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from lcbench.testing.fake_libraries.common import LN2, OPEN, Tensor, dense, modules_of, packed, sequences, table, whole


def split_kv(workspace: Tensor, q_heads: int, kv_heads: int, dim: int) -> None:
    """Room for partial results of releases up to 0.6.18 on 132 multiprocessors, two tiles of 128 rows on each."""
    needed = q_heads * (2 * 132 // kv_heads) * 128 * (dim + 1) * 4
    assert workspace.numel() >= needed, "Buffer overflow when allocating memory for batch_prefill_tmp_v"


class BatchPrefillWithRaggedKVCacheWrapper:
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, backend: str = "auto") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert (kv_layout, backend) == ("NHD", "fa2")
        self.workspace = float_workspace_buffer

    def plan(
        self, qo_indptr: Tensor, kv_indptr: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
        head_dim_vo: int | None = None, *, causal: bool = False, window_left: int = -1, logits_soft_cap: float | None = None,
        sm_scale: float | None = None, q_data_type: Any = "float16", kv_data_type: Any = None,
    ) -> None:  # fmt: skip
        assert sm_scale is not None
        assert q_data_type == kv_data_type
        assert isinstance(q_data_type, torch.dtype)
        table(qo_indptr, kv_indptr, like=self.workspace)
        dim_v = head_dim_qk if head_dim_vo is None else head_dim_vo
        assert head_dim_qk == dim_v or (head_dim_qk, dim_v) == (192, 128)
        split_kv(self.workspace, num_qo_heads, num_kv_heads, dim_v)
        self.heads, self.dtype = (num_qo_heads, num_kv_heads, head_dim_qk, dim_v), q_data_type
        self.cu, self.scale, self.softcap = (qo_indptr, kv_indptr), sm_scale, logits_soft_cap or 0.0
        self.window = OPEN if window_left < 0 else window_left, 0 if causal else OPEN

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> tuple[Tensor, Tensor]:
        whole(q, k, v)
        assert return_lse
        assert q.dtype == self.dtype, "the type that was planned"
        assert self.heads == (q.shape[1], k.shape[1], q.shape[2], v.shape[2])
        out, lse = dense(q, k, v, sequences(*self.cu, (len(q), len(k)), *self.window), self.scale, self.softcap)
        return out, lse.T / LN2


class VariableBlockSparseAttentionWrapper:
    def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert backend == "fa2"
        self.workspace = float_workspace_buffer

    def plan(
        self, block_mask_map: Tensor, block_row_sz: Tensor, block_col_sz: Tensor, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, *, logits_soft_cap: float | None = None, sm_scale: float | None = None, q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:  # fmt: skip
        assert block_mask_map.dtype == torch.bool
        assert block_mask_map.any()
        assert len(block_mask_map) == num_kv_heads
        assert block_row_sz.shape == block_mask_map.shape[:2]
        assert block_col_sz.shape == block_mask_map[:, 0].shape
        assert sm_scale is not None
        assert q_data_type == kv_data_type
        assert isinstance(q_data_type, torch.dtype)
        table(block_row_sz, block_col_sz, like=block_mask_map)
        split_kv(self.workspace, num_qo_heads // num_kv_heads, 1, head_dim)
        self.heads, self.dtype = (num_qo_heads, num_kv_heads, head_dim), q_data_type
        each = num_qo_heads // num_kv_heads
        self.softcap = logits_soft_cap or 0.0
        self.scale, self.allowed = sm_scale or 0.0, torch.stack([
            keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            for keep, rows, columns in zip(block_mask_map, block_row_sz, block_col_sz, strict=True)
        ]).repeat_interleave(each, 0)  # fmt: skip

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> tuple[Tensor, Tensor]:
        packed(q, k, v)  # it reshapes (H, T, D), which would copy anything else
        assert return_lse
        assert q.dtype == self.dtype, "the type that was planned"
        assert self.heads == (q.shape[0], k.shape[0], q.shape[2])
        assert k.shape == v.shape
        out, lse = dense(*(x.transpose(0, 1) for x in (q, k, v)), self.allowed, self.scale, self.softcap)
        return out.transpose(0, 1), lse / LN2


def modules() -> dict[str, ModuleType]:
    """The library's modules by name, for ``sys.modules``."""
    return modules_of("flashinfer", BatchPrefillWithRaggedKVCacheWrapper, VariableBlockSparseAttentionWrapper)
