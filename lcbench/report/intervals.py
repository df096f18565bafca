"""What may be said about a difference: intervals of medians, of their ratio, and of many ratios at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lcbench.measure.stopping import median_interval

# Fewer ratios than these say nothing about how two sweeps differ where nothing was changed.
ENOUGH = 4
NORMAL_95 = 1.959964
MAD_TO_SIGMA = 1.482602  # of a normal distribution


@dataclass(frozen=True)
class Ratio:
    """``value`` and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves out 1."""
        return not self.low <= 1.0 <= self.high

    def widened(self, sigma: float) -> Ratio:
        """With another, independent spread of the logarithm: ``sigma``, a standard deviation."""
        more = NORMAL_95 * sigma
        down, up = (math.hypot(math.log(self.value / self.low), more), math.hypot(math.log(self.high / self.value), more))
        return Ratio(self.value, self.value * math.exp(-down), self.value * math.exp(up))


@dataclass(frozen=True)
class Median:
    """A median in seconds and its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Median:
        return cls(float(np.median(samples)), *median_interval(samples))

    def over(self, other: Median) -> Ratio:
        """Their ratio. Its interval comes from those of both, without an assumption on the shape of either: the method of variance
        estimates recovery (Zou and Donner 2008), on logarithms.
        """
        value = self.value / other.value
        down = math.hypot(math.log(self.value / self.low), math.log(other.high / other.value))
        up = math.hypot(math.log(self.high / self.value), math.log(other.value / other.low))
        return Ratio(value, value * math.exp(-down), value * math.exp(up))


def between_runs(ratios: Sequence[Ratio]) -> float | None:
    """How much the same thing differs from one run to the next beyond what iterations of one run show: a standard deviation of the
    logarithm, None if there are too few ratios to say.

    Iterations share their process, clocks and placement; two runs do not. Where less than half of the cells really changed, or all
    changed alike, the spread of all ratios about their median shows it, robustly (median absolute deviation).
    """
    if len(ratios) < ENOUGH:
        return None
    logs = np.log([r.value for r in ratios])
    spread = MAD_TO_SIGMA * float(np.median(np.abs(logs - np.median(logs))))
    within = float(np.median([math.log(r.high / r.low) / (2 * NORMAL_95) for r in ratios]))
    return math.sqrt(max(0.0, spread**2 - within**2))
