"""A training step as ``measure_cell`` runs it: a session of ``workload=block``."""

from __future__ import annotations

import time

from lcbench.kernels.base import Unsupported
from lcbench.measure.ranks import EVERY, first_refusal
from lcbench.measure.session import Gang, Phases
from lcbench.workloads.base import Work
from lcbench.workloads.block import Block
from lcbench.workloads.training import Training
from lcbench.workloads.transformer import Attention


class BlockSession:
    """One draw of a block cell on this rank."""

    wrong: str | None = None

    def __init__(self, block: Block, work: Work, number: int, gang: Gang) -> None:
        self._work, self._gang = work, gang
        begun = time.perf_counter()
        self.mask = gang.own_heads(work.make_mask(number), work.problem.heads.q)
        reason = None
        try:
            run = work.strategy.start(work.problem, self.mask, work.kernel, gang.place)
            reason = work.recompute.refuses(run)
        except Unsupported as refused:
            reason = str(refused)
        self.refused = first_refusal(EVERY.all_gather_object(reason))
        if self.refused:
            return
        try:
            self.training = Training(block, work, Attention(run), work.recompute, gang)
        except Unsupported as refused:  # by all ranks
            self.refused = str(refused)
            return
        self.prepare_s = time.perf_counter() - begun

    def phases(self) -> Phases:
        return self.training.phases()
