"""No selector: every block that the cell's mask has. Full attention, to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lcbench.masks.band import Ints
from lcbench.masks.block import Keep
from lcbench.problem import Problem
from lcbench.selectors.base import Features, Rows, Selector


@dataclass(frozen=True)
class NoSelector(Selector):
    """It keeps everything."""

    dense: ClassVar[bool] = True

    def __init__(self) -> None:
        """It has no options."""

    def keep(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> Keep:
        return np.broadcast_to(rows.pairs > 0, (self.maps(problem.heads), len(rows.pairs)))
