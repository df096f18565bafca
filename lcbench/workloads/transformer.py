"""Transformer layers of which each rank holds some tokens: plain torch, and attention by any strategy.

A layer has two halves that treat every token alone, ``Before`` and ``After`` the attention, each a module of its own, so that what
is computed again in backward, sharded (FSDP2) or divided among ranks (tensor parallelism) can begin and end at the attention.
Llama's layer: RMSNorm (arXiv 1910.07467), rotary positions by the two halves of a head (arXiv 2104.09864), SwiGLU (arXiv
2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lcbench.cp.base import RankRun
from lcbench.inputs.drawing import seed_of
from lcbench.masks.band import Ints
from lcbench.workloads.models import Model
from lcbench.workloads.watch import Watch

Rope = tuple[torch.Tensor, torch.Tensor]
Give = Callable[[str, torch.Tensor], None]
INITIAL_STD = 0.02  # of projections, GPT-2's and Llama's


def rotations(tokens: Ints, model: Model, dtype: torch.dtype, device: torch.device) -> Rope:
    """Cosines and sines (T, 1, D/2) of tokens at their global positions, in float32 (float64 for float64).

    Angles are computed in float64: at a position of a million float32 has lost a twentieth of a turn.
    """
    positions = torch.from_numpy(tokens).to(device, torch.float64)
    powers = torch.arange(0, model.head_dim, 2, device=device, dtype=torch.float64) / model.head_dim
    angles = positions[:, None, None] * model.rope_theta**-powers
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(wide), angles.sin().to(wide)


def rotated(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """x (T, H, D) turned by its positions: element i of the first half of D goes with element i of the second."""
    cos, sin = rope
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@dataclass(frozen=True)
class Division:
    """The modules of a half that tensor parallelism divides, or has to know of, by name.

    Attributes:
        whole: every rank has them, and what they give goes to ``columns`` or ``classes``.
        columns: projections of which a rank has some outputs: its heads, or its part of the MLP's width.
        rows: projections of which a rank has some inputs, and whose outputs are summed over the ranks.
        by_head: every rank has them, and they see its heads (T, H, D) alone.
        classes: projections of which a rank has some outputs, which stay one tensor that ranks share.
    """

    whole: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    by_head: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


class Half(nn.Module):
    """What weights are gathered for at a time: a part of a layer, or the head.

    Attributes:
        division: of its modules.
    """

    division: Division


class Before(Half):
    """Of x (T, hidden): q (T, Hq, D), k and v (T, Hk, D), with positions in q and k. With tensor parallelism: a rank's heads."""

    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        heads, linear = model.heads(), partial(nn.Linear, bias=False, dtype=dtype, device=device)
        self.norm = nn.RMSNorm(model.hidden, model.norm_eps, dtype=dtype, device=device)
        self.q = linear(model.hidden, heads.q * heads.dim)
        self.k = linear(model.hidden, heads.kv * heads.dim)
        self.v = linear(model.hidden, heads.kv * heads.dim)
        norms = (
            nn.RMSNorm(heads.dim, model.norm_eps, dtype=dtype, device=device) if model.qk_norm else nn.Identity() for _ in "qk"
        )
        self.q_norm, self.k_norm = norms
        self.division = Division(("norm",), ("q", "k", "v"), by_head=("q_norm", "k_norm") if model.qk_norm else ())
        self._dim = heads.dim

    def forward(self, x: torch.Tensor, rope: Rope, give: Give | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``give``: called with each of q, k and v as soon as it is there."""
        normed, found = self.norm(x), []
        for name, project, norm in (("q", self.q, self.q_norm), ("k", self.k, self.k_norm), ("v", self.v, None)):
            one = project(normed).unflatten(-1, (-1, self._dim))
            found.append(one if norm is None else rotated(norm(one), rope))
            if give is not None:
                give(name, found[-1])
        q, k, v = found
        return q, k, v


class After(Half):
    """The layer's x (T, hidden) and out (T, Hq, D) of its attention to what it gives, (T, hidden)."""

    division = Division(("norm",), ("gate", "up"), ("o", "down"))

    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=False, dtype=dtype, device=device)
        self.o = linear(model.heads_q * model.head_dim, model.hidden)
        self.norm = nn.RMSNorm(model.hidden, model.norm_eps, dtype=dtype, device=device)
        self.gate = linear(model.hidden, model.ffn)
        self.up = linear(model.hidden, model.ffn)
        self.down = linear(model.ffn, model.hidden)

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        x = x + self.o(out.flatten(-2))
        normed = self.norm(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class Layer(nn.Module):
    """A transformer layer on this rank's tokens.

    Attributes:
        before, after: its halves.
        attention: between them; it has no weights, and all layers share what it runs on.
    """

    def __init__(self, model: Model, attention: Attention, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.before, self.after = Before(model, dtype, device), After(model, dtype, device)
        self.attention = attention

    def around(self, attention: Attention) -> Layer:
        """The same layer, with its weights, around another attention."""
        layer = copy(self)
        layer.attention = attention
        return layer

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        return self.after(x, self.attend(x, rope))

    def attend(self, x: torch.Tensor, rope: Rope, keep: Kept | None = None) -> torch.Tensor:
        """The layer up to and with its attention: out (T, Hq, D)."""
        q, k, v, given = self.inputs(x, rope)
        return self.attention(q, k, v, keep, given)

    def inputs(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Given | None]:
        """q, k and v of its attention, and what is under way of them where they are exchanged as they come."""
        given = Given(self.attention) if self.attention.run.gives else None
        # A hook of the half sees what it is called with by position.
        return *(self.before(x, rope) if given is None else self.before(x, rope, give=given)), given


class Head(Half):
    """Logits (T, vocab) of what the last layer gives, (T, hidden)."""

    division = Division(("norm",), classes=("logits",))

    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(model.hidden, model.norm_eps, dtype=dtype, device=device)
        self.logits = nn.Linear(model.hidden, model.vocab, bias=False, dtype=dtype, device=device)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.logits(self.norm(y))


@dataclass(frozen=True)
class Stack:
    """Layers one behind the other, and the positions of this rank's tokens."""

    layers: Sequence[Layer]
    rope: Rope

    @property
    def attention(self) -> Attention:
        return self.layers[0].attention


@torch.no_grad()
def give_weights(module: nn.Module, name: str, seed: int) -> None:
    """Fill a module's weights, each from a seed of its own name: the same model at every number of ranks.

    Norms are 1 with a tenth of noise, so that a norm that was forgotten shows.
    """
    generator: torch.Generator | None = None
    for key, weight in module.named_parameters():
        generator = generator or torch.Generator(weight.device)
        generator.manual_seed(seed_of(f"{seed}/{name}.{key}"))
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        drawn = torch.empty(weight.shape, dtype=wide, device=weight.device).normal_(generator=generator)
        weight.copy_(drawn * INITIAL_STD if weight.ndim > 1 else 1 + 0.1 * drawn)


# -- attention ---------------------------------------------------------------------------------------------------------


class Attention:
    """Attention of a strategy, as autograd sees it: q (T, Hq, D), k and v (T, Hk, D) to out (T, Hq, D). Collective.

    Attributes:
        run: what runs it; its buffers serve all layers.
        watch: None, or where the seconds of each pass are noted; on CUDA by events, for which nothing waits.
    """

    def __init__(self, run: RankRun) -> None:
        self.run = run
        self.watch: Watch | None = None

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: Kept | None = None, given: Given | None = None
    ) -> torch.Tensor:
        """
        Args:
            keep: where the results of a first call are kept for a second with the same inputs, which then computes none.
            given: what was begun with these inputs; their gradients go the way back that they came.
        """
        inputs = (q, k, v) if given is None else tuple(x.detach() for x in (q, k, v))
        out: torch.Tensor = _Attend.apply(*inputs, self, keep, *(given.signs if given else ()))  # type: ignore[no-untyped-call]
        return out

    @contextmanager
    def noted(self, phase: str) -> Iterator[None]:
        if self.watch is None:
            yield
            return
        begun = self.watch.now()
        yield
        self.watch.spans.append((phase, begun, self.watch.now()))


@dataclass
class Kept:
    """Results of one attention call, between its first pass and the one that does without computing them."""

    results: list[torch.Tensor] | None = None


class Given:
    """Inputs of one attention call that are exchanged as they come: that of q while k is projected, that of k while v is, as in
    VeOmni (arXiv 2508.02317). In backward the exchanges of dv, dk and dq begin together, in this order, and the projection of each
    waits for its own: autograd goes back through v's first, since it was the last to come.

    Attributes:
        signs: a number for each input, by which autograd knows that the attention depends on it.
    """

    def __init__(self, attention: Attention) -> None:
        self.signs: list[torch.Tensor] = []
        self._attention = attention

    def __call__(self, name: str, x: torch.Tensor) -> None:
        self.signs.append(_Give.apply(x, name, self._attention))  # type: ignore[no-untyped-call]


class _Give(torch.autograd.Function):
    """Begin to exchange an input; in backward wait for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, attention: Attention) -> torch.Tensor:  # type: ignore[override]
        ctx.name, ctx.attention = name, attention
        with attention.noted("forward"):
            attention.run.give(name, x.detach().contiguous())
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, sign: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        with ctx.attention.noted("backward"):
            return ctx.attention.run.gradient(ctx.name), None, None


class _Attend(torch.autograd.Function):
    """A pass of a ``RankRun``. Its tensors are saved as autograd's, so that hooks see them where they are known."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention, keep: Kept | None, *signs: torch.Tensor
    ) -> torch.Tensor:
        run = attention.run
        q, k, v = (x.contiguous() for x in (q, k, v))
        with attention.noted("forward"):
            if keep is not None and keep.results is not None:
                results, keep.results = keep.results, None
                out, saved = results[0], run.resume(q, k, v, results)
            else:
                out, saved = run.forward(q, k, v)
                if keep is not None:
                    keep.results = [x.detach() for x in run.results(saved)]
            tensors, ctx.together = run.apart(run.hold(saved))
        ctx.attention, ctx.signs = attention, len(signs)
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        run, saved = ctx.attention.run, ctx.together(ctx.saved_tensors)
        with ctx.attention.noted("backward"):
            if ctx.signs:
                run.begin_backward(dout.contiguous(), saved)
                return *[None] * 5, *(dout.new_zeros(()) for _ in range(ctx.signs))
            dq, dk, dv = run.backward(dout.contiguous(), saved)
        return dq, dk, dv, None, None
