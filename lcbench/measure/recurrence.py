"""Linear attention token by token in float64, for checks: any stretch of a sequence by itself, whole by putting stretches together.

It shares no code with kernels, and nothing with how ranks exchange states: every rank works out what its own tokens do to a state
and to the gradient of one, and what all ranks' do is told as numbers of the check. Shapes as in ``kernels.linear``, but heads come
first, (H, T, ...), and each key/value head has its G query heads, (H, G, T, D). The recurrences are those that it names.

How far an element may be off follows from its *spread*: the lengths of the two vectors whose product it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lcbench.problem import Rule


class Stretch(NamedTuple):
    """Tokens of some key/value heads in float64.

    Attributes:
        q: (H, G, T, Dk), times the scale.
        k: (H, T, Dk).
        v: (H, T, Dv).
        keep: a_t, (H, T, Dk) or (H, T, 1).
        beta: (H, T); None: nothing is erased.
        scale: that q is multiplied with.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keep: torch.Tensor
    beta: torch.Tensor | None
    scale: float

    @classmethod
    def of(
        cls, rule: Rule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor | None,
        heads: range, scale: float,
    ) -> Stretch:  # fmt: skip
        """Key/value heads ``heads`` of tokens as a kernel has them, (T, H, D), on the host."""

        def taken(x: torch.Tensor) -> torch.Tensor:
            return x[:, heads.start : heads.stop].detach().cpu().double().transpose(0, 1)

        group = q.shape[1] // k.shape[1]
        queries = q[:, heads.start * group : heads.stop * group].detach().cpu().double().unflatten(1, (len(heads), group))
        keep = taken(decay).exp()
        erases = rule == "gated_delta_rule" and beta is not None
        return cls(
            scale * queries.permute(1, 2, 0, 3), taken(k), taken(v), keep if keep.dim() == 3 else keep[..., None],
            taken(beta) if erases and beta is not None else None, scale,
        )  # fmt: skip

    @property
    def zeros(self) -> torch.Tensor:
        """(H, Dk, Dv)."""
        return self.k.new_zeros(len(self.k), self.k.shape[-1], self.v.shape[-1])

    def along(self, direction: torch.Tensor) -> Stretch:
        """With one value per token, its part along a direction (Dv,): out and the state follow, since they are linear in values."""
        return self._replace(v=(self.v @ direction)[..., None])


class Effect(NamedTuple):
    """What a stretch does to a state, S_end = M S_begin + L; ``transition`` M is (H, Dk, Dk), or (H, Dk) where it is diagonal."""

    state: torch.Tensor
    transition: torch.Tensor

    def on(self, state: torch.Tensor) -> torch.Tensor:
        moved = self.transition[..., None] * state if self.transition.dim() == 2 else self.transition @ state
        return moved + self.state

    def back(self, own: torch.Tensor, dstate: torch.Tensor) -> torch.Tensor:
        """The gradient of S_begin from that of S_end; ``own``: what the stretch's own results make of it."""
        diagonal = self.transition.dim() == 2
        return own + (self.transition[..., None] * dstate if diagonal else self.transition.mT @ dstate)


