"""What a recompute policy is: what a stack of layers keeps of forward for backward, and what backward computes again.

A policy changes no result. One file each, found by conf/recompute/<name>.yaml.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from lcbench.cp.base import RankRun
from lcbench.workloads.recompute.sizes import Held, LayerBytes

if TYPE_CHECKING:
    import torch

    from lcbench.workloads.recompute.swap import Swap
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


@dataclass(frozen=True)
class Recompute(ABC):
    """A policy and its options."""

    @abstractmethod
    def start(self, stack: Stack, x: torch.Tensor, layers: int) -> Started:
        """Make ready to run a stack on x (T, hidden). Collective.

        Args:
            layers: of the model that the stack stands for.

        Raises:
            Unsupported: on all ranks, where the memory of some host is too small.
        """

    @abstractmethod
    def refuses(self, run: RankRun) -> str | None:
        """Why it cannot be with a strategy at work, or None."""

    def unsettled(self) -> str | None:
        """Which of its options is left to measurements; None: none is."""
        return None

    @abstractmethod
    def again(self) -> Again:
        """What its backward computes again."""

    def foreseen(self, layer: LayerBytes, hides: float) -> Recompute:
        """The policy with what its options leave to measurements, as these are foreseen.

        Args:
            hides: bytes that a rank can copy to the host while a layer is in forward.
        """
        return self

    @abstractmethod
    def kept(self, layer: LayerBytes) -> Held:
        """What of a layer it keeps between forward and backward, and has there in backward."""


@dataclass(frozen=True)
class OnDevice(Recompute):
    """A policy that moves nothing."""

    def start(self, stack: Stack, x: torch.Tensor, layers: int) -> Started:
        return Started(self, partial(self.forward, stack))

    @abstractmethod
    def forward(self, stack: Stack, x: torch.Tensor) -> torch.Tensor:
        """What the last layer gives, (T, hidden), of x (T, hidden), under autograd. Collective."""

    def refuses(self, run: RankRun) -> str | None:
        return None


@dataclass(frozen=True)
class Started:
    """A policy that is ready to run.

    Attributes:
        policy: with all options that were left to measurements.
        forward: of x (T, hidden) what the last layer gives, (T, hidden), under autograd. Collective.
        swap: what goes to the host and back; None: nothing does.
        notes: what was measured and chosen, for the provenance.
    """

    policy: Recompute
    forward: Callable[[torch.Tensor], torch.Tensor]
    swap: Swap | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def host_bytes(self) -> int:
        """Memory of the host that this rank holds."""
        return self.swap.host.bytes if self.swap else 0

    def metrics(self) -> dict[str, float]:
        """What this rank's last pass moved, and what it holds for that."""
        if self.swap is None:
            return {}
        moved = {f"offload/{phase}/bytes": float(count) for phase, count in self.swap.moved.items()}
        return {"memory/host_bytes": float(self.host_bytes), **moved}


def needs_results(run: RankRun) -> str | None:
    """Why the results of an attention cannot be kept apart from all else that it keeps; None if they can."""
    if run.resumes:
        return None
    return "what the strategy keeps of an attention for backward is known to its library alone"


def recomputed(function: Any, *args: Any) -> Any:
    """What a function of tensors gives, of which autograd keeps the arguments only, and calls it again in backward."""
    from torch.utils.checkpoint import checkpoint  # with torch, which planning does without

    # Nothing in a layer draws at random, so there is no state of a generator to keep.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
