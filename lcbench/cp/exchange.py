"""Collectives of strategies that are no schedules, among the ranks of a context-parallel group; what is sent is counted."""

from __future__ import annotations

import torch

from lcbench.cp.base import Place
from lcbench.problem import Problem
from lcbench.schedule.execute import FromHost, all_gather, wait_all


class Exchange:
    """One rank's end of the messages of a run.

    Attributes:
        bytes_sent: to other ranks since a pass last began; a collective counts as a message to each of them.
        bytes_between_nodes: those of them that go to ranks on other nodes.
    """

    def __init__(self, problem: Problem, place: Place) -> None:
        self._ranks = problem.scale.world_size
        per_node = problem.scale.gpus_per_node
        # Ranks of a node are adjacent in the group, since ranks are counted node after node.
        self._elsewhere = sum(other // per_node != place.rank // per_node for other in range(self._ranks))
        if self._ranks > 1:
            self._group, self._through_host = place.group, place.groups.goes_through_host(place.device)
        self.begin(communicate=True)

    def begin(self, *, communicate: bool) -> None:
        """A pass begins; without ``communicate`` its messages are left out, and what they bring means nothing."""
        self._communicate = communicate
        self.bytes_sent = self.bytes_between_nodes = 0

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """(P, ...): x, of one shape on all ranks, of every rank. Collective."""
        if not self._communicate:
            return x.new_zeros((self._ranks, *x.shape))
        size = x.numel() * x.element_size()
        self.bytes_sent += (self._ranks - 1) * size
        self.bytes_between_nodes += self._elsewhere * size
        return self.told(x)

    def told(self, x: torch.Tensor) -> torch.Tensor:
        """The same outside of a pass, whatever this one leaves out; it is not counted. Collective."""
        if self._ranks == 1:
            return x[None]
        found, x = x.new_zeros((self._ranks, *x.shape)), x.contiguous()
        if not x.numel():
            return found
        if self._through_host:
            landing = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            wait_all([all_gather(landing.view(-1), x.cpu().view(-1), self._group), FromHost([(landing, found)])])
        else:
            wait_all([all_gather(found.view(-1), x.view(-1), self._group)])
        return found
