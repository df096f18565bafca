"""Decode context parallelism: ranks of a tensor-parallel group that would hold the same key/value heads hold other tokens of them.

Groups of D neighbouring ranks have the same heads, and ``interleave`` tokens of each request in turn. Every rank has projected the
queries of its own heads, rank r heads r Hq/P and what follows. It gathers those of its group, computes them on its own tokens, and
the partial results are merged, so that each rank ends with its own heads (vLLM, ``decode_context_parallel_size``,
``cp_kv_cache_interleave_size``, ``dcp_comm_backend``; SGLang, ``--dcp-size``).

``merge=reduce_scatter`` gathers the LSE, scales each partial result to its share of the whole and sums by reduce-scatter.
``merge=all_to_all`` sends every rank the partial results of its heads with their LSE. Bytes that a rank sends for each new token,
whatever the context; b of an input, r of a partial result, s of an LSE, h = Hq/P heads of width d, and d' of values::

    reduce_scatter   (D - 1) h (d b + d' r + D s)
    all_to_all       (D - 1) h (d b + d' r + s)
"""

# No postponed annotations: options are asked for their types.

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lcbench.cp.base import Place, Strategy
from lcbench.cp.split_cache import MERGES, Merge, fewest, modelled, refused, split
from lcbench.kernels.base import Kernel
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_choice, check_count, ranks_of

if TYPE_CHECKING:
    from lcbench.cp.split_run import SplitRun
    from lcbench.schedule.simulate import Modelled


@dataclass(frozen=True)
class DCP(Strategy):
    """Decode context parallelism, forward only.

    Attributes:
        degree: D, ranks of a group; ``auto``: the fewest with which no key/value head is held by two groups: P / Hk where that is
            a number, which is the most that vLLM takes.
        interleave: tokens of a request that go to one rank before the next ones go to the next: 1, or a page of the cache.
        merge: how partial results are merged.
    """

    degree: int | Literal["auto"] = "auto"
    interleave: int = 1
    merge: Merge = "reduce_scatter"

    def __post_init__(self) -> None:
        if self.degree != "auto":
            check_count("degree", self.degree)
        check_count("interleave", self.interleave)
        check_choice("merge", self.merge, MERGES)

    def _degree(self, problem: Problem) -> int:
        return fewest(problem) if self.degree == "auto" else self.degree

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return refused(problem, "degree", self._degree(problem))

    def modelled(self, problem: Problem, mask: Mask) -> "Modelled":
        grid = ranks_of(problem.scale.world_size, self._degree(problem), outside=False)
        return modelled(problem, mask, grid, self.interleave, self.merge, gathers=True)

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> "SplitRun":
        from lcbench.cp.split_run import SplitRun  # with torch, which planning does without

        grid = ranks_of(problem.scale.world_size, self._degree(problem), outside=False)
        return SplitRun(split(problem, grid, place.rank, self.interleave, gathers=True), problem, mask, kernel, place, self.merge)
