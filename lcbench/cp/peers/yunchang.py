"""yunchang's USP: a peer to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from lcbench.cp.layout import Layout, zigzag
from lcbench.cp.loongtrain import largest_degree, refused_grid
from lcbench.cp.peers.library import AutogradRun, missing, refused_length, refused_mask, segments
from lcbench.cp.ulysses import check_count
from lcbench.kernels.base import Kernel
from lcbench.masks.band import Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class YunchangUSP:
    """``ulysses_degree``: ranks of a head exchange, or ``auto``: the largest that divides a node's and the heads."""

    ulysses_degree: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.ulysses_degree != "auto":
            check_count("ulysses_degree", self.ulysses_degree)

    def degree(self, problem: Problem) -> int:
        return largest_degree(problem) if self.ulysses_degree == "auto" else self.ulysses_degree

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        degree = self.degree(problem)
        refused = refused_mask(mask, known="full and causal") or refused_grid(problem, degree)
        if refused is None and problem.heads.kv % degree:
            refused = f"cannot split {problem.heads.kv} key/value heads over {degree} ranks"
        return refused or refused_length(problem, 2 * problem.scale.world_size)

    def unavailable(self, problem: Problem, device: torch.device) -> str | None:
        return missing(problem, device, "yunchang", "flash_attn")

    def layout(self, problem: Problem) -> Layout:
        degree = self.degree(problem)
        return zigzag(problem.seqlen, problem.scale.world_size // degree).split(degree)

    def tokens(self, problem: Problem, rank: int) -> Ints:
        return self.layout(problem).tokens(rank)

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, rank: int, device: torch.device) -> AutogradRun:
        from yunchang import LongContextAttention, set_seq_parallel_pg
        from yunchang.kernels import AttnType

        found = segments(mask)
        assert found is not None
        degree, ranks = self.degree(problem), problem.scale.world_size
        set_seq_parallel_pg(degree, ranks // degree, rank, ranks)
        # Without a causal mask the order of tokens means nothing to its plain ring.
        attention = LongContextAttention(ring_impl_type="zigzag" if found.causal else "basic", attn_type=AttnType.FA)
        attend = partial(attention, causal=found.causal, softmax_scale=problem.softmax_scale)
        return AutogradRun(attend, problem, mask, self.layout(problem), kernel, rank, device)
