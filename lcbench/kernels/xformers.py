"""xformers' memory-efficient attention by its flash operator: sequences of many lengths, causal, with a left window.

It has no key/value groups in backward, so these heads are repeated and their gradients summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.kernels.base import Gradients, OutLse, Platform, Saved, half_on_cuda, importable, per_kv_head, per_query_head
from lcbench.kernels.library import LibraryCall, flash_attention_2_is_here, release_of, unfit
from lcbench.kernels.varlen import CAUSAL, Style, VarlenCall, VarlenKernel, VarlenRun
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


UNTRIED = (0, 0, 36)  # from here on its operators are another package's, and nobody has tried them with this adapter
CALLS = (
    LibraryCall("xformers.ops.fmha", "memory_efficient_attention_forward_requires_grad", 3, ("attn_bias", "scale", "op")),
    LibraryCall("xformers.ops.fmha", "memory_efficient_attention_backward", 6, ("attn_bias", "scale", "op")),
    LibraryCall("xformers.ops.fmha.attn_bias", "BlockDiagonalMask.from_seqlens", 2, ("device",)),
)


class _Run:
    def __init__(self, call: VarlenCall) -> None:
        self._bias = _bias(call)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> OutLse:
        from xformers.ops.fmha import flash, memory_efficient_attention_forward_requires_grad

        keys, values = (per_query_head(x, q.shape[1], 1)[None] for x in (k, v))
        out, lse = memory_efficient_attention_forward_requires_grad(
            q[None], keys, values, attn_bias=self._bias, scale=scale, op=flash.FwOp
        )
        return out[0], lse[0]

    def backward(self, dout: torch.Tensor, saved: Saved, scale: float) -> Gradients:
        from xformers.ops.fmha import flash, memory_efficient_attention_backward

        q, k, v, out, lse = saved
        keys, values = (per_query_head(x, q.shape[1], 1)[None] for x in (k, v))
        dq, dk, dv = memory_efficient_attention_backward(
            dout[None], out[None], lse[None], q[None], keys, values, attn_bias=self._bias, scale=scale, op=flash.BwOp
        )
        return dq[0], per_kv_head(dk[0], k.shape[1], 1), per_kv_head(dv[0], k.shape[1], 1)


@dataclass(frozen=True)
class XFormers(VarlenKernel):
    """xformers' flash operator, compute capability 8.0 to 9.0, half types, head dims up to 256."""

    style: ClassVar[Style] = CAUSAL
    libraries: ClassVar[tuple[str, ...]] = ("xformers",)
    run: ClassVar[Callable[[VarlenCall], VarlenRun]] = _Run

    def pads(self, heads: Heads, platform: Platform) -> bool:
        return True

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "xformers' flash operator", most=(9, 0))

    def missing(self) -> str | None:
        if find_spec("xformers") and find_spec("flash_attn") and not flash_attention_2_is_here():
            return "xformers takes flash_attn for flash-attn 2, of which flash-attn-4 has the name: it runs beside both or neither"
        found = importable("xformers") or _too_new() or importable("xformers.ops.fmha.flash")
        return found or unfit(*CALLS) or _not_for_this_torch()


def _too_new() -> str | None:
    release = release_of("xformers")
    if release < UNTRIED:
        return None
    return f"xformers {'.'.join(map(str, release))} has other operators than 0.0.35, with which this adapter was tried"


def _not_for_this_torch() -> str | None:
    """Its operators refuse every input on CUDA, also those that are torch's, where its compiled part was not loaded."""
    library = import_module("xformers._cpp_lib")
    if library._built_with_cuda:
        return None
    why = str(library._cpp_library_load_exception or "it has no CUDA part").strip().splitlines()[0]
    return f"xformers' compiled part is not for this torch and CUDA: {why}"


def _bias(call: VarlenCall) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    queries, keys = (list(lengths) for lengths in zip(*call.lengths, strict=True))
    bias = BlockDiagonalMask.from_seqlens(queries, keys, device=call.cu_q.device)
    if call.window == (-1, -1):
        return bias
    bias = bias.make_causal_from_bottomright()
    # Its window counts the token itself.
    return bias if call.causal else bias.make_local_attention_from_bottomright(call.window[0] + 1)
