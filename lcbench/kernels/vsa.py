"""Video sparse attention's block-sparse kernels (fastvideo-kernel, arXiv 2505.13389): the Triton ones.

Uniform blocks of 64 tokens, as many key/value as query heads, and its own softmax scale of 1 / sqrt(D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import LOG2_E, Kernel, Platform, Prepared, Saved, Unsupported, dims, half_on_cuda, heads_first
from lcbench.kernels.block_maps import cut_blocks, only_blocks, other_blocks
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.masks.block import BlockMap, kept_first
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

    from lcbench.kernels.base import Gradients, OutLse


BLOCK = 64
MODULE = "fastvideo_kernel.block_sparse_attn"
CALLS = (
    LibraryCall(MODULE, "block_sparse_attn_triton", 6, ()),
    LibraryCall(MODULE, "block_sparse_attn_backward_triton", 9, ()),
)


@dataclass(frozen=True)
class VSA(Kernel):
    """fastvideo-kernel on block maps, bfloat16 on CUDA, head dims up to 128."""

    takes: ClassVar[str] = "blocks"
    libraries: ClassVar[tuple[str, ...]] = ("fastvideo-kernel",)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return super().unsupported(problem, mask) or only_blocks(mask) or _other(problem) or _refused(mask, problem.heads)

    def pads(self, heads: Heads, platform: Platform) -> bool:
        return True

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "VSA", head_dim=128, dtypes=("bfloat16",))

    def missing(self) -> str | None:
        return unfit(*CALLS)

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BlockMap)
        if reason := _refused(mask, heads):
            raise Unsupported(reason)
        return PreparedVSA(mask, heads, device)


def _other(problem: Problem) -> str | None:
    """Why its own softmax scale is not the problem's."""
    if abs(problem.softmax_scale * problem.heads.dim**0.5 - 1) > 1e-6:
        return f"VSA's softmax scale is 1 / sqrt(D), which softmax={problem.softmax} is not"
    if problem.heads.v > problem.heads.dim:
        return f"VSA takes its softmax scale from one head dim, and values are longer than keys: {dims(problem.heads)}"
    return None


def _refused(mask: Mask, heads: Heads) -> str | None:
    if heads.q != heads.kv:
        return f"VSA takes as many key/value as query heads, not {heads.q} and {heads.kv}"
    return other_blocks(mask, BLOCK, "VSA", divide=True) or cut_blocks(mask, "VSA")


class PreparedVSA:
    """A block map as the library's lists of kept blocks of keys per block of queries."""

    calls = 1

    def __init__(self, mask: BlockMap, heads: Heads, device: torch.device) -> None:
        import numpy as np
        import torch

        count, index = kept_first(mask.keeps().repeat(heads.q // mask.maps, axis=0)[None])
        index = np.where(np.arange(index.shape[-1]) < count[..., None], index, -1)
        sizes = np.diff(mask.k_edges)
        self._lists = [torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)).to(device) for x in (index, count, sizes)]

    def _own_scale(self, q: torch.Tensor, softmax_scale: float) -> None:
        if abs(softmax_scale * q.shape[2] ** 0.5 - 1) > 1e-6:
            raise ValueError(f"VSA's softmax scale is 1 / sqrt(D), not {softmax_scale}")

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float) -> OutLse:
        from fastvideo_kernel.block_sparse_attn import block_sparse_attn_triton

        self._own_scale(q, softmax_scale)
        out, log2 = block_sparse_attn_triton(*(heads_first(x).contiguous() for x in (q, k, v)), *self._lists)
        return out[0].transpose(0, 1), (log2[0].T / LOG2_E).contiguous()

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float) -> Gradients:
        from fastvideo_kernel.block_sparse_attn import block_sparse_attn_backward_triton

        q, k, v, out, lse = saved
        self._own_scale(q, softmax_scale)
        dout, q, k, v, out = (heads_first(x).contiguous() for x in (dout, q, k, v, out.to(q.dtype)))
        log2 = (lse.T * LOG2_E)[None].contiguous()
        dq, dk, dv = (x[0].transpose(0, 1) for x in block_sparse_attn_backward_triton(dout, q, k, v, out, log2, *self._lists))
        return dq, dk, dv
