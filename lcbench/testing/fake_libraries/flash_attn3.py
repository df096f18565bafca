# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for flash-attention's Hopper build, of its branch main."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from lcbench.testing.fake_libraries.common import OPEN, Tensor, dense, gradients, lengths, operators, sequences, statistics, whole


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Any = None, v_new: Any = None, qv: Any = None, out_: Any = None,
    cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, cu_seqlens_k_new: Any = None, seqused_q: Any = None,
    seqused_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None, page_table: Any = None,
    kv_batch_idx: Any = None, leftpad_k: Any = None, rotary_cos: Any = None, rotary_sin: Any = None,
    seqlens_rotary: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
    softmax_scale: Any = None, causal: bool = False, window_size_left: int = -1, window_size_right: int = -1,
    attention_chunk: int = 0, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    whole(q, k, v)
    dim, dim_v = q.shape[2], v.shape[2]
    assert dim <= 256
    assert dim == dim_v or (128 < dim <= 192 and 96 < dim_v <= 128) or (dim <= 64 and dim_v <= 512)
    if qv is not None:
        whole(q, qv)
        assert dim <= 64
        assert dim_v >= 256
        assert qv.shape == (*q.shape[:2], dim_v)
        q, k = torch.cat([q, qv], 2), torch.cat([k, v], 2)
    lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left, right = (OPEN if bound < 0 else bound for bound in (window_size_left, 0 if causal else window_size_right))
    allowed = sequences(cu_seqlens_q, cu_seqlens_k, (len(q), len(k)), left, right)
    return *dense(q, k, v, allowed, softmax_scale, softcap), None, None


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None, sequed_q: Any = None, sequed_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None,
    dq: Any = None, dk: Any = None, dv: Any = None, softmax_scale: Any = None, is_causal: bool = False,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    whole(dout, q, k, v, out)
    assert max(q.shape[2], v.shape[2]) <= 256
    lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    statistics(softmax_lse, q, q.shape[1], q.shape[0])
    left, right = (OPEN if bound < 0 else bound for bound in (window_size_left, 0 if is_causal else window_size_right))
    allowed = sequences(cu_seqlens_q, cu_seqlens_k, (len(q), len(k)), left, right)
    gradients(dq, dk, dv, dout, q, k, v, out, softmax_lse, allowed, softmax_scale, softcap)
    return torch.zeros(())


def modules() -> dict[str, ModuleType]:
    """The library's modules by name, for ``sys.modules``."""
    return operators("flash_attn_interface", _flash_attn_forward, _flash_attn_backward)
