# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for flashinfer's paged prefill and its latent attention (flashinfer/prefill.py, flashinfer/mla)."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import torch

from lcbench.testing.fake_libraries.caches import in_pages, numbers, packed_requests
from lcbench.testing.fake_libraries.common import LN2, Tensor, modules_of, sums, table, whole

FLOAT8 = torch.float8_e4m3fn


class _Planned:
    """Pages of requests as both wrappers take them."""

    workspace: Tensor
    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    lengths: list[int]
    page: int

    def keep(self, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, lengths: list[int], page: int) -> None:
        table(qo_indptr, kv_indptr, kv_indices, like=self.workspace)
        assert int(kv_indptr[-1]) <= len(kv_indices)
        counts = [-(-length // page) for length in lengths]
        assert kv_indptr.diff().tolist() == counts, "as many pages as the tokens take"
        self.qo_indptr, self.kv_indptr, self.kv_indices, self.lengths, self.page = qo_indptr, kv_indptr, kv_indices, lengths, page

    def requests(self, *caches: Tensor) -> list[tuple[Tensor, ...]]:
        ends = self.kv_indptr.tolist()
        rows = [self.kv_indices[begin:end] for begin, end in pairwise(ends)]
        assert all(x.shape[1] == self.page for x in caches), "the page size that was planned"
        return [tuple(in_pages(x, row, n) for x in caches) for row, n in zip(rows, self.lengths, strict=True)]


class BatchPrefillWithPagedKVCacheWrapper(_Planned):
    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False, *, backend: str = "auto"
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert (kv_layout, backend, use_cuda_graph) == ("NHD", "fa2", False)
        self.workspace = float_workspace_buffer

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, head_dim_vo: int | None = None, *,
        causal: bool = False, sm_scale: float | None = None, window_left: int = -1, logits_soft_cap: float | None = None,
        q_data_type: Any = "float16", kv_data_type: Any = None,
    ) -> None:  # fmt: skip
        assert head_dim_vo is None
        assert window_left == -1
        assert isinstance(q_data_type, torch.dtype)
        assert kv_data_type in (q_data_type, FLOAT8)
        last = numbers(paged_kv_last_page_len, len(qo_indptr) - 1, self.workspace)
        assert all(1 <= n <= page_size for n in last)
        pages = paged_kv_indptr.diff().tolist()
        lengths = [(count - 1) * page_size + n for count, n in zip(pages, last, strict=True)]
        self.keep(qo_indptr, paged_kv_indptr, paged_kv_indices, lengths, page_size)
        self.heads, self.dtypes = (num_qo_heads, num_kv_heads, head_dim_qk), (q_data_type, kv_data_type)
        self.causal, self.scale, self.softcap = causal, sm_scale, logits_soft_cap

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, return_lse: bool = False) -> tuple[Tensor, Tensor]:
        k, v = paged_kv_cache
        whole(q)
        whole(k, v)
        assert return_lse
        assert (q.dtype, k.dtype) == self.dtypes, "the types that were planned"
        assert k.stride() == v.stride(), "up to 0.6.17 values are read by the strides of keys"
        assert self.heads == (q.shape[1], k.shape[2], q.shape[2])
        assert len(q) == int(self.qo_indptr[-1])
        wide = sums(q.dtype)
        requests = [(a.to(wide), b.to(wide)) for a, b in self.requests(k, v)]
        out, lse = packed_requests(q, self.qo_indptr, requests, self.causal, self.scale, self.softcap or 0.0)
        return out, lse.T / LN2


class BatchMLAPagedAttentionWrapper(_Planned):
    def __init__(self, float_workspace_buffer: Tensor, use_cuda_graph: bool = False, *, backend: str = "auto") -> None:
        assert backend == "auto"
        self.workspace = float_workspace_buffer

    def plan(
        self, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor, num_heads: int, head_dim_ckv: int,
        head_dim_kpe: int, page_size: int, causal: bool, sm_scale: float, q_data_type: torch.dtype, kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:  # fmt: skip
        assert q_data_type == kv_data_type
        lengths = numbers(kv_len_arr, len(qo_indptr) - 1, self.workspace)
        self.keep(qo_indptr, kv_indptr, kv_indices, lengths, page_size)
        self.sizes, self.dtype = (num_heads, head_dim_ckv, head_dim_kpe), q_data_type
        self.causal, self.scale = causal, sm_scale

    def run(
        self, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor, out: Any = None, lse: Any = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        whole(q_nope, q_pe, ckv_cache, kpe_cache)
        assert return_lse
        assert q_nope.dtype == self.dtype, "the type that was planned"
        assert self.sizes == (q_nope.shape[1], q_nope.shape[2], q_pe.shape[2])
        assert (ckv_cache.shape[2], kpe_cache.shape[2]) == self.sizes[1:], "caches are (pages, page, D), without heads"
        members = [(torch.cat([c, p], -1)[:, None], c[:, None]) for c, p in self.requests(ckv_cache, kpe_cache)]
        found, natural = packed_requests(torch.cat([q_nope, q_pe], -1), self.qo_indptr, members, self.causal, self.scale, 0.0)
        return found, natural.T / LN2


def modules() -> dict[str, ModuleType]:
    """The library's modules by name, for ``sys.modules``."""
    paged = modules_of("flashinfer", BatchPrefillWithPagedKVCacheWrapper)
    return paged | {"flashinfer.mla": modules_of("flashinfer.mla", BatchMLAPagedAttentionWrapper)["flashinfer.mla"]}
