"""A cell of ``workload=recurrent_memory`` on one rank, and its check.

sequence           out, and with backward the gradients of inputs, memory tokens and all weights, against float64: of the whole
                   pass, or, where that is too much work, of a pass of its own over the first segments
layers             of the whole pass some layers of some segments, the last ones among them, each against float64 from what it
                   was given itself; left out where the whole pass is compared
between layers     what each layer of each segment was given is what the ones before it gave, bit for bit
last passes        out and gradients as in the first pass with these inputs, which have two signs in turn
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lcbench.inputs.drawing import draw_rows
from lcbench.kernels.base import Platform, Unsupported
from lcbench.masks.band import Ints
from lcbench.measure.bounds import Bounds, Check, Judge, verdict
from lcbench.measure.digests import digest
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.measure.numerics import REFERENCE
from lcbench.measure.ranks import EVERY, first_refusal
from lcbench.measure.session import Cost, Counted, Gang, Phases, Say, Session
from lcbench.workloads import memory_exact
from lcbench.workloads.base import Work
from lcbench.workloads.exact import Known
from lcbench.workloads.memory_layers import Cell, MemoryLayers, Weights
from lcbench.workloads.memory_model import MemoryModel, flops
from lcbench.workloads.transformer import Attention, rotations

BUDGET = {"cpu": 1 << 32, "cuda": 1 << 39}  # FLOPs of forward that the reference may have
SAMPLED = 4  # layers of segments that are looked at where the reference is not of the whole pass
# A later pass may sum in another order, in units of rounding.
AGAIN_HALF, AGAIN_SINGLE, USUAL = 16.0, 4.0, 16.0


@dataclass
class Pass:
    """What the phases have given: ``out``, and with backward ``dx``, ``d_tokens`` and ``d_<name>`` of every weight, (L, ...)."""

    out: torch.Tensor
    gradients: dict[str, torch.Tensor]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {"out": self.out.detach(), **self.gradients}


class MemorySession(Session):
    """One draw of a cell on this rank.

    Attributes:
        layers: what runs.
        x, dout: (S, hidden); dout only with backward.
        judge: what its check has found so far.
    """

    wrong: str | None = None

    def __init__(self, options: MemoryModel, work: Work, gang: Gang, number: int) -> None:
        begun = time.perf_counter()
        self._options, self._work, self._gang, self.judge = options, work, gang, Judge()
        problem, device, dtype = work.problem, gang.device, getattr(torch, work.problem.dtype)
        self._random = np.random.default_rng([work.seed, work.attempt, number])
        attentions: dict[int, Attention] = {}
        reason = None
        try:
            for size in options.group_sizes(problem):
                run = work.strategy.start(*options.of_group(problem, size), work.kernel, gang.place)
                attentions[size] = Attention(run)
                run.share(next(iter(attentions.values())).run)
        except Unsupported as refused:
            reason = str(refused)
        self.refused = first_refusal(EVERY.all_gather_object(reason))
        if self.refused is not None:
            return
        weights = Weights.drawn(options, work.seed, dtype, device, backward=problem.backward)
        rope = rotations(np.arange(options.rows), options.model, dtype, device)
        self._calls = {size: 1 if (own := each.run.counters()) is None else own.calls for size, each in attentions.items()}
        self.layers = MemoryLayers(options, weights, attentions, rope)
        self.negated = False
        self.x, self.dout = self._drawn("x"), self._drawn("dy") if problem.backward else None
        self._firsts: dict[bool, dict[str, torch.Tensor]] = {}
        self._rows = 0
        self.prepare_s = time.perf_counter() - begun

    def _drawn(self, name: str) -> torch.Tensor:
        problem = self._work.problem
        shape, dtype = (self._options.model.hidden,), getattr(torch, problem.dtype)
        return draw_rows(name, np.arange(problem.seqlen), shape, dtype, self._work.seed, self._gang.device)

    @property
    def input_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.x, self.dout) if x is not None)

    @property
    def held_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for first in self._firsts.values() for x in first.values())

    # -- passes ----------------------------------------------------------------------------------------------------

    def phases(self) -> Phases:
        """Forward gives the leaf that it began with and out, backward a ``Pass``."""
        phases: Phases = {"forward": lambda _: self._forward(self.x)}
        if self.dout is not None:
            dout = self.dout
            phases["backward"] = lambda passed: self._backward(passed[0], passed[1], dout)
        return phases

    def _forward(self, x: torch.Tensor, keep: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.detach().requires_grad_(self.dout is not None)
        with torch.set_grad_enabled(self.dout is not None):
            return leaf, self.layers(leaf, keep)

    def _backward(self, leaf: torch.Tensor, out: torch.Tensor, dout: torch.Tensor) -> Pass:
        weights = self.layers.weights
        for gradient in weights.gradients.values():
            gradient.zero_()
        dx, dtokens = torch.autograd.grad(out, [leaf, weights.tokens], dout)
        return Pass(out.detach(), {"dx": dx, "d_tokens": dtokens, **{f"d_{name}": x for name, x in weights.gradients.items()}})

    def _passed(self, segments: int | None = None, keep: Any = None) -> Pass:
        """A pass over the first segments, or over all of them."""
        tokens = None if segments is None else segments * self._options.segment
        leaf, out = self._forward(self.x[:tokens], keep)
        if self.dout is None:
            return Pass(out, {})
        return self._backward(leaf, out, self.dout[:tokens])

    def vary(self) -> None:
        """Negate x in place: all else is something else then."""
        self.x.neg_()
        self.negated = not self.negated

    def first_pass(self) -> None:
        self._cells: list[Cell] = []
        self._first = self._passed(keep=self._cells.append)

    def variants(self) -> dict[str, Phases]:
        return {}

    def timeline(self) -> None:
        return None

    # -- checks ----------------------------------------------------------------------------------------------------

    @property
    def _bounds(self) -> Bounds:
        return Bounds(self._work.problem, self._work.kernel.rounding(Platform.of(self._gang.device)), max(self._calls.values()))

    @property
    def _segments(self) -> int:
        return self._options.segments(self._work.problem)

    @property
    def _compared(self) -> int:
        """Segments of which everything is compared with the reference: two at least, since the first reads no memory."""
        dense, pairs = flops(self._options, 1)
        one = dense + forward_flops(pairs * self._options.model.heads_q, self._options.model.heads())
        return min(self._segments, max(2, int(BUDGET[self._gang.device.type] / one)))

    def check_first(self, say: Say) -> None:
        say("checking the first pass against the float64 reference")
        self._check_first()
        say("checking another pass on negated inputs")
        self.vary()
        self.first_pass()
        self._check_first()
        self.vary()

    def check_again(self) -> None:
        self.first_pass()
        self._check_first()
        self.vary()
        self.first_pass()
        self._check_first()
        self.vary()

    def _check_first(self) -> None:
        passed = self._first
        self._firsts[self.negated] = {name: digest(x.flatten(1)) for name, x in passed.tensors.items()}
        self._between(passed.out)
        if self._compared < self._segments:
            self._some_cells()
        self._cells = []
        self._sequence(passed if self._compared == self._segments else self._passed(self._compared))
        del self._first

    def _sequence(self, passed: Pass) -> None:
        """Against the reference of the first segments."""
        rows = self._compared * self._options.segment
        weights = self.layers.weights
        by_layer = [{name: w[i] for name, w in weights.layers.items()} for i in range(self._options.depth)]
        dout = None if self.dout is None else self.dout[:rows]
        known = memory_exact.sequence(self._options, by_layer, weights.tokens, self.x[:rows], dout, self._work.seed)
        self._rows = rows
        for name, got in passed.tensors.items():
            self._compare(REFERENCE, name, got, known[name])

    def _some_cells(self) -> None:
        """Some layers of some segments, each from what it was given."""
        drawn = self._random.choice(len(self._cells), min(SAMPLED, len(self._cells)), replace=False)
        for number in np.unique([*drawn, len(self._cells) - 1]).tolist():
            one = self._cells[number]
            weights = {name: w[one.layer] for name, w in self.layers.weights.layers.items()}
            x, a, z = (given.detach()[0] for given in (one.x, *one.before))
            known = memory_exact.cell(self._options, weights, x, a, z, self._work.seed + number)
            for name, exact in known.items():
                self._compare("layers", f"{name} of layer {one.layer}", one.gave[name], exact)

    def _between(self, out: torch.Tensor) -> None:
        """What each was given against what the ones before it gave, and what comes out against what the last layers gave."""
        options = self._options
        found = {(one.segment, one.layer): one for one in self._cells}
        wanted = {(n, layer) for n in range(self._segments) for layer in range(options.depth)}
        self.judge.number("between layers", "layers", float(found.keys() != wanted), 0.0, "each layer of each segment once")
        for n, layer in sorted(found.keys() & wanted):
            one = found[n, layer]
            own = slice(n * options.segment, (n + 1) * options.segment)
            tokens = torch.cat([self.x[own], self.layers.weights.tokens.detach()])
            given = tokens if layer == 0 else _gave(found.get((n, layer - 1)), "y")
            before = found.get((n - 1, layer))
            where = f"layer {layer} of segment {n}"
            self._same("x", one.x[0], given, where)
            for name, got in zip("az", one.before, strict=True):
                self._same(name, got[0], torch.zeros_like(got[0]) if n == 0 else _gave(before, name), where)
            if layer == options.depth - 1:
                self._same("out", out[own], one.y[0, : options.segment], where)

    def _same(self, name: str, got: torch.Tensor, want: torch.Tensor | None, where: str) -> None:
        error = float("nan") if want is None else float((got.detach().double() - want.detach().double()).abs().max())
        self.judge.number("between layers", name, error, 0.0, where)

    def _compare(self, part: str, name: str, got: torch.Tensor, known: Known) -> None:
        """Element by element; in half types by the root of the squares of all: where a memory hardly knows what is looked up, a
        division makes single elements as uncertain as they like."""
        bounds, got = self._bounds, got.detach().double()
        if bounds.half:
            error, spread = (float(x.square().sum().sqrt()) for x in (got - known.value, known.spread))
            self.judge.number(part, name, error, bounds.factor * bounds.unit * spread + bounds.tiny, "all elements")
            return
        allowed = bounds.factor * bounds.unit * known.spread + bounds.tiny
        rows: Ints = np.arange(len(got))
        self.judge.elements(part, name, got, known.value, allowed, rows)

    def check_timed(self, passed: Any) -> None:
        self._as_before("last timed pass", passed if self.dout is not None else Pass(passed[1], {}))

    def check_last(self) -> None:
        self.vary()
        self._as_before("last pass", self._passed())

    def _as_before(self, part: str, passed: Pass) -> None:
        """Against the first pass with these inputs."""
        first, bounds = self._firsts[self.negated], self._bounds
        steps = self._segments + self._options.depth
        unit = (AGAIN_HALF if bounds.half else AGAIN_SINGLE) * bounds.unit * steps
        for name, got in passed.tensors.items():
            norm = got.double().flatten(1).square().sum(1).sqrt()
            allowed = unit * (norm + USUAL * norm.square().mean().sqrt())
            self.judge.elements(part, name, digest(got.flatten(1)), first[name], allowed, np.arange(len(got)))

    def check(self) -> Check:
        whole, columns = self._compared == self._segments, 0 if self.dout is None else self._rows
        left = f"the reference is of the first {self._compared} segments, which a pass of their own went through"
        unchecked = {} if whole or self.dout is None else {"gradients of the whole pass": left}
        return verdict([self.judge.found], REFERENCE, self._rows, columns, whole, unchecked)

    # -- what it is made of ----------------------------------------------------------------------------------------

    def costs(self) -> dict[str, Cost]:
        """2 FLOPs per weight and token, memories as products of their features, attention by pairs; backward twice of the former
        and as attention has it of the latter."""
        options, heads = self._options, self._options.model.heads()
        dense, pairs = flops(options, self._segments)
        read = float(sum(x.numel() * x.element_size() for x in self.layers.weights.layers.values()))
        found = {"forward": Cost(dense + forward_flops(pairs * heads.q, heads), 0.0, read)}
        if self.dout is not None:
            found["backward"] = Cost(2 * dense + backward_flops(pairs * heads.q, heads), 0.0, 2 * read)
        return found

    def counted(self) -> Counted:
        options, problem = self._options, self._work.problem
        segments = self._segments
        sizes = [len(group) for group in options.groups(segments)]
        area = segments * options.rows * (options.rows + 1) / 2
        return Counted({
            "mask/area": area, "mask/density": area / problem.seqlen**2, "recurrent/segments": float(segments),
            "recurrent/groups": float(len(sizes)), "recurrent/members": float(segments * options.depth),
            "recurrent/tokens": float(problem.seqlen), "kernel/calls": float(sum(self._calls[size] for size in sizes)),
        })  # fmt: skip


def _gave(one: Cell | None, name: str) -> torch.Tensor | None:
    """What a layer of a segment gave; None: there was none."""
    return None if one is None else one.gave[name]
