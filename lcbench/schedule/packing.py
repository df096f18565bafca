"""Keys and values of some tokens as one tensor, so that any stretch of tokens is one stretch of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lcbench.problem import Heads

Plane = Literal[0, 1]


@dataclass(frozen=True)
class Packing:
    """How keys and values lie in one tensor.

    It is (T, Hk, W): a head's key and behind it its value, or its key alone where values are the first numbers of it
    (``Heads.latent``). With ``planes`` it is (T, Hk, 2, D), and in memory (2, T, Hk, D): for a kernel that wants each contiguous.

    Attributes:
        planes: only where keys and values have one dimension.
    """

    heads: Heads
    planes: bool

    @classmethod
    def of(cls, heads: Heads, *, contiguous: bool) -> Packing:
        """The packing for a kernel; ``contiguous``: it wants keys and values each contiguous. Of two dimensions it gets copies."""
        return cls(heads, contiguous and heads.dim_v is None)

    def together(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """k (T, Hk, D) and v (T, Hk, Dv) as one new tensor; where values are numbers of keys, the keys as they are."""
        if self.planes:
            return torch.stack([k, v]).permute(1, 2, 0, 3)
        return k if self.heads.latent else torch.cat([k, v], -1)

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """Room for keys and values of as many tokens and heads as ``like`` has (T, Hk, ...)."""
        tokens, heads = like.shape[:2]
        if self.planes:
            return like.new_empty((2, tokens, heads, self.heads.dim)).permute(1, 2, 0, 3)
        return like.new_empty((tokens, heads, self.heads.kv_width))

    def view(self, flat: torch.Tensor, tokens: int, heads: int, *, gradients: bool) -> torch.Tensor:
        """A stretch of memory as keys and values of so many tokens and heads, or as their gradients, which never lie in planes."""
        if not self.planes:
            return flat.view(tokens, heads, self.heads.kv_width)
        if gradients:
            return flat.view(tokens, heads, 2, self.heads.dim)
        return flat.view(2, tokens, heads, self.heads.dim).permute(1, 2, 0, 3)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """(T, Hk, D)."""
        return x[:, :, 0] if self.planes else x[..., : self.heads.dim]

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """(T, Hk, Dv)."""
        if self.planes:
            return x[:, :, 1]
        return x[..., : self.heads.v] if self.heads.latent else x[..., self.heads.dim :]

    def plane(self, x: torch.Tensor, plane: Plane) -> torch.Tensor:
        """Keys, 0, or values, 1."""
        return self.values(x) if plane else self.keys(x)

    def gradients(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """dk and dv; where values are numbers of keys, dk alone, which has both."""
        return (x,) if self.heads.latent else (self.keys(x), self.values(x))
