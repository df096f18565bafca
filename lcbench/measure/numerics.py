"""The check of a cell: the first pass against float64, probe passes whose results are known, and the last pass against the first.

    who owns what      tokens of all ranks together are 0 ... S-1, each once
    first pass         rows and columns against the float64 reference; in float32 and float64 sums that must be conserved
    level, zero        probe passes: every row and column of every head, closed form (``measure.probe``)
    last passes        the last timed one, and one after all else: inputs negated in place must negate all results but LSE

docs/measuring.md says what each part can see and what it cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lcbench.cp.base import RankRun
from lcbench.masks.band import Ints
from lcbench.masks.mask import Mask
from lcbench.measure.bounds import TOGETHER, Bounds, Check, Judge, of_groups, verdict
from lcbench.measure.probe import Probe, Terms
from lcbench.measure.ranks import EVERY, Ranks, first_refusal
from lcbench.measure.reference import Exact, Shard, columns, owned, rows, sample
from lcbench.problem import Problem

REFERENCE, SUMS = "reference", "conserved"
CANCELLED = 1e-6  # of the size of terms: what is left of them when they cancel
CONSERVED = ("dv = dout", "dv.v = dout.out", "dk.k = dq.q")


@dataclass(frozen=True)
class Result:
    """What a pass gave for a rank's tokens; gradients are None for a forward-only cell."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None

    def named(self) -> dict[str, torch.Tensor]:
        """The tensors by name, LSE last."""
        named = {"out": self.out, "dq": self.dq, "dk": self.dk, "dv": self.dv, "lse": self.lse}
        return {name: x for name, x in named.items() if x is not None}


def one_pass(run: RankRun, shard: Shard) -> Result:
    """Forward, LSE and backward of this rank. Collective."""
    out, saved = run.forward(shard.q, shard.k, shard.v)
    lse = run.lse(saved)
    return Result(out, lse, *(run.backward(shard.dout, saved) if shard.dout is not None else ()))


def misowned(tokens: Ints, seqlen: int, device: torch.device, ranks: Ranks) -> str | None:
    """What is wrong with who owns which token of a sequence; None if the ranks that share it own each once together. Of several
    sequences the first that something is wrong with. Collective over all ranks.
    """
    own = _misowned(tokens, seqlen, device, ranks)
    return first_refusal(EVERY.all_gather_object(own and _named(ranks.name, own)))


def _named(name: str, line: str) -> str:
    return f"{name}: {line}" if name else line


def _misowned(tokens: Ints, seqlen: int, device: torch.device, ranks: Ranks) -> str | None:
    inside = tokens[(tokens >= 0) & (tokens < seqlen)]
    # The last place counts what is no token of the sequence.
    found = ranks.reduce(torch.from_numpy(np.append(np.bincount(inside, minlength=seqlen), len(tokens) - len(inside))).to(device))
    counts, outside = found[:-1], int(found[-1])
    wrong = torch.nonzero(counts != 1).flatten()
    if outside:
        return f"{outside} tokens that ranks own are not among the {seqlen} of the sequence"
    if len(wrong):
        first = int(wrong[0])
        return f"{len(wrong)} of {seqlen} tokens are not owned by exactly one rank; token {first} by {int(counts[first])}"
    return None


