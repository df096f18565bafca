"""Least squares over positive unknowns: in logarithms, robust against single outliers, and held to what was believed before.

With z the logarithm of an unknown over its first value, in units of its width, and e the logarithm of predicted over observed
seconds in units of ``NOISE``, it minimises the sum of z squared and of soft absolute e. So an unknown that nothing depends on stays
where it was, all stay above 0, and ten times too slow weighs as much as ten times too fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lcbench.predict.unknowns import Key, Unknowns
from lcbench.schedule.machine import Floats

NOISE = 0.04  # of one observation, in logarithms: what a fit need not explain
STEP = 0.02  # of a derivative, in logarithms
ROUNDS = 30  # of evaluations at most

Predict = Callable[[Unknowns, Key | None], Floats]


def search(unknowns: Unknowns, free: Sequence[Key], predict: Predict, observed: Floats, begin: Unknowns | None = None) -> Unknowns:
    """The unknowns at the values that explain what was observed best.

    Args:
        free: the paths that are looked for.
        predict: seconds at some unknowns, (n,). With a path: only those that depend on it need be right, others may be NaN.
        observed: seconds, (n,).
        begin: where to begin, if that is not what was believed.
    """
    from scipy.optimize import least_squares  # what a plan does without

    if not len(free) or not len(observed):
        return unknowns
    first = np.array([unknowns.of[path].value for path in free])
    width = np.array([unknowns.of[path].width for path in free])
    count = len(observed)

    def at(z: Floats) -> Unknowns:
        return unknowns.with_values(dict(zip(free, (first * np.exp(z * width)).tolist(), strict=True)))

    last: tuple[bytes, Floats] | None = None

    def seconds(z: Floats) -> Floats:
        """Slopes are asked for where misses were just before."""
        nonlocal last
        if last is None or last[0] != z.tobytes():
            last = z.tobytes(), predict(at(z), None)
        return last[1]

    def misses(z: Floats) -> Floats:
        return np.concatenate([_soft(np.log(seconds(z) / observed) / NOISE), z])

    def slopes(z: Floats) -> Floats:
        here = seconds(z)
        error = np.log(here / observed) / NOISE
        found = np.zeros((count + len(free), len(free)))
        for column, path in enumerate(free):
            moved = z.copy()
            moved[column] += STEP / width[column]
            there = predict(at(moved), path)
            change = np.where(np.isnan(there), 0.0, np.log(there / here)) / NOISE
            found[:count, column] = change / (STEP / width[column]) * _soft_slope(error)
        found[count:] = np.eye(len(free))
        return found

    start = np.zeros(len(free))
    if begin is not None:
        start = np.log(np.array([begin.of[path].value for path in free]) / first) / width
    found = least_squares(misses, start, jac=slopes, method="trf", max_nfev=ROUNDS, xtol=1e-3, ftol=1e-4)
    return at(found.x)


def _soft(error: Floats) -> Floats:
    """The signed root of the soft absolute value: its square grows like the error itself, once that is large."""
    found: Floats = np.sign(error) * np.sqrt(2 * (np.sqrt(1 + error**2) - 1))
    return found


def _soft_slope(error: Floats) -> Floats:
    soft = np.abs(_soft(error))
    slope: Floats = np.where(soft < 1e-6, 1.0, np.abs(error) / np.sqrt(1 + error**2) / np.maximum(soft, 1e-6))
    return slope
