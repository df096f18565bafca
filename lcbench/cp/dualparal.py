"""A pipeline of layers, through which blocks of frames go, each at a noise level of its own (DualParal, arXiv 2505.21070).

Ranks have adjacent layers, the first rank the first ones, and of their layers all tokens. The tokens are ``blocks`` equal blocks 0
... B-1, in the order of the video. In round n = 0, 1, ... S + B - 2 the blocks i with 0 <= n - i < S are in the queue, each at its
step t = n - i: block n enters, and a block leaves after step S - 1. A round takes the blocks from the newest, which has most noise,
to the oldest. With c = ``context`` * block size tokens, block i at step t is this in each layer:

* Rows are the block, and before it the last c tokens of block i - 1: [i * b - c, (i + 1) * b).
* They see the keys of these same tokens at step t, and of the first c tokens of block i + 1 the keys of step t - 1, that were
  computed just before in this round and are in the layer's *cache*. In step 0 there are none, since block i + 1 enters a round
  later; the last block never has any. Of all these pairs those count that the mask has.
* The latent that the rows begin with is that of their tokens as it is then: of the block after step t - 1, of those before it after
  step t. All of them take the inputs q, k and v of step t.
* What becomes of the block is its new latent; what becomes of the tokens before it is dropped.

A rank sends the rows' latent to the next rank, and the last one sends the block's to the first, where it is for the next round.
These are all messages: (c + b) * Hq * D numbers from rank to rank, without c of block 0, and b * Hq * D from the last.

The release (``examples/DualParal_Wan.py``, ``src/pipelines``) does the same with frames, and with a model between the messages.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcbench.cp.base import Place
from lcbench.cp.steps import OverSteps, StepRun
from lcbench.kernels.base import Kernel
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_count


@dataclass(frozen=True)
class DualParal(OverSteps):
    """``blocks``: of the tokens; ``context``: tokens of each neighbour that a block sees, as a share of a block, 0 to 1."""

    blocks: int = 8
    context: float = 0.5

    def __post_init__(self) -> None:
        check_count("blocks", self.blocks)
        if not 0 <= self.context <= 1:
            raise ValueError(f"cp.context={self.context} is no share of a block, 0 to 1")

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if reason := super().unsupported(problem, mask):
            return reason
        if problem.seqlen % self.blocks:
            return f"has equal blocks, and cp.blocks={self.blocks} does not divide seqlen={problem.seqlen}"
        return None

    def too_few(self, steps: int, layers: int, problem: Problem) -> str | None:
        if layers < problem.scale.world_size:
            return f"is a pipeline of {problem.scale.world_size} ranks, and layers={layers} leaves one without a layer"
        return None

    def start_steps(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place, steps: int, layers: int) -> StepRun:
        from lcbench.cp.dualparal_run import DualParalRun, Queue  # with torch, which planning does without

        return DualParalRun(Queue(problem.seqlen, self.blocks, self.context, steps), problem, mask, kernel, place, layers)
