"""What layers with a memory must give, in float64: one segment and one layer after the other, each by its definition.

It shares no code with ``lcbench.workloads.memory_layers``: products are of whole rows, attention is a dense softmax, features are
gathered by index, positions turn heads as complex numbers, and gradients are autograd's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from lcbench.workloads.exact import Known, Rounded, Tensors, as_it_is, normed_by, turned, with_spread
from lcbench.workloads.memory_model import MemoryModel

EPS = 1e-5

Layer = Mapping[str, torch.Tensor]


def sequence(
    options: MemoryModel, layers: Sequence[Layer], tokens: torch.Tensor, x: torch.Tensor, dout: torch.Tensor | None, seed: int
) -> dict[str, Known]:
    """``out`` (S, hidden) of the first segments of a sequence; with ``dout`` also ``dx``, ``d_tokens`` and ``d_<name>`` of
    every weight, (L, ...).

    Args:
        layers: the weights of each.
        tokens: those of a segment's memory, (m, hidden).
        x: (S, hidden), S a multiple of the segment.
        seed: of the roundings.
    """

    def run(rounded: Rounded) -> Tensors:
        leaf, learned = (one.detach().double().requires_grad_(dout is not None) for one in (x, tokens))
        own = [{name: w.detach().double().requires_grad_(dout is not None) for name, w in layer.items()} for layer in layers]
        hidden = x.shape[1]
        remembered = [(leaf.new_zeros((options.features, hidden)), leaf.new_zeros(options.features)) for _ in own]
        outs = []
        for part in leaf.split(options.segment):
            y = torch.cat([part, learned])
            for number, weights in enumerate(own):
                y, remembered[number] = _cell(options, weights, y, remembered[number], rounded)
            outs.append(y[: options.segment])
        found = {"out": torch.cat(outs)}
        if dout is None:
            return found
        leaves = [leaf, learned, *(layer[name] for name in own[0] for layer in own)]
        # The last layer's memory after the last segment is read by nobody.
        grads = torch.autograd.grad(found["out"], leaves, dout.double(), allow_unused=True)
        grads = tuple(torch.zeros_like(one) if grad is None else grad for one, grad in zip(leaves, grads, strict=True))
        by_name = {f"d_{name}": torch.stack(grads[2 + i * len(own) : 2 + (i + 1) * len(own)]) for i, name in enumerate(own[0])}
        return {"out": found["out"].detach(), "dx": grads[0], "d_tokens": grads[1], **by_name}

    return with_spread(run, x.device, seed)


def cell(options: MemoryModel, weights: Layer, x: torch.Tensor, a: torch.Tensor, z: torch.Tensor, seed: int) -> dict[str, Known]:
    """``y`` (rows, hidden), ``a`` (F, hidden) and ``z`` (F, 1) after one layer of one segment, from what it is given."""

    def run(rounded: Rounded) -> Tensors:
        own = {name: w.double() for name, w in weights.items()}
        y, (a1, z1) = _cell(options, own, x.double(), (a.double(), z.double()[:, 0]), rounded)
        return {"y": y, "a": a1, "z": z1[:, None]}

    return with_spread(run, x.device, seed)


def _cell(
    options: MemoryModel, weights: Layer, x: torch.Tensor, memory: tuple[torch.Tensor, torch.Tensor], rounded: Rounded
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    a, z = memory
    looked = _features(rounded(x @ weights["memory_q"].T), options.nu, rounded)
    x = rounded(x + rounded(rounded(looked @ a) / rounded(rounded(looked @ z) + EPS)[:, None]))
    x = rounded(x + rounded(_attention(options, weights, _normed(x, weights["attention_norm"], options, rounded), rounded)))
    normed = _normed(x, weights["mlp_norm"], options, rounded)
    gate, up = (rounded(normed @ weights[name].T) for name in ("gate", "up"))
    y = rounded(x + rounded(rounded(rounded(gate / (1 + torch.exp(-gate))) * up) @ weights["down"].T))
    m = y[options.segment :]
    k = _features(rounded(m @ weights["memory_k"].T), options.nu, rounded)
    strength = rounded(1 / (1 + torch.exp(-rounded(m @ weights["memory_b"].T))))
    known = rounded(k @ z)
    old = rounded(rounded(k @ a) / rounded(known + EPS)[:, None])
    change = rounded(strength * rounded(rounded(m @ weights["memory_v"].T) - old))
    share = rounded((1 - known / (k.square().sum(1) + EPS)).clamp(0, 1)).detach()
    return y, (rounded(a + rounded(k.T @ change)), rounded(z + rounded(k.T @ share)))


def _features(x: torch.Tensor, nu: int, rounded: Rounded) -> torch.Tensor:
    """Feature n of roll i: both[n] * both[(n - i) mod 2 memory_dim]."""
    both = torch.cat([x.clamp_min(0), (-x).clamp_min(0)], 1)
    places = torch.arange(both.shape[1], device=x.device)
    return torch.cat([rounded(both * both[:, (places - shift) % both.shape[1]]) for shift in range(1, nu + 1)], 1)


def _normed(x: torch.Tensor, weight: torch.Tensor, options: MemoryModel, rounded: Rounded) -> torch.Tensor:
    return rounded(normed_by(x, weight, options.model.norm_eps))


def _attention(options: MemoryModel, weights: Layer, normed: torch.Tensor, rounded: Rounded) -> torch.Tensor:
    model, rows = options.model, len(normed)
    heads = {}
    for name in "qkv":
        one = rounded(normed @ weights[name].T).view(rows, -1, model.head_dim)
        if name != "v":
            one = _normed(one, weights[f"{name}_norm"], options, rounded) if model.qk_norm else one
            one = rounded(turned(one, np.arange(rows), model.rope_theta, as_it_is))
        heads[name] = one
    each = model.heads_q // model.heads_kv
    k, v = (heads[name].repeat_interleave(each, 1) for name in "kv")
    scores = rounded(torch.einsum("qhd,khd->hqk", heads["q"], k) * model.head_dim**-0.5)
    later = torch.ones((rows, rows), dtype=torch.bool, device=normed.device).triu(1)
    weight = rounded(scores.masked_fill(later, -torch.inf).softmax(-1))
    return rounded(torch.einsum("hqk,khd->qhd", weight, v)).reshape(rows, -1) @ weights["o"].T
