"""Blocks at random, the same ones in every pass: what any selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lcbench.masks.band import Ints
from lcbench.problem import Problem
from lcbench.selectors.base import Effort, Features, Rows, check_whole
from lcbench.selectors.choosing import Budgeted, blocks_seen, reach

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Random(Budgeted):
    """``seed``: of the draw, beside the number of the block of queries."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("seed", self.seed, 0)

    def scoring(self, problem: Problem, pairs: float) -> Effort:
        return Effort(moved=16.0 * self.maps(problem.heads) * blocks_seen(self, problem, pairs))

    def score(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> torch.Tensor:
        import torch

        first, last = reach(rows)
        drawn = np.random.default_rng([self.seed, rows.number]).random((self.maps(problem.heads), last - first))
        return torch.from_numpy(drawn).to(rows.q.device)
