"""Cases come by turns: of each test a run takes one case in N, and N runs with turns in a row take them all."""

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
    one_in, turn = map(int, os.environ.get(VARIABLE, "1 0").split())
    return number % one_in == turn % min(one_in, cases)


def due(cases: Iterable[Case]) -> list[Case]:
    """Those that are taken of the cases that a test goes through by itself, since they share a start."""
    every = list(cases)
    return [case for number, case in enumerate(every) if is_due(number, len(every))]
