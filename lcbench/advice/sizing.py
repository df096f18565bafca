"""Sizes: how many GPUs hold a limit of time and memory, and from which length on a choice pays.

All of it is predicted. A limit holds where the upper end of the 95 % interval is below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lcbench.advice.ranking import Candidate, Fate
from lcbench.grid.cell import Cell
from lcbench.grid.search import at
from lcbench.predict.predictor import CannotPredict, Predictor
from lcbench.problem import Scale, format_tokens
from lcbench.report.amounts import digits
from lcbench.report.fitted import Column, Fitted
from lcbench.report.table import Names

GIB = 1 << 30
MOST_GPUS = 1024
SHORTEST = 1 << 10  # tokens, where break-even is looked for
BEYOND = 4  # times the length that was asked for: the longest
NO_ANSWER: tuple[Fate, ...] = ("cannot run", "does not fit", "approximates")
STEPS = 16  # of the last doubling, that a break-even is told in


@dataclass(frozen=True)
class Limits:
    """``seconds`` of an iteration and ``bytes`` of a GPU at most; None: any."""

    seconds: float | None = None
    bytes: float | None = None

    def holds(self, candidate: Candidate) -> bool:
        """Whether a choice keeps both, with 95 % confidence of each."""
        found = candidate.prediction
        if found is None or candidate.fate in NO_ANSWER:
            return False
        slow = self.seconds is not None and found.interval[1] > self.seconds
        return not slow and (self.bytes is None or found.needs_interval[1] <= self.bytes)

    def __str__(self) -> str:
        said = [f"{digits(1e3 * self.seconds)} ms"] if self.seconds is not None else []
        return " and ".join([*said, *([f"{digits(self.bytes / GIB)} GiB a GPU"] if self.bytes is not None else [])])


def ladder(gpus_per_node: int) -> list[Scale]:
    """Scales from one GPU on: doubling within a node, then whole nodes, up to ``MOST_GPUS``."""
    inside = [1 << i for i in range(gpus_per_node.bit_length()) if 1 << i < gpus_per_node]
    scales = [Scale(1, gpus) for gpus in inside]
    nodes = 1
    while nodes * gpus_per_node <= MOST_GPUS:
        scales.append(Scale(nodes, gpus_per_node))
        nodes *= 2
    return scales


def smallest(candidates: Sequence[Candidate], limits: Limits) -> Candidate | None:
    """Of choices at many scales, the fastest at the smallest scale where one holds the limits; None if none does."""
    held = [(c.cell.scale.world_size, c.prediction.seconds, c) for c in candidates if c.prediction is not None and limits.holds(c)]
    return min(held, key=lambda found: found[:2])[2] if held else None


def scales_table(candidates: Sequence[Candidate], limits: Limits) -> Fitted:
    """For each scale, the smallest first, the choice that holds the limits, else the fastest."""
    table = Fitted("the fastest of each scale, predicted, not measured", [
        Column("scale"), Column("GPUs", right=True), Column("choice", folds=True, wanted=24), Column("ms,\npredicted", right=True),
        Column("95 %", right=True), Column("GiB a\nGPU", right=True), Column("95 %", 1, right=True),
        Column(f"holds {limits}" if str(limits) else ""),
    ])  # fmt: skip
    for scale, group in _by_scale(candidates).items():
        timed = sizable(group)
        if not timed:
            table.add(scale, str(group[0].cell.scale.world_size), "-", "-", "-", "-", "-", "no: nothing runs there or fits")
            continue
        best = min(timed, key=lambda c: (not limits.holds(c), predicted_s(c)))
        assert best.prediction is not None
        (low, high), (least, most) = best.prediction.interval, best.prediction.needs_interval
        words = best.cell.words
        table.add(
            scale, str(best.cell.scale.world_size), f"{words['cp']} {words['kernel']}", digits(1e3 * predicted_s(best)),
            f"{digits(1e3 * low)} to {digits(1e3 * high)}", digits(best.prediction.needs_bytes / GIB),
            f"{digits(least / GIB)} to {digits(most / GIB)}", "yes" if limits.holds(best) else "no",
        )  # fmt: skip
    return table


def _by_scale(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    found: dict[str, list[Candidate]] = {}
    for c in sorted(candidates, key=lambda c: c.cell.scale.world_size):
        found.setdefault(str(c.cell.config["scale"]), []).append(c)
    return found


def sizable(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that have a prediction, are exact, run and fit; among them what cannot win at its scale."""
    return [c for c in candidates if c.prediction is not None and c.fate not in NO_ANSWER]


