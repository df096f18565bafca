"""What may be said about a time and about a difference: intervals and p values of medians, of ratios, and of many ratios at once.

The unit is the block: a cell is timed several times in its job, each time built anew, and gives one value each time. The model is
``log t(cell, block) = mu(cell) + e`` with a normal ``e`` that differs from block to block: drift, placement, building anew and what
the iterations of a block leave open. Iterations of one block share most of this, so they are not counted as independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import digamma, fdtrc, stdtr, stdtrit, zeta

from lcbench.measure.stopping import median_interval

Floats = NDArray[np.float64]

LEVEL = 0.05
NORMAL_95 = 1.959964
# Fewer cells than these say nothing about how the noise differs between cells: each stands by its own blocks.
SHARED = 5
# How much a prior from other cells counts beside what its estimate claims, once cells differ in their noise. Blocks are few, and
# verdicts rest on tails, where a prior that is trusted too much calls equal choices different.
TRUST = 0.25
# A cell whose blocks spread so improbably much for the others' noise stands by its own.
ALONE = 0.1
# Fewer ratios than these say nothing about how two sweeps differ where nothing was changed.
ENOUGH = 4
# How improbable a ratio has to be among the others to count as changed: where the blocks explain the spread of the rest, and else.
CHANGED = (0.03, 0.01)
# How improbable a spread has to be to be more than the blocks explain.
BEYOND_BLOCKS = 0.1
BATCHES = 5
# Degrees of freedom of what is taken as known.
KNOWN = 1e9


@dataclass(frozen=True)
class Timing:
    """What was measured of a phase of one cell. ``value``: its time in seconds; ``blocks``: seconds of each block; ``within``: of a
    single block, standard deviation of the logarithm of its time as its own iterations show it, else 0.
    """

    value: float
    blocks: tuple[float, ...]
    within: float

    @classmethod
    def of(cls, metrics: Mapping[str, Any], samples: Mapping[str, Any], phase: str) -> Timing | None:
        """From an attempt's metrics and samples; None if the phase was not measured, or what is there are no times. What is older
        than blocks has one.
        """
        iterations, value = samples.get(f"{phase}_s"), metrics.get(f"time/{phase}/median_s")
        if not (_are_times(iterations) and _are_times([value])):
            return None
        value, blocks = float(value), samples.get(f"block_{phase}_s")  # type: ignore[arg-type]
        if _are_times(blocks) and len(blocks) > 1:  # type: ignore[arg-type]
            return cls(value, tuple(blocks), 0.0)  # type: ignore[arg-type]
        several = float(metrics.get("draws/count", 1.0)) > 1
        # Masks that were drawn differ in their work: the worst draw's noise counts for all.
        noise = math.log1p(max(metrics.get("time/noise", 0.0), 0.0)) / NORMAL_95
        return cls(value, (value,), noise if several else within_block(iterations))  # type: ignore[arg-type]

    @property
    def dof(self) -> int:
        return len(self.blocks) - 1

    @property
    def variance(self) -> float:
        """Of the logarithm of one block; 0 of a single block."""
        logs = [math.log(seconds) for seconds in self.blocks]
        mean = math.fsum(logs) / len(logs)
        return math.fsum((log - mean) ** 2 for log in logs) / self.dof if self.dof else 0.0


def _are_times(values: Any) -> bool:
    """Whether these are seconds: a result may be anybody's."""
    return isinstance(values, list) and bool(values) and all(isinstance(v, int | float) and 0 < v < math.inf for v in values)


def within_block(iterations: Sequence[float]) -> float:
    """Standard deviation of the logarithm of the median of one block's iterations, in seconds.

    It gives the wider of two 95 % intervals: that from order statistics, and that from the medians of consecutive batches (batch
    means, Conway 1963), which iterations that drift together narrow less. A single iteration has none, and gives 0.
    """
    median, (low, high) = float(np.median(iterations)), median_interval(iterations)
    half = max(math.log(high / median), math.log(median / low))
    if len(iterations) >= 2 * BATCHES:
        logs = np.log([np.median(batch) for batch in np.array_split(iterations, BATCHES)])
        half = max(half, float(logs.std(ddof=1) / math.sqrt(BATCHES) * stdtrit(BATCHES - 1, 1 - LEVEL / 2)))
    return half / NORMAL_95


@dataclass(frozen=True)
class Median:
    """A time in seconds, or a rate that comes from one. ``sigma``: standard deviation of its logarithm; ``dof``: its degrees of
    freedom; ``most_dof``: how many a difference of two such may have; ``known``: whether run-to-run noise is in ``sigma``.
    """

    value: float
    sigma: float
    dof: float
    most_dof: float
    known: bool

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value * math.exp(-_reach(self.sigma, self.dof))

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value * math.exp(_reach(self.sigma, self.dof))

    def over(self, other: Median) -> Ratio:
        """Their ratio, with degrees of freedom by Welch and Satterthwaite (1946)."""
        mine, its = self.sigma**2, other.sigma**2
        least = mine**2 / self.dof + its**2 / other.dof
        dof = min((mine + its) ** 2 / least if least else KNOWN, self.most_dof, other.most_dof)
        return Ratio.of(self.value / other.value, math.sqrt(mine + its), dof, known=self.known and other.known)


