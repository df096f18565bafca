"""LASP: the state goes from rank to rank, once through all of them (arXiv 2404.02882).

A rank has a stretch of the tokens. It sums up what these do to any state before it waits, so that a state that comes leaves again
as soon as that is applied; then its tokens are computed from the state. In backward the gradient of the state goes the other way.
What a rank sends is as large as a state, however long the sequence is and however many ranks there are; a state takes P - 1 hops.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lcbench.cp.base import LinearOnly
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import state_chain
from lcbench.schedule.lowering import Lowering
from lcbench.schedule.schedule import Schedule


@dataclass(frozen=True)
class LASP(LinearOnly):
    """The states of all heads in one message."""

    lowering: Lowering = field(default="auto", init=False)  # no option: a chain has no collectives

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        return state_chain(problem, 1)
