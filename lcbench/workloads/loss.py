"""The loss of a stack of layers, by chunks of tokens, so that no logits of all tokens exist (ALST, arXiv 2506.13996)."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from lcbench.masks.band import Ints
from lcbench.measure.inputs import draw_rows
from lcbench.measure.ranks import EVERY
from lcbench.workloads.transformer import Head

UNLABELLED = -100  # torch's own word for a token without a label


def labels_of(tokens: Ints, vocab: int, seed: int, device: torch.device) -> torch.Tensor:
    """(T,): what the head is to say of each token, the same at every number of ranks; ``UNLABELLED`` where there is nothing."""
    uniform = 0.5 + 0.5 * torch.erf(draw_rows("labels", tokens, (), torch.float64, seed, device) / math.sqrt(2))
    return (uniform * vocab).long().clamp_(0, vocab - 1)


class ChunkedLoss:
    """The mean cross-entropy over all labelled tokens of all ranks.

    Args:
        labels: (T,), this rank's.
        chunk: tokens whose logits exist at once.
    """

    def __init__(self, head: Head, labels: torch.Tensor, chunk: int) -> None:
        self.head, self.labels, self.chunk = head, labels, chunk
        self.labelled = int(EVERY.reduce((labels != UNLABELLED).sum()))

    def __call__(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dy (T, hidden), and this rank's part of the loss; the head's weights have their gradients then, which are summed over
        chunks in float32 or wider."""
        weights = list(self.head.parameters())
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        sums = [torch.zeros_like(weight, dtype=wide) for weight in weights]
        loss, dy = torch.zeros((), dtype=wide, device=y.device), torch.empty_like(y)
        for begin in range(0, len(y), self.chunk):
            rows = slice(begin, begin + self.chunk)
            part = y[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = self.head(part).to(wide)
                one = functional.cross_entropy(logits, self.labels[rows], reduction="sum", ignore_index=UNLABELLED) / self.labelled
            dy[rows], *grads = torch.autograd.grad(one, [part, *weights])
            for total, grad in zip(sums, grads, strict=True):
                total += grad
            loss += one.detach()
        for weight, total in zip(weights, sums, strict=True):
            weight.grad = total.to(weight.dtype)
        return dy, loss
