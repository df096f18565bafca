"""Bytes of torch's collectives: those of FSDP2, of tensor parallelism and of sums of gradients, counted where they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """A context that counts what this rank sends over some communicators, of what is called in it, backward passes included.

    A collective among n ranks of s bytes (of all-gather: a rank's part; else: the operand) sends s x (n-1), all-gather;
    s x (n-1)/n, reduce-scatter; twice that, all-reduce, which is a reduce-scatter and an all-gather.

    Attributes:
        sent: bytes by kind.

    Args:
        groups: the communicators by kind; nothing else is counted.

    Raises:
        NotImplementedError: another operation over one of these.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent = dict.fromkeys(groups, 0)
        self._kinds = {str(group.group_name): (kind, group.size()) for kind, group in groups.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it is made of comes here
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Any) -> None:
        names = [name for name in map(_group_name, args) if name in self._kinds]
        if not names:
            return
        kind, ranks = self._kinds[names[0]]
        operation = func.overloadpacket.__name__
        if operation not in OPERATIONS:
            raise NotImplementedError(f"{func} sends over the communicator of {kind}, and nobody knows how many bytes")
        operand, factor = OPERATIONS[operation]
        x = args[operand]
        size = sum(each.numel() * each.element_size() for each in (x if isinstance(x, (list, tuple)) else [x]))
        self.sent[kind] += round(size * factor(ranks))


# By torch's name of the operation: which argument is sent, and how often, among n ranks.
OPERATIONS: dict[str, tuple[int, Any]] = {
    "_allgather_base_": (1, lambda n: n - 1),
    "all_gather_into_tensor": (0, lambda n: n - 1),
    "_reduce_scatter_base_": (1, lambda n: (n - 1) / n),
    "reduce_scatter_tensor": (0, lambda n: (n - 1) / n),
    "allreduce_": (0, lambda n: 2 * (n - 1) / n),
    "all_reduce": (0, lambda n: 2 * (n - 1) / n),
    "all_reduce_": (0, lambda n: 2 * (n - 1) / n),
}


def _group_name(x: Any) -> str | None:
    """The name of a communicator, as an operation is given it."""
    if isinstance(x, str):
        return x
    if isinstance(x, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(x).group_name
        except (RuntimeError, TypeError):
            return None  # another object, such as the kind of a sum
    return None
