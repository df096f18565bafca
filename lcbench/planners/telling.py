"""Lines of progress of planning, for people: the first after a second, and no more than one a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from lcbench.planners.base import Say

EVERY_S = 1.0


def telling(meanwhile: Callable[[], None] = lambda: None) -> Say:
    """What a planner is to call with its lines: prints them on stderr, where stdout may be a command's JSON.

    Args:
        meanwhile: is called with every line, printed or not.
    """
    told = time.monotonic()

    def say(line: str) -> None:
        nonlocal told
        meanwhile()
        if time.monotonic() - told >= EVERY_S:
            told = time.monotonic()
            print(f"planning: {line}", file=sys.stderr, flush=True)

    return say
