"""From which length on a choice pays: as looking at every length says it, and without predicting anything twice."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcbench.advice import sizing
from lcbench.advice.ranking import Candidate
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.predict.predictor import CannotPredict

PLAN = look(["cp=ring,ulysses,allgather", "kernel=flash_attn3", "mask=causal", "seqlen=8k", "scale=1x8", "heads=16x16x64"])
CELLS = [planned.cell for planned in PLAN.cells]
NONE = look(["cp=none", "kernel=flash_attn3", "mask=causal", "seqlen=8k", "scale=1x1", "heads=16x16x64"]).cells[0].cell.config["cp"]
LENGTHS = [1 << place for place in range(10, 16)]


class Told:
    """What a cell takes at a length: seconds by strategy, for each doubling from 1k on; None: it does not run there."""

    def __init__(self, seconds: dict[str, list[float | None]]) -> None:
        self._seconds = seconds
        self.asked: Counter[tuple[str, int]] = Counter()

    def predict(self, cell: Cell, *, memory: bool) -> Any:
        assert not memory
        strategy, tokens = cell.config["cp"]["name"], cell.problem.seqlen
        self.asked[strategy, tokens] += 1
        found = self._seconds[strategy][min(tokens.bit_length() - 11, len(LENGTHS) - 1)]
        if found is None:
            raise CannotPredict("it does not run")
        return SimpleNamespace(seconds=found)


def by_looking_everywhere(mine: list[float | None], its: list[float | None]) -> int | None:
    """The doubling from which on a choice is faster, None if it is not at the longest."""
    faster = [one is not None and (other is None or one < other) for one, other in zip(mine, its, strict=True)]
    if not faster[-1]:
        return None
    return next((place + 1 for place in range(len(faster) - 1, -1, -1) if not faster[place]), 0)


seconds = st.lists(st.one_of(st.none(), st.integers(1, 3).map(float)), min_size=len(LENGTHS), max_size=len(LENGTHS))


@given(seconds, seconds)
def test_a_break_even_lies_in_the_doubling_that_looking_everywhere_finds(mine: list[float | None], its: list[float | None]) -> None:
    assert sizing.lengths(CELLS[0]) == LENGTHS
    found = sizing.break_even(CELLS[0], CELLS[1], sizing.AtLengths(Told({"ring": mine, "ulysses": its})))  # type: ignore[arg-type]
    expected = by_looking_everywhere(mine, its)
    if expected is None or expected == 0:
        assert found == (None if expected is None else LENGTHS[0])
    else:
        assert found is not None
        assert LENGTHS[expected - 1] < found <= LENGTHS[expected]


def test_nothing_is_predicted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"ring": [3.0, 2.0], "ulysses": [3.0, 1.5], "allgather": [3.0, 1.0], "none": [2.0, 9.0]}
    told = Told({name: [*[slow] * 3, *[fast] * 3] for name, (slow, fast) in times.items()})
    monkeypatch.setattr(sizing, "predicted_s", lambda c: times[c.cell.config["cp"]["name"]][1])
    ranked = [Candidate(cell, object(), "may win") for cell in CELLS]  # type: ignore[arg-type]
    found = list(sizing.break_evens(ranked, NONE, told))  # type: ignore[arg-type]
    assert [alone.cell.config["cp"]["name"] for alone, _ in found] == ["allgather", "ulysses", "ring"]
    assert all(alone.tokens is not None and 4096 < alone.tokens <= 8192 for alone, _ in found)
    assert set(told.asked.values()) == {1}, told.asked
