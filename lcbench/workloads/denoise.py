"""Steps of denoising, as a diffusion model makes them: attention layers on inputs that change a little from step to step.

What a step and a layer are is in ``lcbench.cp.steps``. The inputs of a layer are standard normal at every step, and drift::

    x[t] = sqrt(1 - drift) * x[t - 1] + sqrt(drift) * noise[t]

so inputs of neighbouring steps have a correlation of sqrt(1 - drift). Phases: ``warmup``, of strategies that have synchronous steps
at the begin, and ``steady``, all others. Inputs of all steps are there before the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcbench.cp.base import Strategy
from lcbench.cp.steps import STEADY, OverSteps
from lcbench.kernels.base import Kernel
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.workloads.base import Work, Workload
from lcbench.workloads.parts import Attend, Made, Share

if TYPE_CHECKING:
    from lcbench.measure.session import Gang
    from lcbench.workloads.denoising import DenoisingSession


@dataclass(frozen=True)
class Denoise(Workload):
    """``steps`` of ``layers``, each on inputs that ``drift``.

    Raises:
        ValueError: a count below 1, or a drift that is no share.
    """

    steps: int = 8
    layers: int = 2
    drift: float = 0.05

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("layers", self.layers)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                said = "all" if value is None else value  # as layers=all comes
                raise ValueError(f"workload.{name}={said} is no number of at least 1")
        if not 0 <= self.drift <= 1:
            raise ValueError(f"workload.drift={self.drift} is no share, 0 to 1")

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Any) -> str | None:
        if problem.backward:
            return "direction=forward_backward: denoising has no backward pass, so that workload=denoise has direction=forward only"
        if problem.batch is not None:
            return "denoising is of one sequence, all of whose tokens have a query: it takes seqlen, no batch"
        if problem.heads.v != problem.heads.dim or problem.heads.latent:
            return (
                f"heads={problem.heads}: a layer's result is added to what its queries come from, so that both have one dimension"
            )
        if problem.softmax.sink or problem.softmax.softcap:
            return f"softmax={problem.softmax}: no diffusion model has a sink or a softcap"
        if isinstance(strategy, OverSteps):
            return strategy.too_few(self.steps, self.layers, problem)
        if strategy.computes(problem, mask) is not mask:
            return "the strategy computes another mask than the cell's: denoising compares with what is exact"
        return strategy.only_in_a_step()

    def made(self, share: Share, recompute: Any) -> Made:
        passes = Attend("forward", float(self.steps * self.layers))
        return Made({STEADY: (passes,)}, metrics={f"denoise/{STEADY}/steps": float(self.steps)})

    def input_bytes(self, problem: Problem) -> float:
        return self.steps * self.layers * problem.input_bytes

    def start(self, work: Work, draw: int, gang: Gang) -> DenoisingSession:
        from lcbench.workloads.denoising import DenoisingSession  # with torch, which planning does without

        return DenoisingSession(work, draw, gang, steps=self.steps, layers=self.layers, drift=self.drift)
