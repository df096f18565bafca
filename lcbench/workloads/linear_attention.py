"""One pass of linear attention over a sequence, and backward where the cell asks for it.

q, k, v and dout are standard normal, k of unit length for the delta rule, as models have it. Log decays are a sixteenth of
log(sigmoid(normal)), as gated linear attention has them, so that states reach over some dozens of tokens; strengths of the delta
rule are sigmoid(normal). All are drawn by blocks of tokens, so every strategy sees the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel
from lcbench.kernels.linear import LinearKernel
from lcbench.masks.band import BandMask
from lcbench.masks.causal import causal
from lcbench.masks.mask import Mask
from lcbench.problem import RULES, Problem, Rule
from lcbench.schedule.payload import element_bytes
from lcbench.workloads.base import Work, Workload

if TYPE_CHECKING:
    from lcbench.measure.session import Gang
    from lcbench.workloads.linear_session import LinearSession


@dataclass(frozen=True)
class LinearAttention(Workload):
    """``rule``: the recurrence, ``gla`` or ``gated_delta_rule``.

    Raises:
        ValueError: there is no such rule.
    """

    operator: ClassVar[str] = "linear"
    rule: Rule = "gla"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"workload.rule={self.rule} is not one of {', '.join(RULES)}")

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Any) -> str | None:
        if problem.batch is not None:
            return "linear attention is of one sequence: it takes seqlen, no batch"
        if problem.heads.latent:
            return f"heads={problem.heads}: linear attention has values of its own, so that heads are not latent"
        if problem.softmax.sink or problem.softmax.softcap:
            return f"softmax={problem.softmax}: linear attention has no softmax, and takes a scale alone"
        if not isinstance(mask, BandMask) or not np.array_equal(mask.bands, causal(problem.seqlen).bands):
            return "a recurrence goes through all tokens before each: it takes mask=causal"
        rules = cast(LinearKernel, kernel).rules
        if self.rule not in rules:
            return f"the kernel computes {' and '.join(rules)}, not workload.rule={self.rule}"
        return strategy.only_in_a_step()

    def input_bytes(self, problem: Problem) -> float:
        heads = problem.heads
        gates = heads.kv * (heads.dim if self.rule == "gla" else 2) * element_bytes("sum", problem)
        return problem.input_bytes + gates * problem.seqlen / problem.scale.world_size

    def start(self, work: Work, draw: int, gang: Gang) -> LinearSession:
        from lcbench.workloads.linear_session import LinearSession  # with torch, which planning does without

        return LinearSession(work, draw, gang)
