"""What a workload is: what a cell runs, phase by phase, and how its results are checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel, refusal
from lcbench.masks.mask import Mask
from lcbench.measure.session import Gang, Session
from lcbench.problem import Problem


class Workload(Protocol):
    """A frozen dataclass of options, found by conf/workload/<name>.yaml."""

    def start(self, work: Work, draw: int, gang: Gang) -> Session:
        """One draw of a cell, ready to run on this rank. Collective."""
        ...


@dataclass(frozen=True)
class Work:
    """A cell as objects, for ``measure_cell``.

    Attributes:
        make_mask: gives draw 0, 1, ... ``draws - 1`` of the mask.
        settings: how long to measure it (``measure`` of one block).
        seed: of the inputs.
        draws: how many masks are drawn.
        attempt: chooses where the check looks.
    """

    workload: Workload
    problem: Problem
    make_mask: Callable[[int], Mask]
    kernel: Kernel
    strategy: Strategy
    settings: dict[str, Any]
    seed: int
    draws: int = 1
    attempt: int = 1

    def unavailable(self, gang: Gang) -> str | None:
        return refusal(self.kernel, self.problem, gang.device) or refusal(self.strategy, self.problem, gang.device)

    def start(self, draw: int, gang: Gang) -> Session:
        return self.workload.start(self, draw, gang)
