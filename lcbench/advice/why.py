"""Why a choice is faster than another: their times, split into computing, imbalance, exposed communication and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.predict.predictor import Prediction
from lcbench.report.amounts import duration

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("computing", "imbalance", "exposed communication", "rest")  # as reports call them
SAME = 0.005  # of the slower time: parts that differ by less decide nothing


@dataclass(frozen=True)
class Split:
    """Where the seconds of an iteration go, by the names in ``PARTS``; ``predicted``, or measured."""

    seconds: Mapping[str, float]
    predicted: bool

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def predicted_split(prediction: Prediction) -> Split:
    """Of all phases: the average rank's kernels, what the busiest rank has more, waiting for messages, and what is left."""
    phases = prediction.phases.values()
    found = {
        "computing": sum(p.compute_s for p in phases),
        "imbalance": sum(max(0.0, p.imbalance_s) for p in phases),  # rounding may leave less
        "exposed communication": sum(p.exposed_s for p in phases),
    }
    # A rank that waits for the busiest one counts its waiting as exposed: what is counted twice is not communication.
    twice = max(0.0, sum(found.values()) - prediction.seconds)
    found["exposed communication"] = max(0.0, found["exposed communication"] - twice)
    return Split({**found, "rest": max(0.0, prediction.seconds - sum(found.values()))}, predicted=True)


def measured_splits(good: pd.DataFrame) -> dict[str, Split]:
    """Of good rows of ``report.frame.reported``, by cell; without those whose parts were not measured."""
    from lcbench.report.parts import split

    parts = split(good)
    if parts is None:
        return {}
    return {
        str(good.loc[row, "cell"]): Split({part: float(parts.loc[row, part]) for part in PARTS}, predicted=False)
        for row in parts.index
    }


def decided(faster: Split, slower: Split) -> str:
    """Which part makes the difference, in words: the one that the slower choice has most more of."""
    more = {part: slower.seconds[part] - faster.seconds[part] for part in PARTS}
    part = max(PARTS, key=lambda p: more[p])
    how = "predicted" if faster.predicted else "measured"
    if more[part] <= SAME * slower.total:
        return f"no part of the time stands out ({how})"
    against = {p: more[p] for p in PARTS if more[p] < -SAME * slower.total}
    but = f", though it has {', '.join(f'{duration(-s)} less {p}' for p, s in against.items())}" if against else ""
    return f"{part}: the next one has {duration(more[part])} more of it{but} ({how})"
