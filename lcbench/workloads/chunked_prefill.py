"""A prompt that is computed in chunks, each over the cache that the chunks before it left (Sarathi, arXiv 2308.16369, section 4.1).

A chunk is a rectangular problem: its tokens have queries, and all tokens up to its end have keys. Adaptive chunks shrink as the
cache grows, so that each has the pairs of the first one, exact by the mask, and takes about as long (Medha, arXiv 2409.17264,
"adaptive chunking"). With ``pipeline`` the groups of ``mesh.dp`` are stages of layers instead of replicas: a chunk enters the
first stage as soon as the one before has left it, since a chunk needs of earlier ones their keys and values alone (sequence
pipeline parallelism, SPP, in the same paper). S stages and N equal chunks then take (N + S - 1) / N of the work of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.cp.base import Strategy
from lcbench.kernels.base import Kernel
from lcbench.masks.mask import Mask
from lcbench.problem import Mesh, Problem
from lcbench.workloads.base import Work, Workload
from lcbench.workloads.chunks import Chunks
from lcbench.workloads.parts import Attend, Made, Share

if TYPE_CHECKING:
    from lcbench.measure.session import Gang, Session


@dataclass(frozen=True)
class ChunkedPrefill(Chunks, Workload):
    """A prompt in chunks; its options are those of ``Chunks``."""

    any_inputs: ClassVar[bool] = True

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Any) -> str | None:
        if problem.backward:
            return "a prompt is prefilled without backward: write direction=forward"
        if problem.batch is not None and len(problem.batch.groups) > 1:
            return f"batch={problem.batch}: the requests of a chunk are as long as one another, as in batch=2q64k"
        for chunk in self.chunks(problem, mask):
            if chunk.sees_ahead(mask):
                return f"{chunk} sees keys behind it, which are not in the cache yet: the mask does not go by chunks"
            own, part = chunk.problem(problem), chunk.mask(mask)
            for chosen in (kernel, strategy):
                if reason := chosen.unsupported(own, part):
                    return f"{chunk}: {reason}"
        return None

    def misfit(self, mesh: Mesh) -> str | None:
        if not self.pipeline:
            return None
        if mesh.dp == 1:
            return "workload.pipeline=true: mesh.dp=1 is one stage, and a pipeline has several"
        if self.layers % mesh.dp:
            return f"workload.layers={self.layers} cannot be dealt out evenly to the mesh.dp={mesh.dp} stages of a pipeline"
        return None

    def unforeseen(self) -> str | None:
        return "chunks over a growing cache are not simulated: workload=chunked_prefill is measured only"

    def made(self, share: Share, recompute: Any) -> Made:
        return Made({"forward": (Attend("forward", self.layers / self.stages(share.mesh)),)})

    def input_bytes(self, problem: Problem) -> float:
        return self.layers * problem.input_bytes

    def start(self, work: Work, draw: int, gang: Gang) -> Session:
        from lcbench.workloads.prefilling import PrefillSession  # with torch, which planning does without

        return PrefillSession(self, work, draw, gang)
