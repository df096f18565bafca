"""A model's layers and head as plain float64 on one rank, for tests: the whole sequence, dense attention, autograd. It shares no
code with lcbench but the draws of weights and inputs, which are no part of what is computed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcbench.testing.dense import dense_attention


def step(
    model: Any, weights: dict[str, torch.Tensor], x: torch.Tensor, labels: torch.Tensor, mask: NDArray[np.bool_]
) -> dict[str, Any]:
    """The loss of x (S, hidden) under a dense mask, and the gradients of x (``dx``) and of every weight."""
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    start = x.detach().clone().requires_grad_()
    h = start
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    for i in range(layers):
        h = _layer(model, {n.removeprefix(f"layers.{i}."): w for n, w in leaves.items() if n.startswith(f"layers.{i}.")}, h, mask)
    logits = _rms(h, leaves["head.norm.weight"], model.norm_eps) @ leaves["head.logits.weight"].T
    there = labels >= 0
    chances = torch.softmax(logits[there], -1)
    loss = -torch.log(chances[torch.arange(int(there.sum())), labels[there]]).mean()
    loss.backward()
    return {"loss": loss.detach(), "dx": start.grad} | {name: leaf.grad for name, leaf in leaves.items()}


def _layer(model: Any, w: dict[str, torch.Tensor], x: torch.Tensor, mask: NDArray[np.bool_]) -> torch.Tensor:
    normed = _rms(x, w["before.norm.weight"], model.norm_eps)
    q, k, v = ((normed @ w[f"before.{n}.weight"].T).reshape(len(x), -1, model.head_dim) for n in "qkv")
    if model.qk_norm:
        q, k = (_rms(h, w[f"before.{n}_norm.weight"], model.norm_eps) for n, h in (("q", q), ("k", k)))
    q, k = (_rope(h, model.rope_theta) for h in (q, k))
    out, _ = dense_attention(q, k, v, mask, 1 / math.sqrt(model.head_dim))
    x = x + out.reshape(len(x), -1) @ w["after.o.weight"].T
    normed = _rms(x, w["after.norm.weight"], model.norm_eps)
    gate = normed @ w["after.gate.weight"].T
    return x + (gate * torch.sigmoid(gate) * (normed @ w["after.up.weight"].T)) @ w["after.down.weight"].T


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _rope(x: torch.Tensor, theta: float) -> torch.Tensor:
    """By a matrix of 2 x 2 rotations, a position and a pair at a time."""
    half, found = x.shape[-1] // 2, []
    for position in range(len(x)):
        turn = torch.zeros((2 * half, 2 * half), dtype=x.dtype)
        for i in range(half):
            angle = position * theta ** (-2 * i / (2 * half))
            turn[i, i] = turn[i + half, i + half] = math.cos(angle)
            turn[i, i + half], turn[i + half, i] = -math.sin(angle), math.sin(angle)
        found.append(x[position] @ turn.T)
    return torch.stack(found)
