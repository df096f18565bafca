"""Ulysses: an all-to-all gives every rank the whole sequence for its share of the heads (arXiv 2309.14509).

KV heads are replicated where there are fewer of them than ranks; their gradients are summed over the replicas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcbench.cp.layout import contiguous
from lcbench.cp.ring import too_short
from lcbench.cp.schedule import Exchange, Mesh, Schedule, Step, tiles
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem


@dataclass(frozen=True)
class Ulysses:
    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        ranks = problem.scale.world_size
        return indivisible_heads(problem.heads, ranks) or too_short(problem, ranks)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        whole = contiguous(problem.seqlen, 1)
        return Schedule(
            mesh=Mesh.of(ulysses=ranks),
            layout=whole.split(ranks),
            shards=whole,
            shard_of=np.zeros(ranks, dtype=np.int64),
            steps=exchanged((Step(tiles((r, 0, 0) for r in range(ranks))),)),
        )


def exchanged(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Steps that run on gathered sequences and scattered heads, between the two exchanges that make it so."""
    return (Step(tiles(), (Exchange("ulysses", "gather"),)), *steps, Step(tiles(), (Exchange("ulysses", "scatter"),)))


def indivisible_heads(heads: Heads, ranks: int) -> str | None:
    """Why heads cannot be dealt out evenly to an exchange group of this size, or None."""
    if heads.q % ranks:
        return f"cannot split {heads.q} query heads evenly over {ranks} ranks"
    if heads.kv % ranks and ranks % heads.kv:
        return f"cannot split or replicate {heads.kv} key/value heads evenly over {ranks} ranks"
    return None
