# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for xformers 0.0.35 and its flash operator."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from lcbench.testing.fake_libraries.common import (
    OPEN,
    Tensor,
    dense,
    dense_backward,
    modules_of,
    one_dim,
    sequences,
    statistics,
    whole,
)

flash = ModuleType("xformers.ops.fmha.flash")
flash.FwOp, flash.BwOp = "forward", "backward"  # type: ignore[attr-defined]


class BlockDiagonalMask:
    def __init__(self, q: list[int], k: list[int], window: tuple[int, int]) -> None:
        self.q, self.k, self.window = q, k, window

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int] | None = None, *, device: Any = None) -> Any:
        assert kv_seqlen is not None
        assert all(type(length) is int for length in (*q_seqlen, *kv_seqlen))
        assert device is not None, "without a device its offsets go to the current GPU"
        return cls(q_seqlen, kv_seqlen, (OPEN, OPEN))

    def make_causal_from_bottomright(self) -> Any:
        return BlockDiagonalMask(self.q, self.k, (OPEN, 0))

    def make_local_attention_from_bottomright(self, window_size: int) -> Any:
        assert self.window == (OPEN, 0)
        assert window_size > 0
        assert all(q - window_size < k for q, k in zip(self.q, self.k, strict=True)), "a row sees no key"
        return BlockDiagonalMask(self.q, self.k, (window_size - 1, 0))

    def allowed(self) -> Tensor:
        cu = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (self.q, self.k)]
        return sequences(cu[0], cu[1], (sum(self.q), sum(self.k)), *self.window)


def memory_efficient_attention_forward_requires_grad(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None, *, op: Any = None
) -> tuple[Tensor, Tensor]:
    whole(query, key, value)
    one_dim(query, key, value)
    assert (op, p) == (flash.FwOp, 0.0)
    assert query.shape[0] == key.shape[0] == value.shape[0] == 1, "sequences are packed into a batch of one"
    assert query.shape[2] == key.shape[2], "no groups"
    out, lse = dense(query[0], key[0], value[0], attn_bias.allowed(), scale)
    return out[None], lse[None]


def memory_efficient_attention_backward(
    grad: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None,
    p: float = 0.0, scale: Any = None, *, op: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    whole(query, grad, output, key, value)
    one_dim(query, grad, output, key, value)
    assert (op, p) == (flash.BwOp, 0.0)
    assert query.shape[2] == key.shape[2], "no groups"
    statistics(lse, query, 1, query.shape[2], query.shape[1])
    grads = dense_backward(grad[0], query[0], key[0], value[0], output[0], lse[0], attn_bias.allowed(), scale)
    return tuple(x[None] for x in grads)


def modules() -> dict[str, ModuleType]:
    """The library's modules by name, for ``sys.modules``."""
    functions = memory_efficient_attention_forward_requires_grad, memory_efficient_attention_backward
    found = modules_of("xformers.ops.fmha", *functions)
    found["xformers.ops.fmha"].flash = flash  # type: ignore[attr-defined]
    found["xformers"].__version__ = "0.0.35"  # type: ignore[attr-defined]
    compiled = ModuleType("xformers._cpp_lib")
    compiled._built_with_cuda, compiled._cpp_library_load_exception = True, None  # type: ignore[attr-defined]
    found |= {flash.__name__: flash, compiled.__name__: compiled}
    return modules_of("xformers.ops.fmha.attn_bias", BlockDiagonalMask) | found
