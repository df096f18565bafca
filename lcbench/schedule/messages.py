"""What messages between ranks have in common, in schedules and outside of them: waiting, counting, and the way through the host.

A message that is begun is under way until what it gave is waited for (``wait_all``); until then both ends stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Waits(Protocol):
    """Something that is under way."""

    def wait(self) -> Any: ...


def wait_all(works: Sequence[Waits]) -> None:
    """Wait for all of them. ``runs/failure.py`` knows a rank that waits for others by the name of this function."""
    for work in works:
        work.wait()


@dataclass(frozen=True)
class FromHost:
    """Copies of what has arrived in the host's memory, (host, where it belongs), in the order of the stream of computation."""

    pairs: list[tuple[torch.Tensor, torch.Tensor]]

    def wait(self) -> None:
        for host, x in self.pairs:
            x.copy_(host, non_blocking=True)


class Sending:
    """The bytes that one rank sends, and the tensors that its backend can send.

    Args:
        rank: the sender, among the ranks of its context-parallel group.
        per_node: ranks of a node; they are adjacent in the group, since ranks are counted node after node.
        through_host: whether messages are copied to the host's memory and back (``Groups.goes_through_host``).

    Attributes:
        bytes_sent: to other ranks since ``begin``.
        bytes_between_nodes: those of them that go to ranks on other nodes.
    """

    def __init__(self, rank: int, per_node: int, device: torch.device, *, through_host: bool) -> None:
        self._rank, self._per_node, self._device, self._through_host = rank, per_node, device, through_host
        self.begin()

    def begin(self) -> None:
        """Count from 0."""
        self.bytes_sent = self.bytes_between_nodes = 0

    def count(self, size: int, peer: int) -> None:
        """Count bytes that go to another rank."""
        self.bytes_sent += size
        self.bytes_between_nodes += size if peer // self._per_node != self._rank // self._per_node else 0

    def ends(
        self, outgoing: list[torch.Tensor], incoming: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[Waits]]:
        """The tensors that the backend sends and receives into, and what to wait for after it.

        Where messages go through the host's memory, the host waits here until what is sent is computed and copied.
        """
        if not self._through_host:
            return outgoing, incoming, []
        sent, landing = ([self._on_host(x) for x in each] for each in (outgoing, incoming))
        for host, x in zip(sent, outgoing, strict=True):
            host.copy_(x, non_blocking=True)
        if sent and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return sent, landing, [FromHost(list(zip(landing, incoming, strict=True)))]

    def _on_host(self, x: torch.Tensor) -> torch.Tensor:
        # torch hands pinned memory out again only when copies from it are done.
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=self._device.type == "cuda")


def all_gather(target: torch.Tensor, source: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Under its name of torch 2.13 or of before."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(target, source, group=group, async_op=True)


def reduce_scatter(target: torch.Tensor, source: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Under its name of torch 2.13 or of before."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(target, source, group=group, async_op=True)


def all_to_all(
    target: torch.Tensor,
    source: torch.Tensor,
    group: dist.ProcessGroup,
    sent: list[int] | None = None,
    received: list[int] | None = None,
) -> dist.Work:
    """``sent``, ``received``: elements for, and from, each rank; None: as many for all."""
    return dist.all_to_all_single(target, source, received, sent, group=group, async_op=True)
