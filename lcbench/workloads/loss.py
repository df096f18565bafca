"""The loss of a stack of layers, by chunks of tokens, so that no logits of all tokens exist (ALST, arXiv 2506.13996)."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from lcbench.kernels.base import accumulation_dtype
from lcbench.masks.band import Ints
from lcbench.measure.inputs import draw_rows
from lcbench.workloads.sharing import Accumulation, Sharing, local
from lcbench.workloads.transformer import Head

UNLABELLED = -100  # torch's own word for a token without a label


def labels_of(tokens: Ints, vocab: int, seed: int, device: torch.device, sequence: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """(T,): what the head is to say of each token, the same at every number of ranks; ``UNLABELLED`` where there is nothing.

    Args:
        sequence: whose tokens they are, as ``group`` of ``draw_rows``.
    """
    uniform = 0.5 + 0.5 * torch.erf(draw_rows("labels", tokens, (), torch.float64, seed, device, sequence) / math.sqrt(2))
    return (uniform * vocab).long().clamp_(0, vocab - 1)


class ChunkedLoss:
    """The cross-entropy of labelled tokens: a mean over a whole sequence, and over all sequences.

    Args:
        labels: (T,), this rank's.
        chunk: tokens whose logits exist at once.
        share: of the loss that one labelled token has: 1 / (labelled tokens of the sequence x sequences).
        sharing: how the head is shared among ranks.
    """

    def __init__(self, head: Head, labels: torch.Tensor, chunk: int, share: float, sharing: Sharing) -> None:
        self.head, self.labels, self.chunk, self.share, self._sharing = head, labels, chunk, share, sharing
        self._gradients = Accumulation(head)

    def __call__(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dy (T, hidden), and this rank's part of the loss, a sum over ranks of context and data parallelism. Collective.

        The head's weights have their gradients then, which are summed over chunks in float32 or wider.
        """
        wide = accumulation_dtype(y.dtype)
        loss, dy = torch.zeros((), dtype=wide, device=y.device), torch.empty_like(y)
        begins = range(0, max(1, len(y)), self.chunk)  # a rank without tokens takes part all the same
        for begin in begins:
            rows, last = slice(begin, begin + self.chunk), begin == begins[-1]
            part = y[rows].detach().requires_grad_()
            self._gradients.begin(last=last)
            with torch.enable_grad(), self._sharing.whole_loss():
                logits = self.head(part).to(wide)
                one = functional.cross_entropy(logits, self.labels[rows], reduction="sum", ignore_index=UNLABELLED) * self.share
                one.backward()
            self._gradients.end(last=last)
            assert part.grad is not None
            dy[rows] = part.grad
            loss += local(one.detach())
        return dy, loss
