# mypy: disable-error-code="call-arg, arg-type"
"""What stand-ins of libraries share: dense attention, and checks as strict as the libraries'.

A stand-in has the library's low-level signatures and conventions: layouts, strides, alignment, types and devices of every tensor,
argument names, order and defaults, LSE bases, what a window's bound means, what empty rows give, known defects. Where a library
reads raw pointers, its stand-in refuses tensors that do not lie as the library assumes. Inputs may be float64, which no library
takes, so that results can be compared exactly; statistics are then float64 too. A test puts a stand-in's modules into
``sys.modules`` and runs our adapters on CPU tensors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

Tensor = torch.Tensor
OPEN = 1 << 40  # a bound that binds nowhere
LN2 = math.log(2)


def sums(dtype: torch.dtype) -> torch.dtype:
    """What a library computes in, and the type of its LSE."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """out (T, H, Dv) in the type of q and LSE (H, T), natural, -inf for empty rows; ``allowed`` (T, Tk) or (H, T, Tk)."""
    keys, values = (x.to(sums(q.dtype)).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (torch.einsum("qhd,khd->hqk", q.to(keys.dtype), keys) * scale).masked_fill(~allowed, -torch.inf)
    if softcap:
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~allowed, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype), lse


def dense_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, allowed: Tensor, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from any out and LSE (H, T), in the type of q; infinite LSE makes a row's weights 0, as in the libraries."""
    kind, group = q.dtype, q.shape[1] // k.shape[1]
    dout, q, k, v, out = (x.to(sums(kind)) for x in (dout, q, k, v, out))
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
    slopes = torch.ones_like(scores)
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores, slopes = softcap * bent, 1 - bent**2
    scores = scores.masked_fill(~allowed, -torch.inf)
    weights = torch.exp(scores - torch.where(lse.isinf(), torch.inf, lse)[..., None])
    delta = (dout * out).sum(-1).T[..., None]
    ds = weights * (torch.einsum("qhd,khd->hqk", dout, values) - delta) * slopes * scale
    dk, dv = torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", weights, dout)
    dk, dv = (x.unflatten(1, (k.shape[1], group)).sum(2) for x in (dk, dv))
    return torch.einsum("hqk,khd->qhd", ds, keys).to(kind), dk.to(kind), dv.to(kind)


def sequences(cu_q: Tensor, cu_k: Tensor, tokens: tuple[int, int], left: int, right: int) -> Tensor:
    """(Tq, Tk) of sequences with a window, bottom right aligned: ``i + lk - lq - left <= j <= i + lk - lq + right``."""
    table(cu_q, cu_k)
    assert len(cu_q) == len(cu_k)
    assert (int(cu_q[0]), int(cu_k[0])) == (0, 0)
    assert all(int(cu.diff().min()) >= 0 for cu in (cu_q, cu_k)), "offsets do not fall"
    allowed = torch.zeros(tokens, dtype=torch.bool)
    ends = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    for q0, q1, k0, k1 in ends:
        at = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None] - (k1 - k0 - (q1 - q0))
        allowed[q0:q1, k0:k1] = (-left <= at) & (at <= right)
    assert cu_q[-1] == tokens[0]
    assert cu_k[-1] == tokens[1]
    return allowed


def longest(cu: Tensor) -> int:
    """Tokens of the longest sequence."""
    return int(cu.diff().max())


def lengths(cu_q: Tensor, cu_k: Tensor, max_q: Any, max_k: Any) -> None:
    """The longest sequences are given as numbers of the host, and none is longer."""
    assert type(max_q) is type(max_k) is int
    assert max_q >= longest(cu_q)
    assert max_k >= longest(cu_k)


def whole(*tensors: Tensor) -> None:
    """Queries, keys and the like: one type and device, heads whole in memory, everything at multiples of 16 bytes."""
    for x in tensors:
        assert x.stride(-1) == 1, "the last dimension must be contiguous"
        assert x.dtype == tensors[0].dtype, "one type for all"
        assert x.device == tensors[0].device, "one device for all"
        assert x.shape[-1] % 8 == 0, "head dims are multiples of 8"
        steps = [step for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
        assert x.data_ptr() % 16 == 0, "tensors begin at a multiple of 16 bytes"
        assert all(step * x.element_size() % 16 == 0 for step in steps), "strides are multiples of 16 bytes"


def packed(*tensors: Tensor) -> None:
    """The same where the library reads a raw pointer and takes the strides of a packed tensor for granted."""
    whole(*tensors)
    assert all(x.is_contiguous() for x in tensors), "raw pointers are read: every tensor must be contiguous"


def statistics(lse: Tensor, q: Tensor, *shape: int) -> None:
    """LSE: float32, of exactly this shape, read by a raw pointer."""
    assert lse.dtype == sums(q.dtype), "LSE is float32"
    assert lse.device == q.device
    assert tuple(lse.shape) == shape
    assert lse.is_contiguous(), "LSE is read by a raw pointer"


def table(*tensors: Tensor, like: Tensor | None = None) -> None:
    """Offsets, ranges, lists: int32 and contiguous, on one device."""
    for x in tensors:
        assert x.dtype == torch.int32, "int32"
        assert x.is_contiguous(), "contiguous"
        assert x.device == (tensors[0] if like is None else like).device, "one device"


def one_dim(*tensors: Tensor) -> None:
    """The library knows one head dim, of keys and of values."""
    assert len({x.shape[-1] for x in tensors}) == 1, "one head dim for all"


def gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, allowed: Tensor,
    scale: float, softcap: float = 0.0,
) -> None:  # fmt: skip
    """Write gradients, as of ``dense_backward``, into what the caller gave for them."""
    whole(q, dq, dk, dv)
    found = dense_backward(dout, q, k, v, out, lse, allowed, scale, softcap)
    for into, like, grad in zip((dq, dk, dv), (q, k, v), found, strict=True):
        assert into.shape == like.shape
        into.copy_(grad)


class Operator:
    """A function that a library made an operator of torch (``torch.library.custom_op``): it shows no signature."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._init_fn, self.__name__ = function, function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._init_fn(*args, **kwargs)


def modules_of(name: str, *members: Any) -> dict[str, ModuleType]:
    """A module with these members, and its parents."""
    found: dict[str, ModuleType] = {}
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        found[path] = sys.modules.get(path) if path in sys.modules and i < len(parts) else ModuleType(path)  # type: ignore[assignment]
        found[path].__path__ = []  # type: ignore[attr-defined]
        found[path].__spec__ = ModuleSpec(path, None, is_package=True)
    for member in members:
        setattr(found[name], member.__name__, member)
    return found


def operators(name: str, *functions: Callable[..., Any]) -> dict[str, ModuleType]:
    """A module with these functions as operators of torch, and its parents."""
    return modules_of(name, *map(Operator, functions))
