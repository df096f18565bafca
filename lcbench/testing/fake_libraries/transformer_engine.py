# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for Transformer Engine 2.20, or 2.5, whose backward wants a type of gradients and which knows no formats of outputs.

Its C++ takes data pointers and the strides of packed tensors.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from lcbench.testing.fake_libraries.common import (
    OPEN,
    Tensor,
    dense,
    dense_backward,
    longest,
    modules_of,
    packed,
    sequences,
    statistics,
    table,
)


def band(
    q: Tensor, k: Tensor, cu: tuple[Tensor, Tensor], most: tuple[int, int], *, qkv_layout: str, attn_mask_type: str,
    window_size: tuple[int, int], cu_seqlens_q_padded: Any, cu_seqlens_kv_padded: Any, dropout: float,
) -> Tensor:  # fmt: skip
    assert qkv_layout == "thd_thd_thd"
    assert dropout == 0.0
    assert cu_seqlens_q_padded is cu[0]
    assert cu_seqlens_kv_padded is cu[1]
    table(*cu, like=q)
    assert all(int(x.diff().min()) > 0 for x in cu), "no sequence without tokens"
    assert most == (max(2, longest(cu[0])), longest(cu[1]))
    left, right = window_size
    if attn_mask_type == "padding":
        assert (left, right) == (-1, -1)
        return sequences(*cu, (len(q), len(k)), OPEN, OPEN)
    assert attn_mask_type == "padding_causal_bottom_right"
    assert right in (0, -1)
    assert most[0] <= max(2, most[1]), "no bottom right mask with more queries than keys"
    return sequences(*cu, (len(q), len(k)), OPEN if left < 0 else left, 0)


def fused_attn_fwd(
    is_training: bool, max_seqlen_q: int, max_seqlen_kv: int, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Tensor, k: Tensor,
    v: Tensor, fake_dtype: torch.dtype, fused_attention_backend: Any, attn_bias: Any = None, cu_seqlens_q_padded: Any = None,
    cu_seqlens_kv_padded: Any = None, attn_scale: Any = None, dropout: float = 0.0, qkv_layout: str = "sbh3d",
    o_format: str = "sbhd", attn_mask_type: str = "padding", window_size: tuple[int, int] = (-1, -1),
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    packed(q, k, v)
    assert is_training
    assert o_format == "thd"
    assert fused_attention_backend == 1
    assert fake_dtype == q.dtype
    allowed = band(
        q, k, (cu_seqlens_q, cu_seqlens_kv), (max_seqlen_q, max_seqlen_kv), qkv_layout=qkv_layout,
        attn_mask_type=attn_mask_type, window_size=window_size, cu_seqlens_q_padded=cu_seqlens_q_padded,
        cu_seqlens_kv_padded=cu_seqlens_kv_padded, dropout=dropout,
    )  # fmt: skip
    out, lse = dense(q, k, v, allowed, attn_scale)
    return out, [lse.T.contiguous()[..., None], torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q: int, max_seqlen_kv: int, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Tensor, k: Tensor, v: Tensor,
    o: Tensor, d_o: Tensor, fake_dtype: torch.dtype, aux_ctx_tensors: list[Tensor], fused_attention_backend: Any,
    cu_seqlens_q_padded: Any = None, cu_seqlens_kv_padded: Any = None, attn_scale: Any = None, dropout: float = 0.0,
    qkv_layout: str = "sbh3d", o_format: str = "sbhd", do_format: str = "sbhd", dqkv_layout: str = "sbh3d",
    attn_mask_type: str = "padding", window_size: tuple[int, int] = (-1, -1),
) -> list[Any]:  # fmt: skip
    packed(q, k, v, o, d_o)
    assert (o_format, do_format, dqkv_layout) == ("thd", "thd", "thd_thd_thd")
    assert fused_attention_backend == 1
    assert fake_dtype == q.dtype
    lse, rng_state = aux_ctx_tensors
    statistics(lse, q, len(q), q.shape[1], 1)
    assert (rng_state.dtype, rng_state.numel(), rng_state.device) == (torch.int64, 2, q.device)
    allowed = band(
        q, k, (cu_seqlens_q, cu_seqlens_kv), (max_seqlen_q, max_seqlen_kv), qkv_layout=qkv_layout,
        attn_mask_type=attn_mask_type, window_size=window_size, cu_seqlens_q_padded=cu_seqlens_q_padded,
        cu_seqlens_kv_padded=cu_seqlens_kv_padded, dropout=dropout,
    )  # fmt: skip
    return [*dense_backward(d_o, q, k, v, o, lse[..., 0].T, allowed, attn_scale), None]


def older_fwd(
    is_training: bool, max_seqlen_q: int, max_seqlen_kv: int, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Tensor, k: Tensor,
    v: Tensor, fake_dtype: torch.dtype, fused_attention_backend: Any, attn_bias: Any = None, cu_seqlens_q_padded: Any = None,
    cu_seqlens_kv_padded: Any = None, attn_scale: Any = None, dropout: float = 0.0, qkv_layout: str = "sbh3d",
    attn_mask_type: str = "padding", window_size: tuple[int, int] = (-1, -1),
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    return fused_attn_fwd(
        is_training, max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, fake_dtype, fused_attention_backend,
        attn_bias, cu_seqlens_q_padded, cu_seqlens_kv_padded, attn_scale, dropout, qkv_layout, "thd", attn_mask_type,
        window_size,
    )  # fmt: skip


def older_bwd(
    max_seqlen_q: int, max_seqlen_kv: int, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Tensor, k: Tensor, v: Tensor,
    o: Tensor, d_o: Tensor, fake_dtype: torch.dtype, dqkv_dtype: Any, aux_ctx_tensors: list[Tensor],
    fused_attention_backend: Any, cu_seqlens_q_padded: Any = None, cu_seqlens_kv_padded: Any = None, attn_scale: Any = None,
    dropout: float = 0.0, qkv_layout: str = "sbh3d", attn_mask_type: str = "padding",
    window_size: tuple[int, int] = (-1, -1),
) -> list[Any]:  # fmt: skip
    assert dqkv_dtype == ("bfloat16" if q.dtype == torch.bfloat16 else "float16")
    return fused_attn_bwd(
        max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, fake_dtype, aux_ctx_tensors,
        fused_attention_backend, cu_seqlens_q_padded, cu_seqlens_kv_padded, attn_scale, dropout, qkv_layout, "thd", "thd",
        "thd_thd_thd", attn_mask_type, window_size,
    )  # fmt: skip


def modules(release: str = "2.20") -> dict[str, ModuleType]:
    """The modules of release 2.20 or 2.5 by name, for ``sys.modules``."""
    backends = ModuleType("transformer_engine.pytorch.cpp_extensions.fused_attn")
    backends.FusedAttnBackend = {"F16_arbitrary_seqlen": 1}  # type: ignore[attr-defined]
    compiled = ModuleType("transformer_engine_torch")
    compiled.DType = SimpleNamespace(kBFloat16="bfloat16", kFloat16="float16")  # type: ignore[attr-defined]
    found = modules_of("transformer_engine.pytorch.cpp_extensions", fused_attn_fwd, fused_attn_bwd)
    if release == "2.5":
        module = found["transformer_engine.pytorch.cpp_extensions"]
        module.fused_attn_fwd, module.fused_attn_bwd = older_fwd, older_bwd  # type: ignore[attr-defined]
    return found | {backends.__name__: backends, compiled.__name__: compiled}
