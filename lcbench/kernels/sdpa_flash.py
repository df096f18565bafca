"""torch's ``flash`` backend of scaled_dot_product_attention, called below the dispatcher so that no other can take its place.

On CPU: torch's own flash kernel, which knows "no mask" and "causal". On CUDA: the flash-attention 2 that torch ships, called with
sequences and a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lcbench.kernels.base import Gradients, OutLse, Platform, Prepared, Rounding, Saved, Work, half_on_cuda
from lcbench.kernels.pieces import PiecesKernel
from lcbench.kernels.varlen import VarlenCall, count_varlen, prepare_varlen
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

# Blocks of torch's CPU kernel: (from so many rows on, rows of a block), and keys of a block.
ROWS_AT_ONCE = ((768, 256), (192, 64), (0, 32))
KEYS_AT_ONCE = 512


@dataclass(frozen=True)
class SDPAFlash(PiecesKernel):
    """torch's flash backend: half types and head dims up to 256 on CUDA, any type on CPU."""

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "torch's CUDA flash kernel") if platform.type == "cuda" else None

    def pads(self, heads: Heads, platform: Platform) -> bool:
        return True

    def calls(self, mask: BandMask, platform: Platform) -> int:
        return count_varlen(mask) if platform.type == "cuda" else super().calls(mask, platform)

    def work(self, mask: BandMask, platform: Platform) -> Work | None:
        return None if platform.type == "cuda" else super().work(mask, platform)

    def computed(self, rows: int, keys: int, causal: bool, platform: Platform) -> int:
        """torch's CPU kernel computes whole blocks of keys up to the last key that a block of rows sees."""
        if not causal:
            return rows * keys
        height = next(height for least, height in ROWS_AT_ONCE if rows >= least)
        ends = np.minimum(np.arange(0, rows, height) + height, rows)
        seen = -(-np.minimum(ends, keys) // KEYS_AT_ONCE) * KEYS_AT_ONCE
        return int((np.minimum(seen, keys) * np.diff(ends, prepend=0)).sum())

    def rounding(self, platform: Platform) -> Rounding:
        # torch's CPU kernel adds each block of 32 to 256 rows to gradients of the inputs' type; its exponential of 0 is 1 + 5e-5.
        return Rounding(sums_every=64, exponential=1.5e-4) if platform.type == "cpu" else Rounding()

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        if device.type != "cuda":
            return super().prepare(mask, heads, dtype, device)
        assert isinstance(mask, BandMask)
        return prepare_varlen(mask, device, _CUDA)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> OutLse:
        import torch

        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse

    def adjoint(self, dout: torch.Tensor, saved: Saved, causal: bool, scale: float) -> Gradients:
        import torch

        q, k, v, out, lse = saved
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
        return dq, dk, dv


class _CUDA:
    def __init__(self, call: VarlenCall) -> None:
        import torch

        self._call = call
        # Dropout is off, so the random state is never read; the kernel wants tensors in its place all the same.
        self._rng_state = torch.zeros(2, dtype=torch.uint64, device=call.cu_q.device)
        self._unused = torch.empty(0, dtype=torch.uint64, device=call.cu_q.device)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> OutLse:
        import torch

        call = self._call
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, call.cu_q, call.cu_k, call.max_q, call.max_k, 0.0, call.causal, False,
            scale=scale, window_size_left=call.window[0], window_size_right=call.window[1],
        )  # fmt: skip
        return out, lse

    def backward(self, dout: torch.Tensor, saved: Saved, scale: float) -> Gradients:
        import torch

        q, k, v, out, lse = saved
        call = self._call
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, call.cu_q, call.cu_k, call.max_q, call.max_k, 0.0, call.causal, self._rng_state,
            self._unused, scale=scale, window_size_left=call.window[0], window_size_right=call.window[1],
        )  # fmt: skip
        return dq, dk, dv
