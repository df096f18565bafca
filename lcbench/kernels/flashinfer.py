"""flashinfer's prefill attention over sequences of many lengths, forward only: causal, with a left window."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

from lcbench.kernels.base import LOG2_E, Gradients, OutLse, Platform, Saved, forward_only, half_on_cuda
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.kernels.varlen import CAUSAL, Style, VarlenCall, VarlenKernel, VarlenRun
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


WORKSPACE_BYTES = 512 << 20
LIBRARIES = ("flashinfer-python", "flashinfer-cubin", "flashinfer-jit-cache")
_OPTIONS = ("head_dim_vo", "causal", "window_left", "logits_soft_cap", "sm_scale", "q_data_type", "kv_data_type")
_WRAPPER = "BatchPrefillWithRaggedKVCacheWrapper"
CALLS = (
    LibraryCall("flashinfer", _WRAPPER, 1, ("kv_layout", "backend")),
    LibraryCall("flashinfer", f"{_WRAPPER}.plan", 6, _OPTIONS),
    LibraryCall("flashinfer", f"{_WRAPPER}.run", 4, ("return_lse",)),
)


@dataclass(frozen=True)
class FlashInfer(VarlenKernel):
    """flashinfer's ragged prefill, half types, head dims up to 256, softcaps, forward only."""

    softcaps: ClassVar[bool] = True
    style: ClassVar[Style] = CAUSAL
    libraries: ClassVar[tuple[str, ...]] = LIBRARIES

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return super().unsupported(problem, mask) or forward_only(problem, "flashinfer")

    def pads(self, heads: Heads, platform: Platform) -> bool:
        return (heads.dim, heads.v) != (192, 128)  # the only two that its tests of this wrapper have

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "flashinfer")

    def missing(self) -> str | None:
        return unfit(*CALLS)

    def ready(self, call: VarlenCall, heads: Heads, dtype: torch.dtype) -> VarlenRun:
        return _Run(heads, dtype, workspace(heads, call.cu_q.device), call)


_workspaces: WeakValueDictionary[tuple[torch.device, int], torch.Tensor] = WeakValueDictionary()


def workspace(heads: Heads, device: torch.device) -> torch.Tensor:
    """Memory for partial results, which all plans of a device share as long as one of them lives.

    Releases up to 0.6.18 ask for room for every query head in each of their tiles of 128 rows, of which two run on a
    multiprocessor; how many they ask for together depends on the key/value heads, and exceeds the 128 MiB of their examples.
    """
    import torch

    needed = 0
    if device.type == "cuda":
        tiles = 2 * torch.cuda.get_device_properties(device).multi_processor_count // heads.kv
        needed = heads.q * tiles * 128 * (heads.v + 1) * 4
    size = max(WORKSPACE_BYTES, needed + (16 << 20))
    found = _workspaces.get((device, size))
    if found is None:
        found = _workspaces[device, size] = torch.empty(size, dtype=torch.uint8, device=device)
    return found


@dataclass
class _Run:
    heads: Heads
    dtype: torch.dtype
    workspace: torch.Tensor
    call: VarlenCall
    _planned: dict[tuple[float, float], Any] = field(default_factory=dict)

    def _plan(self, scale: float, softcap: float) -> Any:
        """The plan of the call, made when its scale is first known."""
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        if (scale, softcap) not in self._planned:
            wrapper = BatchPrefillWithRaggedKVCacheWrapper(self.workspace, kv_layout="NHD", backend="fa2")
            wrapper.plan(
                self.call.cu_q, self.call.cu_k, self.heads.q, self.heads.kv, self.heads.dim, head_dim_vo=self.heads.v,
                causal=self.call.window != (-1, -1), window_left=self.call.window[0], logits_soft_cap=softcap, sm_scale=scale,
                q_data_type=self.dtype, kv_data_type=self.dtype,
            )  # fmt: skip
            self._planned[scale, softcap] = wrapper
        return self._planned[scale, softcap]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float = 0.0) -> OutLse:
        out, lse = self._plan(scale, softcap).run(q, k, v, return_lse=True)
        return out, lse.T / LOG2_E

    def backward(self, dout: torch.Tensor, saved: Saved, scale: float, softcap: float = 0.0) -> Gradients:
        raise AssertionError("flashinfer has no backward")
