"""The oracle of linear attention: its recurrence token by token in float64, as the papers write it. Shares no code with kernels.

Gated linear attention: Yang et al., arXiv 2312.06635, equation 3. Gated delta rule: Yang et al., arXiv 2412.06464, equation 10.
"""

from __future__ import annotations

import torch

from lcbench.kernels.linear import Rule, Tokens
from lcbench.problem import Heads

RULES: tuple[Rule, ...] = ("gla", "gated_delta_rule")


def draw(
    rule: Rule, count: int, heads: Heads, *, seed: int = 0, dtype: torch.dtype = torch.float64, strength: float = 1.0
) -> Tokens:
    """Seeded tokens with keys of unit length.

    Args:
        count: tokens.
        strength: of the log decays, ``strength * logsigmoid(normal)``; the larger, the sooner a state is forgotten.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    q, k, v = normal(count, heads.q, heads.dim), normal(count, heads.kv, heads.dim), normal(count, heads.kv, heads.v)
    k = torch.nn.functional.normalize(k, dim=-1)
    gates = (count, heads.kv, heads.dim) if rule == "gla" else (count, heads.kv)
    decay = torch.nn.functional.logsigmoid(normal(*gates)) * strength
    beta = None if rule == "gla" else torch.sigmoid(normal(count, heads.kv))
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return Tokens(q.to(dtype), k.to(dtype), v.to(dtype), decay.to(sums), None if beta is None else beta.to(sums))


def recurrence(rule: Rule, x: Tokens, *, scale: float, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """out (T, Hq, Dv) and the state (Hk, Dk, Dv) behind the last token, in float64, from one before the first; None: zero."""
    q, k, v, decay = (part.double() for part in x[:4])
    state = q.new_zeros(k.shape[1], k.shape[2], v.shape[2]) if state is None else state.double()
    group, outs = q.shape[1] // k.shape[1], []
    for t in range(len(q)):
        if rule == "gla":
            state = decay[t].exp()[:, :, None] * state + k[t][:, :, None] * v[t][:, None, :]
        else:
            assert x.beta is not None
            beta = x.beta[t].double()[:, None]
            state = decay[t].exp()[:, None, None] * state
            known = torch.einsum("hk,hkv->hv", k[t], state)
            state = state + k[t][:, :, None] * (beta * (v[t] - known))[:, None, :]
        outs.append(scale * torch.einsum("hk,hkv->hv", q[t], state.repeat_interleave(group, 0)))
    return torch.stack(outs) if outs else q[..., :1].expand(-1, -1, v.shape[2]), state


def recurrence_backward(
    rule: Rule,
    x: Tokens,
    dout: torch.Tensor,
    *,
    scale: float,
    state: torch.Tensor | None = None,
    dstate: torch.Tensor | None = None,
) -> tuple[Tokens, torch.Tensor]:
    """Gradients of the tokens and of the state before the first, in float64, by automatic differentiation of ``recurrence``.

    Args:
        dout: gradient of out.
        dstate: gradient of the state behind the last token; None: zero.
    """
    begin = x.q.new_zeros(x.k.shape[1], x.k.shape[2], x.v.shape[2]) if state is None else state
    leaves = [part.detach().double().requires_grad_() for part in (begin, *x) if part is not None]
    with torch.enable_grad():
        out, end = recurrence(rule, Tokens(*leaves[1:]), scale=scale, state=leaves[0])
        loss = (out * dout.double()).sum() + (0.0 if dstate is None else (end * dstate.double()).sum())
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return Tokens(*grads[1:]), grads[0]
