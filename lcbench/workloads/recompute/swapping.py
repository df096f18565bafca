"""What policies have in common that put saved tensors into the host's memory."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lcbench.cp.base import RankRun
from lcbench.kernels.base import Unsupported
from lcbench.workloads.recompute.base import Recompute, Started, needs_results
from lcbench.workloads.recompute.host import room

if TYPE_CHECKING:
    import torch

    from lcbench.workloads.recompute.swap import Pass, Swap
    from lcbench.workloads.transformer import Layer, Rope, Stack


@dataclass(frozen=True)
class Swapping(Recompute):
    """A policy with a share of some tensors on the host."""

    def start(self, stack: Stack, x: torch.Tensor, layers: int) -> Started:
        from lcbench.workloads.recompute.swap import Swap  # with torch, which planning does without

        policy, notes = self.settled(stack, x, layers)
        _, refused = room(len(stack.layers) * policy.moved_by_layer(stack, x))
        if refused:
            raise Unsupported(refused)
        swap = Swap(x.device)
        return Started(policy, partial(policy.forward, stack, swap), swap, notes)

    def settled(self, stack: Stack, x: torch.Tensor, layers: int) -> tuple[Swapping, dict[str, Any]]:
        """The policy with what its options leave to measurements, and notes of these. Collective, the same on all ranks.

        Raises:
            Unsupported: on all ranks.
        """
        return self, {}

    def forward(self, stack: Stack, swap: Swap, x: torch.Tensor) -> torch.Tensor:
        """As of ``Started``."""
        under_way = swap.begin()
        for layer in stack.layers:
            x = self.layer(under_way, layer, x, stack.rope)
        return x

    @abstractmethod
    def layer(self, under_way: Pass, layer: Layer, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """The next layer of a pass, of x (T, hidden). Collective."""

    def moved_by_layer(self, stack: Stack, x: torch.Tensor) -> int:
        """Bytes of a layer that go to the host. Nothing is copied. Collective."""
        from lcbench.workloads.recompute.swap import Swap

        scales = Swap(x.device, weighs=True)
        self.layer(scales.begin(), stack.layers[0], x.detach().requires_grad_(), stack.rope)
        return scales.moved["forward"]

    def refuses(self, run: RankRun) -> str | None:
        return needs_results(run)
