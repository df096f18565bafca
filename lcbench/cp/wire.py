"""Messages from rank to rank of runs that are no schedules; what is sent is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lcbench.cp.base import Place
from lcbench.problem import Problem
from lcbench.schedule.execute import Waits


@dataclass(frozen=True)
class UnderWay:
    """A message that is under way: after ``wait`` what was to arrive is there, and what was sent may be overwritten.

    Attributes:
        work: the backend's handle.
        tensors: what the backend reads or writes, held until then.
        landed: copies what arrived on the host to where it belongs; None: it is there.
    """

    work: Waits
    tensors: tuple[torch.Tensor, ...]
    landed: Callable[[], object] | None = None

    def wait(self) -> None:
        self.work.wait()
        if self.landed is not None:
            self.landed()


class Wire:
    """Messages of one rank to others.

    Attributes:
        bytes_sent: since ``begin``.
        bytes_between_nodes: those of them that go to ranks on other nodes.
    """

    def __init__(self, rank: int, nodes: Sequence[int], group: dist.ProcessGroup | None, *, through_host: bool) -> None:
        """
        Args:
            rank: this one's number among the ranks.
            nodes: on which each rank is.
            group: their communicator; None: there is one rank.
            through_host: see ``Groups.goes_through_host``.
        """
        self._rank, self._nodes, self._group, self._through_host = rank, nodes, group, through_host
        self.bytes_sent = self.bytes_between_nodes = 0

    @classmethod
    def of(cls, problem: Problem, place: Place, channel: str) -> Wire:
        """That of a rank of a context-parallel group on one channel. Collective over all ranks."""
        ranks, per_node = problem.scale.world_size, problem.scale.gpus_per_node
        several = ranks > 1
        # Ranks of a node are adjacent in the group, since ranks are counted node after node.
        return cls(
            place.rank, [rank // per_node for rank in range(ranks)], place.groups.of(channel) if several else None,
            through_host=several and place.groups.goes_through_host(place.device),
        )  # fmt: skip

    def begin(self) -> None:
        """Count from here on."""
        self.bytes_sent = self.bytes_between_nodes = 0

    def _count(self, x: torch.Tensor, peer: int) -> None:
        size = x.numel() * x.element_size()
        self.bytes_sent += size
        self.bytes_between_nodes += size if self._nodes[peer] != self._nodes[self._rank] else 0

    def send(self, x: torch.Tensor, peer: int) -> UnderWay:
        """Begin to send x, contiguous, to a rank of the group, which is to ``receive`` it."""
        self._count(x, peer)
        source = x.cpu() if self._through_host else x
        return UnderWay(_started(dist.isend(source, group=self._group, group_dst=peer)), (source,))

    def receive(self, into: torch.Tensor, peer: int) -> UnderWay:
        """Begin to receive from a rank of the group, contiguous, what it is to ``send`` next on this channel."""
        target = torch.empty(into.shape, dtype=into.dtype, pin_memory=into.is_cuda) if self._through_host else into
        landed = (lambda: into.copy_(target)) if self._through_host else None
        return UnderWay(_started(dist.irecv(target, group=self._group, group_src=peer)), (target,), landed)


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None  # torch gives none to ranks outside of the group
    return work
