"""Sparse attention whose mask is found at run time: a selector chooses which keys, of those that the cell's mask has, are seen.

Every pass has the phases ``select`` (q and k to a block map, the same on all ranks), ``plan`` (the strategy is started anew for it:
schedule, messages, tables of the kernel), ``forward`` and, unless direction=forward, ``backward``, in which the choice is constant.
``selector=none`` chooses nothing: full attention of the cell's mask, whose phases are ``forward`` and ``backward``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.cp.base import Scheduled, Strategy
from lcbench.kernels.base import Kernel
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.selectors.base import Effort, Selector, blocks_of
from lcbench.selectors.foreseen import foreseen
from lcbench.workloads.base import Attended, Work, Workload
from lcbench.workloads.parts import GATHERED, Compute, Exchange, Made, Part, Share, attention_alone

if TYPE_CHECKING:
    from lcbench.measure.session import Gang
    from lcbench.workloads.attention import AttentionSession

# What choosing takes in operations whatever is chosen; what planning takes: to start a strategy, and for each tile and message; and
# bytes for each block of a map.
CHOOSING, STARTED, EACH_CALL, PLANNED = 150, 250, 40, 8
DRAWN = "density asked, places drawn"


@dataclass(frozen=True)
class SparseAttention(Workload):
    """``min_recall``: the share of the softmax's mass, mean over heads, that a selector has to keep; None: any.

    Raises:
        ValueError: no share.
    """

    takes: ClassVar[tuple[str, ...]] = ("selector",)
    any_inputs: ClassVar[bool] = True

    min_recall: float | None = None

    def __post_init__(self) -> None:
        least = self.min_recall
        if least is not None and (isinstance(least, bool) or not isinstance(least, int | float) or not 0 < least <= 1):
            raise ValueError(f"workload.min_recall={least} is no share above 0 and up to 1, such as 0.9; null: any recall will do")

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Any) -> str | None:
        if problem.batch is not None:
            return "selectors choose for one sequence, all of whose tokens have a query: it takes seqlen, no batch"
        if not isinstance(mask, BandMask):
            return "blocks are chosen within a mask of bands, such as causal or full, and this one is a block map itself"
        if problem.softmax.sink or problem.softmax.softcap:
            return f"softmax={problem.softmax}: selectors choose by a plain softmax, without a sink or a softcap"
        if not isinstance(strategy, Scheduled):
            return "a strategy of another kind than lcbench's own schedules cannot be started for a mask that is chosen at run time"
        if strategy.approximates(problem, mask):
            return "the strategy computes another mask than the cell's, within which blocks would be chosen"
        return strategy.only_in_a_step()

    def attends(self, problem: Problem, mask: Mask, selector: Selector | None) -> list[Attended]:
        """The mask that the selector would leave: what density it is asked for is known, the places are drawn."""
        assert selector is not None
        assert isinstance(mask, BandMask)
        return [(problem, mask if selector.dense else foreseen(selector, problem, mask), 1.0)]

    def made(self, share: Share, recompute: Any) -> Made:
        selector, problem, passes = share.selector, share.problem, attention_alone(share)
        if selector is None or selector.dense:
            return passes
        work = selector.work(problem, problem.plane / 2 if share.seen is None else share.seen) or Effort()
        ranks, every = problem.scale.world_size, selector.every
        # None of its products counts as attention's.
        chosen: tuple[Part, ...] = (
            Compute(work.flops / ranks, 0.0, work.moved / ranks + work.shared, CHOOSING + work.kernels / ranks, useful=0.0),
            *((Exchange(GATHERED, ("cp",), work.told),) if ranks > 1 else ()),
        )
        blocks = math.prod(blocks_of(selector, problem)) * selector.maps(problem.heads)
        planned = Compute(moved_bytes=float(PLANNED * blocks), launches=float(STARTED + EACH_CALL * share.calls))
        phases = {"select": chosen, "plan": (planned,)} | passes.phases
        return replace(passes, phases=phases, metrics={"select/every": float(every)}, drawn=DRAWN)

    def start(self, work: Work, draw: int, gang: Gang) -> AttentionSession:
        from lcbench.workloads.attention import AttentionSession  # with torch, which planning does without
        from lcbench.workloads.sparse_session import SparseSession

        assert work.selector is not None
        return AttentionSession(work, draw, gang) if work.selector.dense else SparseSession(work, draw, gang, self.min_recall)
