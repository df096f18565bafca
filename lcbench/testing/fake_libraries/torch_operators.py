# mypy: disable-error-code="call-arg, arg-type"
"""Stand-ins for torch's CUDA attention operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lcbench.testing.fake_libraries import flash_attn2
from lcbench.testing.fake_libraries.common import Tensor, dense, dense_backward, statistics, whole


def causal(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if is_causal else torch.ones(1, dtype=torch.bool)


def each(function: Callable[..., tuple[Tensor, ...]], *batches: Tensor) -> list[Tensor]:
    """Apply to packed members of a batch of (B, H, S, D) tensors."""
    members = [function(*(x.transpose(0, 1) if x.dim() == 3 else x for x in member)) for member in zip(*batches, strict=True)]
    return [torch.stack(parts) for parts in zip(*members, strict=True)]


def heads_first(tensors: list[Tensor]) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def efficient(q: Tensor, k: Tensor, v: Tensor, bias: Any, compute_lse: bool, dropout: float = 0.0, is_causal: bool = False,
              *, scale: float) -> tuple[Any, ...]:  # fmt: skip
    whole(q, k, v)
    assert bias is None
    assert compute_lse
    assert dropout == 0.0
    assert q.shape[1] == k.shape[1], "no groups"
    out, lse = each(lambda *m: dense(*m, causal(q, k, is_causal), scale), q, k, v)
    return out.transpose(1, 2), torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf), None, None


def efficient_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, out: Tensor, lse: Tensor, seed: Tensor,
                       offset: Tensor, dropout: float, wanted: list[bool], is_causal: bool = False, *,
                       scale: float) -> tuple[Any, ...]:  # fmt: skip
    whole(dout, q, k, v, out)
    statistics(lse, q, *q.shape[:2], -(-q.shape[2] // 32) * 32)
    assert seed.dtype == offset.dtype == torch.int64
    assert out.transpose(1, 2).is_contiguous(), "the kernel takes the strides of a packed out for granted"
    assert wanted == [True, True, True, False]
    lse = lse[..., : q.shape[2]]
    grads = each(lambda *m: dense_backward(*m, causal(q, k, is_causal), scale), dout, q, k, v, out, lse)
    return *heads_first(grads), None


def cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Any, compute_lse: bool, dropout: float = 0.0, is_causal: bool = False,
          debug: bool = False, *, scale: float) -> tuple[Any, ...]:  # fmt: skip
    assert (q.shape[2], k.shape[2]) != (1, 1), "cuDNN Frontend error: s_q = s_kv = 1 is not supported."
    out, lse, *_ = efficient(q, k, v, bias, compute_lse, dropout, is_causal, scale=scale)
    return out, lse[..., : q.shape[2], None], None, None, None, None, None, None, None


def cudnn_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor,
                   bias: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, dropout: float, is_causal: bool, *,
                   scale: float) -> tuple[Any, ...]:  # fmt: skip
    whole(dout, q, k, v, out)
    assert q.shape[1] == k.shape[1], "no groups"
    assert bias is cu_q is cu_k is None
    assert seed.dtype == offset.dtype == torch.int64
    statistics(lse, q, *q.shape[:3], 1)
    assert (q.shape[2], k.shape[2]) != (1, 1), "cuDNN Frontend error: s_q = s_kv = 1 is not supported."
    assert (max_q, max_k) == (q.shape[2], k.shape[2])
    grads = each(lambda *m: dense_backward(*m, causal(q, k, is_causal), scale), dout, q, k, v, out, lse[..., 0])
    return tuple(heads_first(grads))


def flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float,
          is_causal: bool, debug: bool, *, scale: float, window_size_left: int, window_size_right: int) -> Any:  # fmt: skip
    forward = flash_attn2._flash_attn_varlen_forward
    return forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, is_causal, window_size_left, window_size_right)


def flash_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
                   max_q: int, max_k: int, dropout: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
                   scale: float, window_size_left: int, window_size_right: int) -> Any:  # fmt: skip
    assert rng_state.dtype == unused.dtype == torch.uint64
    assert (rng_state.numel(), unused.numel()) == (2, 0)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    flash_attn2._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *grads, cu_q, cu_k, max_q, max_k, dropout, scale, is_causal, window_size_left,
        window_size_right, 0.0, None, False,
    )  # fmt: skip
    return grads


def operators() -> dict[str, Callable[..., Any]]:
    """The operators by name in ``torch.ops.aten``."""
    return {
        "_scaled_dot_product_efficient_attention": efficient,
        "_scaled_dot_product_efficient_attention_backward": efficient_backward,
        "_scaled_dot_product_cudnn_attention": cudnn, "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
        "_flash_attention_forward": flash, "_flash_attention_backward": flash_backward,
    }  # fmt: skip
