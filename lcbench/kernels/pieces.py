"""Any band mask on functions that know "no mask" and "causal from the top left corner": batches of such pieces.

Equal pieces go into one batched call, and partial results are merged by LSE.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lcbench.kernels.base import Gradients, Kernel, OutLse, Platform, Prepared, Saved, Work, accumulation_dtype, zero_gradients
from lcbench.masks.band import BandMask
from lcbench.masks.convert import Piece, pieces
from lcbench.masks.mask import Mask
from lcbench.problem import Heads

if TYPE_CHECKING:
    import torch


class PiecesKernel(Kernel):
    """A kernel that runs batches of pieces, each full or causal from its top left corner.

    Tensors of a batch are (B, H, l, D or Dv), LSE (B, Hq, l): B pieces of l tokens. k and v have the key/value heads.
    """

    @abstractmethod
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> OutLse:
        """(out, lse) of a batch."""
        ...

    @abstractmethod
    def adjoint(self, dout: torch.Tensor, saved: Saved, causal: bool, scale: float) -> Gradients:
        """(dq, dk, dv) of a batch, from out and LSE over all keys of its rows."""
        ...

    def calls(self, mask: BandMask, platform: Platform) -> int:
        return len(_batches(mask))

    def computed(self, rows: int, keys: int, causal: bool, platform: Platform) -> int:
        """Pairs that a call computes of a piece, those among them that a causal mask takes away."""
        return rows * keys

    def work(self, mask: BandMask, platform: Platform) -> Work | None:
        batches = _batches(mask)
        each = [(p.kind != "full", p.q1 - p.q0, p.k1 - p.k0) for batch in batches for p in batch]
        pairs = sum(self.computed(rows, keys, causal, platform) for causal, rows, keys in each)
        if [(rows, keys) for _, rows, keys in each] == [(mask.num_q, mask.num_k)] and batches[0][0].kind != "inverse":
            return Work(1, pairs)
        most = max(map(_copies, batches), key=sum, default=(0, 0))
        return Work(len(batches), pairs, sum(rows for _, rows, _ in each), sum(keys for _, _, keys in each), *most)

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BandMask)
        return PreparedPieces(self, mask, device)


def _copies(batch: Sequence[Piece]) -> tuple[int, int]:
    """Rows and keys of a batch, each as often as ``_Batch.backward`` holds a copy of them: operands where they are gathered,
    gradients, and one of these in the order that it is added in.
    """
    first, gathered = batch[0], len(batch) > 1 or batch[0].kind == "inverse"
    rows, keys = len(batch) * (first.q1 - first.q0), len(batch) * (first.k1 - first.k0)
    return (5 * rows, 3 * keys) if gathered else (2 * rows, 2 * keys)


def _batches(mask: BandMask) -> list[list[Piece]]:
    """Pieces of a mask, batched by kind and size; no query is twice in a batch."""
    batches: dict[tuple[str, int, int, int], list[Piece]] = {}
    layers: dict[tuple[str, int, int], list[int]] = {}
    for piece in sorted(pieces(mask), key=lambda p: (p.q0, p.k0)):
        shape = (piece.kind, piece.q1 - piece.q0, piece.k1 - piece.k0)
        ends = layers.setdefault(shape, [])
        layer = next((i for i, end in enumerate(ends) if end <= piece.q0), len(ends))
        ends[layer : layer + 1] = [piece.q1]
        batches.setdefault((*shape, layer), []).append(piece)
    return list(batches.values())


class PreparedPieces:
    """A mask as batches of pieces for one kernel."""

    def __init__(self, kernel: PiecesKernel, mask: BandMask, device: torch.device) -> None:
        self._batches = [_Batch(kernel, members, device) for members in _batches(mask)]
        self.calls = len(self._batches)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float) -> OutLse:
        import torch

        from lcbench.kernels.merge import merge_into

        dtype = accumulation_dtype(q.dtype)
        if len(self._batches) == 1 and self._batches[0].covers(q, k):
            out, lse = self._batches[0].forward(q, k, v, softmax_scale)
            return out.flatten(0, 1), lse.flatten(0, 1)
        out = torch.zeros((*q.shape[:2], v.shape[2]), dtype=dtype, device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
        for batch in self._batches:
            part, part_lse = batch.forward(q, k, v, softmax_scale)
            rows = batch.q_index
            own, own_lse = out[rows], lse[rows]
            merge_into(*(x.flatten(0, 1) for x in (own, own_lse, part, part_lse)))  # views: the rows that were taken are contiguous
            out[rows], lse[rows] = own, own_lse
        return out, lse

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float) -> Gradients:
        q, k, v, _, _ = saved
        if len(self._batches) == 1 and self._batches[0].covers(q, k):
            whole = self._batches[0].backward(dout, saved, softmax_scale)
            return whole[0].flatten(0, 1), whole[1].flatten(0, 1), whole[2].flatten(0, 1)
        dq, dk, dv = zero_gradients(q, k, v)
        for batch in self._batches:
            grads = batch.backward(dout, saved, softmax_scale)
            for total, index, grad in zip((dq, dk, dv), (batch.q_index, batch.k_index, batch.k_index), grads, strict=True):
                total.index_add_(0, index.flatten(), grad.flatten(0, 1).to(total.dtype))
        return dq, dk, dv


class _Batch:
    """Equal pieces as one batched call. ``inverse`` pieces are causal once their queries and keys are reversed."""

    def __init__(self, kernel: PiecesKernel, members: list[Piece], device: torch.device) -> None:
        import torch

        self._kernel = kernel
        kind, q0, q1, k0, k1 = members[0]
        self.causal = kind != "full"
        rows, keys = torch.arange(q1 - q0, device=device), torch.arange(k1 - k0, device=device)
        if kind == "inverse":
            rows, keys = rows.flip(0), keys.flip(0)
        self.q_index = torch.stack([rows + piece.q0 for piece in members])  # (B, lq)
        self.k_index = torch.stack([keys + piece.k0 for piece in members])  # (B, lk)
        # One piece in its own order is a slice: its rows are not gathered.
        self._slices = (slice(q0, q1), slice(k0, k1)) if len(members) == 1 and kind != "inverse" else None

    def covers(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        """Whether it is one piece of all queries and all keys."""
        return self._slices == (slice(0, len(q)), slice(0, len(k)))

    def _take(self, *tensors: torch.Tensor, keys: bool = False) -> list[torch.Tensor]:
        """(T, H, ...) to (B, H, l, ...)."""
        if self._slices:
            return [x[self._slices[keys]][None].transpose(1, 2) for x in tensors]
        index = self.k_index if keys else self.q_index
        return [x[index].transpose(1, 2) for x in tensors]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> OutLse:
        """out (B, lq, H, Dv) and lse (B, lq, H)."""
        (q,), (k, v) = self._take(q), self._take(k, v, keys=True)
        out, lse = self._kernel.attend(q, k, v, self.causal, scale)
        return out.transpose(1, 2), lse.transpose(1, 2)

    def backward(self, dout: torch.Tensor, saved: Saved, scale: float) -> list[torch.Tensor]:
        """dq (B, lq, H, D), dk (B, lk, Hk, D) and dv (B, lk, Hk, Dv)."""
        dout, q, out, lse = self._take(dout, saved.q, saved.out, saved.lse)
        k, v = self._take(saved.k, saved.v, keys=True)
        grads = self._kernel.adjoint(dout, Saved(q, k, v, out, lse), self.causal, scale)
        return [grad.transpose(1, 2) for grad in grads]
