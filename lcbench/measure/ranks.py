"""What ranks tell each other besides what is measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from lcbench.measure import progress


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    progress.own.mark()
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank. Collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def first_refusal(reasons: Iterable[str | None]) -> str | None:
    """The first rank's reason not to run, of those of all ranks, or None when every rank can."""
    return next((reason for reason in reasons if reason), None)


def reduce(x: torch.Tensor, operation: str = "sum") -> torch.Tensor:
    """A tensor summed over all ranks, or the largest (``max``) of each element."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        x = x.contiguous()
        dist.all_reduce(x, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation])
    progress.own.mark()
    return x


def reduce_together(*parts: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one type, each summed over all ranks: at many ranks one message of all of them takes as long as one of each."""
    whole = reduce(torch.cat([x.flatten() for x in parts]))
    return [x.view(part.shape) for x, part in zip(whole.split([part.numel() for part in parts]), parts, strict=True)]
