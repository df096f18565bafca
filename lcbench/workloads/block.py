"""A training step of a few transformer layers under context parallelism, with any strategy, kernel and mask of attention cells.

Phases: ``forward`` of the layers; ``head``: loss and its gradient, by chunks of tokens; ``backward`` of the layers; ``reduce``:
sums of the weights' gradients over the ranks that have the same weights, where these are not sharded; ``optimizer``: its step, if
any. With images ``reshard`` comes first and ``reshard_backward`` behind ``backward``. A model's step is these once, ``head``
and, as often as it has layers, a layer's share of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel
from lcbench.masks.mask import Mask
from lcbench.problem import PLAIN, Problem
from lcbench.workloads.base import Work, Workload
from lcbench.workloads.block_parts import made_of
from lcbench.workloads.parts import Made, Share
from lcbench.workloads.recompute.base import Recompute
from lcbench.workloads.trained import Trained

if TYPE_CHECKING:
    from lcbench.measure.session import Gang
    from lcbench.workloads.step import BlockSession

LABEL_BYTES = 8


@dataclass(frozen=True)
class Block(Trained, Workload):
    """Layers of a model, and its head, trained as ``Trained`` says."""

    takes: ClassVar[tuple[str, ...]] = ("recompute",)

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
        if problem.batch is not None:
            return f"batch={problem.batch}: a training step is of one sequence, all of whose tokens are computed"
        if problem.softmax != PLAIN:
            return f"softmax={problem.softmax}: layers of its models have a plain softmax"
        if problem.dtype == "float16":
            return "dtype=float16: gradients of a mean loss are below what float16 holds, and there is no loss scaling here"
        tp = self.model.heads_q // problem.heads.q  # the problem has one tensor-parallel rank's heads
        for name in ("ffn", "vocab"):
            if (size := getattr(self.model, name)) % tp:
                return f"mesh.tp={tp} does not divide model.{name}={size}, of which each tensor-parallel rank has an equal part"
        if self.masked_logits and self.labelled == 1:
            return "workload.masked_logits=true leaves nothing out where every token has a label (workload.labelled=1.0)"
        return None

    def input_bytes(self, problem: Problem) -> float:
        """Of what the first layer gets, of the images that it gets from elsewhere, and of the labels. Weights are no inputs."""
        hidden = (1 + self.vision) * self.model.hidden
        return problem.seqlen / problem.scale.world_size * (hidden * problem.itemsize + LABEL_BYTES)

    def start(self, work: Work, draw: int, gang: Gang) -> BlockSession:
        from lcbench.workloads.step import BlockSession  # with torch, which planning does without

        return BlockSession(self, work, draw, gang)
