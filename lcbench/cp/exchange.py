"""Collectives of strategies that are no schedules, among the ranks of a context-parallel group; what is sent is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from lcbench.cp.base import Place
from lcbench.problem import Problem
from lcbench.schedule.execute import FromHost, Waits, all_gather, reduce_scatter, wait_all
from lcbench.schedule.groups import MAIN

Operation = Callable[[torch.Tensor, torch.Tensor, dist.ProcessGroup], Waits]


class Exchange:
    """One rank's end of the messages of a run. Making it is collective over all ranks.

    Attributes:
        size, place: ranks that exchange with one another, and this one's place among them.
        bytes_sent: to other ranks since a pass last began; a collective counts as a message to each of them.
        bytes_between_nodes: those of them that go to ranks on other nodes.
    """

    def __init__(self, problem: Problem, place: Place, sets: Sequence[tuple[int, ...]] = ()) -> None:
        """
        Args:
            sets: ranks that exchange among themselves, ascending; each rank is in one. Without any all ranks do.
        """
        sets = sets or [tuple(range(problem.scale.world_size))]
        members = next(each for each in sets if place.rank in each)
        self.size, self.place = len(members), members.index(place.rank)
        per_node = problem.scale.gpus_per_node
        # Ranks of a node are adjacent in the group, since ranks are counted node after node.
        self._elsewhere = sum(other // per_node != place.rank // per_node for other in members)
        if self.size > 1:
            place.groups.prepare([(MAIN, each) for each in sets])
            group = place.groups.among(members)
            assert group is not None
            self._group, self._through_host = group, place.groups.goes_through_host(place.device)
        self.begin(communicate=True)

    def begin(self, *, communicate: bool) -> None:
        """A pass begins; without ``communicate`` its messages are left out, and what they bring means nothing."""
        self._communicate = communicate
        self.bytes_sent = self.bytes_between_nodes = 0

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """(P, ...): x, of one shape on all ranks, of every rank. Collective."""
        found = x.new_zeros((self.size, *x.shape))
        wait_all(self.gather(found, x.contiguous()))
        return found

    def told(self, x: torch.Tensor) -> torch.Tensor:
        """The same outside of a pass, whatever this one leaves out; it is not counted. Collective."""
        if self.size == 1:
            return x[None]
        found = x.new_zeros((self.size, *x.shape))
        wait_all(self._begun(all_gather, found, x.contiguous()))
        return found

    # Ends are contiguous, and stay as they are until what these give is waited for (``wait_all``).

    def gather(self, target: torch.Tensor, source: torch.Tensor) -> list[Waits]:
        """``target`` (P, ...) gets the ``source`` (...) of every rank. Collective."""
        return self._sent(all_gather, target, source, source.numel())

    def sum_scattered(self, target: torch.Tensor, source: torch.Tensor) -> list[Waits]:
        """``target`` (...) gets the sum of what all ranks have for this one in their ``source`` (P, ...). Collective."""
        return self._sent(reduce_scatter, target, source, target.numel())

    def to_all(self, target: torch.Tensor, source: torch.Tensor) -> list[Waits]:
        """``target`` (P, ...) gets what every rank has for this one in its ``source`` (P, ...). Collective."""
        return self._sent(_all_to_all, target, source, source.numel() // self.size)

    def _sent(self, operation: Operation, target: torch.Tensor, source: torch.Tensor, elements: int) -> list[Waits]:
        """Begin an operation that sends so many elements to each other rank."""
        if self.size == 1:
            target.view(source.shape).copy_(source)
            return []
        if not self._communicate:
            return []
        self.bytes_sent += (self.size - 1) * elements * source.element_size()
        self.bytes_between_nodes += self._elsewhere * elements * source.element_size()
        return self._begun(operation, target, source)

    def _begun(self, operation: Operation, target: torch.Tensor, source: torch.Tensor) -> list[Waits]:
        if not source.numel():
            return []
        if not self._through_host:
            return [operation(target.view(-1), source.view(-1), self._group)]
        landing = torch.empty(target.shape, dtype=target.dtype, pin_memory=target.is_cuda)
        return [operation(landing.view(-1), source.cpu().view(-1), self._group), FromHost([(landing, target)])]


def _all_to_all(target: torch.Tensor, source: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    return dist.all_to_all_single(target, source, group=group, async_op=True)
