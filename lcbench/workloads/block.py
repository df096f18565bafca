"""A training step of a few transformer layers under context parallelism, with any strategy, kernel and mask of attention cells.

Phases: ``forward`` of the layers; ``head``: loss and its gradient, by chunks of tokens; ``backward`` of the layers; ``reduce``:
sums of the weights' gradients over ranks. A model's step is ``head`` and, as often as it has layers, a layer's share of the rest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from lcbench.kernels.base import Unsupported
from lcbench.measure.ranks import all_gather_object, first_refusal
from lcbench.measure.session import Gang, Phases
from lcbench.workloads.base import Work
from lcbench.workloads.models import Model
from lcbench.workloads.training import Training
from lcbench.workloads.transformer import Attention


@dataclass(frozen=True)
class Block:
    """Layers of a model, and its head.

    Attributes:
        model: sizes.
        layers: how many layers are run; None: all of the model's.
        loss_chunk: tokens whose logits exist at once.
    """

    takes: ClassVar[tuple[str, ...]] = ("recompute",)

    model: Model
    layers: int | None = None
    loss_chunk: int = 1024

    def start(self, work: Work, draw: int, gang: Gang) -> BlockSession:
        return BlockSession(self, work, draw, gang)


class BlockSession:
    """One draw of a block cell on this rank."""

    wrong: str | None = None

    def __init__(self, block: Block, work: Work, number: int, gang: Gang) -> None:
        self._work, self._gang = work, gang
        begun = time.perf_counter()
        self.mask = work.make_mask(number)
        reason = None
        try:
            run = work.strategy.start(work.problem, self.mask, work.kernel, gang.place)
            reason = work.recompute.refuses(run)
        except Unsupported as refused:
            reason = str(refused)
        self.refused = first_refusal(all_gather_object(reason))
        if self.refused:
            return
        self.training = Training(block, work, Attention(run), work.recompute, gang.device)
        self.prepare_s = time.perf_counter() - begun

    def phases(self) -> Phases:
        return self.training.phases()
