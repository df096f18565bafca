"""How far a sound run may be from what is exact, and the judge that keeps what came nearest to it or went beyond.

A result is a sum of terms, each rounded by itself: what is left of that is the root of the sum of their squares (the *spread*),
times half a unit in the last place, and a factor that covers the largest of millions of elements. Where many terms share their
rounding, their sizes add up (*common*). Both are those of the row, column or element itself, never of the largest in a sample. LSE
has a type of its own, float32, and is judged by it. docs/measuring.md has the factors' calibration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lcbench.kernels.base import Rounding
from lcbench.masks.band import Ints
from lcbench.problem import Problem

HALF_FACTOR = 10.0
SINGLE_FACTOR = 300.0
FLOAT64_BOUND = 1e-12
# Share of the factor for what is common to many terms: it has no largest of millions.
COMMON = 0.4
# Of a row's or column's elements together, a share of the factor for one of them.
TOGETHER = 0.4
HALF_LSE = 1e-4  # some kernels take a fast exponential for half types
ULPS = 4.0  # of a float32 LSE
# Of a factor that all elements have in common: units, and standard deviations of what roundings make of it.
COMMON_HALF, COMMON_SINGLE, SIGMAS = 0.25, 40.0, 6.0
PROBE_HALF, PROBE_SINGLE = 1.75, 100.0
# dq and dk of a probe in half types come this much nearer: their terms have both signs, and half of a pass rounds nothing alike.
SCORES_HALF, SCORES_FACTOR_HALF = 0.4, 0.7
# Equal weights, added one by one in float32, are rounded in the same direction again and again: units per root of their number.
ONE_BY_ONE = 16.0
# Steps of sums in the inputs' type per unit of variance that they add to that of one rounding.
STEPS = 3.0


@dataclass(frozen=True)
class Bounds:
    """What is allowed of one problem on one kernel.

    Args:
        parts: partial results that are merged, over ranks and native calls.
        hops: additions of gradients in the inputs' type on their way between ranks.
    """

    problem: Problem
    rounding: Rounding
    parts: int = 1
    hops: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.problem.dtype)  # type: ignore[no-any-return]

    @property
    def half(self) -> bool:
        return self.dtype.itemsize == 2

    @property
    def unit(self) -> float:
        """Half a unit in the last place of 1, in the inputs' type."""
        return torch.finfo(self.dtype).eps / 2

    @property
    def tiny(self) -> float:
        """The smallest number of the type: what float16 rounds small weights by."""
        return torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps

    @property
    def factor(self) -> float:
        if self.dtype == torch.float64:
            return FLOAT64_BOUND / self.unit
        return HALF_FACTOR if self.half else SINGLE_FACTOR

    def _wide(self) -> float:
        return torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).eps

    def element(self, spread: torch.Tensor, common: torch.Tensor, floor: torch.Tensor | float = 0.0) -> torch.Tensor:
        """What an element may be off by."""
        return self.factor * self.unit * (spread + COMMON * common) + self.tiny * floor

    def summed(self, spread: torch.Tensor, common: torch.Tensor, floor: torch.Tensor | float, count: torch.Tensor) -> torch.Tensor:
        """What an element of a gradient may be off by; ``count``: tokens that it is summed over."""
        steps = self.hops + (count / self.rounding.sums_every if self.rounding.sums_every and self.half else 0.0 * count)
        return self.element(spread, common, floor) * torch.sqrt(1 + steps / STEPS)

    def probed(
        self, spread: torch.Tensor, common: torch.Tensor, floor: torch.Tensor | float, count: torch.Tensor, *, scores: bool
    ) -> torch.Tensor:
        """The same for a probe; ``scores``: of a gradient that comes by way of the scores, dq or dk."""
        return self.summed(spread, common, floor, count) * (SCORES_HALF if scores and self.half else 1.0)

    def lse(self, lse: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
        """What an LSE may be off by; ``spread``: of its scores, weighted."""
        size = torch.where(torch.isfinite(lse), lse.abs(), 0.0).clamp_min(1.0)
        if self.dtype == torch.float64:
            return FLOAT64_BOUND * size
        single = (ULPS + math.sqrt(self.parts)) * self._wide() * size
        rough = 2 * self.unit * (1 + 2 * spread) if self.rounding.scores else 0.0 * size
        return ULPS * single + (HALF_LSE + self.rounding.exponential if self.half else 0.0) + rough

    def count(self, lse: torch.Tensor, key: torch.Tensor, score: float) -> torch.Tensor:
        """What an LSE of a probe may be off by: half of what one key makes, if float32 can tell; never more than ``lse`` allows.

        Args:
            key: what the lightest key makes of the sum of weights.
            score: the largest score.
        """
        size = torch.where(torch.isfinite(lse), lse.abs(), 0.0).clamp_min(1.0)
        if self.dtype == torch.float64:
            return FLOAT64_BOUND * size
        single = (ULPS + math.sqrt(self.parts)) * self._wide() * size / 2
        rough = 2 * self.unit * score if self.rounding.scores else 0.0
        rough += self.rounding.exponential if self.half else 0.0
        return torch.maximum(single, torch.minimum(0.5 * key, ULPS * single)) + rough

    def out(
        self,
        spread: torch.Tensor,
        common: torch.Tensor,
        out: torch.Tensor,
        key: torch.Tensor,
        lse: torch.Tensor,
        count: torch.Tensor,
    ) -> torch.Tensor:
        """What an element of a probe's out may be off by: a quarter of a key, and what rounds many keys alike."""
        shared: float | torch.Tensor = 8.0 if self.rounding.scores else 4.0
        if not self.half:
            shared = ONE_BY_ONE * torch.sqrt(count)
        if self.dtype == torch.float64:
            return FLOAT64_BOUND * (common + out.abs() + spread)
        merged = 0.0 if self.parts == 1 else 4 * self._wide() * (1 + lse.abs())
        own = torch.minimum(self.factor * self.unit * spread, 0.25 * key)
        return own + merged + self.unit * shared * (common + out.abs()) + self.tiny

    def shared(self, count: float, *, scores: bool) -> float:
        """How far from 1 the factor may be by which all elements of a probe's gradient follow the exact ones; where all rows see as
        many keys, their weights are rounded alike. ``count``: keys of a row in the mean, and so terms of an element; ``scores``: of
        dq or dk."""
        if self.dtype == torch.float64:
            return FLOAT64_BOUND
        if not self.half:
            return self.unit * (PROBE_SINGLE + ONE_BY_ONE * math.sqrt(count))
        again = self.rounding.scores or self.rounding.sums_every  # and then rounded alike once more
        # Weights are about 1 / count, which float16 holds as so many of its smallest numbers.
        of_gradient = (self.unit * PROBE_HALF + self.tiny * count) * (2 if again else 1) + 4 * self.rounding.exponential
        return of_gradient * (SCORES_FACTOR_HALF if scores else 1.0)

    def slope(self, told: torch.Tensor) -> float:
        """How far from 1 the factor may be by which all elements follow the exact ones: their roundings, and a share of one that
        many have in common. ``told``: exact elements over what each may be off by."""
        squares = float(told.square().sum())
        if squares == 0:
            return math.inf
        noise = 1 / math.sqrt(squares) / self.factor
        if self.dtype == torch.float64:
            return FLOAT64_BOUND + self.factor * noise
        return self.unit * (COMMON_HALF if self.half else COMMON_SINGLE) + SIGMAS * noise * (1.0 if self.half else 20.0)


@dataclass
class Worst:
    """The element that came nearest to its bound: ``ratio`` of the bound, infinite where it is no number. ``largest`` is the
    largest error of any element, and ``allowed`` its bound."""

    ratio: float = 0.0
    error: float = 0.0
    bound: float = 0.0
    where: str = ""
    largest: float = 0.0
    allowed: float = 0.0


@dataclass(frozen=True)
class Check:
    """What the check found.

    Attributes:
        errors, bounds: by tensor, of the reference's sample: the largest error, and what was allowed there.
        ratios: error over bound, of the worst element, by part of the check and tensor: above 1 is out.
        failures: one line per part and tensor that is out.
        rows, columns: of the reference, ``whole`` if these are all.
        unchecked: what could not be checked, and why.
    """

    errors: dict[str, float]
    bounds: dict[str, float]
    rows: int
    columns: int
    whole: bool
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)

    @property
    def of_bound(self) -> float:
        """The largest error over its bound of all."""
        return max((ratio for part in self.ratios.values() for ratio in part.values()), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        return {
            "errors": self.errors, "bounds": self.bounds, "rows": self.rows, "columns": self.columns,
            "reference": "whole" if self.whole else "sampled", "of_bound": self.ratios, "unchecked": self.unchecked,
        }  # fmt: skip


class Judge:
    """Collects, on one rank, the worst of each part of the check."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Worst] = {}

    def elements(
        self,
        part: str,
        tensor: str,
        got: torch.Tensor,
        exact: torch.Tensor,
        bound: torch.Tensor,
        tokens: Ints,
        head: int | None = None,
        first: int = 0,
    ) -> None:
        """Compare elements, (T, ...) each, of these tokens, of one ``head`` or of those from ``first`` on; equal infinities agree,
        all else that is no number is out."""
        worst = self.found.setdefault((part, tensor), Worst())
        if not exact.numel():
            return
        error = torch.where(got == exact, 0.0, (got - exact).abs())
        bound = bound.broadcast_to(exact.shape)
        ratio = torch.where(error == 0, 0.0, error / bound)
        ratio = torch.where(torch.isfinite(ratio) & torch.isfinite(error), ratio, torch.inf)
        most, place = error.flatten().max(0)
        if not float(most) <= worst.largest:
            worst.largest, worst.allowed = float(most), float(bound.flatten()[place])
        highest, place = ratio.flatten().max(0)
        if float(highest) > worst.ratio or not worst.where:
            at = [int(i) for i in np.unravel_index(int(place), exact.shape)]  # torch's imports sympy at first use
            heads = [head] if head is not None else [first + at[1]] if exact.ndim > 1 else []
            worst.where = ", ".join([f"token {int(tokens[at[0]])}", *(f"head {h}" for h in heads)])
            worst.ratio, worst.error, worst.bound = float(highest), float(error[tuple(at)]), float(bound[tuple(at)])

    def number(self, part: str, tensor: str, error: float, bound: float, where: str) -> None:
        """Compare one number."""
        worst = self.found.setdefault((part, tensor), Worst())
        ratio = 0.0 if error == 0 else error / bound if bound and math.isfinite(error) else math.inf
        if not error <= worst.largest:
            worst.largest, worst.allowed = error, bound
        if ratio > worst.ratio or not worst.where:
            worst.ratio, worst.error, worst.bound, worst.where = ratio, error, bound, where


def verdict(
    judges: Sequence[dict[tuple[str, str], Worst]], reference: str, rows: int, columns: int, whole: bool, unchecked: dict[str, str]
) -> Check:
    """What all ranks found together; ``reference``: the part whose errors are reported by size."""
    ratios: dict[str, dict[str, float]] = {}
    failures, errors, bounds = [], {}, {}
    for part, tensor in dict.fromkeys(key for found in judges for key in found):
        worst = max((found[part, tensor] for found in judges if (part, tensor) in found), key=lambda w: w.ratio)
        ratios.setdefault(part, {})[tensor] = worst.ratio
        if part == reference:
            most = max((found[part, tensor] for found in judges if (part, tensor) in found), key=lambda w: w.largest)
            errors[tensor], bounds[tensor] = most.largest, most.allowed
        if not worst.ratio <= 1.0:
            failures.append(f"{tensor}: error {worst.error:.3g} above its bound {worst.bound:.3g} ({part}, {worst.where})")
    return Check(errors, bounds, rows, columns, whole, ratios, failures, unchecked)


def of_groups(checks: dict[str, Check]) -> Check:
    """What was found in several context-parallel groups, by their names: a failure says in which, other numbers are the worst."""
    every = list(checks.values())
    parts = dict.fromkeys((part, tensor) for check in every for part, found in check.ratios.items() for tensor in found)
    ratios: dict[str, dict[str, float]] = {}
    for part, tensor in parts:
        ratios.setdefault(part, {})[tensor] = max(check.ratios.get(part, {}).get(tensor, 0.0) for check in every)
    worst = {
        tensor: max((check for check in every if tensor in check.errors), key=lambda check: check.errors[tensor])
        for tensor in dict.fromkeys(tensor for check in every for tensor in check.errors)
    }
    return Check(
        {tensor: check.errors[tensor] for tensor, check in worst.items()},
        {tensor: check.bounds[tensor] for tensor, check in worst.items()},
        min(check.rows for check in every),
        min(check.columns for check in every),
        all(check.whole for check in every),
        ratios,
        [f"{name}: {failure}" for name, check in checks.items() for failure in check.failures],
        {tensor: why for check in every for tensor, why in check.unchecked.items()},
    )
