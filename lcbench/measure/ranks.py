"""What ranks tell each other besides what is measured: all of them (``EVERY``), or those of one context-parallel group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lcbench.measure import progress


@dataclass(frozen=True)
class Ranks:
    """Ranks that speak to one another. All methods are collective among them.

    Attributes:
        group: their communicator; None: all ranks, or this process alone where there are no others.
        name: what these are called among several such sets of ranks; empty where there is one.
        alone: whether this rank is the only one.
    """

    group: dist.ProcessGroup | None = None
    name: str = ""
    alone: bool = False

    @property
    def _several(self) -> bool:
        return not self.alone and dist.is_initialized() and dist.get_world_size(self.group) > 1

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if not self._several:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        progress.own.mark()
        return values

    def broadcast_object(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if not self._several:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        progress.own.mark()
        return box[0]

    def reduce(self, x: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        """A tensor summed over the ranks, or the largest (``max``) of each element."""
        if self._several:
            x = x.contiguous()
            dist.all_reduce(x, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation], group=self.group)
        progress.own.mark()
        return x

    def reduce_together(self, *parts: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of one type, each summed over the ranks: at many ranks one message of all takes as long as one of each."""
        whole = self.reduce(torch.cat([x.flatten() for x in parts]))
        return [x.view(part.shape) for x, part in zip(whole.split([part.numel() for part in parts]), parts, strict=True)]


EVERY, ALONE = Ranks(), Ranks(alone=True)


def first_refusal(reasons: Iterable[str | None]) -> str | None:
    """The first rank's reason not to run, of those of all ranks, or None when every rank can."""
    return next((reason for reason in reasons if reason), None)