def _step(x: Stretch, t: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the decayed state, u) of a token: its state is the first plus k u^T. Columns beside values have no value."""
    state = x.keep[:, t, :, None] * state
    value = x.v[:, t]
    if state.shape[-1] > value.shape[-1]:
        value = torch.nn.functional.pad(value, (0, state.shape[-1] - value.shape[-1]))
    if x.beta is None:
        return state, value
    return state, x.beta[:, t, None] * (value - (state.mT @ x.k[:, t, :, None])[..., 0])


def effect(x: Stretch) -> Effect:
    """What the tokens do to any state."""
    state = x.zeros
    if x.beta is None:
        for t in range(x.k.shape[1]):
            state = torch.baddbmm(x.keep[:, t, :, None] * state, x.k[:, t, :, None], x.v[:, t, None, :])
        return Effect(state, x.keep.prod(1).expand(len(x.k), x.k.shape[-1]))
    one = torch.eye(x.k.shape[-1], dtype=torch.float64).expand(len(x.k), -1, -1)
    state = torch.cat([state, one], -1)
    for t in range(x.k.shape[1]):
        state, u = _step(x, t, state)
        state = torch.baddbmm(state, x.k[:, t, :, None], u[:, None, :])
    own, transition = state.split([x.v.shape[-1], x.k.shape[-1]], -1)
    return Effect(own.clone(), transition.clone())


def effect_backward(x: Stretch, dout: torch.Tensor) -> torch.Tensor:
    """The gradient (H, Dk, Dv) of the state that the tokens begin with, from their own dout (H, G, T, Dv) alone."""
    carry = x.zeros
    for t in reversed(range(x.k.shape[1])):
        carry = _carried(x, t, _with_results(x, t, carry, dout))
    return carry


def _with_results(x: Stretch, t: int, carry: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """The gradient of the state after a token, with that of its own results."""
    return torch.baddbmm(carry, x.q[:, :, t].mT, dout[:, :, t])


def _carried(x: Stretch, t: int, dstate: torch.Tensor) -> torch.Tensor:
    """The gradient of the state before a token from that of the state after it."""
    if x.beta is not None:
        du = (dstate.mT @ x.k[:, t, :, None])[..., 0]
        dstate = dstate - x.beta[:, t, None, None] * x.k[:, t, :, None] * du[:, None, :]
    return x.keep[:, t, :, None] * dstate


@dataclass(frozen=True)
class Exact:
    """A result and the spread of each element, of equal shapes."""

    value: torch.Tensor
    spread: torch.Tensor


def outputs(x: Stretch, state: torch.Tensor) -> Exact:
    """out (H, G, T, Dv) from the state that the tokens begin with."""
    out = x.q.new_empty(*x.q.shape[:3], x.v.shape[-1])
    spread = torch.empty_like(out)
    for t in range(x.k.shape[1]):
        state, u = _step(x, t, state)
        state = torch.baddbmm(state, x.k[:, t, :, None], u[:, None, :])
        out[:, :, t] = x.q[:, :, t] @ state
        spread[:, :, t] = x.q[:, :, t].norm(dim=-1, keepdim=True) * state.norm(dim=1)[:, None]
    return Exact(out, spread)


def value_gradients(x: Stretch, dout: torch.Tensor, dstate: torch.Tensor) -> Exact:
    """dv (H, T, Dv) from dout (H, G, T, Dv) and the gradient of the state behind the tokens, which no value has a part in."""
    dv, carry = torch.empty_like(x.v), dstate
    spread = torch.empty_like(dv)
    for t in reversed(range(x.k.shape[1])):
        after = _with_results(x, t, carry, dout)
        strength = 1.0 if x.beta is None else x.beta[:, t, None]
        dv[:, t] = strength * (after.mT @ x.k[:, t, :, None])[..., 0]
        spread[:, t] = strength * x.k[:, t].norm(dim=-1, keepdim=True) * after.norm(dim=1)
        carry = _carried(x, t, after)
    return Exact(dv, spread)


def gradients(x: Stretch, dout: torch.Tensor, state: torch.Tensor, dstate: torch.Tensor) -> dict[str, Exact]:
    """dq (H, G, T, Dk), dk (H, T, Dk), dv (H, T, Dv), ddecay (H, T, Dk or 1) and, where there is one, dbeta (H, T, 1).

    States are kept before every so many tokens, and the others worked out again from these.

    Args:
        state: that the tokens begin with.
        dstate: gradient of the state behind them.
    """
    count = x.k.shape[1]
    size = max(1, math.isqrt(count))
    found = {"dq": x.q, "dk": x.k, "dv": x.v, "ddecay": x.keep} | ({} if x.beta is None else {"dbeta": x.beta[..., None]})
    value, spread = ({name: torch.empty_like(like) for name, like in found.items()} for _ in range(2))
    carry = dstate
    for begin, states in reversed(list(_checkpoints(x, state, size))):
        own = list(_states(x, states, range(begin, min(begin + size, count))))
        for t, after_decay, u, now in reversed(own):
            after = _with_results(x, t, carry, dout)
            k, v, result = x.k[:, t], x.v[:, t], dout[:, :, t]
            value["dq"][:, :, t] = x.scale * result @ now.mT
            spread["dq"][:, :, t] = x.scale * result.norm(dim=-1, keepdim=True) * now.norm(dim=2)[:, None]
            value["dk"][:, t] = (after @ u[..., None])[..., 0]
            spread["dk"][:, t] = after.norm(dim=2) * u.norm(dim=-1, keepdim=True)
            du = (after.mT @ k[..., None])[..., 0]
            of_u = k.norm(dim=-1, keepdim=True) * after.norm(dim=1)
            dafter = after
            if x.beta is None:
                value["dv"][:, t], spread["dv"][:, t] = du, of_u
            else:
                beta = x.beta[:, t, None]
                known = (after_decay.mT @ k[..., None])[..., 0]
                value["dv"][:, t], spread["dv"][:, t] = beta * du, beta * of_u
                value["dk"][:, t] -= beta * (after_decay @ du[..., None])[..., 0]
                spread["dk"][:, t] += beta * after_decay.norm(dim=2) * du.norm(dim=-1, keepdim=True)
                value["dbeta"][:, t] = (du * (v - known)).sum(-1, keepdim=True)
                spread["dbeta"][:, t] = of_u.norm(dim=-1, keepdim=True) * (v.norm(dim=-1) + known.norm(dim=-1))[:, None]
                dafter = after - beta[..., None] * k[..., None] * du[:, None, :]
            products, sizes = dafter * after_decay, (after.norm(dim=2) + dafter.norm(dim=2)) * after_decay.norm(dim=2)
            whole = x.keep.shape[-1] == 1
            value["ddecay"][:, t] = products.sum((1, 2))[:, None] if whole else products.sum(2)
            spread["ddecay"][:, t] = sizes.norm(dim=1, keepdim=True) if whole else sizes
            carry = x.keep[:, t, :, None] * dafter
    # Some kernels sum decays' gradients up over all tokens behind one: of what each query and key has of it.
    terms = (value["dq"] * x.q / x.scale).square().sum(1) + (value["dk"] * x.k).square()
    terms = terms.sum(-1, keepdim=True) if x.keep.shape[-1] == 1 else terms
    spread["ddecay"] = spread["ddecay"] + terms.flip(1).cumsum(1).flip(1).sqrt()
    return {name: Exact(value[name], spread[name]) for name in value}


def _checkpoints(x: Stretch, state: torch.Tensor, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first token, the state before it) of every so many tokens."""
    count = x.k.shape[1]
    for begin in range(0, count, size):
        yield begin, state
        for *_, after in _states(x, state, range(begin, min(begin + size, count))):
            state = after


def _states(x: Stretch, state: torch.Tensor, tokens: range) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(token, the state before it after its decay, its u, the state after it)."""
    for t in tokens:
        decayed, u = _step(x, t, state)
        after = torch.baddbmm(decayed, x.k[:, t, :, None], u[:, None, :])
        yield t, decayed, u, after
        state = after
