"""Two-stage sharding of LongVILA (arXiv 2408.10188, section 3.3): images even over ranks, then tokens as the strategy has them.

A vision tower wants as many images on each rank, whole; attention wants its own layout of all tokens. So what the tower gives of an
image, hidden states of its tokens, goes from the rank that had the image to the ranks that own these tokens, and the gradients go
back: an all-to-all of uneven parts each. Text is looked up where it is needed and does not move. The tower itself is not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist

from lcbench.masks.band import Ints
from lcbench.measure.session import Gang
from lcbench.workloads.spans import within

PHASE, BACK = "reshard", "reshard_backward"  # what they are timed as


class Reshard:
    """Both ways between the ranks of images and those of tokens, on one rank. Made collectively.

    Attributes:
        tokens: (n,), global tokens of this rank's images, ascending.
        rows: local positions of this rank's tokens that are of images; ``text``: of all others.
        sent: rows that this rank sends to each rank of its group; ``received``: that it receives from each. In backward they change
            places.
        max_over_mean: image tokens of the rank that has most of them, over the mean.
        returned: (n, hidden), gradients of the images' tokens, from the last pass.

    Args:
        images: (m, 2), the spans of the sequence that are images.
        own: this rank's tokens, in the order of its tensors.
    """

    returned: torch.Tensor

    def __init__(self, images: Ints, own: Ints, ranks: int, gang: Gang) -> None:
        device = gang.device
        # A communicator of its own: what goes over those of weights is counted as theirs.
        self._group = gang.groups.of(PHASE) if ranks > 1 else None
        cuts = [len(images) * rank // ranks for rank in range(ranks + 1)]
        parts = [images[begin:end] for begin, end in pairwise(cuts)]
        sizes = [int((part[:, 1] - part[:, 0]).sum()) for part in parts]
        self.max_over_mean = max(sizes) * ranks / max(1, sum(sizes))
        self.tokens = _tokens_of(parts[gang.cp_rank])
        mine = within(own, images)
        rows, ids = np.flatnonzero(mine), own[mine]
        owners = np.repeat(np.arange(ranks), [len(part) for part in parts])
        source = owners[np.searchsorted(images[:, 1], ids, side="right")]
        order = np.lexsort((ids, source))
        self.rows = torch.from_numpy(rows[order]).to(device)
        self.text = torch.from_numpy(np.flatnonzero(~mine)).to(device)
        self.received: list[int] = np.bincount(source, minlength=ranks).tolist()
        self.sent: list[int] = self._exchanged(torch.tensor(self.received, device=device), [1] * ranks, [1] * ranks).tolist()
        asked = self._exchanged(torch.from_numpy(ids[order]).to(device), self.sent, self.received)
        self._index = torch.from_numpy(np.searchsorted(self.tokens, asked.cpu().numpy())).to(device)

    def _exchanged(self, x: torch.Tensor, into: Sequence[int], out: Sequence[int]) -> torch.Tensor:
        """``out[r]`` rows of x go to rank r, and ``into[r]`` come from it."""
        if self._group is None:
            return x
        found = x.new_empty((sum(into), *x.shape[1:]))
        dist.all_to_all_single(found, x.contiguous(), list(into), list(out), group=self._group)
        return found

    def forward(self, images: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """x (T, hidden) of this rank's tokens: those of images from where the images are, all others as ``text`` (T, hidden) has
        them. Collective.

        Args:
            images: (n, hidden), of ``tokens``.
        """
        x = torch.empty_like(text)
        x[self.text] = text[self.text]
        x[self.rows] = self._exchanged(images[self._index], self.received, self.sent)
        return x

    def backward(self, dx: torch.Tensor) -> None:
        """Take the gradients dx (T, hidden) of images' tokens to where the images are: ``returned``. Collective."""
        arrived = self._exchanged(dx[self.rows], self.sent, self.received)
        self.returned = torch.empty_like(arrived)
        self.returned[self._index] = arrived  # each once


def _tokens_of(spans: Ints) -> Ints:
    return np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(begin, end) for begin, end in spans)])
