"""FlashAttention-2 against a cache: ``flash_attn_with_kvcache`` of the library flash-attn, which splits keys over programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lcbench.kernels.base import OutLse, Platform, half_on_cuda
from lcbench.kernels.cache import Cache, CacheKind
from lcbench.kernels.flash_attn2 import MODULE
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.kernels.requests import RequestCall, RequestKernel, RequestRun, of_equal_dims, of_input_type
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

PAGE = 256  # tokens that its pages are multiples of
_OPTIONS = ("cache_seqlens", "block_table", "softmax_scale", "causal", "softcap", "return_softmax_lse")
CALLS = (LibraryCall(MODULE, "flash_attn_with_kvcache", 3, _OPTIONS),)


class _Run:
    def __init__(self, call: RequestCall) -> None:
        self._call = call
        own = call.sequences
        number, begins = len(own.q), own.k[:, 0]
        # Keys of all sequences as one tensor (sequences, keys, Hk, D): a view where they are evenly apart, else a copy.
        step = int(begins[1] - begins[0]) if number > 1 else call.max_k
        even = (np.diff(begins) == step).all() and step >= call.max_k
        self._even = (int(begins[0]), step) if even else None
        self._places: torch.Tensor | None = None
        if call.table is None and not even:
            import torch

            columns = torch.arange(call.max_k, device=call.begins.device)
            self._places = call.begins[:, None] + torch.minimum(columns[None, :], call.lengths[:, None] - 1)

    def forward(self, q: torch.Tensor, cache: Cache, scale: float, softcap: float) -> OutLse:
        from flash_attn.flash_attn_interface import flash_attn_with_kvcache

        call = self._call
        k, v = (cache.k, cache.v) if call.table is not None else (self._batched(x) for x in (cache.k, cache.v))
        out, lse = flash_attn_with_kvcache(
            q.unflatten(0, (len(call.lengths), call.max_q)), k, v, cache_seqlens=call.lengths, block_table=call.table,
            softmax_scale=scale, causal=call.causal, softcap=softcap, return_softmax_lse=True,
        )  # fmt: skip
        return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)

    def _batched(self, x: torch.Tensor) -> torch.Tensor:
        if self._places is not None:
            return x[self._places]
        assert self._even is not None
        begin, step = self._even
        number = len(self._call.lengths)
        own = x[begin : begin + number * step]
        # The last sequence may be shorter than the step that the others are apart.
        return own.as_strided((number, self._call.max_k, *x.shape[1:]), (step * x.stride(0), *x.stride()))


@dataclass(frozen=True)
class FlashAttn2Cache(RequestKernel):
    """flash-attn 2's kernel for caches, from compute capability 8.0 on, half types, equal head dims up to 256, forward only.

    A call takes requests of equally many rows. Requests of a contiguous cache that are not equally far apart are copied to a tensor
    where they are, in every call.
    """

    called: ClassVar[str] = "flash-attn's kernel for caches"
    libraries: ClassVar[tuple[str, ...]] = ("flash-attn",)
    equal_rows: ClassVar[bool] = True

    def refused_heads(self, heads: Heads) -> str | None:
        return of_equal_dims(self.called, heads)

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, self.called)

    def missing(self) -> str | None:
        return unfit(*CALLS)

    def reads(self, kind: CacheKind, problem: Problem, platform: Platform) -> str | None:
        if kind.page is not None and kind.page % PAGE:
            return f"{self.called} takes pages of whole {PAGE} tokens, not of {kind.page}"
        if kind.page is None and problem.batch is not None and len({group.total for group in problem.batch.groups}) > 1:
            return f"{self.called} takes contiguous caches of equally long requests, others in pages of {PAGE} tokens"
        return of_input_type(self.called, kind, problem)

    def ready(self, call: RequestCall, heads: Heads, dtype: torch.dtype) -> RequestRun:
        return _Run(call)
