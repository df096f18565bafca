"""The loss of a stack of layers, by chunks of tokens, so that no logits of all tokens exist (ALST, arXiv 2506.13996)."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from lcbench.inputs.drawing import draw_rows
from lcbench.kernels.base import accumulation_dtype
from lcbench.masks.band import Ints
from lcbench.workloads.sharing import Accumulation, Sharing, local
from lcbench.workloads.spans import within
from lcbench.workloads.transformer import Head

UNLABELLED = -100  # torch's own word for a token without a label


def labels_of(
    tokens: Ints, vocab: int, seed: int, device: torch.device, sequence: tuple[int, int] = (0, 0), answers: Ints | None = None
) -> torch.Tensor:
    """(T,): what the head is to say of each token, the same at every number of ranks; ``UNLABELLED`` where there is nothing.

    Args:
        sequence: whose tokens they are, as ``group`` of ``draw_rows``.
        answers: (n, 2), the spans of the sequence that have labels; None: all of it.
    """
    uniform = 0.5 + 0.5 * torch.erf(draw_rows("labels", tokens, (), torch.float64, seed, device, sequence) / math.sqrt(2))
    labels = (uniform * vocab).long().clamp_(0, vocab - 1)
    if answers is not None:
        labels[torch.from_numpy(~within(tokens, answers)).to(device)] = UNLABELLED
    return labels


class ChunkedLoss:
    """The cross-entropy of labelled tokens: a mean over a whole sequence, and over all sequences.

    Args:
        labels: (T,), this rank's.
        chunk: tokens whose logits exist at once.
        share: of the loss that one labelled token has: 1 / (labelled tokens of the sequence x sequences).
        sharing: how the head is shared among ranks.
        masked: whether the head is computed only where a label is (masked logits of Long-VITA, arXiv 2502.05177).

    Attributes:
        labels: of the tokens that the head gets, in their order.
        rows: which of this rank's tokens these are; None: all.
    """

    def __init__(
        self, head: Head, labels: torch.Tensor, chunk: int, share: float, sharing: Sharing, *, masked: bool = False
    ) -> None:
        self.rows = torch.nonzero(labels != UNLABELLED).flatten() if masked else None
        self.labels = labels if self.rows is None else labels[self.rows]
        self.head, self.chunk, self.share, self._sharing = head, chunk, share, sharing
        self._gradients = Accumulation(head)

    def __call__(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dy (T, hidden), and this rank's part of the loss, a sum over ranks of context and data parallelism. Collective.

        The head's weights have their gradients then, which are summed over chunks in float32 or wider.
        """
        wide = accumulation_dtype(y.dtype)
        y = y.detach()
        loss = torch.zeros((), dtype=wide, device=y.device)
        dy = torch.empty_like(y) if self.rows is None else torch.zeros_like(y)
        begins = range(0, max(1, len(self.labels)), self.chunk)  # a rank without tokens takes part all the same
        for begin in begins:
            chunk, last = slice(begin, begin + self.chunk), begin == begins[-1]
            rows = chunk if self.rows is None else self.rows[chunk]
            part = y[rows].requires_grad_()
            self._gradients.begin(last=last)
            with torch.enable_grad(), self._sharing.whole_loss():
                logits = self.head(part).to(wide)
                one = functional.cross_entropy(logits, self.labels[chunk], reduction="sum", ignore_index=UNLABELLED) * self.share
                one.backward()
            self._gradients.end(last=last)
            assert part.grad is not None
            dy[rows] = part.grad
            loss += local(one.detach())
        return dy, loss
