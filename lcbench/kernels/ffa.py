"""MagiAttention's flex-flash-attention (arXiv 2505.13211): any mask as slices in one call, on Hopper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.kernels.base import Gradients, Kernel, Merged, OutLse, Platform, Prepared, Saved, half_on_cuda
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.masks.band import BandMask
from lcbench.masks.convert import slices
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


_SLICES = ("q_ranges", "k_ranges", "attn_type_map", "softmax_scale", "softcap")
CALLS = (
    LibraryCall("magi_attention.functional", "flex_flash_attn_func", 3, _SLICES),
    LibraryCall(
        "magi_attention.functional.flex_flash_attn", "_flex_flash_attn_backward", 0,
        (
            *_SLICES, "dout", "q", "k", "v", "sink", "sink_layout", "out", "lse", "dq", "dk", "dv", "dsink", "dq_type",
            "dk_type", "dv_type", "disable_bwd_dkv_atomic_reduction", "deterministic", "sm_margin",
        ),
    ),
    # Since 1.1 the forward function returns LSE in it; until then it came bare.
    LibraryCall("magi_attention.functional.flex_flash_attn", "AttnForwardMeta"),
)  # fmt: skip
KINDS = {"full": 0, "causal": 1, "inverse": 2, "both": 3}


@dataclass(frozen=True)
class FFA(Kernel):
    """flex-flash-attention on Hopper, half types, head dims up to 128, softcaps; an empty mask is no call."""

    softcaps: ClassVar[bool] = True
    contiguous_kv: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("magi-attention",)

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "flex-flash-attention", least=(9, 0), most=(9, 0), head_dim=128)

    def pads(self, heads: Heads, platform: Platform) -> bool:
        return True

    def missing(self) -> str | None:
        reason = unfit(*CALLS)
        return f"{reason}; MagiAttention 1.1 or later runs" if reason else None

    def calls(self, mask: BandMask, platform: Platform) -> int:
        return min(1, len(mask))

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BandMask)
        return PreparedFFA(mask, device) if len(mask) else Merged([])


class PreparedFFA:
    """The slices of a mask as int32 tables on the device: ranges (n, 2), and the kind of each slice (n)."""

    calls = 1

    def __init__(self, mask: BandMask, device: torch.device) -> None:
        import torch

        found = slices(mask)

        def table(values: list[Any]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self._slices = {
            "q_ranges": table([(s.q0, s.q1) for s in found]), "k_ranges": table([(s.k0, s.k1) for s in found]),
            "attn_type_map": table([KINDS[s.kind] for s in found]),
        }  # fmt: skip

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        from magi_attention.functional import flex_flash_attn_func

        q, k, v = (x.contiguous() for x in (q, k, v))
        out, meta = flex_flash_attn_func(q, k, v, **self._slices, softmax_scale=softmax_scale, softcap=softcap)
        return out, meta.lse

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float, softcap: float = 0.0) -> Gradients:
        import torch
        from magi_attention.functional.flex_flash_attn import _flex_flash_attn_backward

        q, k, v, out, lse = saved
        dout, q, k, v, out = (x.contiguous() for x in (dout, q, k, v, out.to(q.dtype)))
        dq, dk, dv, _ = _flex_flash_attn_backward(
            dout=dout, q=q, k=k, v=v, sink=None, sink_layout="sh", out=out, lse=lse.contiguous(),
            dq=None, dk=None, dv=None, dsink=None,
            **self._slices, softmax_scale=softmax_scale, softcap=softcap, dq_type=torch.float32, dk_type=torch.float32,
            dv_type=torch.float32, disable_bwd_dkv_atomic_reduction=False, deterministic=False, sm_margin=0,
        )  # fmt: skip
        return dq, dk, dv