def predicted_s(candidate: Candidate) -> float:
    """Seconds of an iteration of one that is ``sizable``."""
    assert candidate.prediction is not None
    return candidate.prediction.seconds


# -- from which length on ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BreakEven:
    """From which length on a choice is faster than another, by prediction; None: nowhere up to ``longest``."""

    cell: Cell
    other: str
    tokens: int | None
    longest: int

    @property
    def said(self) -> str:
        if self.tokens is None:
            return f"not up to {format_tokens(self.longest)}"
        return f"{'' if self.tokens > SHORTEST else 'at most '}{format_tokens(self.tokens)}"


class AtLengths:
    """Predictions of cells at lengths that are not their own, each made once: a choice is compared with several."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._known: dict[tuple[str, int], float | None] = {}

    def seconds(self, cell: Cell, tokens: int) -> float | None:
        """Of an iteration; None where it does not run, or is not predicted."""
        key = cell.id, tokens
        if key not in self._known:
            try:
                self._known[key] = self._predictor.predict(at(cell, tokens), memory=False).seconds
            except CannotPredict:
                self._known[key] = None
        return self._known[key]

    def faster(self, cell: Cell, other: Cell, tokens: int) -> bool:
        """Whether a choice is faster at a length; one that does not run there is not, and anything is faster than one that does
        not."""
        mine = self.seconds(cell, tokens)
        return mine is not None and ((its := self.seconds(other, tokens)) is None or mine < its)


def break_even(cell: Cell, other: Cell, predicted: AtLengths) -> int | None:
    """Tokens from which on ``cell`` is predicted to be faster than ``other`` at every length that is looked at, up to ``BEYOND``
    times its own; None if it is not at the longest. Within a doubling it is found by bisection, to a sixteenth.
    """
    above = None
    for tokens in sorted(lengths(cell), reverse=True):
        if not predicted.faster(cell, other, tokens):
            if above is None:
                return None
            low, step = tokens, tokens // STEPS
            while above - low > step:
                middle = low + (above - low) // (2 * step) * step
                low, above = (low, middle) if predicted.faster(cell, other, middle) else (middle, above)
            return above
        above = tokens
    return above


def lengths(cell: Cell) -> list[int]:
    """Where break-even is looked for: doubling, as far as ``BEYOND`` times the cell's length."""
    found = [SHORTEST]
    while found[-1] < BEYOND * cell.problem.seqlen:
        found.append(2 * found[-1])
    return found


def without_cp(cell: Cell, none: dict[str, Any]) -> Cell:
    """The same problem on one GPU; ``none``: the config of cp=none."""
    return Cell.from_config({**cell.config, "cp": none, "scale": "1x1"})


def break_evens(
    ranked: Sequence[Candidate], none: dict[str, Any], predictor: Predictor
) -> Iterator[tuple[BreakEven, BreakEven | None]]:
    """For the fastest kernel of each strategy, the fastest strategy first: from where on it beats no context parallelism, and the
    strategy that is next to it.
    """
    found: dict[str, Candidate] = {}
    for c in sizable(ranked):
        found.setdefault(c.cell.words["cp"], c)
    cells, predicted = [c.cell for c in sorted(found.values(), key=predicted_s)], AtLengths(predictor)
    for place, cell in enumerate(cells):
        longest = lengths(cell)[-1]
        alone = BreakEven(cell, "no context parallelism", break_even(cell, without_cp(cell, none), predicted), longest)
        after = cells[place + 1] if place + 1 < len(cells) else None
        yield alone, None if after is None else BreakEven(cell, after.words["cp"], break_even(cell, after, predicted), longest)


def break_even_table(found: Sequence[tuple[BreakEven, BreakEven | None]]) -> Fitted:
    names = Names.of(alone.cell for alone, _ in found)
    table = Fitted(names.title("lengths from which on a choice is faster, predicted, not measured"), [
        Column("choice", folds=True), Column("than one GPU\nwithout cp", right=True), Column("than the\nnext below", right=True),
        Column("which is"),
    ])  # fmt: skip
    for alone, after in found:
        table.add(names.what[alone.cell.id], alone.said, after.said if after else "-", after.other if after else "-")
    return table
