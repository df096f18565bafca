"""Sparse attention whose mask is found at run time: a selector chooses which keys, of those that the cell's mask has, are seen.

Every pass has the phases ``select`` (q and k to a block map, the same on all ranks), ``plan`` (the strategy is started anew for it:
schedule, messages, tables of the kernel), ``forward`` and, unless direction=forward, ``backward``, in which the choice is constant.
``selector=none`` chooses nothing: full attention of the cell's mask, whose phases are ``forward`` and ``backward``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.cp.base import Scheduled, Strategy
from lcbench.kernels.base import Kernel
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.workloads.base import Work, Workload

if TYPE_CHECKING:
    from lcbench.measure.session import Gang
    from lcbench.workloads.attention import AttentionSession


@dataclass(frozen=True)
class SparseAttention(Workload):
    """``min_recall``: the share of the softmax's mass, mean over heads, that a selector has to keep; None: any.

    Raises:
        ValueError: no share.
    """

    takes: ClassVar[tuple[str, ...]] = ("selector",)

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

    def unforeseen(self) -> str | None:
        return "workload=sparse_attention chooses its mask and plans for it in every pass, which is not simulated"

    def start(self, work: Work, draw: int, gang: Gang) -> AttentionSession:
        from lcbench.workloads.attention import AttentionSession  # with torch, which planning does without
        from lcbench.workloads.sparse_session import SparseSession

        assert work.selector is not None
        return AttentionSession(work, draw, gang) if work.selector.dense else SparseSession(work, draw, gang, self.min_recall)
