"""Partial results over disjoint keys, merged in place (the rescaling of FlashAttention, arXiv 2205.14135, section 3.1)."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def merge_into(out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Merge another partial result into ``out`` (T, H, D) and ``lse`` (T, H), in place.

    ``out`` and both LSE have the accumulation type, ``other_out`` any type; all may be slices of larger tensors. A row without keys
    has LSE -inf and out 0; it takes the other's row, which may be without keys too. On CUDA with Triton it is one kernel.
    Elsewhere it is a pass over ``out``, and one that converts ``other_out`` if its type differs.

    Raises:
        ValueError: the shapes differ, or a head of ``out`` is not contiguous, which the kernel could not address.
    """
    if out.dim() != 3 or out.shape != other_out.shape or not out.shape[:2] == lse.shape == other_lse.shape or out.stride(-1) != 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in (out, lse, other_out, other_lse))
        raise ValueError(f"partial results are (T, H, D) and (T, H), heads whole in memory, not {shapes}")
    if out.is_cuda and _triton_is_there():
        from lcbench.kernels.triton_merge import fused_merge_into

        fused_merge_into(out, lse, other_out, other_lse)
    else:
        plain_merge_into(out, lse, other_out, other_lse)


def plain_merge_into(out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor) -> None:
    """``merge_into`` in operations of torch."""
    # exp(other) / (exp(own) + exp(other)); infinities of two empty rows have no difference.
    weight = torch.sigmoid(other_lse - lse).nan_to_num_(nan=0.0)
    out.lerp_(other_out.to(out.dtype), weight.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, other_lse))


@cache
def _triton_is_there() -> bool:
    return find_spec("triton") is not None
