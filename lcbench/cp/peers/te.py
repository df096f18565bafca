"""Transformer Engine's context parallelism, its four ways to communicate: peers to compare with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Place, Scheduled
from lcbench.cp.peers.library import (
    CHANNEL,
    AutogradRun,
    LibraryStrategy,
    grid,
    refused_length,
    refused_mask,
    refused_platform,
    segments,
)  # fmt: skip
from lcbench.cp.ring import Ring
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.usp import USP
from lcbench.kernels.base import Kernel, Platform
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.kernels.te_fused import LIBRARIES
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_choice, largest_degree
from lcbench.schedule.layout import Layout, zigzag

if TYPE_CHECKING:
    from lcbench.schedule.simulate import Modelled

CALLS = (
    LibraryCall(
        "transformer_engine.pytorch", "DotProductAttention", 2,
        ("num_gqa_groups", "attention_dropout", "qkv_format", "attn_mask_type", "softmax_scale"),
    ),
    LibraryCall("transformer_engine.pytorch", "DotProductAttention.set_context_parallel_group", 5, ()),
)  # fmt: skip
# Our own strategy that does the same as each way to communicate.
COMMUNICATIONS: dict[str, Scheduled] = {
    "p2p": Ring(layout="zigzag"), "all_gather": AllGather(layout="zigzag"), "a2a": Ulysses(), "a2a+p2p": USP(layout="zigzag"),
}  # fmt: skip


@dataclass(frozen=True)
class TransformerEngine(LibraryStrategy):
    """``comm``: ring, all-gather of keys, exchange of heads, or the last among neighbours and a ring between them."""

    libraries: ClassVar[tuple[str, ...]] = LIBRARIES
    comm: Literal["p2p", "all_gather", "a2a", "a2a+p2p"]

    def __post_init__(self) -> None:
        check_choice("comm", self.comm, COMMUNICATIONS)

    @property
    def value_dims(self) -> bool:
        return self.comm == "p2p"  # its context_parallel.py: multi-head latent attention is for p2p alone

    def refused(self, problem: Problem, mask: Mask) -> str | None:
        ranks = problem.scale.world_size
        found = refused_mask(mask, known="full and causal") or refused_length(problem, 2 * ranks)
        if found:
            return found
        degree = {"a2a": ranks, "a2a+p2p": largest_degree(problem)}.get(self.comm, 1)
        if problem.heads.kv % degree:
            return f"cannot split {problem.heads.kv} key/value heads over {degree} ranks"
        if self.comm == "a2a+p2p" and (degree == 1 or ranks % degree or degree == ranks):
            return f"needs ranks for both: the {ranks} of scale={problem.scale} are no {degree} x ring"
        return None

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return refused_platform(problem, platform, CALLS[0].module)

    def missing(self) -> str | None:
        return unfit(*CALLS)

    def layout(self, problem: Problem) -> Layout:
        return zigzag(problem.seqlen, problem.scale.world_size)

    def modelled(self, problem: Problem, mask: Mask) -> Modelled | None:
        """The same schedule of ours."""
        if self.comm == "p2p":  # its ring sums gradients of keys and values in their own type (its context_parallel.py)
            problem = replace(problem, reduce_dtype="input")
        return COMMUNICATIONS[self.comm].modelled(problem, mask)

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> AutogradRun:
        import torch
        from transformer_engine.pytorch import DotProductAttention

        found = segments(mask)
        assert found is not None
        heads = problem.heads
        attention = DotProductAttention(
            heads.q,
            heads.dim if heads.dim == heads.v else (heads.dim, heads.v),
            num_gqa_groups=heads.kv,
            attention_dropout=0.0,
            qkv_format="bshd",
            attn_mask_type="causal" if found.causal else "no_mask",
            softmax_scale=problem.softmax_scale,
        ).to(place.device)
        both = self.comm == "a2a+p2p"
        ranks = problem.scale.world_size
        made: Any = grid(place.groups, ranks, largest_degree(problem)) if both else place.groups.of(CHANNEL)
        # It wants ranks as the whole job counts them.
        attention.set_context_parallel_group(made, list(place.groups.ranks), torch.cuda.Stream(), self.comm)
        return AutogradRun(attention, problem, mask, self.layout(problem), kernel, place)