@dataclass(frozen=True)
class Ratio:
    """``value`` with its 95 % interval, and ``p``: how probable one as far from 1 is where the truth is 1 (Student's t, two sides).

    ``sigma``: standard deviation of its logarithm, with ``dof`` degrees of freedom; ``known``: whether run-to-run noise is in it.
    """

    value: float
    low: float
    high: float
    p: float
    sigma: float
    dof: float
    known: bool

    @classmethod
    def of(cls, value: float, sigma: float, dof: float, *, known: bool) -> Ratio:
        reach, distance = math.exp(_reach(sigma, dof)), abs(math.log(value))
        p = 2 * float(stdtr(dof, -distance / sigma)) if sigma else float(distance == 0)
        return cls(value, value / reach, value * reach, p, sigma, dof, known)


def _reach(sigma: float, dof: float) -> float:
    """Half of a 95 % interval of a logarithm; what is not known at all is cut where numbers end."""
    return min(sigma * float(stdtrit(dof, 1 - LEVEL / 2)), 600.0) if sigma else 0.0


def holm(ps: Sequence[float]) -> list[float]:
    """P values adjusted so that of all that are true, any is below 5 % in 5 % of tables only (Holm 1979)."""
    order, count = np.argsort(ps), len(ps)
    adjusted = np.empty(count)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(ps)[order] * np.arange(count, 0, -1)))
    return [float(p) for p in adjusted]


def medians(timings: Sequence[Timing]) -> list[Median]:
    """The times of the cells of one sweep, whose blocks together tell the noise."""
    dofs = np.array([t.dof for t in timings], dtype=float)
    noise = noise_of([t.variance for t in timings], dofs)
    found = []
    for timing, variance, dof in zip(timings, noise.variance.tolist(), noise.dof.tolist(), strict=True):
        sigma = max(math.sqrt(variance / len(timing.blocks)), timing.within)
        found.append(Median(timing.value, sigma, dof or KNOWN, noise.total, dof > 0))
    return found


@dataclass(frozen=True)
class Noise:
    """``variance`` of the logarithm of one block, per cell, with its degrees of freedom ``dof`` (0: nothing is known); ``total``:
    the most that a difference of two may have.
    """

    variance: Floats
    dof: Floats
    total: float


def noise_of(variances: ArrayLike, dofs: ArrayLike) -> Noise:
    """What the blocks of many cells say about the noise of each. ``variances``: of the logarithm of a block, per cell; ``dofs``: of
    each, 0 where a cell has one block only.

    Where the cells' own variances differ no more than chance explains, they are pooled. Else each is moderated: drawn towards a
    common one, the less the more they differ (Smyth 2004), with a prior that counts ``TRUST``; and one that stands out (F test) is
    left as it is. Of fewer than ``SHARED`` cells with blocks each stands by its own.
    """
    every, dof = np.asarray(variances, dtype=float), np.asarray(dofs, dtype=float)
    own = dof > 0
    if own.sum() < SHARED:
        return Noise(np.where(own, every, 0.0), dof, KNOWN)
    mine, its = every[own], dof[own]
    total = float(its.sum())
    pooled = float(mine @ its) / total
    if pooled == 0:
        return Noise(np.zeros_like(every), np.full_like(dof, total), total)
    # Unbiased logarithms of the variances; a variance of 0 is rounding.
    logs = np.log(np.maximum(mine, 1e-5 * pooled)) - digamma(its / 2) + np.log(its / 2)
    spread = float(logs.var(ddof=1))
    beyond_chance = spread - float(zeta(2, its / 2).mean())
    if beyond_chance <= 0:
        common, prior = pooled, total
        variance, given = np.full_like(every, pooled), np.full_like(dof, total)
    else:
        claimed = 2 * _inverse_trigamma(beyond_chance)
        common = math.exp(logs.mean() + digamma(claimed / 2) - math.log(claimed / 2))
        # The common variance is itself an estimate from few cells.
        whole = 1 / (1 / claimed + spread / (2 * len(mine)))
        prior = TRUST * whole
        variance = (prior * common + dof * every) / (prior + dof)
        given = np.where(own, np.minimum(prior + dof, total), whole)
    alone = own & (fdtrc(np.maximum(dof, 1.0), prior, every / common) < ALONE)
    return Noise(np.where(alone, every, variance), np.where(alone, dof, given), total)


