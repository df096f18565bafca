"""FlashAttention-3 against a cache: the Hopper build of flash-attention, which splits keys over programs where that helps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import OutLse, Platform, half_on_cuda
from lcbench.kernels.cache import Cache, CacheKind
from lcbench.kernels.flash_attn3 import MODULE
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.kernels.requests import FLASH_OPTIONS, RequestCall, RequestKernel, RequestRun, flash_arguments, of_input_type
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

CALLS = (LibraryCall(MODULE, "_flash_attn_forward", 3, ("qv", *FLASH_OPTIONS, "num_splits")),)
ROTARY = 64  # the most numbers of a latent key besides those that are its value


@dataclass(frozen=True)
class _Run:
    call: RequestCall
    heads: Heads

    def forward(self, q: torch.Tensor, cache: Cache, scale: float, softcap: float) -> OutLse:
        from flash_attn_interface import _flash_attn_forward

        k, latent = cache.k, {}
        if self.heads.latent:
            # Products with the part of a key that is its value come from a query of their own, as SGLang calls it.
            latent = {"qv": q[..., : self.heads.v]}
            q, k = q[..., self.heads.v :], k[..., self.heads.v :]
        told = flash_arguments(self.call, scale, softcap)
        out, lse, *_ = _flash_attn_forward(q, k, cache.v, **latent, **told, num_splits=0)
        return out, lse.T


@dataclass(frozen=True)
class FlashAttn3Cache(RequestKernel):
    """flash-attn 3 on Hopper, half types, pages of any size, forward only.

    Head dims are equal and up to 256, or of keys above 128 up to 192 with values above 96 up to 128, or latent with values from
    256 to 512 and at most 64 numbers more.
    """

    called: ClassVar[str] = "flash-attn 3's kernel for caches"
    libraries: ClassVar[tuple[str, ...]] = ("flash-attn-3",)

    def refused_heads(self, heads: Heads) -> str | None:
        if heads.latent:
            fits = 256 <= heads.v <= 512 and 0 < heads.dim - heads.v <= ROTARY
        else:
            fits = heads.dim == heads.v <= 256 or (128 < heads.dim <= 192 and 96 < heads.v <= 128)
        if fits and heads.dim % 8 == heads.v % 8 == 0:
            return None
        return (
            f"{self.called} takes equal head dims up to 256, keys above 128 up to 192 with values above 96 up to 128, and latent"
            f" values from 256 to 512 with at most {ROTARY} numbers more, in steps of 8, not {heads.dim} with {heads.v}"
        )

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, self.called, least=(9, 0), most=(9, 0), head_dim=512 + ROTARY)

    def missing(self) -> str | None:
        reason = unfit(*CALLS)
        return f"{reason}; the Hopper build of flash-attention's branch main is what runs" if reason else None

    def reads(self, kind: CacheKind, problem: Problem, platform: Platform) -> str | None:
        if kind.storage == "float8":
            return f"{self.called} reads float8 keys with float8 queries only, and a problem's queries are {problem.dtype}"
        return of_input_type(self.called, kind, problem)

    def ready(self, call: RequestCall, heads: Heads, dtype: torch.dtype) -> RequestRun:
        return _Run(call, heads)
