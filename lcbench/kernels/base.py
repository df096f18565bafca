"""What a kernel is to the rest, and how partial results are merged.

Shapes, packed ("THD"): q, out, dout, dq (Tq, Hq, D); k, v, dk, dv (Tk, Hk, D); lse (Tq, Hq), natural logarithm, float32
(float64 for float64 inputs), -inf for a row without keys. Query head h reads key/value head ``h // (Hq // Hk)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lcbench.masks.band import BandMask
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

    def unsupported(self, problem: Problem, mask: BandMask) -> str | None:
        """None if this kernel can run the problem, else the reason, stored word for word in the skipped result."""
        ...

    def unavailable(self, problem: Problem, device: torch.device) -> str | None:
        """None if it can run here, on this device with what is installed, else the reason; asked by the worker."""
        ...

    def prepare(self, mask: BandMask, device: torch.device) -> Prepared: ...


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What out, LSE and gradients are summed in: float64 for float64, float32 for all else."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


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
