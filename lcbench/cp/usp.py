"""USP: Ulysses inside groups of U ranks, a ring across R groups, U x R = P (Fang & Zhao, arXiv 2405.07719).

Ulysses ranks are adjacent, so that with U up to the GPUs of a node its all-to-all stays inside the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lcbench.cp.ring import Order, check_order, deal, too_short
from lcbench.cp.schedule import Mesh, Schedule, ring_steps
from lcbench.cp.ulysses import exchanged, indivisible_heads
from lcbench.masks.mask import Mask
from lcbench.problem import Problem


@dataclass(frozen=True)
class USP:
    """``ulysses_degree``: U, or ``auto``: the largest that divides the GPUs of a node and splits the heads."""

    ulysses_degree: int | Literal["auto"] = "auto"
    order: Order = "auto"

    def __post_init__(self) -> None:
        check_order(self.order)
        if self.ulysses_degree != "auto" and (not isinstance(self.ulysses_degree, int) or self.ulysses_degree < 1):
            raise ValueError(f"cp.ulysses_degree={self.ulysses_degree} is neither auto nor a number of ranks such as 8")

    def degree(self, problem: Problem) -> int:
        if self.ulysses_degree != "auto":
            return self.ulysses_degree
        per_node = problem.scale.gpus_per_node
        return max(u for u in range(1, per_node + 1) if per_node % u == 0 and not indivisible_heads(problem.heads, u))

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        ranks, degree = problem.scale.world_size, self.degree(problem)
        if ranks % degree:
            return f"ulysses_degree={degree} does not divide the {ranks} ranks of scale={problem.scale}"
        return indivisible_heads(problem.heads, degree) or too_short(problem, ranks)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        degree = self.degree(problem)
        mesh = Mesh.of(ring=problem.scale.world_size // degree, ulysses=degree)
        shards = deal(mask, problem.seqlen, mesh.size("ring"), self.order)
        return Schedule(
            mesh=mesh,
            layout=shards.split(degree),
            shards=shards,
            shard_of=mesh.coordinate("ring"),
            steps=exchanged(ring_steps(mesh, "ring")),
        )
