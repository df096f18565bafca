"""How many cores there are to compute with."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores that this process may use: those that a scheduler, a cpuset or ``taskset`` left it; all where nobody can say."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
