"""A run's passes without kernels or without messages, which tell what of a whole pass is computing and what is sending."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from lcbench.kernels.cache import Cache


class Bare(Protocol):
    """A run whose passes do without kernels or without messages where they are told to."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, *, compute: bool, communicate: bool
    ) -> tuple[torch.Tensor, Any]: ...

    def forward_cache(
        self, q: torch.Tensor, cache: Cache, sink: torch.Tensor | None, *, compute: bool, communicate: bool
    ) -> tuple[torch.Tensor, Any]: ...

    def backward(self, dout: torch.Tensor, saved: Any, *, compute: bool, communicate: bool) -> tuple[torch.Tensor, ...]: ...


@dataclass(frozen=True)
class Replay:
    """The passes of a run without kernels or without messages. Results mean nothing.

    Backward takes what a whole forward pass saved.
    """

    run: Bare
    compute: bool
    communicate: bool

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        return self.run.forward(q, k, v, sink, compute=self.compute, communicate=self.communicate)

    def forward_cache(self, q: torch.Tensor, cache: Cache, sink: torch.Tensor | None = None) -> tuple[torch.Tensor, Any]:
        return self.run.forward_cache(q, cache, sink, compute=self.compute, communicate=self.communicate)

    def backward(self, dout: torch.Tensor, saved: Any) -> tuple[torch.Tensor, ...]:
        return self.run.backward(dout, saved, compute=self.compute, communicate=self.communicate)
