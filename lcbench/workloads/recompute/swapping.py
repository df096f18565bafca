"""What policies have in common that put saved tensors into the host's memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        policy, notes = self.settled(stack, x, layers)
        return replace(started_each([(policy, stack, x)], layers, x.device, swaps=True)[0], notes=notes)

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


def started_each(
    given: Sequence[tuple[Recompute, Stack, torch.Tensor]], layers: int, device: torch.device, *, swaps: bool
) -> list[Started]:
    """Policies ready to run, each on its stack and x (T, hidden); one at a time is between its forward and the end of its backward.
    Collective over all ranks, of which each has any number of them.

    Args:
        layers: as of ``Recompute.start``.
        swaps: whether some rank has a policy among them that puts tensors into the host's memory; the same on all ranks.

    Raises:
        Unsupported: on all ranks, where the memory of some host is too small.
    """
    if not swaps:
        return [policy.start(stack, x, layers) for policy, stack, x in given]
    from lcbench.workloads.recompute.swap import Swap  # with torch, which planning does without

    # One micro-batch after the other uses the same memory.
    moved = [len(s.layers) * policy.moved_by_layer(s, x) for policy, s, x in given if isinstance(policy, Swapping)]
    _, refused = room(max(moved, default=0))
    if refused:
        raise Unsupported(refused)
    swap = Swap(device)
    return [
        Started(policy, partial(policy.forward, stack, swap), swap)
        if isinstance(policy, Swapping)
        else policy.start(stack, x, layers)
        for policy, stack, x in given
    ]
