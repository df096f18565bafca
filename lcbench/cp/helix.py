"""Helix: tensor parallelism as wide as key/value heads allow, and the tokens of the cache split among the rest (arXiv 2507.07120).

P ranks are TPA x KVP. Each of TPA groups has its share of the key/value heads, and of every request each of its KVP ranks has some
of the tokens. All ranks of a group have projected the queries of all of its heads, so no queries are sent: a rank computes them on
its own tokens, and an all-to-all brings each rank the partial results of Hq/P heads with their LSE, which it merges. What follows
attention takes all P ranks as one tensor-parallel group.

Bytes that a rank sends for each new token, whatever the context; r of a partial result of width d', s of an LSE::

    (KVP - 1) Hq/P (d' r + s)
"""

# No postponed annotations: options are asked for their types.

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lcbench.cp.base import Place, Strategy
from lcbench.cp.split_cache import fewest, modelled, refused, split
from lcbench.kernels.base import Kernel
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_choice, check_count, ranks_of

if TYPE_CHECKING:
    from lcbench.cp.split_run import SplitRun
    from lcbench.schedule.simulate import Modelled

Neighbours = Literal["kvp", "tpa"]


@dataclass(frozen=True)
class Helix(Strategy):
    """Helix parallelism, forward only.

    Attributes:
        kvp: ranks that split the tokens; ``auto``: the fewest with which no key/value head is held by two groups.
        interleave: tokens of a request that go to one rank before the next ones go to the next, in turn; None: each rank has one
            stretch of every request.
        neighbours: whose ranks are adjacent: those that split tokens, or those that split heads.
    """

    kvp: int | Literal["auto"] = "auto"
    interleave: int | None = None
    neighbours: Neighbours = "kvp"

    def __post_init__(self) -> None:
        if self.kvp != "auto":
            check_count("kvp", self.kvp)
        if self.interleave is not None:
            check_count("interleave", self.interleave)
        check_choice("neighbours", self.neighbours, ("kvp", "tpa"))

    def _kvp(self, problem: Problem) -> int:
        return fewest(problem) if self.kvp == "auto" else self.kvp

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return refused(problem, "kvp", self._kvp(problem))

    def modelled(self, problem: Problem, mask: Mask) -> "Modelled":
        grid = ranks_of(problem.scale.world_size, self._kvp(problem), outside=self.neighbours == "tpa")
        return modelled(problem, mask, grid, self.interleave, "all_to_all", gathers=False)

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> "SplitRun":
        from lcbench.cp.split_run import SplitRun  # with torch, which planning does without

        grid = ranks_of(problem.scale.world_size, self._kvp(problem), outside=self.neighbours == "tpa")
        of_rank = split(problem, grid, place.rank, self.interleave, gathers=False)
        return SplitRun(of_rank, problem, mask, kernel, place, "all_to_all")
