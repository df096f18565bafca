"""The check of linear attention: its passes against the recurrence in float64 (``measure.recurrence``), on every rank.

    who owns what       all ranks together have every token once (``measure.owners``)
    reference           out and all gradients of every token of some key/value heads: of all where that is cheap, else of one that
                        the seed of the attempt draws
    along one direction out and dv of all heads and tokens: a result is linear in values, so that with one number per token in
                        place of a value the recurrence is as cheap as a vector
    factor              of all heads: q_t dq_t is dout_t out_t for each token, since out is linear in q, and with gated linear
                        attention k_t dk_t is v_t dv_t; no part of either may be missing that other tokens' states have
    last passes         the last timed one, and one after all else: with values and dout negated, out and dv must be negated too

States come to the reference by no message of the run: a rank works out what its tokens do to any state, all ranks tell it to all,
and each puts together the state before its own tokens, and the gradient of the one behind them. So a hop that is lost, a state
that does not decay on its way, one of the pass before, of another head, or a block of one that is missing is an error of every
token behind it. What the parts of a long sequence's check leave open: dk, decays' and strengths' gradients of heads that are not
drawn. Each block of timings draws its own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from lcbench.kernels.linear import Tokens
from lcbench.masks.band import Ints
from lcbench.measure.bounds import TOGETHER, Bounds, Check, Judge, of_groups, verdict
from lcbench.measure.digests import digest
from lcbench.measure.numerics import REFERENCE
from lcbench.measure.ranks import EVERY, Ranks
from lcbench.measure.recurrence import Effect, Exact, Stretch, effect, effect_backward, gradients, outputs, value_gradients
from lcbench.problem import Problem

ALONG, FACTOR = "along one direction", "factor"
# Multiplications of the reference: up to the first all heads are compared; up to the second the delta rule along one direction,
# whose transitions are matrices, is.
WHOLE, MATRICES = 1 << 27, 1 << 32
GRADIENTS = ("dq", "dk", "dv", "ddecay", "dbeta")
NEGATED = ("out", "dv")  # with values and dout negated


class Result(NamedTuple):
    """What a pass gives on this rank; ``gradients``: None without backward."""

    out: torch.Tensor
    gradients: Tokens | None

    def named(self) -> dict[str, torch.Tensor]:
        """(T, H, D) each; a number per token and head has D = 1."""
        found = zip(GRADIENTS, self.gradients or (), strict=False)
        every = {"out": self.out} | {name: x for name, x in found if x is not None}
        return {name: x if x.dim() == 3 else x[..., None] for name, x in every.items()}


class LinearCheck:
    """The check on one rank. All methods but ``held_bytes`` are collective.

    Args:
        tokens: those of this rank, a stretch.
        seed: draws heads and a direction.
        ranks: those that share the sequence.
    """

    def __init__(self, problem: Problem, tokens: Ints, bounds: Bounds, seed: list[int], ranks: Ranks, rank: int) -> None:
        assert problem.rule is not None
        self._problem, self._rule, self._tokens, self._bounds, self._ranks = problem, problem.rule, tokens, bounds, ranks
        self.judge = Judge()
        self._digest: dict[str, torch.Tensor] = {}
        self._unchecked: dict[str, str] = {}
        heads, random = problem.heads, np.random.default_rng(seed)
        per_head = problem.seqlen * heads.dim * (heads.dim + heads.v)
        drawn = int(random.integers(heads.kv))
        self._all = per_head * heads.kv <= WHOLE
        self._matrices = problem.rule != "gated_delta_rule" or per_head * heads.kv // problem.scale.world_size <= MATRICES
        self._heads = range(heads.kv) if self._all else range(drawn, drawn + 1)
        if problem.backward and not self._all:
            left = ("dk", "ddecay", "dbeta") if problem.rule == "gated_delta_rule" else ("ddecay",)
            self._unchecked = {
                f"{name} of other heads": f"head {drawn} is drawn, and no direction or factor shows it" for name in left
            }
        self._direction = torch.from_numpy(random.choice([-1.0, 1.0], heads.v))
        starts: list[int] = ranks.all_gather_object(int(tokens.min(initial=problem.seqlen)))
        self._order: list[int] = np.argsort(starts, kind="stable").tolist()  # ranks by their tokens
        self._place = self._order.index(rank)

    @property
    def held_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self._digest.values())

    def first(self, x: Tokens, dout: torch.Tensor | None, result: Result, *, whole: bool) -> None:
        """A pass on inputs that nobody has changed; ``whole``: by all parts, else by the reference alone."""
        named = result.named()
        self._digest = {name: digest(one) for name, one in named.items()}
        self._reference(x, dout, named)
        if whole and not self._all:
            self._along(x, dout, named)
            self._factors(x, dout, named)

    # -- parts -----------------------------------------------------------------------------------------------------

    def _stretch(self, x: Tokens, heads: range) -> Stretch:
        return Stretch.of(self._rule, *x, heads=heads, scale=self._problem.softmax_scale)

    def _queries(self, x: torch.Tensor, heads: range) -> torch.Tensor:
        """(T, Hq, D) of the query heads that read some key/value heads as (H, G, T, D) in float64, on the host."""
        group = self._problem.heads.q // self._problem.heads.kv
        taken = x[:, heads.start * group : heads.stop * group].detach().cpu().double()
        return taken.unflatten(1, (len(heads), group)).permute(1, 2, 0, 3)

    def _begins(self, stretch: Stretch, dout: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The state before this rank's tokens, and the gradient of that behind them, from what all ranks' tokens do."""
        own = effect(stretch), None if dout is None else effect_backward(stretch, dout)
        every: list[tuple[Effect, torch.Tensor | None]] = self._ranks.all_gather_object(own)
        ordered = [every[rank] for rank in self._order]
        state, dstate = stretch.zeros, stretch.zeros
        for one, _ in ordered[: self._place]:
            state = one.on(state)
        for one, back in reversed(ordered[self._place + 1 :]):
            dstate = dstate if back is None else one.back(back, dstate)
        return state, dstate

    def _reference(self, x: Tokens, dout: torch.Tensor | None, named: dict[str, torch.Tensor]) -> None:
        stretch = self._stretch(x, self._heads)
        own = None if dout is None else self._queries(dout, self._heads)
        state, dstate = self._begins(stretch, own)
        exact = {"out": outputs(stretch, state)}
        if own is not None:
            exact |= gradients(stretch, own, state, dstate)
        for name, known in exact.items():
            got, first = self._of_heads(name, named[name], self._heads)
            value, spread = self._by_token(known.value), self._by_token(known.spread)
            self._compare(REFERENCE, name, got, Exact(value, spread), first)

    def _compare(self, part: str, name: str, got: torch.Tensor, known: Exact, first: int) -> None:
        """Elements, and those of each token and head together."""
        judge, tokens = self.judge, self._tokens
        bound = self._bounds.element(known.spread, known.value.abs())
        judge.elements(part, name, got, known.value, bound, tokens, first=first)
        if known.value.shape[-1] > 1:
            apart = torch.where(got == known.value, 0.0, got - known.value).norm(dim=-1)
            limit = TOGETHER * self._bounds.element(known.spread, known.value.abs()).norm(dim=-1)
            judge.elements(f"{part}, together", name, apart, torch.zeros_like(apart), limit, tokens, first=first)

    def _of_heads(self, name: str, x: torch.Tensor, heads: range) -> tuple[torch.Tensor, int]:
        """A result's heads that belong to some key/value heads, in float64 on the host, and the first one's number."""
        group = self._problem.heads.q // self._problem.heads.kv if name in ("out", "dq") else 1
        return x[:, heads.start * group : heads.stop * group].detach().cpu().double(), heads.start * group

    @staticmethod
    def _by_token(x: torch.Tensor) -> torch.Tensor:
        """(H, T, D), or (H, G, T, D), as (T, H, D)."""
        return x.transpose(0, 1) if x.dim() == 3 else x.permute(2, 0, 1, 3).flatten(1, 2)

    def _along(self, x: Tokens, dout: torch.Tensor | None, named: dict[str, torch.Tensor]) -> None:
        if not self._matrices:
            self._unchecked["out and dv of other heads"] = "the delta rule's transitions of a sequence of this length take too long"
            return
        every, direction = range(self._problem.heads.kv), self._direction
        whole = self._stretch(x, every)
        stretch = whole.along(direction)
        result = None if dout is None else self._queries(dout, every)
        along = None if result is None else (result @ direction)[..., None]
        state, dstate = self._begins(stretch, along)
        known = {"out": outputs(stretch, state)}
        # How large all values together may be: what a direction shows of a few of them may be small by chance.
        sizes = {"out": _length(whole.keep, whole.k.square().sum(-1) * whole.v.square().sum(-1))}
        factor = {"out": whole.q.norm(dim=-1)}
        if along is not None and result is not None:
            known["dv"] = value_gradients(stretch, along, dstate)
            terms = (whole.q.square().sum(-1) * result.square().sum(-1)).sum(1)
            sizes["dv"], factor["dv"] = _length(whole.keep.flip(1), terms.flip(1)).flip(1), whole.k.norm(dim=-1)
        for name, exact in known.items():
            got, _ = self._of_heads(name, named[name], every)
            size = sizes[name][:, None] if name == "out" else sizes[name]
            spread = exact.spread + (factor[name] * size)[..., None]
            self._compare(ALONG, name, (got @ direction)[..., None], Exact(self._by_token(exact.value), self._by_token(spread)), 0)

    def _factors(self, x: Tokens, dout: torch.Tensor | None, named: dict[str, torch.Tensor]) -> None:
        """By what factor the two sides of what must be equal differ, over all tokens of a head of all ranks."""
        if dout is None:
            return
        sides = {"dq": ((x.q, named["dq"]), (dout, named["out"]))}
        if self._rule == "gla":
            sides["dk"] = (x.k, named["dk"]), (x.v, named["dv"])
        for name, (left, right) in sides.items():
            one, other = ((a.double() * b.double()).sum(-1) for a, b in (left, right))
            sums = torch.stack([(one * other).sum(0), other.square().sum(0)])
            products, squares = self._ranks.reduce(sums).cpu().tolist()
            allowed = self._allowed(left[0].shape[-1])
            for head, (product, square) in enumerate(zip(products, squares, strict=True)):
                error = abs(product / square - 1) if square else math.inf
                self.judge.number(FACTOR, name, error, allowed, f"head {head}")

    def _allowed(self, dim: int) -> float:
        """How far such a factor may be from 1: each token's two sides have roundings of their own, about the root of ``dim`` as
        large as those of one element."""
        unit = self._bounds.factor * self._bounds.unit
        return unit * math.sqrt(dim / self._problem.seqlen) + 4 * self._bounds.unit

    def last(self, part: str, result: Result, *, negated: bool) -> None:
        """A later pass on the inputs of the first, or with values and dout negated."""
        half = self._bounds.half
        unit = (16 if half else 4) * self._bounds.unit
        for name, x in result.named().items():
            norm = x.double().square().sum(-1).sqrt()
            square, count = self._ranks.reduce(torch.stack([norm.square().sum(), norm.new_tensor(float(norm.numel()))]))
            # Sums in another order end up elsewhere by what rounds their terms, which are as large where little is left.
            bound = unit * (norm + 16 * (square / count).sqrt() * (2.0**-10 if half else 1.0))
            sign = -1.0 if negated and name in NEGATED else 1.0
            self.judge.elements(part, name, digest(x), sign * self._digest[name], bound, self._tokens)

    def check(self) -> Check:
        """What all ranks have found so far, of every sequence. Collective over all ranks."""
        found: list[Any] = self._ranks.all_gather_object(self.judge.found)
        rows = self._problem.seqlen
        own = verdict(found, REFERENCE, rows, rows if self._problem.backward else 0, self._all, dict(self._unchecked))
        checks: dict[str, Check] = dict(EVERY.all_gather_object((self._ranks.name, own)))
        return of_groups(checks) if len(checks) > 1 else own


def _length(keep: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """(H, T): the root of sums of squares (H, T) of each token and those before it, which decay as the slowest of ``keep``."""
    found, kept, size = torch.empty_like(squares), keep.amax(-1).square(), squares.new_zeros(len(squares))
    for t in range(squares.shape[1]):
        size = kept[:, t] * size + squares[:, t]
        found[:, t] = size
    return found.sqrt()
