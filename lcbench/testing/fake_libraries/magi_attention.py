# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for MagiAttention's flex-flash-attention."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch

from lcbench.testing.fake_libraries.common import Tensor, dense, dense_backward, modules_of, one_dim, packed, statistics, table


def cut(tokens: tuple[int, int], q_ranges: Tensor, k_ranges: Tensor, kinds: Tensor) -> Tensor:
    table(q_ranges, k_ranges, kinds)
    assert q_ranges.shape == k_ranges.shape == (len(kinds), 2)
    assert len(kinds), "no call without slices"
    count = torch.zeros(tokens, dtype=torch.int32)
    for (q0, q1), (k0, k1), kind in zip(q_ranges.tolist(), k_ranges.tolist(), kinds.tolist(), strict=True):
        at = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None]
        above, below = at > (k1 - k0) - (q1 - q0), at < 0
        count[q0:q1, k0:k1] += ~((above if kind in (1, 3) else False) | (below if kind in (2, 3) else torch.zeros_like(below)))
    assert count.max() <= 1, "slices overlap"
    return count.bool()


def flex_flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, q_ranges: Any = None, k_ranges: Any = None, attn_type_map: Any = None, *,
    softmax_scale: Any = None, softcap: float = 0.0,
) -> tuple[Tensor, Any]:  # fmt: skip
    packed(q, k, v)
    one_dim(q, k, v)
    out, lse = dense(q, k, v, cut((len(q), len(k)), q_ranges, k_ranges, attn_type_map), softmax_scale, softcap)
    return out, AttnForwardMeta(lse.T.contiguous())


def _flex_flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Any, sink_layout: str, out: Tensor, lse: Tensor, dq: Any, dk: Any,
    dv: Any, dsink: Any, q_ranges: Tensor, k_ranges: Tensor, attn_type_map: Tensor, softmax_scale: float, softcap: float,
    dq_type: Any, dk_type: Any, dv_type: Any, disable_bwd_dkv_atomic_reduction: bool, deterministic: bool, sm_margin: int,
) -> tuple[Any, ...]:  # fmt: skip
    packed(dout, q, k, v, out)
    one_dim(dout, q, k, v, out)
    assert sink is dq is dk is dv is dsink is None
    assert sink_layout in ("sh", "ssh", "shd")
    assert dq_type == dk_type == dv_type == torch.float32
    statistics(lse, q, *q.shape[:2])
    allowed = cut((len(q), len(k)), q_ranges, k_ranges, attn_type_map)
    return *dense_backward(dout, q, k, v, out, lse.T, allowed, softmax_scale, softcap), None


class AttnForwardMeta(NamedTuple):
    lse: Tensor
    max_logits: Tensor | None = None


def modules() -> dict[str, ModuleType]:
    """The library's modules by name, for ``sys.modules``."""
    below = modules_of("magi_attention.functional.flex_flash_attn", _flex_flash_attn_backward, AttnForwardMeta)
    return below | modules_of("magi_attention.functional", flex_flash_attn_func)
