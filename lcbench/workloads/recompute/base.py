"""What a recompute policy is: what a stack of layers keeps of forward for backward, and what backward computes again.

A policy changes no result. One file each, found by conf/recompute/<name>.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lcbench.cp.base import RankRun

if TYPE_CHECKING:
    import torch

    from lcbench.workloads.transformer import Stack


@dataclass(frozen=True)
class Again:
    """What backward computes again of each layer's forward, as shares of it.

    Attributes:
        token_wise: of the projections and the MLP.
        attention: of the attention.
    """

    token_wise: float = 0.0
    attention: float = 0.0


class Recompute(Protocol):
    """A frozen dataclass of options."""

    def forward(self, stack: Stack, x: torch.Tensor) -> torch.Tensor:
        """What the last layer gives, (T, hidden), of x (T, hidden), under autograd. Collective."""
        ...

    def refuses(self, run: RankRun) -> str | None:
        """Why it cannot be with a strategy at work, or None."""
        ...

    def again(self) -> Again:
        """What its backward computes again."""
        ...


def needs_results(run: RankRun) -> str | None:
    """Why the results of an attention cannot be kept without the rest of it; None if they can."""
    if run.resumes:
        return None
    return "its attention would be computed again: what the strategy keeps for backward is known to its library alone"


def recomputed(function: Any, *args: Any) -> Any:
    """What a function of tensors gives, of which autograd keeps the arguments only, and calls it again in backward."""
    from torch.utils.checkpoint import checkpoint  # with torch, which planning does without

    # Nothing in a layer draws at random, so there is no state of a generator to keep.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
