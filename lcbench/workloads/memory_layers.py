"""Layers of ARMT in plain torch, several at once: what ``workload=recurrent_memory`` runs.

The weights of all layers lie in one tensor each, (L, ...), and the members of a group are neighbours there, so that a group is a
batch of matrix products on views of them. Gradients of weights are added up where they lie, so that no group makes a tensor as
large as all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from lcbench.inputs.drawing import seed_of
from lcbench.kernels.base import accumulation_dtype
from lcbench.workloads.memory_model import MemoryModel, shapes
from lcbench.workloads.transformer import INITIAL_STD, Attention, Rope, rotated

EPS = 1e-5  # under what a memory divides by


class Memory(NamedTuple):
    """What layers remember: A (G, F, hidden) and z (G, F, 1), in the accumulation type."""

    a: torch.Tensor
    z: torch.Tensor


@dataclass(frozen=True)
class Cell:
    """Layer ``layer`` of segment ``segment``: what it was given and what it gave, each with a first dimension of 1."""

    segment: int
    layer: int
    x: torch.Tensor
    before: Memory
    y: torch.Tensor
    after: Memory

    @property
    def gave(self) -> dict[str, torch.Tensor]:
        """y (rows, hidden), a (F, hidden) and z (F, 1), without their gradients."""
        return {name: x.detach()[0] for name, x in zip("yaz", (self.y, *self.after), strict=True)}


@dataclass
class Weights:
    """Weights of all layers and the memory's learned tokens, with their gradients.

    Attributes:
        layers: by name, (L, ...).
        tokens: (memory_tokens, hidden).
        gradients: of ``layers``, in the accumulation type; empty where there is no backward.
    """

    layers: dict[str, torch.Tensor]
    tokens: torch.Tensor
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def drawn(cls, options: MemoryModel, seed: int, dtype: torch.dtype, device: torch.device, *, backward: bool) -> Weights:
        """Seeded by name and layer. Norms are 1 with a tenth of noise, so that a norm that was forgotten shows."""
        wide = accumulation_dtype(dtype)
        generator = torch.Generator(device)

        def one(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            generator.manual_seed(seed_of(f"{seed}/{name}"))
            x = torch.empty(shape, dtype=wide, device=device).normal_(generator=generator)
            return (x * INITIAL_STD if len(shape) > 1 else 1 + 0.1 * x).to(dtype)

        layers = {
            name: torch.stack([one(f"{layer}.{name}", shape) for layer in range(options.depth)])
            for name, shape in shapes(options).items()
        }
        tokens = one("memory_tokens", (options.memory_tokens, options.model.hidden)) / INITIAL_STD
        gradients = {name: torch.zeros_like(x, dtype=wide) for name, x in layers.items()} if backward else {}
        return cls(layers, tokens.requires_grad_(backward), gradients)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.layers.values(), self.tokens, *self.gradients.values()))


class _Linear(torch.autograd.Function):
    """x (G, T, in) by weights (G, out, in), whose gradients are added up in place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        return torch.bmm(x, weight.mT)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        ctx.gradient += torch.bmm(dy.mT, x)
        return torch.bmm(dy, weight), None, None


class _Norm(torch.autograd.Function):
    """RMSNorm of x (G, ..., n) by weights (G, n), whose gradients are added up in place, in the accumulation type."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        wide = accumulation_dtype(x.dtype)
        inverse = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.gradient = gradient
        return (x * inverse * _along(weight, x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        normed, scaled = x * inverse, dy * _along(weight, x)
        # A product of a row of ones: each member's sum by itself, whatever is beside it.
        terms = (dy * normed).flatten(1, -2)
        ones = terms.new_ones((len(terms), 1, terms.shape[1]))
        ctx.gradient += torch.bmm(ones, terms)[:, 0]
        dx = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return dx.to(x.dtype), None, None, None


def _along(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Weights (G, n) beside x (G, ..., n)."""
    return weight.view(len(weight), *[1] * (x.ndim - 2), -1)


def phi(x: torch.Tensor, nu: int) -> torch.Tensor:
    """DPFP features (..., 2 nu n) of x (..., n): products of [relu(x), relu(-x)] with itself, rolled by 1 ... nu."""
    both = torch.cat([functional.relu(x), functional.relu(-x)], -1)
    return torch.cat([both * both.roll(shift, -1) for shift in range(1, nu + 1)], -1)