class Examination:
    """The check of one draw of a cell, on one rank; its methods are collective among ``ranks``, and called in this order.

    Args:
        ranks: those that share the sequence.
        own_lse: whether the LSE that ``run.lse`` gives is the run's own; another is compared with nothing.
        seed: of the sample and of the probes: the cell's seed and the attempt, so that repeats look elsewhere.
    """

    def __init__(
        self,
        run: RankRun,
        mask: Mask,
        problem: Problem,
        tokens: Ints,
        bounds: Bounds,
        seed: list[int],
        ranks: Ranks,
        *,
        own_lse: bool,
    ) -> None:
        self._run, self._mask, self._problem, self._tokens, self._bounds, self._seed = run, mask, problem, tokens, bounds, seed
        self._ranks = ranks
        self._judge = Judge()
        self._keys = mask.density * mask.num_k  # of a row, in the mean
        self._rows = sample(mask, "q", seed, problem.heads.q)
        self._columns = sample(mask, "k", seed, problem.heads.q)
        self._unchecked = {} if own_lse else {"lse": "the library gives none of its own"}
        self._digest: dict[str, torch.Tensor] = {}

    @property
    def held_bytes(self) -> int:
        """Memory that this object holds on the device between the first pass and the last."""
        return sum(x.numel() * x.element_size() for x in self._digest.values())

    def begin(self, result: Result) -> None:
        """Keep of the first pass what later ones are compared with."""
        self._digest = self._digested(result)

    def first(self, shard: Shard, result: Result) -> None:
        """Check the first pass."""
        self.begin(result)
        self._against_reference(shard, result)
        if not self._bounds.half and shard.dout is not None:
            self._conserved(shard, result)

    @property
    def probes(self) -> list[str]:
        """Which probe passes there are: queries of zeros show more only of gradients and of kernels that round their scores."""
        return ["level", "zero"] if self._problem.backward or self._bounds.rounding.scores else ["level"]

    def probe(self, name: str, shard: Shard) -> None:
        """A probe pass. It takes the place of the inputs in memory: ``shard`` has to be drawn anew after it."""
        zero = name == "zero"
        probe = Probe(self._mask, self._problem, self._tokens, _number(self._seed), shard.q.device, self._ranks.reduce, zero=zero)
        probe.fill(shard.q, shard.k, shard.v, shard.dout)
        result = one_pass(self._run, shard)
        score, bounds = abs(probe.largest_score), self._bounds
        factors = _Factors(self._judge, self._ranks)
        for head in range(self._problem.heads.q):
            want = probe.rows(head)
            if "lse" not in self._unchecked:
                self._of_head(name, head, "lse", result.lse[:, head], want.lse, bounds.count(want.lse, want.key, score))
            lse = want.lse.nan_to_num(neginf=0.0)[:, None]
            allowed = bounds.out(want.out_spread, want.out_common, want.out, want.key[:, None], lse, want.count[:, None])
            self._of_head(name, head, "out", result.out[:, head], want.out, allowed)
            if result.dq is not None and want.gradient is not None:
                self._of_terms(name, head, "dq", result.dq, want.gradient, want.count, factors)
        if result.dk is None or result.dv is None:
            return
        for head in range(self._problem.heads.kv):
            sums = probe.columns(head)
            for tensor, got, terms in (("dk", result.dk, sums.dk), ("dv", result.dv, sums.dv)):
                self._of_terms(name, head, tensor, got, terms, sums.count, factors)
        factors.settle()

    def _of_terms(
        self, probe: str, head: int, tensor: str, got: torch.Tensor, terms: Terms, count: torch.Tensor, factors: _Factors
    ) -> None:
        """Elements of one head of a gradient, and their part in the factor that all of them have in common."""
        scores, common = tensor in ("dq", "dk"), terms.value.abs() + terms.common
        bound = self._bounds.probed(terms.spread, common, terms.floor, count[:, None], scores=scores)
        self._of_head(probe, head, tensor, got[:, head], terms.value, bound)
        allowed = self._bounds.shared(self._keys, scores=scores)
        factors.add(f"{probe}, factor", tensor, head, got[:, head], terms.value, terms.spread, allowed)

    def last(self, part: str, result: Result, negated: bool) -> None:
        """Check a later pass on the inputs of the first, or on the negative of all of them: all but LSE is then negative too."""
        half, digest = self._bounds.half, self._digested(result)
        unit = (16 if half else 4) * self._bounds.unit
        norms = {name: _by_head(x, lambda one: one.square().sum(-1).sqrt()) for name, x in result.named().items() if name != "lse"}
        squares = self._ranks.reduce(torch.stack([x.square().sum() for x in norms.values()]))
        for (name, norm), square in zip(norms.items(), squares, strict=True):
            # Sums in another order end up elsewhere by what rounds their terms, which are as large where little is left.
            usual = (square / (norm.shape[1] * self._problem.seqlen)).sqrt()
            bound = unit * (norm + 16 * usual * (2.0**-10 if half else 1.0))
            self._judge.elements(part, name, digest[name], (-1.0 if negated else 1.0) * self._digest[name], bound, self._tokens)
        if "lse" not in self._unchecked:
            size = self._digest["lse"].abs().nan_to_num(posinf=0.0) + 1
            self._judge.elements(part, "lse", digest["lse"], self._digest["lse"], (1e-5 if half else unit) * size, self._tokens)

    def check(self) -> Check:
        """What all ranks have found so far, of every sequence. Collective over all ranks."""
        whole = len(self._rows) == self._mask.num_q and len(self._columns) == self._mask.num_k
        judges = self._ranks.all_gather_object(self._judge.found)
        own = verdict(judges, REFERENCE, len(self._rows), len(self._columns), whole, self._unchecked)
        checks: dict[str, Check] = dict(EVERY.all_gather_object((self._ranks.name, own)))
        return of_groups(checks) if len(checks) > 1 else own

    # -- parts -----------------------------------------------------------------------------------------------------

    def _of_head(self, part: str, head: int, tensor: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> None:
        self._judge.elements(part, tensor, got.double(), want, bound, self._tokens, head)

    def _digested(self, result: Result) -> dict[str, torch.Tensor]:
        """A number per token and head of each tensor: elements with signs of their own, added up."""
        found = {"lse": result.lse.double()}
        for name, x in result.named().items():
            if name != "lse":
                signs = torch.from_numpy(np.random.default_rng(len(name)).choice([-1.0, 1.0], x.shape[-1])).to(x.device)
                found[name] = _by_head(x, lambda one, signs=signs: one @ signs)  # type: ignore[misc]
        return found

    def _against_reference(self, shard: Shard, result: Result) -> None:
        scores, factors = self._bounds.rounding.scores, _Factors(self._judge, self._ranks)
        exact = rows(self._mask, self._problem, shard, self._rows, self._ranks, scores=scores)
        for name in [str(n) for n in ("out", "dq", "lse") if n in exact and n not in self._unchecked]:
            self._compare(name, result.named()[name], exact[name], self._rows, factors)
        if shard.dout is None:
            factors.settle()
            return
        lse, out = result.lse, result.out
        if len(self._rows) == self._mask.num_q:
            own = torch.from_numpy(shard.tokens).to(out.device)
            lse, out = exact["lse"].value[own], exact["out"].value[own]
        exact = columns(self._mask, self._problem, shard, self._columns, self._ranks, lse, out, scores=scores)
        for name in ("dk", "dv"):
            self._compare(name, result.named()[name], exact[name], self._columns, factors)
        factors.settle()

    def _compare(self, name: str, got: torch.Tensor, exact: Exact, wanted: Ints, factors: _Factors) -> None:
        """Elements, each row's elements together, and each head's factor."""
        mine, at = owned(self._tokens, wanted)
        own = Exact(*(x[at.to(x.device)] for x in (exact.value, exact.spread, exact.common, exact.floor, exact.count)))
        rows_got = got[mine.to(got.device)].double()
        tokens = wanted[at.numpy()]
        if name == "lse":
            self._judge.elements(REFERENCE, name, rows_got, own.value, self._bounds.lse(own.value, own.spread), tokens)
            return
        bound = self._allowed(name, own)
        self._judge.elements(REFERENCE, name, rows_got, own.value, bound, tokens)
        together = ((rows_got - own.value) / bound.clamp_min(torch.finfo(torch.float64).tiny)).square().mean(-1).sqrt()
        limit = torch.full_like(together, TOGETHER)
        self._judge.elements("rows together", name, together, torch.zeros_like(together), limit, tokens)
        # Each element counts by how well its bound lets it tell, so that a few large ones do not hide what all others share.
        told = exact.value / self._allowed(name, exact)
        for head in range(told.shape[1]):
            got_of, value, spread = (x[:, head] / bound[:, head] for x in (rows_got, own.value, own.spread))
            factors.add("factor", name, head, got_of, value, spread, self._bounds.slope(told[:, head]))

    def _allowed(self, name: str, exact: Exact) -> torch.Tensor:
        if name == "out":
            return self._bounds.element(exact.spread, exact.common, exact.floor)
        return self._bounds.summed(exact.spread, exact.common, exact.floor, exact.count)

    def _conserved(self, shard: Shard, result: Result) -> None:
        """Sums that no attention changes, by key/value head: dv with dout, dout.out with dv.v, q.dq with k.dk."""
        heads, dout = self._problem.heads, shard.dout
        assert dout is not None
        assert result.dq is not None
        assert result.dk is not None
        assert result.dv is not None
        group, sums = heads.q // heads.kv, []
        for head in range(heads.kv):  # one in float64 at a time
            own = slice(head * group, (head + 1) * group)
            q, dq, douts, out = (x[:, own].double() for x in (shard.q, result.dq, dout, result.out))
            k, dk, v, dv = (x[:, head].double() for x in (shard.k, result.dk, shard.v, result.dv))
            seen = torch.where(torch.isfinite(result.lse[:, own])[..., None], douts, 0.0)
            for keys, queries, dims in ((dv, seen, (0,)), (dv * v, douts * out, (0, 1)), (dk * k, dq * q, (0, 1))):
                queries = queries.flatten(0, 1)
                squares = keys.square().sum(dims) + queries.square().sum(dims)
                sums.append(torch.stack([keys.sum(dims), queries.sum(dims), squares]).reshape(3, -1))
        for number, (left, right, squares) in enumerate(self._ranks.reduce_together(*sums)):
            errors, bounds = (left - right).abs(), self._bounds.factor * self._bounds.unit * squares.sqrt()
            for one, allowed in zip(errors.tolist(), bounds.tolist(), strict=True):
                self._judge.number(SUMS, CONSERVED[number % 3], one, allowed, f"key/value head {number // 3}")


class _Factors:
    """Factors by which what heads gave follows what is exact, on all ranks together, and how far from 1 each may be."""

    def __init__(self, judge: Judge, ranks: Ranks) -> None:
        self._judge, self._ranks = judge, ranks
        self._of: list[tuple[str, str, int, float]] = []
        self._products: list[torch.Tensor] = []

    def add(
        self, part: str, tensor: str, head: int, got: torch.Tensor, want: torch.Tensor, spread: torch.Tensor, allowed: float
    ) -> None:
        """This rank's elements of a tensor of one head; ``spread``: root of the sum of the squares of each one's terms."""
        self._of.append((part, tensor, head, allowed))
        terms = spread.square().expand_as(want).sum()
        self._products.append(torch.stack([(got.double() * want).sum(), want.square().sum(), terms]))

    def settle(self) -> None:
        """Judge all of them after one message. Collective."""
        if not self._of:
            return
        products = self._ranks.reduce(torch.stack(self._products)).tolist()
        for (part, tensor, head, allowed), (product, squares, terms) in zip(self._of, products, strict=True):
            # Terms may cancel in all elements; what rounding in float64 leaves of them has no factor.
            if squares > CANCELLED**2 * terms:
                self._judge.number(part, tensor, abs(product / squares - 1), allowed, f"head {head}")


def _by_head(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(T, H) of a (T, H, D), a head in float64 at a time: all of a long sequence would be more than a cell needs itself."""
    return torch.stack([function(x[:, head].double()) for head in range(x.shape[1])], 1)


def _number(seed: list[int]) -> int:
    return int(np.random.default_rng(seed).integers(0, 1 << 31))
