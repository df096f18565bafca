"""A stack of layers and its head in training, on one rank: weights, inputs, and the phases of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lcbench.measure.inputs import draw_rows
from lcbench.measure.session import Phases
from lcbench.workloads.loss import ChunkedLoss, labels_of
from lcbench.workloads.recompute.base import Recompute
from lcbench.workloads.transformer import Attention, Head, Layer, Stack, give_weights, rotations

if TYPE_CHECKING:
    from lcbench.workloads.base import Work
    from lcbench.workloads.block import Block


class Training:
    """The layers and the head on this rank, and its share of a sequence.

    Attributes:
        x: (T, hidden), what the first layer gets.
        labels: (T,), what the head is to say.
    """

    def __init__(self, block: Block, work: Work, attention: Attention, recompute: Recompute, device: torch.device) -> None:
        model, problem, tokens = block.model, work.problem, attention.run.tokens
        dtype: torch.dtype = getattr(torch, problem.dtype)
        layers = [Layer(model, attention, dtype, device) for _ in range(block.layers or model.layers)]
        self.head = Head(model, dtype, device)
        for number, layer in enumerate(layers):
            give_weights(layer, f"layers.{number}", work.seed)
        give_weights(self.head, "head", work.seed)
        self.stack = Stack(layers, rotations(tokens, model, dtype, device))
        self._recompute = recompute
        self.x = draw_rows("x", tokens, (model.hidden,), dtype, work.seed, device)
        self.labels = labels_of(tokens, model.vocab, work.seed, device)
        self._loss = ChunkedLoss(self.head, self.labels, block.loss_chunk)

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """All weights by name."""
        named = {
            f"layers.{i}.{name}": weight for i, layer in enumerate(self.stack.layers) for name, weight in layer.named_parameters()
        }
        return named | {f"head.{name}": weight for name, weight in self.head.named_parameters()}

    def phases(self) -> Phases:
        """Forward gives (x, y); head (x, y, dy, loss); backward and reduce (dx, loss), and the weights have their gradients."""
        phases: dict[str, Callable[[Any], Any]] = {
            "forward": lambda _: self.forward(),
            "head": lambda passed: (*passed, *self._loss(passed[1])),
            "backward": self._backward,
            "reduce": self._reduce,
        }
        return phases

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        for weight in self.weights().values():
            weight.grad = None
        x = self.x.detach().requires_grad_()
        return x, self._recompute.forward(self.stack, x)

    def _backward(self, passed: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y, dy, loss = passed
        y.backward(dy)
        return x.grad, loss

    def _reduce(self, passed: Any) -> Any:
        """Sum the weights' gradients over all ranks."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            for weight in self.weights().values():
                dist.all_reduce(weight.grad)
        return passed
