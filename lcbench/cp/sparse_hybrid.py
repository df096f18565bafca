"""Hybrid sparse context parallelism of DSV (arXiv 2502.07590, section 5): heads inside of nodes, the sequence across them.

Ranks are a grid. Those of a row, which are neighbours, exchange heads, dealt out by their work as in ``sparse_heads``; those of a
column have the same heads and fetch keys from one another as in ``sparse_sequence``. A grid of one row is the former, one of one
column the latter. Which is fastest depends on the maps: heads whose work differs much leave ranks idle, and blocks that all ranks
need make the keys that are fetched many. Every grid whose rows are parts of nodes, or whole nodes, is played on the machine that
the options describe (``schedule.simulate``), and the one whose slowest rank is done first is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.masks.band import Ints
from lcbench.masks.block import BlockMap
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_count, check_rate, too_few_queries
from lcbench.schedule.lowering import operations_of
from lcbench.schedule.schedule import Schedule
from lcbench.schedule.sparse import Demand, grid_of_heads, pairs_of, sparse_edges

if TYPE_CHECKING:
    from lcbench.schedule.machine import Floats, Machine, Tiles

BACKWARD = 2.5  # times the products of forward


@dataclass(frozen=True)
class SparseHybrid(Scheduled):
    """A grid of ranks, given or chosen.

    Attributes:
        heads_degree: ranks of a row, or ``auto``: the grid that takes least on the machine below.
        stages: parts in which keys are fetched, each while the one before it is computed.
        tflops: 10^12 products and sums per second of the attention kernel on one rank, in forward.
        inside_gbytes_per_s, across_gbytes_per_s: 10^9 bytes per second of a rank, one way, within its node and out of it.
        memory_gbytes_per_s: of a rank's memory, for copies and sums.
    """

    heads_degree: int | Literal["auto"] = "auto"
    stages: int = 2
    tflops: float = 400.0
    inside_gbytes_per_s: float = 370.0
    across_gbytes_per_s: float = 45.0
    memory_gbytes_per_s: float = 2680.0

    def __post_init__(self) -> None:
        if self.heads_degree != "auto":
            check_count("heads_degree", self.heads_degree)
        check_count("stages", self.stages)
        for option in ("tflops", "inside_gbytes_per_s", "across_gbytes_per_s", "memory_gbytes_per_s"):
            check_rate(option, getattr(self, option))

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        ranks = problem.scale.world_size
        if self.heads_degree != "auto" and ranks % self.heads_degree:
            return f"heads_degree={self.heads_degree} does not divide the {ranks} ranks of scale={problem.scale}"
        return too_few_queries(problem)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        q_edges, k_edges = sparse_edges(problem, self.stages)
        pairs = pairs_of(mask, problem.heads, q_edges)
        degrees = self._degrees(problem) if self.heads_degree == "auto" else [self.heads_degree]
        demand = Demand.of(mask, q_edges, k_edges, np.arange(ranks))
        grids = [grid_of_heads(problem, demand, pairs, degree, self.stages) for degree in degrees]
        if len(grids) == 1:
            return grids[0]
        return min(grids, key=lambda grid: self.seconds(grid, mask, problem))

    def _degrees(self, problem: Problem) -> list[int]:
        """Ranks of a row: all of them, those that divide a node or are whole nodes, or one."""
        ranks, per_node = problem.scale.world_size, problem.scale.gpus_per_node
        return [u for u in range(ranks, 0, -1) if ranks % u == 0 and (per_node % u == 0 or u % per_node == 0)]

    def seconds(self, schedule: Schedule, mask: Mask, problem: Problem) -> float:
        """What an iteration takes by ``schedule.simulate`` on the machine that the options describe."""
        from lcbench.schedule.simulate import Modelled, simulate  # with scipy, which planning does without

        if isinstance(mask, BlockMap):  # a kernel computes a block that a mask cuts as it does a whole one, which is counted sooner
            mask = replace(mask, draw=mask.keep, within=None)
        modelled, operations = Modelled(schedule, mask, problem), operations_of(self.lowering, "nccl")
        found = simulate(modelled, self._machine(), _Products(self.tflops * 1e12), operations=operations, memory=False)
        return sum(phase.seconds for phase in found.phases.values())

    def _machine(self) -> Machine:
        from lcbench.schedule.machine import Collective, Link, Machine

        share = Collective(latency_s=1e-6, efficiency=0.8)  # as the machines of conf/machine have them
        return Machine(
            "options", "none", Link(5e-6, self.inside_gbytes_per_s * 1e9), Link(1.2e-5, self.across_gbytes_per_s * 1e9),
            memory_bytes=0, memory_bytes_per_s=self.memory_gbytes_per_s * 1e9, launch_s=4e-6, message_s=1e-5,
            collectives=dict.fromkeys(("all_to_all", "all_gather", "reduce_scatter"), share),
        )  # fmt: skip


@dataclass(frozen=True)
class _Products:
    """A kernel that computes unmasked pairs alone, at one rate, in one call."""

    flops: float

    def seconds(self, tiles: Tiles, problem: Problem, *, backward: bool) -> Floats:
        heads = problem.heads
        found: Floats = 2.0 * (heads.dim + heads.v) * tiles.pairs * tiles.q_heads / self.flops
        return BACKWARD * found if backward else found

    def calls(self, tiles: Tiles) -> Ints:
        return np.ones(len(tiles), dtype=np.int64)

    def workspace_bytes(self, tiles: Tiles, problem: Problem, *, backward: bool) -> Floats:
        return np.zeros(len(tiles))
