"""A stack of layers and its head in training, on one rank: weights, inputs, and the phases of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

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
        recompute: what the layers' forward keeps, ready to run.

    Raises:
        Unsupported: on all ranks, where activations do not fit the memory of some host.
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
        self.x = draw_rows("x", tokens, (model.hidden,), dtype, work.seed, device)
        self.recompute = recompute.start(self.stack, self.x, model.layers)
        self._loss = ChunkedLoss(self.head, labels_of(tokens, model.vocab, work.seed, device), block.loss_chunk)

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
        }
        return phases

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        for weight in self.weights().values():
            weight.grad = None
        x = self.x.detach().requires_grad_()
        return x, self.recompute.forward(x)

    def _backward(self, passed: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y, dy, loss = passed
        y.backward(dy)
        return x.grad, loss
