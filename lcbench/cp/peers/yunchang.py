"""yunchang's USP: a peer to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from lcbench.cp.base import HeadGrid, Place
from lcbench.cp.peers.library import AutogradRun, LibraryStrategy, grid, refused_length, refused_mask, refused_platform, segments
from lcbench.cp.usp import USP
from lcbench.kernels.base import Kernel, Platform
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import refused_grid
from lcbench.schedule.layout import Layout, zigzag

if TYPE_CHECKING:
    from lcbench.schedule.simulate import Modelled

CALLS = (
    LibraryCall("yunchang", "LongContextAttention", 0, ("ring_impl_type", "attn_type")),
    LibraryCall("yunchang", "LongContextAttention.forward", 4, ("causal", "softmax_scale")),
    LibraryCall("yunchang.globals", "PROCESS_GROUP.ULYSSES_PG"),
    LibraryCall("yunchang.globals", "PROCESS_GROUP.RING_PG"),
    LibraryCall("yunchang.kernels", "AttnType.FA"),
    LibraryCall("flash_attn.flash_attn_interface", "_flash_attn_forward"),
)


@dataclass(frozen=True)
class YunchangUSP(HeadGrid, LibraryStrategy):
    """Heads exchanged in groups of ranks, a zigzag ring across them."""

    libraries: ClassVar[tuple[str, ...]] = ("yunchang", "flash-attn")

    def refused(self, problem: Problem, mask: Mask) -> str | None:
        degree = self.degree(problem)
        refused = refused_mask(mask, known="full and causal") or refused_grid(problem, degree)
        if refused is None and problem.heads.kv % degree:
            refused = f"cannot split {problem.heads.kv} key/value heads over {degree} ranks"
        return refused or refused_length(problem, 2 * problem.scale.world_size)

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return refused_platform(problem, platform, CALLS[0].module)

    def missing(self) -> str | None:
        return unfit(*CALLS)

    def layout(self, problem: Problem) -> Layout:
        degree = self.degree(problem)
        return zigzag(problem.seqlen, problem.scale.world_size // degree).split(degree)

    def modelled(self, problem: Problem, mask: Mask) -> Modelled | None:
        """The same schedule of ours."""
        return USP(self.ulysses_degree, layout="zigzag").modelled(problem, mask)

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> AutogradRun:
        from yunchang import LongContextAttention
        from yunchang.globals import PROCESS_GROUP
        from yunchang.kernels import AttnType

        found = segments(mask)
        assert found is not None
        # As its set_seq_parallel_pg lays them out, which makes new ones each time.
        PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = grid(place.groups, problem.scale.world_size, self.degree(problem))
        # Without a causal mask the order of tokens means nothing to its plain ring.
        attention = LongContextAttention(ring_impl_type="zigzag" if found.causal else "basic", attn_type=AttnType.FA)
        attend = partial(attention, causal=found.causal, softmax_scale=problem.softmax_scale)
        return AutogradRun(attend, problem, mask, self.layout(problem), kernel, place)
