"""torch's own attention kernels, with LSE and backward, for any band mask.

On CPU: the flash kernel behind ``scaled_dot_product_attention``, which knows "no mask" and "causal from the top left
corner"; a mask is cut into such pieces, equal ones are batched into one call, partial results are merged by LSE.
On CUDA: the flash-attention 2 that torch ships, called varlen with a window; one call per group of bands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcbench.kernels.base import Prepared, accumulation_dtype, merge, zero_gradients
from lcbench.masks.band import BandMask
from lcbench.masks.convert import Piece, Varlen, pieces, varlen
from lcbench.masks.mask import Mask
from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SDPA:
    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return None

    def unavailable(self, problem: Problem, device: torch.device) -> str | None:
        if device.type == "cuda":
            if problem.dtype not in ("bfloat16", "float16"):
                return f"torch's CUDA flash kernel takes bfloat16 and float16, not {problem.dtype}"
            if problem.heads.dim % 8 or problem.heads.dim > 256:
                return f"torch's CUDA flash kernel takes head dims up to 256 in steps of 8, not {problem.heads.dim}"
        return None

    def prepare(self, mask: BandMask, device: torch.device) -> Prepared:
        return PreparedCUDA(mask, device) if device.type == "cuda" else PreparedCPU(mask)


class PreparedCPU:
    """Pieces of a mask, those of one kind and size batched as long as no query is twice in a batch."""

    def __init__(self, mask: BandMask) -> None:
        batches: dict[tuple[str, int, int, int], list[Piece]] = {}
        layers: dict[tuple[str, int, int], list[int]] = {}
        for piece in sorted(pieces(mask), key=lambda p: (p.q0, p.k0)):
            shape = (piece.kind, piece.q1 - piece.q0, piece.k1 - piece.k0)
            ends = layers.setdefault(shape, [])
            layer = next((i for i, end in enumerate(ends) if end <= piece.q0), len(ends))
            ends[layer : layer + 1] = [piece.q1]
            batches.setdefault((*shape, layer), []).append(piece)
        self._batches = [_Batch(members) for members in batches.values()]
        self.calls = len(self._batches)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        dtype = accumulation_dtype(q.dtype)
        if len(self._batches) == 1 and self._batches[0].covers(q):
            out, lse = self._batches[0].forward(q, k, v, softmax_scale)
            return out.flatten(0, 1), lse.flatten(0, 1)
        out = torch.zeros(q.shape, dtype=dtype, device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
        for batch in self._batches:
            part, part_lse = batch.forward(q, k, v, softmax_scale)
            rows = batch.q_index
            out[rows], lse[rows] = merge(out[rows], lse[rows], part, part_lse)
        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = zero_gradients(q, k, v)
        for batch in self._batches:
            grads = batch.backward(dout, q, k, v, out, lse, softmax_scale)
            for total, index, grad in zip((dq, dk, dv), (batch.q_index, batch.k_index, batch.k_index), grads, strict=True):
                total.index_add_(0, index.flatten(), grad.flatten(0, 1).to(total.dtype))
        return dq, dk, dv


class _Batch:
    """Equal pieces as one batched call; ``inverse`` ones run causal with queries and keys in reverse order."""

    def __init__(self, members: list[Piece]) -> None:
        import torch

        kind, q0, q1, k0, k1 = members[0]
        self.causal = kind != "full"
        rows, keys = torch.arange(q1 - q0), torch.arange(k1 - k0)
        if kind == "inverse":
            rows, keys = rows.flip(0), keys.flip(0)
        self.q_index = torch.stack([rows + piece.q0 for piece in members])  # (B, lq)
        self.k_index = torch.stack([keys + piece.k0 for piece in members])  # (B, lk)
        # A piece that is a stretch of rows in order needs no gathering.
        self._slices = (slice(q0, q1), slice(k0, k1)) if len(members) == 1 and kind != "inverse" else None

    def covers(self, q: torch.Tensor) -> bool:
        return self._slices is not None and self._slices[0] == slice(0, len(q))

    def _take(self, *tensors: torch.Tensor, keys: bool = False) -> list[torch.Tensor]:
        """(T, H, ...) to (B, H, l, ...)."""
        if self._slices:
            return [x[self._slices[keys]][None].transpose(1, 2) for x in tensors]
        index = self.k_index if keys else self.q_index
        return [x[index].transpose(1, 2) for x in tensors]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """out (B, lq, H, D) and lse (B, lq, H)."""
        import torch

        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *self._take(q), *self._take(k, v, keys=True), 0.0, self.causal, scale=scale
        )
        return out.transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> list[torch.Tensor]:
        """dq (B, lq, H, D), dk and dv (B, lk, Hk, D)."""
        import torch

        dout, q, out, lse = self._take(dout, q, out, lse)
        k, v = self._take(k, v, keys=True)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, self.causal, scale=scale
        )
        return [grad.transpose(1, 2) for grad in grads]


class PreparedCUDA:
    """The mask as varlen calls of torch's flash-attention 2."""

    def __init__(self, mask: BandMask, device: torch.device) -> None:
        import torch

        def offsets(values: tuple[int, ...]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self._groups = [(group, offsets(group.cu_q), offsets(group.cu_k)) for group in varlen(mask)]
        self.calls = len(self._groups)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        total: tuple[torch.Tensor, torch.Tensor] | None = None
        for group, cu_q, cu_k in self._groups:
            out, lse, *_ = torch.ops.aten._flash_attention_forward(
                q, k, v, cu_q, cu_k, group.max_q, group.max_k, 0.0, _is_causal(group), False,
                scale=softmax_scale, window_size_left=group.window[0], window_size_right=group.window[1],
            )  # fmt: skip
            # torch returns (H, T), and +inf for a row without keys.
            lse = torch.where(lse == torch.inf, -torch.inf, lse).T
            if self.calls == 1:
                return out, lse.contiguous()
            total = (out.float(), lse) if total is None else merge(*total, out, lse)
        if total is None:
            return torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf, device=q.device)
        return total

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        # A row without keys has no finite LSE; +inf makes the kernel's weights vanish.
        kernel_lse = torch.where(lse == -torch.inf, torch.inf, lse).T.contiguous()
        # Dropout is off, so the random state is never read; the kernel wants tensors in its place all the same.
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        totals: list[torch.Tensor] = []
        for group, cu_q, cu_k in self._groups:
            grads = torch.ops.aten._flash_attention_backward(
                dout, q, k, v, out, kernel_lse, cu_q, cu_k, group.max_q, group.max_k, 0.0, _is_causal(group),
                rng_state, unused,
                scale=softmax_scale, window_size_left=group.window[0], window_size_right=group.window[1],
            )  # fmt: skip
            if self.calls == 1:
                dq, dk, dv = grads
                return dq, dk, dv
            totals = [g.float() for g in grads] if not totals else [t + g for t, g in zip(totals, grads, strict=True)]
        if not totals:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        return totals[0], totals[1], totals[2]


def _is_causal(group: Varlen) -> bool:
    return group.window == (-1, 0)
