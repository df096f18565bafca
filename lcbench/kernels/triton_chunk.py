"""Linear attention by chunks in Triton: our own, forward and backward; no library needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import Platform, dims, importable
from lcbench.kernels.linear import LinearKernel, PreparedScan, Rule
from lcbench.kernels.tiled import where_triton_runs
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

MOST_DIM = 256  # a program keeps a state's whole column


@dataclass(frozen=True)
class TritonChunk(LinearKernel):
    """Both rules, head dims up to 256."""

    rules: ClassVar[tuple[Rule, ...]] = ("gla", "gated_delta_rule")

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        if reason := where_triton_runs(problem, platform):
            return reason
        if max(problem.heads.dim, problem.heads.v) > MOST_DIM:
            return f"triton_chunk takes head dims up to {MOST_DIM}, not {dims(problem.heads)}"
        return None

    def missing(self) -> str | None:
        return importable("triton")

    def scan(self, rule: Rule, heads: Heads, dtype: torch.dtype, device: torch.device, *, scale: float) -> PreparedScan:
        from lcbench.kernels.triton_delta import PreparedTritonDelta
        from lcbench.kernels.triton_scan import PreparedTritonChunk

        return (PreparedTritonChunk if rule == "gla" else PreparedTritonDelta)(heads, scale)
