"""Any band mask on a library that takes sequences of many lengths with a window ("varlen"): several calls, merged by LSE.

A ``Style`` says which sequences and windows a library takes. ``WINDOWED`` libraries (flash-attn) take any window, and sequences
without queries or without keys, so they read q, k and v in place. Other libraries get gathered rows of the sequences only. For a
library whose only right bound is the causal one, bands are cut into slices; a slice that is bounded below only becomes causal when
its queries and keys are reversed, and runs that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import numpy as np

from lcbench.kernels.base import Gradients, Kernel, Merged, OutLse, Platform, Prepared, Saved, accumulation_dtype, heads_whole
from lcbench.masks.band import BandMask, Ints, spread
from lcbench.masks.convert import Varlen, varlen, without_right_windows
from lcbench.masks.mask import Mask
from lcbench.problem import Heads

if TYPE_CHECKING:
    import torch


class Style(NamedTuple):
    """Which sequences and windows a library takes.

    Attributes:
        gaps: it takes sequences without queries or without keys.
        right: it takes windows that reach right of the diagonal.
    """

    gaps: bool
    right: bool


WINDOWED = Style(gaps=True, right=True)
CAUSAL = Style(gaps=False, right=False)


@dataclass(frozen=True)
class VarlenCall:
    """One varlen call.

    Attributes:
        cu_q, cu_k: (sequences + 1), int32 on the device: sequence i is rows ``cu_q[i]:cu_q[i + 1]`` against keys
            ``cu_k[i]:cu_k[i + 1]``.
        max_q, max_k: the longest sequence, tokens.
        window: (left, right) in tokens, aligned to the bottom right corner of each sequence; -1 for no bound.
        lengths: (queries, keys) of each sequence, on the host.
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    window: tuple[int, int]
    lengths: tuple[tuple[int, int], ...]

    @property
    def causal(self) -> bool:
        """Whether the window is the causal bound alone."""
        return self.window == (-1, 0)


@dataclass(frozen=True)
class OneCall:
    """What a library's functions are made ready for, where nothing else is to be kept."""

    call: VarlenCall


class VarlenRun(Protocol):
    """A library's varlen functions made ready for one call. Here LSE is (Hq, Tq); in rows without keys it is infinite.

    Where ``Kernel.softcaps``, both methods take ``softcap`` besides, as those of ``Prepared`` do.
    """

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> OutLse:
        """(out, lse); the infinity of rows without keys has the sign that the library gives it."""
        ...

    def backward(self, dout: torch.Tensor, saved: Saved, scale: float) -> Gradients:
        """(dq, dk, dv); ``saved.lse`` is +inf in rows without keys, ``saved.out`` has the inputs' type."""
        ...


class VarlenKernel(Kernel):
    """A kernel whose library takes sequences of many lengths with a window: it says how one call is made.

    Attributes:
        style: which sequences and windows the library takes.
        run: makes the library's functions ready for one call.
    """

    style: ClassVar[Style] = WINDOWED
    run: ClassVar[Callable[[VarlenCall], VarlenRun]]

    def ready(self, call: VarlenCall, heads: Heads, dtype: torch.dtype) -> VarlenRun:
        """The library's functions for one call, of heads and types that it may ask for.

        Raises:
            Unsupported: the library cannot run this call.
        """
        return type(self).run(call)

    def calls(self, mask: BandMask, platform: Platform) -> int:
        return count_varlen(mask, self.style)

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BandMask)
        return prepare_varlen(mask, device, lambda call: self.ready(call, heads, dtype), self.style)


def count_varlen(mask: BandMask, style: Style = WINDOWED) -> int:
    """Varlen calls that a mask takes."""
    return len(list(_groups(mask, style)))


def prepare_varlen(
    mask: BandMask, device: torch.device, ready: Callable[[VarlenCall], VarlenRun], style: Style = WINDOWED
) -> Prepared:
    """A mask as varlen calls of one library; ``ready`` is called once for each of them."""
    return Merged([_Part(group, flipped, mask, device, ready, style) for group, flipped in _groups(mask, style)])


def _groups(mask: BandMask, style: Style) -> Iterator[tuple[Varlen, bool]]:
    """Pairs of a call and whether its queries and keys are reversed."""
    if style.right:
        yield from ((group, False) for group in varlen(mask))
        return
    causal, below_only = without_right_windows(mask)
    yield from ((group, False) for group in varlen(causal))
    yield from ((group, True) for group in varlen(_reversed(below_only)))


def _reversed(mask: BandMask) -> BandMask:
    """The mask with queries and keys counted from the end."""
    q0, q1, k0, k1, lo, hi = mask.bands.T
    corner = mask.num_k - mask.num_q
    return BandMask.of(
        mask.num_q, mask.num_k,
        np.stack([mask.num_q - q1, mask.num_q - q0, mask.num_k - k1, mask.num_k - k0, corner - hi, corner - lo], axis=1),
    )  # fmt: skip


def _call(cu_q: Ints, cu_k: Ints, window: tuple[int, int], device: torch.device) -> VarlenCall:
    import torch

    lengths = np.stack([np.diff(cu_q), np.diff(cu_k)], axis=1)
    on_q, on_k = (torch.from_numpy(cu.astype(np.int32)).to(device) for cu in (cu_q, cu_k))
    # flash-attn takes another layout where no sequence has two queries, and that one refuses sequences without any.
    max_q = max(2, int(lengths[:, 0].max()))
    return VarlenCall(on_q, on_k, max_q, int(lengths[:, 1].max()), window, tuple(map(tuple, lengths.tolist())))


class _Part:
    """One varlen call, with its rows gathered and its results put back where the library takes no gaps."""

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
        self._run = ready(_call(cu_q, cu_k, group.window, device))

    def _take(self, *tensors: torch.Tensor, side: int) -> list[torch.Tensor]:
        rows = self._rows[side]
        return [heads_whole(x) if rows is None else x[rows] for x in tensors]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, **softcap: float) -> OutLse:
        import torch

        (own_q,), (own_k, own_v) = self._take(q, side=0), self._take(k, v, side=1)
        out, lse = self._run.forward(own_q, own_k, own_v, softmax_scale, **softcap)
        # Libraries give +inf or -inf for a row without keys; here it is -inf.
        lse = torch.where(lse == torch.inf, -torch.inf, lse).T.contiguous()
        if self._rows[0] is None:
            return out, lse
        whole_out, whole_lse = out.new_zeros(*q.shape[:2], v.shape[2]), lse.new_full(q.shape[:2], -torch.inf)
        whole_out[self._rows[0]], whole_lse[self._rows[0]] = out, lse
        return whole_out, whole_lse

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float, **softcap: float) -> Gradients:
        import torch

        q, k, v, out, lse = saved
        # +inf makes the weights of a row without keys 0, whichever infinity the library itself gives there.
        kernel_lse = torch.where(lse == -torch.inf, torch.inf, lse)
        own_dout, own_q, own_out, own_lse = self._take(dout, q, out.to(q.dtype), kernel_lse, side=0)
        own_k, own_v = self._take(k, v, side=1)
        own = Saved(own_q, own_k, own_v, own_out, own_lse.T.contiguous())
        grads = self._run.backward(own_dout, own, softmax_scale, **softcap)
        found = []
        for grad, like, rows in zip(grads, (q, k, v), (self._rows[0], self._rows[1], self._rows[1]), strict=True):
            if rows is None:
                found.append(grad)
                continue
            found.append(torch.zeros(like.shape, dtype=accumulation_dtype(like.dtype), device=like.device))
            found[-1][rows] = grad.to(found[-1].dtype)
        return found[0], found[1], found[2]
