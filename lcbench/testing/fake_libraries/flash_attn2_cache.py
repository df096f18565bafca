# mypy: disable-error-code="call-arg, arg-type, misc"
"""A stand-in for flash-attn 2.8.3's ``flash_attn_with_kvcache`` (flash_attn_interface.py; mha_fwd_kvcache in csrc/flash_attn)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from lcbench.testing.fake_libraries.caches import in_pages, numbers, request
from lcbench.testing.fake_libraries.common import Tensor, modules_of, whole


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any = None, v: Any = None, rotary_cos: Any = None, rotary_sin: Any = None,
    cache_seqlens: Any = None, cache_batch_idx: Any = None, cache_leftpad: Any = None, block_table: Any = None,
    softmax_scale: Any = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    rotary_interleaved: bool = True, alibi_slopes: Any = None, num_splits: int = 0, return_softmax_lse: bool = False,
) -> Any:  # fmt: skip
    whole(q, k_cache, v_cache)
    assert (k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, alibi_slopes) == (None,) * 7
    assert (window_size, num_splits) == ((-1, -1), 0)
    batch, rows, _, dim = q.shape
    assert dim <= 256
    assert k_cache.shape == v_cache.shape, "values have the head dim of keys"
    lengths = numbers(cache_seqlens, batch, q)
    if block_table is None:
        assert k_cache.shape[0] == batch
        assert max(lengths) <= k_cache.shape[1]
        members = [(k_cache[i, :n], v_cache[i, :n]) for i, n in enumerate(lengths)]
    else:
        assert block_table.dtype == torch.int32
        assert block_table.stride(-1) == 1
        assert block_table.shape[0] == batch
        assert k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
        assert max(lengths) <= block_table.shape[1] * k_cache.shape[1], "exceeds the capacity addressable by block_table"
        members = [tuple(in_pages(x, block_table[i], n) for x in (k_cache, v_cache)) for i, n in enumerate(lengths)]
    found = [request(q[i], *members[i], causal and rows > 1, softmax_scale, softcap) for i in range(batch)]
    out, lse = (torch.stack(parts) for parts in zip(*found, strict=True))
    return (out, lse) if return_softmax_lse else out


def modules() -> dict[str, ModuleType]:
    """The library's modules by name, for ``sys.modules``."""
    return modules_of("flash_attn.flash_attn_interface", flash_attn_with_kvcache)