def _inverse_trigamma(value: float) -> float:
    """By Newton's method on its reciprocal, which is nearly straight (Smyth 2004, appendix)."""
    x = 0.5 + 1 / value
    for _ in range(20):
        there = float(zeta(2, x))
        x += there * (1 - there / value) / (-2 * float(zeta(3, x)))
    return x


def ratios(a: Sequence[Timing], b: Sequence[Timing]) -> tuple[list[Ratio], float | None]:
    """Times of ``b`` over those of ``a``, of the same cells in the same order in two sweeps; and the standard deviation of the
    logarithm by which two sweeps differ beyond what the blocks of each explain, None if there are too few cells to tell.

    A cell's noise is taken to be the same in both. Two sweeps also differ by what their blocks share (another day, another job).
    That shows in the spread of all ratios about their mean, without those that stand out as changed (generalised ESD, Rosner 1983).
    Where it is more than the blocks explain (F test), every interval has it: estimated from the *other* cells, so that a cell that
    changed does not widen its own. What stands out a little less counts as changed too, if the blocks explain the rest. An effect
    that all cells share is no spread, and cannot be told from a change.
    """
    counts = np.array([[len(t.blocks) for t in side] for side in (a, b)], dtype=float)
    dofs = (counts - 1).sum(0)
    sums = np.sum([[t.variance * t.dof for t in side] for side in (a, b)], axis=0)
    own = np.divide(sums, dofs, out=np.zeros_like(sums), where=dofs > 0)
    noise = noise_of(own, dofs)
    within = np.array([x.within**2 + y.within**2 for x, y in zip(a, b, strict=True)])
    per_block = (1 / counts).sum(0)
    variance, dof = np.maximum(noise.variance * per_block, within), np.where(noise.dof > 0, noise.dof, KNOWN)
    logs = np.array([math.log(y.value / x.value) for x, y in zip(a, b, strict=True)])
    known, between = noise.dof > 0, None
    if len(logs) >= ENOUGH:
        explained = np.where(dofs > 0, np.maximum(own * per_block, within), variance)
        variance, dof, between = _with_spread(logs, variance, dof, explained, dofs)
        known = np.ones_like(known)
    rows = zip(logs.tolist(), np.sqrt(variance).tolist(), dof.tolist(), known.tolist(), strict=True)
    return [Ratio.of(math.exp(log), sigma, f, known=k) for log, sigma, f, k in rows], between


def _with_spread(logs: Floats, variance: Floats, dof: Floats, explained: Floats, dofs: Floats) -> tuple[Floats, Floats, float]:
    """Variances and degrees of freedom with what two sweeps differ by beyond their blocks, and that as a standard deviation.

    Args:
        logs: of the ratios.
        variance: of each, as its blocks explain it, with ``dof`` degrees of freedom.
        explained: the same from each cell's own blocks, which have ``dofs``.
    """
    for level in CHANGED:
        same = ~_changed(logs, level)
        count, mean = int(same.sum()), float(logs[same].mean())
        squares, blocks = float(((logs[same] - mean) ** 2).sum()), float(explained[same].sum())
        spread, block_dof = squares / (count - 1), float(dofs[same].sum()) or KNOWN
        if spread <= 0 or fdtrc(count - 1, block_dof, spread * count / blocks if blocks else math.inf) >= BEYOND_BLOCKS:
            return variance, dof, 0.0
    # Of the other cells: without itself, if it is among those that did not change.
    others = np.where(same, count - 1, count)
    spreads = np.where(same, squares - (logs - mean) ** 2 * count / (count - 1), squares) / (others - 1)
    theirs = (blocks - np.where(same, explained, 0.0)) / others
    total = variance + np.maximum(spreads - theirs, 0.0)
    uncertain = spreads**2 / (others - 1) + variance**2 / dof
    freedom = np.divide(total**2, uncertain, out=np.full_like(total, KNOWN), where=uncertain > 0)
    return total, freedom, math.sqrt(max(0.0, spread - blocks / count))


def _changed(logs: Floats, level: float) -> NDArray[np.bool_]:
    """Those of a normal sample that stand out, less than two fifths of it: generalised ESD (Rosner 1983)."""
    left, changed = np.arange(len(logs)), 0
    suspects: list[int] = []
    for _ in range(2 * (len(logs) - 1) // 5):
        values, count = logs[left], len(left)
        distances = np.abs(values - values.mean())
        deviation, farthest = values.std(ddof=1), int(distances.argmax())
        if deviation == 0:
            break
        t = float(stdtrit(count - 2, 1 - level / (2 * count)))
        suspects.append(int(left[farthest]))
        if distances[farthest] / deviation > (count - 1) * t / math.sqrt((count - 2 + t * t) * count):
            changed = len(suspects)
        left = np.delete(left, farthest)
    found = np.zeros(len(logs), dtype=bool)
    found[suspects[:changed]] = True
    return found
