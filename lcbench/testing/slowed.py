"""A ring for tests that is slow on purpose while a certain file exists: a regression that a comparison must find."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcbench.cp.base import Place, RankRun, Strategy
from lcbench.cp.ring import Ring
from lcbench.kernels.base import Kernel
from lcbench.masks.mask import Mask
from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SlowedRing(Strategy):
    """Our ring, each forward pass ``seconds`` longer while ``while_file`` exists."""

    while_file: str
    seconds: float = 0.3

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return Ring("zigzag").unsupported(problem, mask)

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> RankRun:
        run = Ring("zigzag").start(problem, mask, kernel, place)
        return _Slow(run, self.seconds) if Path(self.while_file).exists() else run


class _Slow(RankRun):
    def __init__(self, run: RankRun, seconds: float) -> None:
        self._run, self._seconds, self.tokens = run, seconds, run.tokens

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        time.sleep(self._seconds)
        return self._run.forward(q, k, v, sink)

    def lse(self, saved: Any) -> torch.Tensor:
        return self._run.lse(saved)

    def backward(self, dout: torch.Tensor, saved: Any) -> tuple[torch.Tensor, ...]:
        return self._run.backward(dout, saved)
