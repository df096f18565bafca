# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for flash-attn 2.8.3."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from lcbench.testing.fake_libraries.common import (
    OPEN,
    Tensor,
    dense,
    gradients,
    lengths,
    one_dim,
    operators,
    sequences,
    statistics,
    whole,
)


def _flash_window(max_k: int, causal: bool, left: int, right: int) -> tuple[int, int]:
    """flash-attn 2 takes a bound of max_k for none, which is wrong with more rows than keys (its issue 895)."""
    right = 0 if causal else right
    if left >= max_k:
        left = -1
    if right >= max_k:
        right = -1
    if left < 0 and right < 0:
        return OPEN, OPEN
    return (max_k if left < 0 else left), (max_k if right < 0 else right)


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False, block_table: Any = None,
    leftpad_k: Any = None, seqused_k: Any = None, zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, None, Tensor]:  # fmt: skip
    whole(q, k, v)
    one_dim(q, k, v)
    assert q.shape[-1] <= 256
    assert dropout_p == 0.0
    lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert max_seqlen_q > 1, "one query a sequence runs another layout"
    window = _flash_window(max_seqlen_k, causal, window_size_left, window_size_right)
    out, lse = dense(q, k, v, sequences(cu_seqlens_q, cu_seqlens_k, (len(q), len(k)), *window), softmax_scale, softcap)
    return out, torch.where(lse == -torch.inf, torch.inf, lse), None, torch.zeros(2)


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float,
    causal: bool, window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    deterministic: bool, rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    whole(dout, q, k, v, out)
    one_dim(dout, q, k, v, out)
    assert dropout_p == 0.0
    lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert max_seqlen_k >= 1
    statistics(softmax_lse, q, q.shape[1], q.shape[0])
    window = _flash_window(max_seqlen_k, causal, window_size_left, window_size_right)
    allowed = sequences(cu_seqlens_q, cu_seqlens_k, (len(q), len(k)), *window)
    gradients(dq, dk, dv, dout, q, k, v, out, softmax_lse, allowed, softmax_scale, softcap)
    return torch.zeros(())


def batches(q: Tensor, k: Tensor, causal: bool, left: int, right: int) -> Tensor:
    left, right = _flash_window(k.shape[1], causal, left, right)
    at = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
    return (-left <= at) & (at <= right)


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor, None, Tensor]:  # fmt: skip
    whole(q, k, v)
    one_dim(q, k, v)
    assert q.shape[-1] <= 256
    assert (dropout_p, softcap, alibi_slopes) == (0.0, 0.0, None)
    allowed = batches(q, k, causal, window_size_left, window_size_right)
    found = [dense(*member, allowed, softmax_scale) for member in zip(q, k, v, strict=True)]
    out, lse = (torch.stack(parts) for parts in zip(*found, strict=True))
    return out, lse, None, torch.zeros(2)


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    whole(dout, q, k, v, out)
    one_dim(dout, q, k, v, out)
    assert (dropout_p, softcap, alibi_slopes) == (0.0, 0.0, None)
    statistics(softmax_lse, q, q.shape[0], q.shape[2], q.shape[1])
    allowed = batches(q, k, causal, window_size_left, window_size_right)
    for member in zip(dq, dk, dv, dout, q, k, v, out, softmax_lse, strict=True):
        gradients(*member, allowed, softmax_scale)
    return torch.zeros(())


def modules() -> dict[str, ModuleType]:
    """The library's modules by name, for ``sys.modules``."""
    functions = _flash_attn_varlen_forward, _flash_attn_varlen_backward, _flash_attn_forward, _flash_attn_backward
    found = operators("flash_attn.flash_attn_interface", *functions)
    package: Any = found["flash_attn"]
    package.__version__, package.flash_attn_func = "2.8.3", None
    return found
