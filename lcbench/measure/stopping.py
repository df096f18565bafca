"""When to stop measuring: as soon as the median is known well enough, at the latest when the budget is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Stopping:
    """``precision``: relative half-width of the median's 95 % interval that is narrow enough; ``budget_s``: seconds at most."""

    min_iterations: int
    max_iterations: int
    budget_s: float
    precision: float

    @classmethod
    def from_config(cls, measure: dict[str, Any]) -> Stopping:
        return cls(
            int(measure["min_iterations"]), int(measure["max_iterations"]),
            float(measure["budget_s"]), float(measure["precision"]),
        )  # fmt: skip

    def verdict(self, samples: ArrayLike, spent_s: float) -> str | None:
        """Why to stop now (``precision``, ``budget`` or ``iterations``), or None to go on."""
        count = len(np.asarray(samples))
        if count < self.min_iterations:
            return None
        if self.noise(samples) <= self.precision:
            return "precision"
        if spent_s >= self.budget_s:
            return "budget"
        return "iterations" if count >= self.max_iterations else None

    @staticmethod
    def noise(samples: ArrayLike) -> float:
        """Relative half-width of the 95 % interval of the median."""
        median = float(np.median(np.asarray(samples, dtype=float)))
        if np.size(samples) < 2 or median <= 0:
            return math.inf
        low, high = median_interval(samples)
        return (high - low) / 2 / median


def median_interval(samples: ArrayLike) -> tuple[float, float]:
    """95 % interval of the median, from order statistics, without an assumption on the shape of the distribution.

    Between the order statistics at n/2 -+ 0.98 sqrt(n) (binomial, normal approximation); with fewer than six samples no such
    interval exists and the whole range is taken.
    """
    values = np.sort(np.asarray(samples, dtype=float))
    count = len(values)
    reach = 0.98 * math.sqrt(count)
    low, high = max(0, math.floor(count / 2 - reach)), min(count - 1, math.ceil(count / 2 + reach) - 1)
    return float(values[low]), float(values[high])


def summary(samples: ArrayLike) -> dict[str, float]:
    """median, p20 and p80, in the unit of the samples."""
    median, p20, p80 = np.quantile(np.asarray(samples, dtype=float), [0.5, 0.2, 0.8]).tolist()
    return {"median": median, "p20": p20, "p80": p80}
