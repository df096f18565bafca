"""A training step of a few transformer layers under context parallelism, with any strategy, kernel and mask of attention cells.

Phases: ``forward`` of the layers; ``head``: loss and its gradient, by chunks of tokens; ``backward`` of the layers; ``reduce``:
sums of the weights' gradients over the ranks that have the same weights, where these are not sharded; ``optimizer``: its step, if
any. With images ``reshard`` comes first and ``reshard_backward`` behind ``backward``. A model's step is these once, ``head``
and, as often as it has layers, a layer's share of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.workloads.base import Work, Workload
from lcbench.workloads.block_parts import made_of
from lcbench.workloads.parts import Made, Share
from lcbench.workloads.recompute.base import Recompute
from lcbench.workloads.trained import LABEL_BYTES, Trained, is_number

if TYPE_CHECKING:
    from lcbench.measure.session import Gang
    from lcbench.workloads.step import BlockSession


@dataclass(frozen=True)
class Block(Trained, Workload):
    """Layers of a model, and its head, trained as ``Trained`` says.

    Attributes:
        fsdp: see ``Trained.sharded``; ``vision``: see ``Trained.shown``.
    """

    takes: ClassVar[tuple[str, ...]] = ("recompute",)

    fsdp: bool = False
    # At its default it is no part of a cell, whose id is from before there was a choice.
    vision: float = field(default=0.0, metadata={"left_out": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.vision) or not 0 <= self.vision <= 1:
            raise ValueError(f"workload.vision={self.vision} is no share of the tokens from 0 to 1, such as 0.5")

    @property
    def sharded(self) -> bool:
        return self.fsdp

    @property
    def shown(self) -> float:
        return self.vision

    def made(self, share: Share, recompute: Recompute) -> Made:
        return made_of(self, share, recompute)

    def unforeseen(self) -> str | None:
        if not self.vision:
            return None
        return f"workload.vision={self.vision:g} moves images between ranks (reshard, reshard_backward), which is not simulated yet"

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Any) -> str | None:
        if not problem.backward:
            return (
                "direction=forward: a training step has a backward pass, so that workload=block has direction=forward_backward only"
            )
        return self.untrainable(problem)

    def input_bytes(self, problem: Problem) -> float:
        """Of what the first layer gets, of the images that it gets from elsewhere, and of the labels. Weights are no inputs."""
        hidden = (1 + self.vision) * self.model.hidden
        return problem.seqlen / problem.scale.world_size * (hidden * problem.itemsize + LABEL_BYTES)

    def start(self, work: Work, draw: int, gang: Gang) -> BlockSession:
        from lcbench.workloads.step import BlockSession  # with torch, which planning does without

        return BlockSession(self, work, draw, gang)
