# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for the forward of flash-attention's Hopper build against a cache, of its branch main (hopper/flash_api.cpp)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from lcbench.testing.fake_libraries.caches import flash_requests, packed_requests
from lcbench.testing.fake_libraries.common import Tensor, operators, whole


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Any = None, v_new: Any = None, qv: Any = None, out_: Any = None,
    cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, cu_seqlens_k_new: Any = None, seqused_q: Any = None,
    seqused_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None, page_table: Any = None, kv_batch_idx: Any = None,
    leftpad_k: Any = None, rotary_cos: Any = None, rotary_sin: Any = None, seqlens_rotary: Any = None, q_descale: Any = None,
    k_descale: Any = None, v_descale: Any = None, softmax_scale: Any = None, causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, attention_chunk: int = 0, softcap: float = 0.0, rotary_interleaved: bool = True,
    scheduler_metadata: Any = None, num_splits: int = 1, pack_gqa: Any = None, sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    whole(q, k, v)
    dim, value = q.shape[-1], v.shape[-1]
    assert dim <= 256, "FlashAttention forward only supports head dimension at most 256"
    if value != dim:
        assert (128 < dim <= 192 and 96 < value <= 128) or (dim <= 64 and value <= 512), "V headdim is different from Q/K dim"
    if qv is not None:
        whole(qv, v)
        assert dim <= 64, "q_v is only supported for head_size <= 64"
        assert value >= 256, "q_v is only supported for hdim_v >= 256."
        assert qv.shape == (*q.shape[:-1], value)
        q, k = torch.cat([q, qv], -1), torch.cat([k, v], -1)
    assert type(max_seqlen_q) is type(max_seqlen_k) is int
    assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
    requests = flash_requests(k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, max_seqlen_k)
    out, lse = packed_requests(q, cu_seqlens_q, requests, causal, softmax_scale, softcap)
    return out, lse, torch.empty(0), torch.empty(0)


def modules() -> dict[str, ModuleType]:
    """The library's modules by name, for ``sys.modules``."""
    return operators("flash_attn_interface", _flash_attn_forward)
