"""zhuzilin's ring-flash-attention, three of its ways to deal out tokens: peers to compare with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Place, Scheduled
from lcbench.cp.peers.library import (
    AutogradRun,
    LibraryStrategy,
    Segments,
    refused_length,
    refused_mask,
    refused_platform,
    segments,
)
from lcbench.cp.ring import Ring
from lcbench.kernels.base import Kernel, Platform
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_choice
from lcbench.schedule.layout import Layout, contiguous, striped, zigzag

if TYPE_CHECKING:
    from lcbench.schedule.simulate import Modelled

VARIANTS: dict[str, Callable[[int, int], Layout]] = {"zigzag": zigzag, "stripe": striped, "llama3": contiguous}

# Our own strategy that does the same: llama3 gathers ``heads_k_stride=1`` key/value head after the other, as ``start`` asks.
OWN: dict[str, Scheduled] = {
    "zigzag": Ring(layout="zigzag"), "stripe": Ring(layout="striped"), "llama3": AllGather(1, layout="contiguous"),
}  # fmt: skip
_OPTIONS = ("softmax_scale", "causal", "group")
CALLS = (
    *(
        LibraryCall("ring_flash_attn", name, 3, _OPTIONS)
        for name in ("ring_flash_attn_func", "zigzag_ring_flash_attn_func", "stripe_flash_attn_func")
    ),
    LibraryCall("ring_flash_attn", "llama3_flash_attn_prepare_cu_seqlens", 4, ()),
    LibraryCall("ring_flash_attn", "llama3_flash_attn_varlen_func", 7, ("heads_k_stride", "local_k_slice", *_OPTIONS)),
    LibraryCall("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward"),
)
_HUGGING_FACE = "ring_flash_attn.adapters"


def _without_hugging_face() -> None:
    """Put an empty module in the place of the library's adapter for Hugging Face, before the library is imported.

    Its ``__init__`` imports that adapter, which imports names that transformers has no more, or is not there.
    """
    if _HUGGING_FACE not in sys.modules:
        empty: Any = ModuleType(_HUGGING_FACE)
        empty.substitute_hf_flash_attn = empty.update_ring_flash_attn_params = None
        sys.modules[_HUGGING_FACE] = empty


def _library() -> Any:
    _without_hugging_face()
    return import_module("ring_flash_attn")


@dataclass(frozen=True)
class RingFlashAttention(LibraryStrategy):
    """``variant``: a ring in zigzag or stripes, or Llama 3's all-gather, which knows documents too."""

    libraries: ClassVar[tuple[str, ...]] = ("ring-flash-attn", "flash-attn")
    variant: Literal["zigzag", "stripe", "llama3"]

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)

    def refused(self, problem: Problem, mask: Mask) -> str | None:
        found = segments(mask)
        if self.variant == "llama3":
            refused = None if found else "knows the masks full and causal, of the whole or of each document, only"
        elif self.variant == "stripe":
            refused = None if found and found.causal and len(found.bounds) == 2 else "knows the mask causal only"
        else:
            refused = refused_mask(mask, known="full and causal")
        return refused or refused_length(problem, 2 * problem.scale.world_size)

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return refused_platform(problem, platform, CALLS[0].module)

    def missing(self) -> str | None:
        _without_hugging_face()
        return unfit(*CALLS)

    def layout(self, problem: Problem) -> Layout:
        return VARIANTS[self.variant](problem.seqlen, problem.scale.world_size)

    def modelled(self, problem: Problem, mask: Mask) -> Modelled | None:
        """The same schedule of ours; gradients travel in float32, as in ours (its ring's backward)."""
        return OWN[self.variant].modelled(problem, mask)

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> AutogradRun:
        found = segments(mask)
        assert found is not None
        attend = self._llama3(problem, found, place) if self.variant == "llama3" else self._ring(problem, found, place)
        return AutogradRun(attend, problem, mask, self.layout(problem), kernel, place)

    def _ring(self, problem: Problem, found: Segments, place: Place) -> Callable[[Any, Any, Any], Any]:
        library = _library()
        causal = {"zigzag": library.zigzag_ring_flash_attn_func, "stripe": library.stripe_flash_attn_func}
        # Without a causal mask the order of tokens means nothing to its plain ring.
        function = causal[self.variant] if found.causal else library.ring_flash_attn_func
        return partial(function, softmax_scale=problem.softmax_scale, causal=found.causal, group=place.group)

    def _llama3(self, problem: Problem, found: Segments, place: Place) -> Callable[[Any, Any, Any], Any]:
        import torch

        library = _library()
        bounds = torch.tensor(found.bounds, dtype=torch.int32, device=place.device)
        ranks, group = problem.scale.world_size, place.group
        cu_q, cu_k, max_q, max_k, local = library.llama3_flash_attn_prepare_cu_seqlens(bounds, found.causal, place.rank, ranks)

        def attend(q: Any, k: Any, v: Any) -> Any:
            return library.llama3_flash_attn_varlen_func(
                q[0], k[0], v[0], cu_q, cu_k, max_q, max_k, heads_k_stride=1, local_k_slice=local,
                softmax_scale=problem.softmax_scale, causal=found.causal, group=group,
            )[None]  # fmt: skip

        return attend
