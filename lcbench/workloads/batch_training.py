"""A stack of layers and its head in training on a batch of documents: this rank's micro-batches one after the other.

Each goes forward, through the head and back before the next. Weights' gradients add up over them, and then over all ranks, in
float32 or wider. The loss is the mean over all labelled tokens of the batch, so that no result depends on who computes what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lcbench.cp.base import RankRun
from lcbench.kernels.base import accumulation_dtype
from lcbench.measure.session import Gang, Phases
from lcbench.workloads.parts import BATCH
from lcbench.workloads.recompute.base import Again, Recompute
from lcbench.workloads.recompute.swapping import started_each
from lcbench.workloads.sharing import Accumulation
from lcbench.workloads.training import Done, MicroBatch, Training
from lcbench.workloads.transformer import Attention, Stack

if TYPE_CHECKING:
    from lcbench.workloads.base import Work
    from lcbench.workloads.trained import Trained


@dataclass(frozen=True)
class OwnPart:
    """What a rank has of a micro-batch.

    Attributes:
        run: its attention.
        tokens: how many of this rank's tokens are in it.
        recompute: what the layers' forward keeps.
        ended: called behind its backward.
    """

    run: RankRun
    tokens: int
    recompute: Recompute
    ended: Callable[[], None] = lambda: None


class BatchTraining(Training):
    """The layers and the head on this rank, and its tokens of all micro-batches, one behind the other.

    Attributes:
        micro_batches: this rank's; it may have none.
        moved: bytes that its last step has copied to the host, and from it, by phase; nothing where nothing goes there.

    Args:
        attention: of the whole batch.
        recompute: of the cell.
        parts: this rank's, in their order.
        swaps: whether some rank's recomputation puts tensors into the host's memory.
    """

    def __init__(
        self,
        block: Trained,
        work: Work,
        attention: Attention,
        recompute: Recompute,
        gang: Gang,
        parts: Sequence[OwnPart],
        *,
        swaps: bool,
    ) -> None:
        self._parts, self._policy, self._swaps = parts, recompute, swaps
        self.moved: dict[str, int] = {}
        super().__init__(block, work, attention, recompute, gang)
        self._gradients = Accumulation(self._whole)

    def _micro_batches(self, recompute: Recompute) -> list[MicroBatch]:
        sizes = [part.tokens for part in self._parts]
        stacks, xs, labels = [], self.x.split(sizes), self.labels.split(sizes)
        for part, *rope in zip(self._parts, *(x.split(sizes) for x in self.stack.rope), strict=True):
            attention = Attention(part.run)
            stacks.append(Stack([layer.around(attention) for layer in self.stack.layers], (rope[0], rope[1])))
        policies = [part.recompute for part in self._parts]
        given = list(zip(policies, stacks, xs, strict=True))
        ready = started_each(given, self._block.model.layers, self._device, swaps=self._swaps)
        return [MicroBatch(*each) for each in zip(stacks, xs, ready, map(self._loss, labels), strict=True)]

    @property
    def again(self) -> Again:
        return self._policy.again()

    @property
    def host_bytes(self) -> int:
        return max((each.recompute.host_bytes for each in self.micro_batches), default=0)

    def offloaded(self) -> dict[str, float]:
        if not self._swaps:
            return {}
        moved = {phase: float(self.moved.get(phase, 0)) for phase in ("forward", "backward")}
        return {"memory/host_bytes": float(self.host_bytes)} | {f"offload/{phase}/bytes": count for phase, count in moved.items()}

    @property
    def notes(self) -> dict[str, Any]:
        return {}

    def phases(self, done: Done = lambda part, passed: None) -> Phases:
        """``batch`` and what comes after it give (dx, loss), dx of all tokens of this rank in their order; see ``Training.phases``.

        Args:
            done: called after ``forward``, ``head`` and ``backward`` of each micro-batch, with what these give in
                ``Training.phases``.
        """
        return {BATCH: lambda _: self._batch(done)} | self._of_weights()

    def _batch(self, done: Done) -> tuple[torch.Tensor, torch.Tensor]:
        self._forget()
        self.moved = {}
        dx, loss = [self.x[:0]], torch.zeros((), dtype=accumulation_dtype(self.x.dtype), device=self._device)
        for own, micro_batch in zip(self._parts, self.micro_batches, strict=True):
            last = micro_batch is self.micro_batches[-1]
            self._gradients.begin(last=last)
            of_x, of_loss = self._one(micro_batch, done)
            self._gradients.end(last=last)
            own.ended()
            dx.append(of_x)
            loss += of_loss
            if (swap := micro_batch.recompute.swap) is not None:
                self.moved = {phase: self.moved.get(phase, 0) + count for phase, count in swap.moved.items()}
        for weight in self.weights().values():
            if weight.grad is None:  # a rank without tokens takes part in what comes after all the same
                weight.grad = torch.zeros_like(weight)
        self.sharing.settle(self.weights().values())
        return torch.cat(dx), loss

    def _one(self, micro_batch: MicroBatch, done: Done) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward, head and backward of a micro-batch: dx of its tokens, and its part of the loss."""
        x, y = self._through(micro_batch, micro_batch.x)
        done("forward", (x, y))
        dy, loss = micro_batch.loss(y)
        done("head", (x, y, dy, loss))
        y.backward(dy)
        assert x.grad is not None
        done("backward", (x.grad, loss))
        return x.grad, loss
