"""flashinfer's prefill attention over sequences of many lengths, forward only: causal, with a left window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.kernels.base import Platform, Prepared, half_on_cuda, importable
from lcbench.kernels.varlen import Style, VarlenCall, count_varlen, prepare_varlen
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


STYLE = Style(gaps=False, right=False)
WORKSPACE_BYTES = 128 << 20
LOG2_E = 1.4426950408889634  # its LSE is in powers of two


@dataclass(frozen=True)
class FlashInfer:
    takes: ClassVar[str] = "bands"

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return forward_only(problem, "flashinfer")

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "flashinfer")

    def missing(self) -> str | None:
        return importable("flashinfer")

    def calls(self, mask: BandMask, platform: Platform) -> int:
        return count_varlen(mask, STYLE)

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BandMask)
        return prepare_varlen(mask, device, _Library(heads, dtype, device), STYLE)


def forward_only(problem: Problem, name: str) -> str | None:
    return f"{name} has no backward; direction=forward runs" if problem.backward else None


class _Library:
    def __init__(self, heads: Heads, dtype: torch.dtype, device: torch.device) -> None:
        import torch

        self._heads, self._dtype = heads, dtype
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._planned: dict[tuple[int, float], Any] = {}

    def _plan(self, call: VarlenCall, scale: float) -> Any:
        """The plan of a call, made when its scale is first known."""
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        if (id(call), scale) not in self._planned:
            wrapper = BatchPrefillWithRaggedKVCacheWrapper(self._workspace, kv_layout="NHD", backend="fa2")
            wrapper.plan(
                call.cu_q, call.cu_k, self._heads.q, self._heads.kv, self._heads.dim, causal=call.window != (-1, -1),
                window_left=call.window[0], sm_scale=scale, q_data_type=self._dtype, kv_data_type=self._dtype,
            )  # fmt: skip
            self._planned[id(call), scale] = wrapper
        return self._planned[id(call), scale]

    def forward(
        self, call: VarlenCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self._plan(call, scale).run(q, k, v, return_lse=True)
        return out, lse.T / LOG2_E

    def backward(
        self,
        call: VarlenCall,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise AssertionError("flashinfer has no backward")
