"""For kernels that take sequences of many lengths with a window: any band mask as such calls, merged by LSE.

Libraries differ in what they stand, and say so by ``Style``. ``WINDOWED`` ones (flash-attn) take any window and sequences without
queries or without keys, so that q, k and v are used where they lie. Others get the sequences alone, their rows gathered; and where
they know a causal bound but no other right bound, bands are cut into slices, of which those that are bounded below only run
with queries and keys in reverse order, which makes them causal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from lcbench.kernels.base import Merged, Prepared, accumulation_dtype, heads_whole
from lcbench.masks.band import BandMask, spread
from lcbench.masks.convert import Varlen, varlen, without_right_windows

if TYPE_CHECKING:
    import torch


class Style(NamedTuple):
    gaps: bool  # sequences without queries or without keys are fine
    right: bool  # a window may reach right of the diagonal


WINDOWED = Style(gaps=True, right=True)


@dataclass(frozen=True)
class VarlenCall:
    """One call: sequence i is rows ``cu_q[i]:cu_q[i + 1]`` against keys ``cu_k[i]:cu_k[i + 1]``, int32 on the device.

    ``window`` is (left, right), aligned to the bottom right corner of each sequence, -1 for no bound. ``lengths``:
    (queries, keys) of each sequence, on the host.
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    window: tuple[int, int]
    lengths: tuple[tuple[int, int], ...]

    @property
    def causal(self) -> bool:
        return self.window == (-1, 0)


class VarlenRun(Protocol):
    """A library's varlen functions made ready for one call; LSE is (H, T), for rows without keys what the library says."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]: ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


def count_varlen(mask: BandMask, style: Style = WINDOWED) -> int:
    """Calls that a mask takes."""
    return len(list(_groups(mask, style)))


def prepare_varlen(
    mask: BandMask, device: torch.device, ready: Callable[[VarlenCall], VarlenRun], style: Style = WINDOWED
) -> Prepared:
    """A mask as varlen calls of one library, which ``ready`` is asked for once for each of them."""
    return Merged([_Part(group, flipped, mask, device, ready, style) for group, flipped in _groups(mask, style)])


def _groups(mask: BandMask, style: Style) -> Iterator[tuple[Varlen, bool]]:
    """(call, whether it runs with queries and keys in reverse order)."""
    if style.right:
        yield from ((group, False) for group in varlen(mask))
        return
    causal, below_only = without_right_windows(mask)
    yield from ((group, False) for group in varlen(causal))
    yield from ((group, True) for group in varlen(_reversed(below_only)))


def _reversed(mask: BandMask) -> BandMask:
    """Queries and keys counted from the end."""
    q0, q1, k0, k1, lo, hi = mask.bands.T
    corner = mask.num_k - mask.num_q
    return BandMask.of(
        mask.num_q, mask.num_k,
        np.stack([mask.num_q - q1, mask.num_q - q0, mask.num_k - k1, mask.num_k - k0, corner - hi, corner - lo], axis=1),
    )  # fmt: skip


class _Part:
    """One varlen call; ``calls`` is 1."""

    calls = 1

    def __init__(
        self,
        group: Varlen,
        flipped: bool,
        mask: BandMask,
        device: torch.device,
        ready: Callable[[VarlenCall], VarlenRun],
        style: Style,
    ) -> None:
        import torch

        cu_q, cu_k = np.array(group.cu_q), np.array(group.cu_k)
        self._rows: list[torch.Tensor | None] = [None, None]
        if not style.gaps:
            whole = (np.diff(cu_q) > 0) & (np.diff(cu_k) > 0)
            for side, (cu, number) in enumerate(((cu_q, mask.num_q), (cu_k, mask.num_k))):
                _, rows = spread(cu[:-1][whole], cu[1:][whole])
                rows = number - 1 - rows if flipped else rows
                if len(rows) != number or flipped:
                    self._rows[side] = torch.from_numpy(rows).to(device)
            cu_q, cu_k = (np.concatenate([[0], np.cumsum(np.diff(cu)[whole])]) for cu in (cu_q, cu_k))
        lengths = np.stack([np.diff(cu_q), np.diff(cu_k)], axis=1)
        offsets = [torch.from_numpy(cu.astype(np.int32)).to(device) for cu in (cu_q, cu_k)]
        # flash-attn runs another layout where no sequence has two queries, which does not stand ones without any.
        max_q = max(2, int(lengths[:, 0].max()))
        self._run = ready(
            VarlenCall(offsets[0], offsets[1], max_q, int(lengths[:, 1].max()), group.window, tuple(map(tuple, lengths.tolist())))
        )

    def _take(self, *tensors: torch.Tensor, side: int) -> list[torch.Tensor]:
        rows = self._rows[side]
        return [heads_whole(x) if rows is None else x[rows] for x in tensors]

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        (own_q,), (own_k, own_v) = self._take(q, side=0), self._take(k, v, side=1)
        out, lse = self._run.forward(own_q, own_k, own_v, softmax_scale)
        # Libraries give +inf or -inf for a row without keys.
        lse = torch.where(lse == torch.inf, -torch.inf, lse).T.contiguous()
        if self._rows[0] is None:
            return out, lse
        whole_out, whole_lse = torch.zeros_like(q, dtype=out.dtype), lse.new_full(q.shape[:2], -torch.inf)
        whole_out[self._rows[0]], whole_lse[self._rows[0]] = out, lse
        return whole_out, whole_lse

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

        # For a row without keys +inf makes the weights vanish, whatever the library itself gives there.
        kernel_lse = torch.where(lse == -torch.inf, torch.inf, lse)
        own_dout, own_q, own_out, own_lse = self._take(dout, q, out.to(q.dtype), kernel_lse, side=0)
        own_k, own_v = self._take(k, v, side=1)
        grads = self._run.backward(own_dout, own_q, own_k, own_v, own_out, own_lse.T.contiguous(), softmax_scale)
        found = []
        for grad, like, rows in zip(grads, (q, k, v), (self._rows[0], self._rows[1], self._rows[1]), strict=True):
            if rows is None:
                found.append(grad)
                continue
            found.append(torch.zeros(like.shape, dtype=accumulation_dtype(like.dtype), device=like.device))
            found[-1][rows] = grad.to(found[-1].dtype)
        return found[0], found[1], found[2]
