"""Cases of tests come by turns: a run takes one case in N, and its turn says which (docs/decisions/cases-by-turns.md)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

Case = TypeVar("Case")
VARIABLE = "LCBENCH_TEST_TURN"


def tell(one_in: int, turn: int) -> None:
    """Tell this process, and those that it starts, which cases to take."""
    os.environ[VARIABLE] = f"{one_in} {turn}"


def is_due(number: int, cases: int) -> bool:
    """Whether a case is taken, by its number among all of its test. Every run takes at least one case."""
    one_in, turn = _said()
    return number % one_in == turn % min(one_in, cases)


def due(cases: Iterable[Case]) -> list[Case]:
    """Those that are taken of the cases that a test goes through by itself, since they share a start; all where they are few.

    After N turns they move on by one, so that in time each comes together with each case of the test that pytest knows.
    """
    one_in, turn = _said()
    every = list(cases)
    if len(every) < one_in:
        return every
    return [case for number, case in enumerate(every) if number % one_in == (turn + turn // one_in) % one_in]


def _said() -> tuple[int, int]:
    one_in, turn = map(int, os.environ.get(VARIABLE, "1 0").split())
    return one_in, turn
