"""The check of a cell: the first pass against float64, probe passes whose results are known, and the last pass against the first.

    who owns what      each result is given by one rank, each query and key that the mask uses is held by some (``measure.owners``)
    first pass         rows and columns against the float64 reference; in float32 and float64 sums that must be conserved
    level, zero        probe passes: every row and column of every head, closed form (``measure.probe``)
    last passes        the last timed one, and one after all else: inputs negated in place must negate all results but LSE and dsink

docs/measuring.md says what each part can see and what it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lcbench.cp.base import Passes, RankRun
from lcbench.masks.band import Ints
from lcbench.masks.mask import Computed
from lcbench.measure.bounds import TOGETHER, Bounds, Check, Judge, of_groups, verdict
from lcbench.measure.owners import Owners
from lcbench.measure.probe import Probe, Terms, held_heads, impossible
from lcbench.measure.ranks import EVERY, Ranks
from lcbench.measure.reference import Exact, Shard, columns, owned, rows, sample, sinks
from lcbench.problem import Problem
from lcbench.schedule.held import Part

REFERENCE, SUMS = "reference", "conserved"
CANCELLED = 1e-6  # of the size of terms: what is left of them when they cancel


@dataclass(frozen=True)
class Result:
    """What a pass gave of what a rank holds; None: gradients of a forward-only cell, dv where dk has it in it, and dsink (Hq,),
    this rank's part of a sum over all, where there is no sink; ``chosen``: the mask of the pass, where inputs choose it."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    dsink: torch.Tensor | None = None
    chosen: Computed | None = None

    @classmethod
    def of(cls, problem: Problem, run: RankRun, passed: Sequence[Any], lse: torch.Tensor | None = None) -> Result:
        """From a pass: (out, saved) of forward, and what backward gave if it ran; ``lse``: as ``RankRun.lse`` gave it before
        backward. Collective.

        Raises:
            ValueError: another number of gradients than the problem has.
        """
        out, saved, *gradients = passed
        names = ["dq", "dk", *(() if problem.heads.latent else ("dv",)), *(("dsink",) if problem.softmax.sink else ())]
        found = dict(zip(names, gradients[0], strict=True)) if gradients else {}
        return cls(out, run.lse(saved) if lse is None else lse, **found, chosen=run.chosen(saved))

    def named(self) -> dict[str, torch.Tensor]:
        """The tensors of tokens by name, LSE last."""
        named = {"out": self.out, "dq": self.dq, "dk": self.dk, "dv": self.dv, "lse": self.lse}
        return {name: x for name, x in named.items() if x is not None}


def forward(run: Passes, shard: Shard) -> tuple[torch.Tensor, Any]:
    """out and what backward needs. Collective."""
    return run.forward(shard.q, shard.k, shard.v, shard.sink)


def one_pass(run: RankRun, shard: Shard, problem: Problem) -> Result:
    """Forward, LSE and backward of this rank. Collective."""
    passed = forward(run, shard)
    lse = run.lse(passed[1])
    return Result.of(problem, run, passed if shard.dout is None else (*passed, run.backward(shard.dout, passed[1])), lse)


