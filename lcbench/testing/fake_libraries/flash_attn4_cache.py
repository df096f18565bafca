# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for flash-attn-4's forward against a cache (flash_attn/cute/interface.py), on Hopper: no splits."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from lcbench.testing.fake_libraries.caches import flash_requests, packed_requests
from lcbench.testing.fake_libraries.common import Tensor, modules_of, whole


def _flash_attn_fwd(
    q: Tensor, k: Tensor, v: Tensor, qv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, seqused_q: Any = None,
    seqused_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None, min_seqlen_k: Any = None, page_table: Any = None,
    softmax_scale: Any = None, causal: bool = False, softcap: Any = None, window_size_left: int | None = None,
    window_size_right: int | None = None, learnable_sink: Any = None, tile_mn: Any = None, mma_pv_is_rs: Any = None,
    intra_wg_overlap: Any = None, num_threads: int = 384, num_splits: int = 1, pack_gqa: Any = None, *, return_lse: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    whole(q, k, v)
    assert all(8 <= x.shape[-1] <= 256 for x in (q, v)), "not supported on SM90"
    assert num_splits == 1, "SplitKV not supported on SM 9.0"
    requests = flash_requests(k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, max_seqlen_k)
    out, lse = packed_requests(q, cu_seqlens_q, requests, causal, softmax_scale, softcap or 0.0)
    return out, lse if return_lse else None, None, None


def modules() -> dict[str, ModuleType]:
    """The library's modules by name, for ``sys.modules``."""
    return modules_of("flash_attn.cute.interface", _flash_attn_fwd)
