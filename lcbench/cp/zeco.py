"""ZeCO: the state goes through all ranks in blocks, so that links of several hops are busy at once (arXiv 2507.01004).

Its All-Scan cuts a state into K blocks. A rank applies what its own tokens do to a block when that comes, and sends it on while
the next block is on its way. A rank sends as much as a state, as in LASP; the last block arrives after P - 1 + K - 1 hops of a
K-th of it each, so its latency grows by a K-th of a state's with each rank. Here a block is the state of some of the heads, which
are one stretch of memory; a rank computes its tokens, all heads together, when all blocks have come and are sent on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lcbench.cp.base import LinearOnly
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_count, state_chain
from lcbench.schedule.lowering import Lowering
from lcbench.schedule.schedule import Schedule


@dataclass(frozen=True)
class ZeCO(LinearOnly):
    """``blocks``: K; no more than there are key/value heads."""

    blocks: int = 4
    lowering: Lowering = field(default="auto", init=False)  # no option: a chain has no collectives

    def __post_init__(self) -> None:
        check_count("blocks", self.blocks)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if problem.heads.kv < self.blocks:
            return f"cannot cut the states of {problem.heads.kv} key/value heads into cp.blocks={self.blocks} blocks of whole heads"
        return super().unsupported(problem, mask)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        return state_chain(problem, self.blocks)
