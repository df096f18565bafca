"""FlashAttention-4's block sparsity (flash-attn-4): uniform blocks of 128 tokens, a map for all heads or for each query head.

Kept blocks are given as full ones, so no mask function runs. Backward takes the transposed lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.kernels.base import Gradients, Kernel, OutLse, Platform, Prepared, Saved, Unsupported, half_on_cuda
from lcbench.kernels.block_maps import cut_blocks, only_blocks, other_blocks
from lcbench.kernels.flash_attn4 import LIBRARIES, MODULE, overwritten
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.masks.block import BlockMap, kept_first
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


BLOCK = 128
_OPTIONS = ("softmax_scale", "causal", "softcap", "block_sparse_tensors")
CALLS = (
    LibraryCall(MODULE, "_flash_attn_fwd", 3, (*_OPTIONS, "return_lse")),
    LibraryCall(MODULE, "_flash_attn_bwd", 6, _OPTIONS),
    LibraryCall("flash_attn.cute.block_sparsity", "BlockSparseTensorsTorch", 4, ("block_size",)),
)


@dataclass(frozen=True)
class FlashAttn4Sparse(Kernel):
    """flash-attn-4 on block maps, on Hopper, half types, head dims up to 128, softcaps."""

    softcaps: ClassVar[bool] = True
    takes: ClassVar[str] = "blocks"
    contiguous_kv: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = LIBRARIES

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return super().unsupported(problem, mask) or only_blocks(mask) or _refused(mask)

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "flash-attn-4 with blocks of 128", least=(9, 0), most=(9, 0), head_dim=128)

    def missing(self) -> str | None:
        return overwritten(unfit(*CALLS))

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BlockMap)
        if reason := _refused(mask):
            raise Unsupported(reason)
        return PreparedBlocks(mask, heads, device)


def _refused(mask: Mask) -> str | None:
    return other_blocks(mask, BLOCK, "flash-attn-4") or cut_blocks(mask, "flash-attn-4 with blocks")


class PreparedBlocks:
    """A block map as the library's lists: kept blocks of keys per block of queries, and the transposed lists."""

    calls = 1

    def __init__(self, mask: BlockMap, heads: Heads, device: torch.device) -> None:
        import numpy as np
        import torch
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        def lists(keep: Any) -> Any:
            count, index = kept_first(keep)
            repeat = heads.q // mask.maps if mask.maps > 1 else 1
            tables = [count, index, np.zeros_like(count), np.zeros_like(index)]
            full_count, full, none_count, none = (
                torch.from_numpy(np.ascontiguousarray(x.repeat(repeat, axis=0)[None], dtype=np.int32)).to(device) for x in tables
            )
            return BlockSparseTensorsTorch(none_count, none, full_count, full, block_size=(BLOCK, BLOCK))

        keep = mask.keeps()
        self._forward, self._backward = lists(keep), lists(keep.swapaxes(1, 2))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        from flash_attn.cute.interface import _flash_attn_fwd

        out, lse, *_ = _flash_attn_fwd(
            *(x[None].contiguous() for x in (q, k, v)), softmax_scale=softmax_scale, causal=False, softcap=softcap, return_lse=True,
            block_sparse_tensors=self._forward,
        )  # fmt: skip
        return out[0], lse[0].T.contiguous()

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float, softcap: float = 0.0) -> Gradients:
        from flash_attn.cute.interface import _flash_attn_bwd

        q, k, v, out, lse = saved
        q, k, v, out, dout = (x[None].contiguous() for x in (q, k, v, out.to(q.dtype), dout))
        dq, dk, dv, *_ = _flash_attn_bwd(
            q, k, v, out, dout, lse.T[None].contiguous(), softmax_scale=softmax_scale, causal=False, softcap=softcap,
            block_sparse_tensors=self._backward,
        )  # fmt: skip
        return dq[0], dk[0], dv[0]
