"""flashinfer's variable block-sparse attention, forward only: a map for all heads or per key/value head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.kernels.base import LOG2_E, Kernel, Platform, Prepared, Saved, Unsupported, forward_only, half_on_cuda, importable
from lcbench.kernels.block_maps import cut_blocks, only_blocks
from lcbench.kernels.flashinfer import LIBRARIES, workspace
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.masks.block import BlockMap
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

    from lcbench.kernels.base import Gradients, OutLse


_WRAPPER = "VariableBlockSparseAttentionWrapper"
CALLS = (
    LibraryCall("flashinfer", _WRAPPER, 1, ("backend",)),
    LibraryCall("flashinfer", f"{_WRAPPER}.plan", 7, ("logits_soft_cap", "sm_scale", "q_data_type", "kv_data_type")),
    LibraryCall("flashinfer", f"{_WRAPPER}.run", 4, ("return_lse",)),
)
COPIES = 4  # of its token indices that its plan has in memory at a time, by reading it


@dataclass(frozen=True)
class FlashInferSparse(Kernel):
    """flashinfer on block maps, half types, head dims up to 256, softcaps, forward only."""

    softcaps: ClassVar[bool] = True
    takes: ClassVar[str] = "blocks"
    libraries: ClassVar[tuple[str, ...]] = (*LIBRARIES, "einops")

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        blocks = only_blocks(mask) or forward_only(problem, "flashinfer") or _refused(mask, problem.heads)
        return super().unsupported(problem, mask) or blocks

    def pads(self, heads: Heads, platform: Platform) -> bool:
        return True

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "flashinfer")

    def missing(self) -> str | None:
        return unfit(*CALLS) or importable("einops")

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BlockMap)
        if reason := _refused(mask, heads):
            raise Unsupported(reason)
        return PreparedFlashInfer(mask, heads, dtype, device)


def _refused(mask: Mask, heads: Heads) -> str | None:
    if isinstance(mask, BlockMap) and mask.maps > heads.kv:
        return "flashinfer takes one map per key/value head at most, this mask has one per query head"
    return cut_blocks(mask, "flashinfer")


def _too_many(indices: int) -> str | None:
    """Why a plan does not fit into the host's memory: it lists the tokens of all kept blocks, on the device and on the host."""
    import torch

    devices = max(1, torch.cuda.device_count())  # each has a rank that plans at the same time
    needed, here = 4 * COPIES * indices, Platform.of(torch.device("cpu")).memory_bytes // devices
    if needed <= here:
        return None
    return (
        f"flashinfer's plan lists the tokens of every kept block: {needed / 2**30:.0f} GiB of the host's memory, "
        f"which has {here / 2**30:.0f} for each device"
    )


class PreparedFlashInfer:
    """A block map as arguments of the library's plan. The plan is made at the first pass with a softmax scale, which it holds.

    Raises:
        Unsupported: the map has no block, or its plan does not fit into the host's memory.
    """

    calls = 1

    def __init__(self, mask: BlockMap, heads: Heads, dtype: torch.dtype, device: torch.device) -> None:
        import numpy as np
        import torch

        if not len(mask):
            raise Unsupported("flashinfer takes no map without a block")
        keep = mask.keeps().repeat(heads.kv // mask.maps, axis=0)
        if reason := _too_many(int((keep * np.diff(mask.k_edges)).sum())):
            raise Unsupported(reason)
        sizes = [np.tile(np.diff(edges), (heads.kv, 1)).astype(np.int32) for edges in (mask.q_edges, mask.k_edges)]
        self._plan_arguments = [torch.from_numpy(x).to(device) for x in (keep, *sizes)]
        self._workspace = workspace(heads, device)
        self._heads, self._dtype = heads, dtype
        self._planned: dict[tuple[float, float], Any] = {}

    def _plan(self, scale: float, softcap: float) -> Any:
        from flashinfer import VariableBlockSparseAttentionWrapper

        if (scale, softcap) not in self._planned:
            wrapper = VariableBlockSparseAttentionWrapper(self._workspace, backend="fa2")
            wrapper.plan(
                *self._plan_arguments, self._heads.q, self._heads.kv, self._heads.dim, logits_soft_cap=softcap,
                sm_scale=scale, q_data_type=self._dtype, kv_data_type=self._dtype,
            )  # fmt: skip
            self._planned[scale, softcap] = wrapper
        return self._planned[scale, softcap]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        heads_first = [x.transpose(0, 1).contiguous() for x in (q, k, v)]
        out, lse = self._plan(softmax_scale, softcap).run(*heads_first, return_lse=True)
        return out.transpose(0, 1), (lse.T / LOG2_E).contiguous()

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float, softcap: float = 0.0) -> Gradients:
        raise AssertionError("flashinfer has no backward")
