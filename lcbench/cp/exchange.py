"""Messages of runs that are no schedules, among ranks that share a communicator; what is sent is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from lcbench.cp.base import Place
from lcbench.problem import Problem
from lcbench.schedule.groups import MAIN
from lcbench.schedule.messages import Sending, Waits, all_gather, all_to_all, reduce_scatter, wait_all

Operation = Callable[[torch.Tensor, torch.Tensor, dist.ProcessGroup], Waits]


class Exchange:
    """One rank's end of the messages of a run.

    Ends of messages are contiguous, and stay as they are until what a method gives is waited for (``wait_all``). Without
    ``communicate`` nothing is sent, and what would have arrived means nothing.

    Attributes:
        size, place: ranks that exchange with one another, and this one's place among them.
    """

    def __init__(self, members: Sequence[int], place: int, group: dist.ProcessGroup | None, sending: Sending) -> None:
        """
        Args:
            members: the ranks that exchange with one another, ascending, as ``sending`` numbers them.
            group: their communicator; None: there is one.
        """
        self.size, self.place = len(members), place
        self._members, self._group, self._sending = members, group, sending
        self._communicate = True

    @classmethod
    def of(cls, problem: Problem, place: Place, sets: Sequence[tuple[int, ...]] = (), channel: str = MAIN) -> Exchange:
        """That of a rank of a context-parallel group. Collective over all ranks.

        Args:
            sets: ranks that exchange among themselves, ascending; each rank is in one. Without any all ranks do.
            channel: messages wait for others of their channel only.
        """
        sets = sets or [tuple(range(problem.scale.world_size))]
        members = next(each for each in sets if place.rank in each)
        group, through_host = None, False
        if len(members) > 1:
            place.groups.prepare([(channel, each) for each in sets])
            group = place.groups.among(members, channel)
            assert group is not None
            through_host = place.groups.goes_through_host(place.device)
        sending = Sending(place.rank, problem.scale.gpus_per_node, place.device, through_host=through_host)
        return cls(members, members.index(place.rank), group, sending)

    def begin(self, *, communicate: bool = True) -> None:
        """A pass begins: count its bytes from 0."""
        self._communicate = communicate
        self._sending.begin()

    @property
    def bytes_sent(self) -> int:
        """To other ranks since a pass last began; a collective counts as a message to each of them."""
        return self._sending.bytes_sent

    @property
    def bytes_between_nodes(self) -> int:
        """Those of ``bytes_sent`` that go to ranks on other nodes."""
        return self._sending.bytes_between_nodes

    # -- collectives -----------------------------------------------------------------------------------------------

    def gather(self, target: torch.Tensor, source: torch.Tensor) -> list[Waits]:
        """``target`` (P, ...) gets the ``source`` (...) of every rank. Collective."""
        return self._begun(all_gather, target, source, source.numel())

    def sum_scattered(self, target: torch.Tensor, source: torch.Tensor) -> list[Waits]:
        """``target`` (...) gets the sum of what all ranks have for this one in their ``source`` (P, ...). Collective."""
        return self._begun(reduce_scatter, target, source, target.numel())

    def to_all(self, target: torch.Tensor, source: torch.Tensor) -> list[Waits]:
        """``target`` (P, ...) gets what every rank has for this one in its ``source`` (P, ...). Collective."""
        return self._begun(all_to_all, target, source, source.numel() // self.size)

    def to_each(self, target: torch.Tensor, source: torch.Tensor, received: list[int], sent: list[int]) -> list[Waits]:
        """``target`` (rows, n) gets the rows that each rank has for this one in its ``source``, rank after rank. Collective.

        Args:
            received, sent: rows from, and for, each rank, this one among them.
        """
        if self.size > 1 and not self._communicate:
            return []
        width = source.shape[1]
        for place, rank in enumerate(self._members):
            if place != self.place:
                self._sending.count(sent[place] * width * source.element_size(), rank)
        if self.size == 1:
            target.copy_(source)
            return []
        assert self._group is not None
        (source,), (target,), copies = self._sending.ends([source], [target])
        elements = ([width * rows for rows in each] for each in (sent, received))
        return [all_to_all(target.view(-1), source.view(-1), self._group, *elements), *copies]

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """(P, ...): x, of one shape on all ranks, of every rank. Collective."""
        found = x.new_zeros((self.size, *x.shape))
        wait_all(self.gather(found, x.contiguous()))
        return found

    def told(self, x: torch.Tensor) -> torch.Tensor:
        """``all_gather`` outside of a pass: it is neither counted nor left out. Collective."""
        found = x.new_zeros((self.size, *x.shape))
        wait_all(self._moved(all_gather, found, x.contiguous()))
        return found

    def _begun(self, operation: Operation, target: torch.Tensor, source: torch.Tensor, elements: int) -> list[Waits]:
        """Begin an operation that sends so many elements to each other rank."""
        if self.size > 1 and not self._communicate:
            return []
        for place, rank in enumerate(self._members):
            if place != self.place:
                self._sending.count(elements * source.element_size(), rank)
        return self._moved(operation, target, source)

    def _moved(self, operation: Operation, target: torch.Tensor, source: torch.Tensor) -> list[Waits]:
        if self.size == 1:
            target.view(source.shape).copy_(source)
            return []
        if not source.numel():
            return []
        assert self._group is not None
        (source,), (target,), copies = self._sending.ends([source], [target])
        return [operation(target.view(-1), source.view(-1), self._group), *copies]

    # -- from rank to rank -----------------------------------------------------------------------------------------

    def send(self, x: torch.Tensor, place: int) -> list[Waits]:
        """Begin to send x to the rank at a place, which is to ``receive`` it."""
        if not self._communicate:
            return []
        self._sending.count(x.numel() * x.element_size(), self._members[place])
        (source,), _, _ = self._sending.ends([x], [])
        return [_of_member(dist.isend(source, group=self._group, group_dst=place))]

    def receive(self, into: torch.Tensor, place: int) -> list[Waits]:
        """Begin to receive what the rank at a place is to ``send`` next."""
        if not self._communicate:
            return []
        _, (landing,), copies = self._sending.ends([], [into])
        return [_of_member(dist.irecv(landing, group=self._group, group_src=place)), *copies]


def _of_member(work: dist.Work | None) -> dist.Work:
    assert work is not None  # torch gives none to ranks outside of the group
    return work
