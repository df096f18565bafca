"""Keys with most softmax weight from the prompt's last queries: what a good choice for the answer would be.

The last tokens of a prompt are the question; APB puts its text into the anchor, so that every rank has it (arXiv 2502.12085). Here
every rank is given the queries of the last ``sample`` tokens. A key's score is the sum of its exact softmax weights over these
queries, and over the query heads that read its key/value head. The weights are those of the cell's own mask over the whole prompt:
ranks tell each other the LSE over their blocks, (P-1) sample Hq s bytes of a prompt, s being those of an LSE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.cp.compressors.base import Block, Compressor, Scores
from lcbench.problem import Problem, check_whole

if TYPE_CHECKING:
    import torch

    from lcbench.cp.exchange import Exchange


@dataclass(frozen=True)
class Oracle(Compressor):
    """``sample``: how many of a prompt's last queries it looks at; all of a shorter prompt's."""

    sample: int = 64

    def __post_init__(self) -> None:
        check_whole("compressor.sample", self.sample, 1)

    @property
    def asks(self) -> int:
        return self.sample

    def start(self, problem: Problem, device: torch.device, exchange: Exchange) -> Scores:
        return Masses(problem, exchange)


@dataclass(frozen=True)
class Masses:
    """Softmax weight of keys, of a key/value head at a time."""

    problem: Problem
    exchange: Exchange

    def __call__(self, blocks: Sequence[Block]) -> list[torch.Tensor]:
        import torch

        if not blocks:
            return []
        own = [torch.stack([self._products(block, head).logsumexp(-1) for head in range(block.k.shape[1])]) for block in blocks]
        counts = [len(block.last) for block in blocks]
        lse = self.exchange.all_gather(torch.cat(own, -1)).logsumexp(0)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a query without keys gives none of them any weight
        return [self._weights(block, each) for block, each in zip(blocks, lse.split(counts, -1), strict=True)]

    def _products(self, block: Block, head: int) -> torch.Tensor:
        """(Hq / Hk, n, T): scores of a key/value head, -inf for keys that a query does not see."""
        import torch

        from lcbench.kernels.base import accumulation_dtype

        each, softmax = block.q.shape[1] // block.k.shape[1], self.problem.softmax
        sums = accumulation_dtype(block.q.dtype)
        q, k = block.last[:, head * each : (head + 1) * each].to(sums), block.k[:, head].to(sums)
        scores = torch.einsum("nhd,td->hnt", q, k) * self.problem.softmax_scale
        if softmax.softcap:
            scores = softmax.softcap * torch.tanh(scores / softmax.softcap)
        return scores.masked_fill(~block.sees, -torch.inf)

    def _weights(self, block: Block, lse: torch.Tensor) -> torch.Tensor:
        """(T, Hk), of LSE (Hk, Hq / Hk, n) over the whole prompt."""
        import torch

        of_heads = [torch.exp(self._products(block, head) - lse[head, ..., None]).sum((0, 1)) for head in range(len(lse))]
        return torch.stack(of_heads, 1)
