"""Cases of tests come by turns: a run takes one case in N, and its turn says which (docs/decisions/cases-by-turns.md)."""

from __future__ import annotations

import inspect
import os
import zlib
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any, TypeVar

Case = TypeVar("Case")
VARIABLE = "LCBENCH_TEST_TURN"


def tell(one_in: int, turn: int, cases: int = 1) -> None:
    """Tell this process, and those that it starts, which cases to take, and how many the test has that is run now."""
    os.environ[VARIABLE] = f"{one_in} {turn} {cases}"


def is_due(number: int, cases: int) -> bool:
    """Whether a case is taken, by its number among all of its test. Every run takes at least one case."""
    one_in, turn, _ = _told()
    return number % one_in == turn % min(one_in, cases)


def is_its_turn(test: str) -> bool:
    """Whether a test without cases is run, by a number that follows from its name alone: other tests come and go."""
    return is_due(zlib.crc32(test.encode()), cases=2**32)


def due(cases: Iterable[Case]) -> list[Case]:
    """Those that are taken of the cases that a test goes through by itself, since they share a start: at least one.

    Whenever a case of the test that pytest knows is taken, it takes the next of these, so that in time each comes with each.
    """
    one_in, turn, known = _told()
    every = list(cases)
    first = turn // min(one_in, known) % max(min(one_in, len(every)), 1)
    return [case for number, case in enumerate(every) if number % one_in == first]


def goes_by_turns(test: Callable[..., Any]) -> bool:
    """Whether a test, or a function of its file that it names, takes the cases that are `due`."""
    names, seen = [test], set()
    while names:
        function = inspect.unwrap(names.pop())
        if function in seen or function.__module__ != test.__module__:
            continue
        seen.add(function)
        used = [function.__globals__.get(name) for name in _named(function.__code__)]
        if any(value is due for value in used):
            return True
        names += [value for value in used if inspect.isfunction(value)]
    return False


def _named(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_named(part) for part in code.co_consts if isinstance(part, CodeType)))


def _told() -> tuple[int, int, int]:
    one_in, turn, cases = map(int, os.environ.get(VARIABLE, "1 0 1").split())
    return one_in, turn, cases
