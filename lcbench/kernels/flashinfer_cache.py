"""flashinfer against a cache: its paged prefill, which is its decode with tensor cores too, and its latent attention.

Both split keys over programs, by a plan that is made once for a mask and a cache. A contiguous cache is one of pages of one token.
Scales of float8 go to queries and results; they are powers of two, so nothing is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lcbench.kernels.base import LOG2_E, OutLse, Platform, half_on_cuda
from lcbench.kernels.cache import Cache, CacheKind
from lcbench.kernels.flashinfer import LIBRARIES, workspace
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.kernels.requests import RequestCall, RequestKernel, RequestRun, of_equal_dims, of_input_type
from lcbench.masks.band import spread
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

_PAGED, _LATENT = "BatchPrefillWithPagedKVCacheWrapper", "BatchMLAPagedAttentionWrapper"
CALLS = (
    LibraryCall("flashinfer", _PAGED, 1, ("kv_layout", "backend")),
    LibraryCall("flashinfer", f"{_PAGED}.plan", 9, ("causal", "sm_scale", "logits_soft_cap", "q_data_type", "kv_data_type")),
    LibraryCall("flashinfer", f"{_PAGED}.run", 3, ("return_lse",)),
    LibraryCall("flashinfer.mla", _LATENT, 1, ("backend",)),
    LibraryCall("flashinfer.mla", f"{_LATENT}.plan", 13, ()),
    LibraryCall("flashinfer.mla", f"{_LATENT}.run", 5, ("return_lse",)),
)
LATENT = (576, 512)  # dims of a latent key and of its value: those of DeepSeek-V2 and V3


class _Pages:
    """The pages of a call's sequences as flashinfer takes them: indptr (n + 1,), indices, and tokens of each last page (n,)."""

    def __init__(self, call: RequestCall) -> None:
        import torch

        own, page = call.sequences, call.kind.page or 1
        counts = -(-own.keys // page)
        sequence, column = spread(np.zeros_like(counts), counts)
        table = None if call.table is None else call.table.cpu().numpy()
        indices = own.k[sequence, 0] + column if table is None else table[sequence, column]
        found = np.concatenate([[0], np.cumsum(counts)]), indices, own.keys - (counts - 1) * page
        device = call.cu_q.device
        self.indptr, self.indices, self.last = (torch.from_numpy(x.astype(np.int32)).to(device) for x in found)
        self.page = page


def _in_pages(x: torch.Tensor) -> torch.Tensor:
    """(pages, page, Hk, D) of a cache's keys or values."""
    return x if x.dim() == 4 else x[:, None]


class _Run:
    def __init__(self, call: RequestCall, heads: Heads, dtype: torch.dtype) -> None:
        self._call, self._heads, self._dtype = call, heads, dtype
        self._pages, self._workspace = _Pages(call), workspace(heads, call.cu_q.device)
        self._planned: dict[tuple[float, float], Any] = {}

    def _plan(self, scale: float, softcap: float, stored: torch.dtype) -> Any:
        """The plan of the call, made when its scale is first known."""
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        if (scale, softcap) not in self._planned:
            call, pages, heads = self._call, self._pages, self._heads
            wrapper = BatchPrefillWithPagedKVCacheWrapper(self._workspace, kv_layout="NHD", backend="fa2")
            wrapper.plan(
                call.cu_q, pages.indptr, pages.indices, pages.last, heads.q, heads.kv, heads.dim, pages.page, causal=call.causal,
                sm_scale=scale, logits_soft_cap=softcap, q_data_type=self._dtype, kv_data_type=stored,
            )  # fmt: skip
            self._planned[scale, softcap] = wrapper
        return self._planned[scale, softcap]

    def forward(self, q: torch.Tensor, cache: Cache, scale: float, softcap: float) -> OutLse:
        k, v = _in_pages(cache.k), _in_pages(cache.v)
        if k.stride() != v.stride():  # up to 0.6.18 it reads both by the strides of one
            k, v = k.contiguous(), v.contiguous()
        if cache.k_scale is not None and cache.v_scale is not None:
            q = q * self._of_heads(cache.k_scale, q)
        out, lse = self._plan(scale, softcap, k.dtype).run(q, (k, v), return_lse=True)
        if cache.v_scale is not None:
            out = out * self._of_heads(cache.v_scale, out)
        return out, lse / LOG2_E

    def _of_heads(self, scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Scales of key/value heads as those of query heads, (Hq, 1)."""
        return scale.repeat_interleave(self._heads.q // self._heads.kv)[:, None].to(like.dtype)


class _LatentRun(_Run):
    def _plan(self, scale: float, softcap: float, stored: torch.dtype) -> Any:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        if (scale, softcap) not in self._planned:
            call, pages, heads = self._call, self._pages, self._heads
            wrapper = BatchMLAPagedAttentionWrapper(self._workspace, backend="auto")
            wrapper.plan(
                call.cu_q, pages.indptr, pages.indices, call.lengths, heads.q, heads.v, heads.dim - heads.v, pages.page,
                call.causal, scale, self._dtype, stored,
            )  # fmt: skip
            self._planned[scale, softcap] = wrapper
        return self._planned[scale, softcap]

    def forward(self, q: torch.Tensor, cache: Cache, scale: float, softcap: float) -> OutLse:
        keys, width = _in_pages(cache.k)[:, :, 0], self._heads.v
        wrapper = self._plan(scale, softcap, keys.dtype)
        out, lse = wrapper.run(q[..., :width], q[..., width:], keys[..., :width], keys[..., width:], return_lse=True)
        return out, lse / LOG2_E


@dataclass(frozen=True)
class FlashInferCache(RequestKernel):
    """flashinfer's kernels for caches, half types, pages of any size, float8 under half-type queries, forward only.

    Equal head dims up to 256, or latent heads of 576 with values of 512 and one key/value head, without a softcap.
    """

    called: ClassVar[str] = "flashinfer's kernel for caches"
    libraries: ClassVar[tuple[str, ...]] = LIBRARIES

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if problem.heads.latent and problem.softmax.softcap:
            return f"{self.called} has no softcap for latent heads"
        return super().unsupported(problem, mask)

    def refused_heads(self, heads: Heads) -> str | None:
        if not heads.latent:
            return of_equal_dims(self.called, heads)
        if (heads.dim, heads.v) == LATENT and heads.kv == 1:
            return None
        return f"{self.called} takes latent heads of {LATENT[0]} with values of {LATENT[1]} and one key/value head, not {heads}"

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, self.called, head_dim=LATENT[0] if problem.heads.latent else 256)

    def missing(self) -> str | None:
        return unfit(*CALLS)

    def reads(self, kind: CacheKind, problem: Problem, platform: Platform) -> str | None:
        if kind.storage == "float8" and not problem.heads.latent:
            narrow = problem.dtype == "float16"
            return f"{self.called} would scale float16 queries out of their range; bfloat16 ones read float8" if narrow else None
        return of_input_type(self.called, kind, problem)

    def ready(self, call: RequestCall, heads: Heads, dtype: torch.dtype) -> RequestRun:
        return (_LatentRun if heads.latent else _Run)(call, heads, dtype)