class MemoryLayers:
    """The layers of one rank, and the order in which they run.

    Args:
        attentions: by the number of segments that are side by side.
        rope: of a segment's tokens and those of its memory.
    """

    def __init__(self, options: MemoryModel, weights: Weights, attentions: dict[int, Attention], rope: Rope) -> None:
        self.options, self.weights, self._attentions, self._rope = options, weights, attentions, rope

    def __call__(self, x: torch.Tensor, keep: Callable[[Cell], None] | None = None) -> torch.Tensor:
        """What the last layer gives of the sequence's tokens, (S, hidden), of x (S, hidden).

        Args:
            keep: called with every (n, l), as soon as it is there.
        """
        options, tokens = self.options, self.weights.tokens
        given = [torch.cat([part, tokens])[None] for part in x.split(options.segment)]
        memories = [self._empty(x) for _ in range(options.depth)]
        for group in options.groups(len(given)):
            layers = slice(group[0][1], group[-1][1] + 1)
            cells = [(given[n], memories[layer]) for n, layer in group]
            y, after = self._layer(torch.cat([x for x, _ in cells]), _together([each for _, each in cells]), layers)
            for (n, layer), (before, memory), own, a, z in zip(group, cells, *(t.split(1) for t in (y, *after)), strict=True):
                given[n], memories[layer] = own, Memory(a, z)
                if keep is not None:
                    keep(Cell(n, layer, before, memory, own, memories[layer]))
        return torch.cat([y[0, : options.segment] for y in given])

    def _empty(self, x: torch.Tensor) -> Memory:
        """What a layer remembers before the first segment."""
        wide, features = accumulation_dtype(x.dtype), self.options.features
        return Memory(*(x.new_zeros((1, features, width), dtype=wide) for width in (x.shape[-1], 1)))

    def _layer(self, x: torch.Tensor, memory: Memory, layers: slice) -> tuple[torch.Tensor, Memory]:
        """x (G, rows, hidden) of the members of a group to what their layers give and then remember."""
        linear, norm = partial(self._linear, layers), partial(self._norm, layers)
        wide = memory.a.dtype
        looked = phi(linear(x, "memory_q").to(wide), self.options.nu)
        x = x + (torch.bmm(looked, memory.a) / (torch.bmm(looked, memory.z) + EPS)).to(x.dtype)
        x = x + linear(self._attended(norm(x, "attention_norm"), layers), "o")
        normed = norm(x, "mlp_norm")
        y = x + linear(_each(functional.silu, linear(normed, "gate")) * linear(normed, "up"), "down")
        return y, self._written(y[:, self.options.segment :], memory, layers)

    def _attended(self, normed: torch.Tensor, layers: slice) -> torch.Tensor:
        """out (G, rows, Hq D) of the attention within each member's segment."""
        members, rows, _ = normed.shape
        found = {name: self._linear(layers, normed, name).unflatten(-1, (-1, self.options.model.head_dim)) for name in "qkv"}
        for name in "qk":
            if self.options.model.qk_norm:
                found[name] = self._norm(layers, found[name], f"{name}_norm")
            found[name] = rotated(found[name], self._rope)
        out = self._attentions[members](*(found[name].flatten(0, 1) for name in "qkv"))
        return out.reshape(members, rows, -1)

    def _written(self, tokens: torch.Tensor, memory: Memory, layers: slice) -> Memory:
        """The memories once these memory tokens (G, m, hidden) are in them."""
        linear, wide = partial(self._linear, layers), memory.a.dtype
        k = phi(linear(tokens, "memory_k").to(wide), self.options.nu)
        v, strength = linear(tokens, "memory_v").to(wide), _each(torch.sigmoid, linear(tokens, "memory_b").to(wide))
        weight = torch.bmm(k, memory.z)
        old = torch.bmm(k, memory.a) / (weight + EPS)
        a = memory.a + torch.bmm(k.mT, strength * (v - old))
        with torch.no_grad():
            new = (1 - weight / (k.square().sum(-1, keepdim=True) + EPS)).clamp(0, 1)
        return Memory(a, memory.z + torch.bmm(k.mT, new))

    def _linear(self, layers: slice, x: torch.Tensor, name: str) -> torch.Tensor:
        y: torch.Tensor = _Linear.apply(x, *self._weight(name, layers))  # type: ignore[no-untyped-call]
        return y

    def _norm(self, layers: slice, x: torch.Tensor, name: str) -> torch.Tensor:
        y: torch.Tensor = _Norm.apply(x, *self._weight(name, layers), self.options.model.norm_eps)  # type: ignore[no-untyped-call]
        return y

    def _weight(self, name: str, layers: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        gradients = self.weights.gradients
        return self.weights.layers[name][layers], gradients[name][layers] if gradients else None


def _each(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A function of every element of x (G, ...), whose bits do not depend on how many members there are: on a CPU an exponential
    has other code for whole vectors than for what is left behind them."""
    return function(x) if x.device.type != "cpu" else torch.cat([function(one) for one in x.split(1)])


def _together(memories: list[Memory]) -> Memory:
    return Memory(*(torch.cat(parts) for parts in zip(*memories, strict=True)))