class Examination:
    """The check of one draw of a cell, on one rank; its methods are collective among ``ranks``, and called in this order.

    Args:
        passed: one pass of some inputs, collective over all ranks.
        mask: what is computed, unless inputs choose that.
        asked: what the cell asks for, where that is another.
        owners: what this rank holds.
        ranks: those that share the sequence.
        rank: this one's number among them.
        no_probe: why its inputs cannot be a probe's; None: the problem decides.
        own_lse: whether the LSE of a pass is its own; another is compared with nothing.
        seed: of the sample and of the probes: the cell's seed and the attempt, so that repeats look elsewhere.

    Attributes:
        distance: of the first pass's out from what ``asked`` gives, by the sample's rows: the root of the sum of the squares of
            what is between them, over that of what is exact; None where nothing else is asked for.
        judge: what has been found; a workload adds parts of its own.
    """

    distance: float | None = None

    def __init__(
        self,
        passed: Callable[[Shard], Result],
        mask: Computed,
        problem: Problem,
        owners: Owners,
        bounds: Bounds,
        seed: list[int],
        ranks: Ranks,
        *,
        own_lse: bool,
        rank: int = 0,
        asked: Computed | None = None,
        no_probe: str | None = None,
    ) -> None:
        self._mask, self._problem, self._owners, self._bounds, self._seed = mask, problem, owners, bounds, seed
        self._passed = passed
        self._ranks, self._rank, self._asked = ranks, rank, asked
        self.judge = Judge()
        self._keys = mask.density * mask.num_k  # of a row, in the mean
        self._rows = sample(mask, "q", seed, problem.heads.q)
        self._columns = sample(mask, "k", seed, problem.heads.q)
        self._unchecked = {} if own_lse else {"lse": "the library gives none of its own"}
        self._no_probe = no_probe or impossible(problem)
        if self._no_probe:
            self._unchecked["every row and column"] = self._no_probe
        elif problem.backward and problem.heads.latent:
            self._unchecked["every row of dq"] = (
                f"values are numbers of keys: the first {problem.heads.v} numbers of dq are known to the reference alone"
            )
        self._digest: dict[str, torch.Tensor] = {}

    @property
    def held_bytes(self) -> int:
        """Memory that this object holds on the device between the first pass and the last."""
        return sum(x.numel() * x.element_size() for x in self._digest.values())

    def begin(self, result: Result) -> None:
        """Keep of the first pass what later ones are compared with."""
        self._digest = self._digested(result)

    def first(self, shard: Shard, result: Result, drawn: Shard | None = None) -> None:
        """Check the first pass.

        Args:
            shard: its inputs.
            drawn: the same inputs by tokens, where ranks do not hold them so.
        """
        self.begin(result)
        by_tokens = shard if self._owners.by_tokens else drawn
        assert by_tokens is not None
        self._against_reference(by_tokens, result)
        asked, heads = self._asked, self._problem.heads.q
        # A choice of all pairs is none: its results are exact.
        if asked is None and result.chosen is not None and result.chosen.pairs(heads) < self._mask.pairs(heads):
            asked = self._mask
        if asked is not None:
            self._measure_distance(asked, by_tokens, result)
        if self._bounds.half or shard.dout is None:
            return
        if self._owners.by_tokens:
            self._conserved(shard, result)
        else:
            self._unchecked["sums"] = "ranks do not hold whole tokens, each once"

    @property
    def probes(self) -> list[str]:
        """Which probe passes there are: queries of zeros show more only of gradients and of kernels that round their scores."""
        if self._no_probe:
            return []
        return ["level", "zero"] if self._problem.backward or self._bounds.rounding.scores else ["level"]

    def probe(self, name: str, shard: Shard) -> None:
        """A probe pass. It takes the place of the inputs in memory: ``shard`` has to be drawn anew after it."""
        zero, problem, bounds, device = name == "zero", self._problem, self._bounds, shard.q.device
        inputs = self._owners, _number(self._seed), device, self._ranks.reduce
        probe = Probe(self._mask, problem, *inputs, zero=zero, keys=self._keys, rank=self._rank)
        probe.fill(shard)
        result = self._passed(shard)
        if result.chosen is not None:
            probe = Probe(result.chosen, problem, *inputs, zero=zero, keys=self._keys, rank=self._rank)
        score = abs(probe.largest_score)
        factors = _Factors(self.judge, self._ranks, result.out.device)
        for place, head in enumerate(self._heads("out")):
            want = probe.rows(head)
            if "lse" not in self._unchecked:
                self._of_head(name, head, "lse", result.lse[:, place], want.lse, bounds.count(want.lse, want.key, score))
            lse = want.lse.nan_to_num(neginf=0.0)[:, None]
            allowed = bounds.out(want.out_spread, want.out_common, want.out, want.key[:, None], lse, want.count[:, None])
            self._of_head(name, head, "out", result.out[:, place], want.out, allowed)
        if result.dq is None or result.dk is None:
            return
        for head in range(problem.heads.q):
            terms, count = probe.gradient(head) if head in self._heads("dq") else (None, None)
            self._of_terms(name, head, "dq", result.dq[..., probe.scored], terms, count, factors, scores=True)
        of_values = ("dk", result.dk[..., : problem.heads.v]) if result.dv is None else ("dv", result.dv)
        for head in range(problem.heads.kv):
            sums = probe.columns(head)
            mine = head in self._heads("dk")
            dk, dv = (sums.dk, sums.dv) if mine else (None, None)
            self._of_terms(name, head, "dk", result.dk[..., probe.scored], dk, sums.count, factors, scores=True)
            self._of_terms(name, head, *of_values, dv, sums.count, factors, scores=False)
        factors.settle()
        if result.dsink is not None:
            self._of_sinks(name, result.dsink, *probe.sinks())

    def _of_sinks(self, part: str, got: torch.Tensor, exact: torch.Tensor, spread: torch.Tensor, common: torch.Tensor) -> None:
        """dsink of all query heads, which ranks have parts of. Collective."""
        every = self._ranks.reduce(got.to(torch.float64, copy=True))  # a sum over ranks is in place
        errors, allowed = (every - exact).abs().tolist(), self._bounds.element(spread, common).tolist()
        for head, (error, bound) in enumerate(zip(errors, allowed, strict=True)):
            self.judge.number(part, "dsink", error, bound, f"head {head}")

    def _of_terms(
        self,
        probe: str,
        head: int,
        tensor: str,
        got: torch.Tensor,
        terms: Terms | None,
        count: torch.Tensor | None,
        factors: _Factors,
        *,
        scores: bool,
    ) -> None:
        """Elements of one head of a gradient, and their part in the factor that all of them have in common; ``terms``: None where
        this rank does not hold the head; ``scores``: whether the gradient comes by way of the scores."""
        allowed = self._bounds.shared(self._keys, scores=scores)
        if terms is None or count is None:
            factors.add(f"{probe}, factor", tensor, head, None, allowed)
            return
        bound = self._bounds.probed(terms.spread, terms.value.abs() + terms.common, terms.floor, count[:, None], scores=scores)
        own = got[:, self._heads(tensor).index(head)]
        self._of_head(probe, head, tensor, own, terms.value, bound)
        factors.add(f"{probe}, factor", tensor, head, (own, terms.value, terms.spread), allowed)

    def last(self, part: str, result: Result, negated: bool) -> None:
        """Check a later pass on the inputs of the first, or on the negative of all of them: all but LSE and dsink is then negative
        too."""
        half, digest = self._bounds.half, self._digested(result)
        unit = (16 if half else 4) * self._bounds.unit
        norms = {name: _by_head(x, lambda one: one.square().sum(-1).sqrt()) for name, x in result.named().items() if name != "lse"}
        own = torch.tensor([[x.square().sum(), x.numel()] for x in norms.values()], dtype=torch.float64, device=result.out.device)
        for (name, norm), (square, count) in zip(norms.items(), self._ranks.reduce(own), strict=True):
            # Sums in another order end up elsewhere by what rounds their terms, which are as large where little is left.
            usual = (square / count).sqrt()
            bound = unit * (norm + 16 * usual * (2.0**-10 if half else 1.0))
            tokens = self._part(name).tokens
            self.judge.elements(part, name, digest[name], (-1.0 if negated else 1.0) * self._digest[name], bound, tokens)
        if "lse" not in self._unchecked:
            size = self._digest["lse"].abs().nan_to_num(posinf=0.0) + 1
            bound, tokens = (1e-5 if half else unit) * size, self._part("lse").tokens
            self.judge.elements(part, "lse", digest["lse"], self._digest["lse"], bound, tokens)
        if result.dsink is not None:
            now, first = self._ranks.reduce(torch.stack([digest["dsink"], self._digest["dsink"]]))
            usual = first.square().mean().sqrt()
            for head, (error, one) in enumerate(zip((now - first).abs().tolist(), first.abs().tolist(), strict=True)):
                self.judge.number(part, "dsink", error, unit * (one + 16 * float(usual)), f"head {head}")

    def check(self) -> Check:
        """What all ranks have found so far, of every sequence. Collective over all ranks."""
        whole = len(self._rows) == self._mask.num_q and len(self._columns) == self._mask.num_k
        judges = self._ranks.all_gather_object(self.judge.found)
        own = verdict(judges, REFERENCE, len(self._rows), len(self._columns), whole, self._unchecked)
        checks: dict[str, Check] = dict(EVERY.all_gather_object((self._ranks.name, own)))
        return of_groups(checks) if len(checks) > 1 else own

    # -- parts -----------------------------------------------------------------------------------------------------

    def _part(self, tensor: str) -> Part:
        """Which tokens and heads of a tensor a rank has."""
        held = self._owners.held
        return {"out": held.out, "lse": held.out, "dq": held.q, "dk": held.kv, "dv": held.kv}[tensor]

    def _heads(self, tensor: str) -> range:
        return held_heads(self._part(tensor), self._count(tensor))

    def _count(self, tensor: str) -> int:
        heads = self._problem.heads
        return heads.kv if tensor in ("dk", "dv") else heads.q

    def _of_head(self, part: str, head: int, tensor: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> None:
        self.judge.elements(part, tensor, got.double(), want, bound, self._part(tensor).tokens, head)

    def _digested(self, result: Result) -> dict[str, torch.Tensor]:
        """A number per token and head of each tensor: elements with signs of their own, added up."""
        found = {"lse": result.lse.double()}
        if result.dsink is not None:
            found["dsink"] = result.dsink.to(torch.float64, copy=True)
        for name, x in result.named().items():
            if name != "lse":
                signs = torch.from_numpy(np.random.default_rng(len(name)).choice([-1.0, 1.0], x.shape[-1])).to(x.device)
                found[name] = _by_head(x, lambda one, signs=signs: one @ signs)  # type: ignore[misc]
        return found

    def _against_reference(self, shard: Shard, result: Result) -> None:
        mask = self._mask if result.chosen is None else result.chosen
        scores, factors = self._bounds.rounding.scores, _Factors(self.judge, self._ranks, result.out.device)
        exact = rows(mask, self._problem, shard, self._rows, self._ranks, scores=scores)
        for name in [str(n) for n in ("out", "dq", "lse") if n in exact and n not in self._unchecked]:
            self._compare(name, result.named()[name], exact[name], self._rows, factors)
        if shard.dout is None:
            factors.settle()
            return
        if len(self._rows) == self._mask.num_q:
            own = torch.from_numpy(shard.held.q.tokens).to(shard.q.device)
            lse, out = exact["lse"].value[own], exact["out"].value[own]
        elif self._owners.by_tokens:
            lse, out = result.lse, result.out
        else:
            lse, out = (self._by_tokens(x, shard.held.q) for x in (result.lse, result.out))
        if result.dsink is not None:
            known = sinks(self._problem, shard, self._ranks, lse, out)
            self._of_sinks(REFERENCE, result.dsink, known.value, known.spread, known.common)
        exact = columns(mask, self._problem, shard, self._columns, self._ranks, lse, out, scores=scores)
        for name in exact:
            self._compare(name, result.named()[name], exact[name], self._columns, factors)
        factors.settle()

    def _by_tokens(self, x: torch.Tensor, part: Part) -> torch.Tensor:
        """Of results (Tq, heads, ...) that ranks have parts of, all heads of the queries of ``part``, in float64. Collective."""
        heads, mine, found = self._heads("out"), self._part("out").tokens, x
        for rank, wanted in enumerate(self._ranks.all_gather_object(part.tokens)):
            whole = x.new_zeros((len(wanted), self._problem.heads.q, *x.shape[2:]), dtype=torch.float64)
            order = np.argsort(wanted)
            at, places = owned(mine, wanted[order])
            whole[torch.from_numpy(order).to(x.device)[places.to(x.device)], heads.start : heads.stop] = x[at.to(x.device)].double()
            whole = self._ranks.reduce(whole)
            found = whole if rank == self._rank else found
        return found

    def _measure_distance(self, asked: Computed, shard: Shard, result: Result) -> None:
        """How far out is from what another mask gives. Collective."""
        exact = rows(asked, self._problem, replace(shard, dout=None), self._rows, self._ranks, scores=False)["out"].value
        mine, at = owned(self._part("out").tokens, self._rows)
        heads, device = self._heads("out"), exact.device
        want = exact[at.to(device), heads.start : heads.stop]
        sums = torch.stack([(result.out[mine.to(device)].double() - want).square().sum(), want.square().sum()])
        between, size = self._ranks.reduce(sums).tolist()
        self.distance = math.sqrt(between / size) if size else math.inf if between else 0.0

    def _compare(self, name: str, got: torch.Tensor, exact: Exact, wanted: Ints, factors: _Factors) -> None:
        """Elements, each row's elements together, and each head's factor."""
        mine, at = owned(self._part(name).tokens, wanted)
        heads = self._heads(name)
        parts = (exact.value, exact.spread, exact.common, exact.floor, exact.count)
        of_heads = (x if x.shape[1] == 1 else x[:, heads.start : heads.stop] for x in parts)
        own = Exact(*(x[at.to(x.device)] for x in of_heads))
        rows_got = got[mine.to(got.device)].double()
        tokens = wanted[at.numpy()]
        if name == "lse":
            self.judge.elements(
                REFERENCE, name, rows_got, own.value, self._bounds.lse(own.value, own.spread), tokens, first=heads.start
            )
            return
        bound = self._allowed(name, own)
        self.judge.elements(REFERENCE, name, rows_got, own.value, bound, tokens, first=heads.start)
        together = ((rows_got - own.value) / bound.clamp_min(torch.finfo(torch.float64).tiny)).square().mean(-1).sqrt()
        limit = torch.full_like(together, TOGETHER)
        self.judge.elements("rows together", name, together, torch.zeros_like(together), limit, tokens, first=heads.start)
        # Each element counts by how well its bound lets it tell, so that a few large ones do not hide what all others share.
        told = exact.value / self._allowed(name, exact)
        for head in range(told.shape[1]):
            place, some = head - heads.start, None
            if head in heads:
                got_of, value, spread = (x[:, place] / bound[:, place] for x in (rows_got, own.value, own.spread))
                some = (got_of, value, spread)
            factors.add("factor", name, head, some, self._bounds.slope(told[:, head]))

    def _allowed(self, name: str, exact: Exact) -> torch.Tensor:
        if name == "out":
            return self._bounds.element(exact.spread, exact.common, exact.floor)
        return self._bounds.summed(exact.spread, exact.common, exact.floor, exact.count)

    def _conserved(self, shard: Shard, result: Result) -> None:
        """Sums that no attention changes, by key/value head: dv with dout, dout.out with dv.v, q.dq with k.dk. A sink takes its
        share of dout. Of latent heads dk has dv in it, so k.dk is q.dq and dout.out together."""
        heads, dout = self._problem.heads, shard.dout
        assert dout is not None
        assert result.dq is not None
        assert result.dk is not None
        group, sums, names = heads.q // heads.kv, [], []
        equal: list[tuple[str, torch.Tensor, tuple[torch.Tensor, ...], tuple[int, ...]]]
        for head in range(heads.kv):  # one in float64 at a time
            own = slice(head * group, (head + 1) * group)
            q, dq, douts, out = (x[:, own].double() for x in (shard.q, result.dq, dout, result.out))
            k, dk = (x[:, head].double() for x in (shard.k, result.dk))
            if result.dv is None:
                equal = [("dk.k = dq.q + dout.out", dk * k, (dq * q, douts * out), (0, 1))]
            else:
                v, dv = (x[:, head].double() for x in (shard.v, result.dv))
                seen = torch.where(torch.isfinite(result.lse[:, own])[..., None], douts, 0.0)
                if shard.sink is not None:
                    seen = seen * -torch.expm1(shard.sink[own].double() - result.lse[:, own].double())[..., None]
                equal = [
                    ("dv = dout", dv, (seen,), (0,)),
                    ("dv.v = dout.out", dv * v, (douts * out,), (0, 1)),
                    ("dk.k = dq.q", dk * k, (dq * q,), (0, 1)),
                ]
            for name, keys, several, dims in equal:
                queries = [x.flatten(0, 1) for x in several]
                right = torch.stack([x.sum(dims) for x in queries]).sum(0)
                squares = torch.stack([x.square().sum(dims) for x in (keys, *queries)]).sum(0)
                sums.append(torch.stack([keys.sum(dims), right, squares]).reshape(3, -1))
                names.append((name, f"key/value head {head}"))
        for (name, where), (left, right, squares) in zip(names, self._ranks.reduce_together(*sums), strict=True):
            errors, bounds = (left - right).abs(), self._bounds.factor * self._bounds.unit * squares.sqrt()
            for one, allowed in zip(errors.tolist(), bounds.tolist(), strict=True):
                self.judge.number(SUMS, name, one, allowed, where)


class _Factors:
    """Factors by which what heads gave follows what is exact, on all ranks together, and how far from 1 each may be."""

    def __init__(self, judge: Judge, ranks: Ranks, device: torch.device) -> None:
        self._judge, self._ranks, self._device = judge, ranks, device
        self._of: list[tuple[str, str, int, float]] = []
        self._products: list[torch.Tensor | None] = []

    def add(self, part: str, tensor: str, head: int, own: tuple[torch.Tensor, ...] | None, allowed: float) -> None:
        """This rank's elements of a tensor of one head: what it gave, what is exact, and the root of the sum of the squares of each
        one's terms; None: it does not hold the head. All ranks add the same heads in the same order."""
        self._of.append((part, tensor, head, allowed))
        if own is None:
            self._products.append(None)
            return
        got, want, spread = own
        terms = spread.square().expand_as(want).sum()
        self._products.append(torch.stack([(got.double() * want).sum(), want.square().sum(), terms]))

    def settle(self) -> None:
        """Judge all of them after one message. Collective."""
        if not self._of:
            return
        nothing = torch.zeros(3, dtype=torch.float64, device=self._device)
        products = self._ranks.reduce(torch.stack([nothing if x is None else x for x in self._products])).tolist()
        for (part, tensor, head, allowed), (product, squares, terms) in zip(self._of, products, strict=True):
            # Terms may cancel in all elements; what rounding in float64 leaves of them has no factor.
            if squares > CANCELLED**2 * terms:
                self._judge.number(part, tensor, abs(product / squares - 1), allowed, f"head {head}")


def _by_head(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(T, H) of a (T, H, D), a head in float64 at a time: all of a long sequence would be more than a cell needs itself."""
    return torch.stack([function(x[:, head].double()) for head in range(x.shape[1])], 1)


def _number(seed: list[int]) -> int:
    return int(np.random.default_rng(seed).integers(0, 1 << 31))
