"""q and k with the structure that attention of trained models has: sinks, local bands, vertical lines, slash lines and matching
segments, in other shares for each head, and sparse to other degrees. Without it no selector of keys can be judged: of independent
numbers no key matters more than another.

What is published, and followed: the three kinds of head, A-shape, vertical-slash and block-sparse (MInference, arXiv 2407.02490,
section 3.1); that heads differ in how many keys they need, and that these critical keys hold most of the weight (DSV, arXiv
2502.07590); that patterns and LSE differ by head and stay over denoising steps (AdaSpa, arXiv 2502.21079); that first tokens are
sinks (StreamingLLM, arXiv 2309.17453). How many heads are of a kind, and the numbers, are this generator's own (``inputs.marks``);
docs/inputs.md has what it makes beside what MInference found for the heads of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcbench.inputs.base import MOST_CRITICAL, Inputs, Wanted
from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch

    from lcbench.inputs.marks import Plan

LEAST_DIM = 16


@dataclass(frozen=True)
class Structured(Inputs):
    """Seeded q and k with structure; v and dout are standard normal.

    Attributes:
        critical: share of the keys of a row that hold 90 % of its weight, in the mean over heads. Heads of a kind reach only some
            shares: what is made is said by ``states``.
        spread: standard deviation of the logarithm of that share over heads.
        drift: angle in radians by which noise and values turn from one step to the next; lines, bands and topics stay.

    Raises:
        ValueError: a share that is not above 0 and up to 0.6, which scores without structure have; a spread that is not from 0 to
            2; an angle that is not from 0 to pi/2.
    """

    critical: float = 0.1
    spread: float = 0.7
    drift: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.critical <= MOST_CRITICAL:
            raise ValueError(f"inputs.critical={self.critical} is no share of keys above 0 and up to {MOST_CRITICAL}")
        if not 0 <= self.spread <= 2:
            raise ValueError(f"inputs.spread={self.spread} is no number from 0 to 2")
        if not 0 <= self.drift <= math.pi / 2:
            raise ValueError(f"inputs.drift={self.drift} is no angle from 0 to pi/2")

    def unsupported(self, problem: Problem) -> str | None:
        if problem.heads.latent:
            return "latent keys have their values in them, so they are not made with structure"
        if problem.heads.dim < LEAST_DIM:
            return f"keys of {problem.heads.dim} numbers have no room for structure, which needs {LEAST_DIM}"
        return None

    def plan(self, problem: Problem, seed: int, group: tuple[int, int] = (0, 0), layer: int = 0) -> Plan:
        """What each head attends to; the same on every rank."""
        from lcbench.inputs.marks import plan

        return plan(self.critical, self.spread, problem.requests, problem.heads, problem.softmax, seed, group, layer)

    def states(self, problem: Problem, seed: int, group: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        return self.plan(problem, seed, group).stated()

    def draw(self, wanted: Wanted) -> torch.Tensor:
        import torch  # which planning does without

        from lcbench.inputs.drawing import draw_rows

        w, own = wanted, wanted.problem.heads
        dtype = getattr(torch, w.problem.dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        count, dim = own.q if w.name in ("q", "dout") else own.kv, own.v if w.name in ("v", "dout") else own.dim
        name = f"{w.name}/{w.layer}" if w.layer else w.name

        def normal(name: str) -> torch.Tensor:
            return draw_rows(name, w.tokens, (count, dim), wide, w.seed, w.device, w.group, w.heads)

        found, angle = normal(name), w.step * self.drift
        if angle and w.name != "dout":
            found = found * math.cos(angle) + normal(f"{name}/turned") * math.sin(angle)
        if w.name in ("q", "k"):
            plan = self.plan(w.problem, w.seed, w.group, w.layer)
            plan.put(w.name, w.tokens, w.heads or range(count), found)
        return found.to(dtype)
