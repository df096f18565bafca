"""What a kernel is to the rest, and how partial results are merged.

Shapes, packed ("THD"): q, out, dout, dq (Tq, Hq, D); k, v, dk, dv (Tk, Hk, D); lse (Tq, Hq), natural logarithm, float32
(float64 for float64 inputs), -inf for a row without keys. Query head h reads key/value head ``h // (Hq // Hk)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lcbench.masks.band import BandMask
from lcbench.masks.block import BlockMap
from lcbench.masks.mask import Mask
from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch


class Prepared(Protocol):
    """A kernel made ready for one mask on one device; ``calls`` native calls make it up (more than one: it was split)."""

    calls: int

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) over the keys given; out may have the inputs' type or the accumulation type."""
        ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of these keys, given out and lse over *all* keys of the row, wherever they were computed."""
        ...


class Kernel(Protocol):
    """Modules import torch lazily, so that a plan can ask ``unsupported`` on a login node without loading it."""

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        """None if this kernel can run the problem, else the reason, stored word for word in the skipped result."""
        ...

    def unavailable(self, problem: Problem, device: torch.device) -> str | None:
        """None if it can run here, on this device with what is installed, else the reason; asked by the worker."""
        ...

    def prepare(self, mask: BandMask, device: torch.device) -> Prepared:
        """Ready for a band mask; ``prepare`` below makes any mask of it."""
        ...


def prepare(kernel: Kernel, mask: Mask, device: torch.device) -> Prepared:
    """A kernel made ready for a mask; one that knows bands only runs a block map as bands, map by map."""
    return PreparedMaps(kernel, mask, device) if isinstance(mask, BlockMap) else kernel.prepare(mask, device)


class PreparedMaps:
    """A block map on a band kernel: each map for the query heads that read it, with their key/value heads."""

    def __init__(self, kernel: Kernel, mask: BlockMap, device: torch.device) -> None:
        self._maps = [kernel.prepare(mask.bands(i), device) for i in range(mask.maps)]
        self.calls = sum(part.calls for part in self._maps)

    def _heads(self, q: torch.Tensor, k: torch.Tensor) -> list[tuple[Prepared, slice, slice]]:
        each, group = q.shape[1] // len(self._maps), q.shape[1] // k.shape[1]
        return [
            (part, slice(i * each, (i + 1) * each), slice(i * each // group, -(-(i + 1) * each // group)))
            for i, part in enumerate(self._maps)
        ]

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        parts = [part.forward(q[:, own], k[:, kv], v[:, kv], softmax_scale=softmax_scale) for part, own, kv in self._heads(q, k)]
        return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = zero_gradients(q, k, v)
        for part, own, kv in self._heads(q, k):
            grads = part.backward(
                dout[:, own], q[:, own], k[:, kv], v[:, kv], out[:, own], lse[:, own], softmax_scale=softmax_scale
            )
            # Several maps may share a key/value head, so gradients add up.
            for total, heads, grad in zip((dq, dk, dv), (own, kv, kv), grads, strict=True):
                total[:, heads] += grad
        return dq, dk, dv


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What out, LSE and gradients are summed in: float64 for float64, float32 for all else."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


def zero_gradients(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Zeros like each input, in the accumulation type: what partial gradients are added to."""
    import torch

    return tuple(torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) for x in inputs)


def merge(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join two partial results over disjoint keys, (..., H, D) and (..., H), shifted by the larger LSE so that nothing overflows.

    Rows empty in both stay 0 and -inf (the difference of two infinities is never taken).
    """
    import torch

    top = torch.maximum(lse, other_lse)
    shift = torch.where(top == -torch.inf, 0.0, top)
    mine, theirs = torch.exp(lse - shift), torch.exp(other_lse - shift)
    total = mine + theirs
    scale = torch.where(total == 0, 1.0, total)
    merged = out * (mine / scale)[..., None] + other_out.to(out.dtype) * (theirs / scale)[..., None]
    return merged, torch.log(total) + shift
