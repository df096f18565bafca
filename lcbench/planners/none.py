"""No planner: documents in their order, each shared by all ranks, as with one degree of context parallelism for everything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Group, Infeasible, Planner, Say


@dataclass(frozen=True)
class NoPlanner(Planner):
    """Every micro-batch has as many of the next documents as all ranks together hold."""

    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        if fleet.ranks not in cost.degrees:
            raise Infeasible(f"no method shares a document among all {fleet.ranks} ranks")
        room = fleet.ranks * fleet.capacity
        micro_batches: list[list[int]] = []
        left = 0
        for number, tokens in enumerate(documents.tokens.tolist()):
            if tokens > room:
                raise Infeasible(f"document {number} has {tokens} tokens, and {fleet.ranks} ranks hold {room}")
            if tokens > left:
                micro_batches.append([])
                left = room
            micro_batches[-1].append(number)
            left -= tokens
        every = tuple(range(fleet.ranks))

        def whole(numbers: list[int]) -> tuple[Group, ...]:
            return (Group(every, tuple(numbers), cost.group(documents.of(np.array(numbers)), every)[1]),)

        return Assignment(tuple(map(whole, micro_batches)))
