"""LASP-2: every rank gets what the tokens of every other do to a state, by one all-gather (arXiv 2502.07563).

There is one exchange and no chain of hops, at the price of (P - 1) times the bytes. A rank puts its state together from the
summaries of the ranks before it; in backward from those behind it. As in the paper all ranks get all of them, although with a
causal mask half would do, since that is what a collective is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcbench.cp.base import LinearOnly
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import state_blocks, stretches
from lcbench.schedule.schedule import Move, Schedule, Step, rows, singles


@dataclass(frozen=True)
class LASP2(LinearOnly):
    """It has no options of its own."""

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        every = np.arange(ranks)
        source, to = (each.ravel() for each in np.meshgrid(every, every, indexing="ij"))
        others = source != to
        moves = (Move("summary", rows(source[others], to[others], source[others], 0)),) if ranks > 1 else ()
        tiles = rows(every, 0, every, every)
        # The first rank needs nothing of the others.
        steps = (Step(tiles[:1], moves), Step(tiles[1:])) if ranks > 1 else (Step(tiles),)
        return Schedule.of(ranks, stretches(problem), every, state_blocks(problem.heads, 1), singles(ranks), steps)
