"""What the token-wise parts of a training step must give, in float64: an implementation of its own, of some tokens.

It shares no code with ``lcbench.workloads.transformer`` and is of a kind of its own: positions turn heads as complex numbers, and
gradients are autograd's in float64. How far roundings carry a result is found by running it again with every operation's result,
and every gradient on its way, rounded at random (Monte Carlo arithmetic, Parker 1997): what that moves a token's elements by in the
mean is their *spread*, in units of a rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lcbench.masks.band import Ints
from lcbench.workloads.models import Model

Weights = Mapping[str, torch.Tensor]
Tensors = dict[str, torch.Tensor]
Rounded = Callable[[torch.Tensor], torch.Tensor]

STEP = 2.0**-30  # of a rounding that is tried out: small enough for results to follow in proportion, and far above float64's own
TRIES = 2  # each tells of all elements of a token
ELEMENTS = 1 << 24  # of a weight in float64 at a time


@dataclass(frozen=True)
class Known:
    """Exact elements (n, ...) of some tokens, and how far one unit of rounding in each operation carries each: its ``spread``."""

    value: torch.Tensor
    spread: torch.Tensor


def layer(model: Model, weights: Weights, tokens: Ints, given: Tensors, seed: int) -> dict[str, Known]:
    """q, k, v, y, and dx and dout, of some tokens of a layer.

    Args:
        weights: by their names in the layer, in whatever type they have.
        tokens: global positions, (n,).
        given: x (n, hidden), out (n, Hq, D) and the gradients dy, dq, dk, dv.
        seed: of the roundings.
    """

    def run(rounded: Rounded) -> Tensors:
        x, out = (given[name].double().requires_grad_() for name in ("x", "out"))
        results = _before(model, weights, tokens, x, rounded) | {"y": _after(model, weights, x, out, rounded)}
        found = torch.autograd.grad(list(results.values()), [x, out], [given[f"d{name}"].double() for name in results])
        return {name: one.detach() for name, one in results.items()} | dict(zip(("dx", "dout"), found, strict=True))

    return with_spread(run, given["x"].device, seed)


def head(model: Model, weights: Weights, y: torch.Tensor, labels: torch.Tensor, share: float, seed: int) -> dict[str, Known]:
    """dy of some tokens: the gradient of their cross-entropies, of each a ``share``; ``labels`` (n,) are negative where there are
    none."""

    def run(rounded: Rounded) -> Tensors:
        leaf = y.double().requires_grad_()
        logits = rounded(_product(rounded(normed_by(leaf, weights["norm.weight"], model.norm_eps)), weights["logits.weight"]))
        mine = torch.nonzero(labels >= 0).flatten()
        chosen = logits[mine, labels[mine]]
        losses = rounded(logits)[mine].logsumexp(-1) - chosen
        (dy,) = torch.autograd.grad(losses.sum() * share, leaf)
        return {"dy": dy}

    return with_spread(run, y.device, seed)


# -- the parts ---------------------------------------------------------------------------------------------------------


def _before(model: Model, weights: Weights, tokens: Ints, x: torch.Tensor, rounded: Rounded) -> Tensors:
    normed = rounded(normed_by(x, weights["before.norm.weight"], model.norm_eps))
    # Angles are float64's whatever the type, so they tell in float64 alone.
    wide = weights["before.norm.weight"].dtype == torch.float64
    found = {}
    for name in ("q", "k", "v"):
        projected = rounded(_product(normed, weights[f"before.{name}.weight"]))
        heads = projected.reshape(len(x), -1, model.head_dim)
        if name != "v":
            if model.qk_norm:
                heads = rounded(normed_by(heads, weights[f"before.{name}_norm.weight"], model.norm_eps))
            heads = rounded(turned(heads, tokens, model.rope_theta, rounded if wide else as_it_is))
        found[name] = heads
    return found


def _after(model: Model, weights: Weights, x: torch.Tensor, out: torch.Tensor, rounded: Rounded) -> torch.Tensor:
    x = rounded(x + rounded(_product(out.reshape(len(x), -1), weights["after.o.weight"])))
    normed = rounded(normed_by(x, weights["after.norm.weight"], model.norm_eps))
    gate, up = (rounded(_product(normed, weights[f"after.{name}.weight"])) for name in ("gate", "up"))
    gated = rounded(rounded(gate / (1 + torch.exp(-gate))) * up)
    return rounded(x + rounded(_product(gated, weights["after.down.weight"])))


def normed_by(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def turned(x: torch.Tensor, tokens: Ints, theta: float, angle_rounded: Rounded) -> torch.Tensor:
    """Element i of the first half of a head and of the second are a complex number, turned by position / theta^(2i/D)."""
    half = x.shape[-1] // 2
    places = torch.arange(half, dtype=torch.float64, device=x.device)
    angles = torch.from_numpy(tokens).to(x.device, torch.float64)[:, None] / theta ** (places / half)
    angles = angle_rounded(angles)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """x (n, in) with a weight (out, in): a few of its rows in float64 at a time, and the gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.weight = weight
        return torch.cat([x @ some.double().T for some in _few(weight)], 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        rows = [len(some) for some in _few(ctx.weight)]
        found = torch.zeros((len(grad), ctx.weight.shape[1]), dtype=grad.dtype, device=grad.device)
        for some, part in zip(_few(ctx.weight), grad.split(rows, 1), strict=True):
            found += part @ some.double()
        return found, None


def _few(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.detach().split(max(1, ELEMENTS // weight.shape[1]))


# -- roundings ---------------------------------------------------------------------------------------------------------


def with_spread(run: Callable[[Rounded], Tensors], device: torch.device, seed: int) -> dict[str, Known]:
    """What ``run`` gives where nothing is rounded, with its spread. ``run`` puts every operation's result through its argument."""
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    exact = run(as_it_is)
    squares = {name: torch.zeros_like(one) for name, one in exact.items()}
    for _ in range(TRIES):
        for name, one in run(lambda x: _Rounded.apply(x, generator)).items():  # type: ignore[no-untyped-call]
            squares[name] += ((one - exact[name]) / STEP).square() / TRIES
    # Of an element itself two tries say little: a token's elements have the mean of all of them, and each its own last rounding.
    return {
        name: Known(one, (squares[name].flatten(1).mean(1).view(-1, *[1] * (one.ndim - 1)) + one.square()).sqrt())
        for name, one in exact.items()
    }


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


class _Rounded(torch.autograd.Function):
    """x with every element off by up to a step, and so the gradient on its way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:  # type: ignore[override]
        ctx.generator = generator
        return _off(x, generator)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return _off(grad, ctx.generator), None


def _off(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return x * (1 + STEP * (2 * drawn - 1))
