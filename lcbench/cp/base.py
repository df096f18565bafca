"""What a strategy is to the rest: options as a frozen dataclass, an honest refusal, and a schedule."""

from __future__ import annotations

from typing import Protocol

from lcbench.cp.schedule import Schedule
from lcbench.masks.mask import Mask
from lcbench.problem import Problem


class Strategy(Protocol):
    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        """None if the schedule can run this problem, else the reason, stored word for word in the skipped result."""
        ...

    def schedule(self, problem: Problem, mask: Mask) -> Schedule: ...
