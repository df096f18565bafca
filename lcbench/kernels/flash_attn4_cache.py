"""FlashAttention-4 against a cache: flash-attn-4's forward with a table of pages; on Blackwell it splits keys over programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import OutLse, Platform, half_on_cuda
from lcbench.kernels.cache import Cache, CacheKind
from lcbench.kernels.flash_attn4 import LIBRARIES, MODULE, overwritten
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.kernels.requests import (
    FLASH_OPTIONS,
    RequestCall,
    RequestKernel,
    RequestRun,
    flash_arguments,
    of_equal_dims,
    of_input_type,
)
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

CALLS = (LibraryCall(MODULE, "_flash_attn_fwd", 3, (*FLASH_OPTIONS, "num_splits", "return_lse")),)
SPLITS_SINCE = (10, 0)  # on Hopper it has no kernel that splits keys


@dataclass(frozen=True)
class _Run:
    call: RequestCall
    splits: int

    def forward(self, q: torch.Tensor, cache: Cache, scale: float, softcap: float) -> OutLse:
        from flash_attn.cute.interface import _flash_attn_fwd

        told = flash_arguments(self.call, scale, softcap)
        out, lse, *_ = _flash_attn_fwd(q, cache.k, cache.v, **told, num_splits=self.splits, return_lse=True)
        return out, lse.T


@dataclass(frozen=True)
class FlashAttn4Cache(RequestKernel):
    """flash-attn-4 on Hopper and Blackwell (compute capability 9.0 to 11.x), half types, pages of any size, forward only.

    Equal head dims up to 256 on Hopper and 128 on Blackwell, or 192 with values of 128.
    """

    called: ClassVar[str] = "flash-attn-4's kernel for caches"
    libraries: ClassVar[tuple[str, ...]] = LIBRARIES

    def refused_heads(self, heads: Heads) -> str | None:
        return None if (heads.dim, heads.v) == (192, 128) else of_equal_dims(self.called, heads)

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        most = 256 if platform.capability[0] == 9 or problem.heads.v != problem.heads.dim else 128
        return half_on_cuda(problem, platform, self.called, least=(9, 0), most=(11, 9), head_dim=most)

    def missing(self) -> str | None:
        return overwritten(unfit(*CALLS))

    def reads(self, kind: CacheKind, problem: Problem, platform: Platform) -> str | None:
        return of_input_type(self.called, kind, problem)

    def ready(self, call: RequestCall, heads: Heads, dtype: torch.dtype) -> RequestRun:
        splits = 0 if Platform.of(call.cu_q.device).capability >= SPLITS_SINCE else 1  # 0: as many as it thinks best
        return _Run(call, splits)
