"""Which choices of kernel and strategy may win, before anything is measured: by what can run, by prediction, and by memory.

Every time in here is predicted. A choice is left out only where its whole interval lies above that of another, so a prediction that
may be off by a factor leaves out what is slower by its square.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lcbench.cp.base import Strategy
from lcbench.grid import build
from lcbench.grid.axes import PROBLEM
from lcbench.grid.cell import Cell
from lcbench.grid.expand import Planned
from lcbench.grid.refusals import approximates
from lcbench.predict.predictor import CannotPredict, Prediction, Predictor
from lcbench.report.amounts import size, times
from lcbench.runs.budget import alone

Fate = Literal["may win", "approximates", "cannot win", "does not fit", "cannot run", "no prediction"]
MAY_WIN: tuple[Fate, ...] = ("may win", "no prediction")


@dataclass(frozen=True)
class Candidate:
    """A choice for a problem. ``fate``: what becomes of it, ``why`` in words; ``no prediction`` says nothing against it.
    ``approximates``: its results are not those of the mask, so that it is no rival of exact ones, whatever it takes."""

    cell: Cell
    prediction: Prediction | None
    fate: Fate
    why: str = ""

    @property
    def needs_bytes(self) -> float | None:
        """Of a rank, predicted; None without a prediction."""
        return None if self.prediction is None else self.prediction.needs_bytes


def problem_of(cell: Cell) -> str:
    """What a cell is a choice for, as a key."""
    return json.dumps([cell.config.get(axis) for axis in PROBLEM], sort_keys=True)


def by_problem(candidates: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    found: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        found.setdefault(problem_of(candidate.cell), []).append(candidate)
    return found


def rank(
    cells: Sequence[Planned], predictor: Predictor, refuse: Callable[[Cell], str | None] = lambda cell: None
) -> list[Candidate]:
    """Candidates, problem by problem, those that may win first, by predicted time.

    Args:
        refuse: why a cell cannot run that a plan lets run, such as a library that is not here; begins as the reasons of a plan
            do, ``kernel flex: ...`` or ``cp te_p2p: ...``.
    """
    strategies = {json.dumps(p.cell.config["cp"]): build.build_strategy(p.cell.config["cp"]) for p in cells}
    found = [_candidate(p, predictor, refuse) for p in cells]
    ranked: list[Candidate] = []
    for group in by_problem(map(_parallel, found)).values():
        ranked += sorted(_pruned(_kernels_once(group, strategies), predictor.machine.memory_bytes), key=_place)
    return ranked


def _candidate(planned: Planned, predictor: Predictor, refuse: Callable[[Cell], str | None]) -> Candidate:
    cell = planned.cell
    if reason := planned.skip or predictor.refusal(cell) or refuse(cell):
        return Candidate(cell, None, "cannot run", reason)
    fate: Fate = "approximates" if approximates(cell) else "may win"
    try:
        return Candidate(cell, predictor.predict(cell), fate)
    except CannotPredict as error:
        return Candidate(cell, None, "no prediction" if fate == "may win" else fate, str(error))


def _parallel(candidate: Candidate) -> Candidate:
    """Not a strategy on one rank, where it is no other than none at all."""
    if candidate.fate == "cannot run" or not alone(candidate.cell):
        return candidate
    name = candidate.cell.config["cp"]["name"]
    return replace(candidate, fate="cannot run", why=f"cp {name}: has nothing to do on one rank; cp=none is the same there")


def _kernels_once(group: Sequence[Candidate], strategies: Mapping[str, Strategy]) -> list[Candidate]:
    """Without further kernels of a strategy that brings its own: the one with the shortest prediction stands for all."""
    kept: dict[str, Candidate] = {}
    for candidate in sorted(group, key=_place):
        config = candidate.cell.config
        strategy = json.dumps(config["cp"])
        kept.setdefault(f"{strategy} {config['reduce_dtype']}" if strategies[strategy].own_kernel else candidate.cell.id, candidate)
    return list(kept.values())


def _pruned(group: Sequence[Candidate], memory_bytes: int) -> list[Candidate]:
    """Without what does not fit into ``memory_bytes`` (0: not known), and what is slower than another that surely fits, even where
    predictions are as far off as they may be.
    """
    fit = [_fitting(c, memory_bytes) for c in group]
    bounds = [
        c.prediction.interval[1] for c in fit if c.prediction is not None and c.fate == "may win" and _surely(c, memory_bytes)
    ]
    return [_winning(c, min(bounds)) if bounds else c for c in fit]


def _fitting(candidate: Candidate, memory_bytes: int) -> Candidate:
    """The same, with its fate where not even the lower end of what it needs fits."""
    if candidate.prediction is None or not memory_bytes or candidate.prediction.needs_interval[0] <= memory_bytes:
        return candidate
    (low, _), needs = candidate.prediction.needs_interval, candidate.prediction.needs_bytes
    why = f"needs {size(needs)} of {size(memory_bytes)}, at best {size(low)}, predicted"
    return replace(candidate, fate="does not fit", why=why)


def _surely(candidate: Candidate, memory_bytes: int) -> bool:
    """Whether a choice fits also where its memory is predicted as much too low as it may be."""
    return not memory_bytes or (candidate.prediction is not None and candidate.prediction.needs_interval[1] <= memory_bytes)


def _winning(candidate: Candidate, least_s: float) -> Candidate:
    if candidate.fate != "may win" or candidate.prediction is None or candidate.prediction.interval[0] <= least_s:
        return candidate
    why = f"at best {times(candidate.prediction.interval[0] / least_s)} the longest that another takes, predicted"
    return replace(candidate, fate="cannot win", why=why)


def _place(candidate: Candidate) -> tuple[bool, bool, float]:
    out = candidate.fate not in MAY_WIN
    return out, candidate.prediction is None, candidate.prediction.seconds if candidate.prediction is not None else 0.0
