"""FlashMask (arXiv 2410.01359), the torch build of PaddlePaddle's flash-attention fork, on Hopper.

A column of its mask names at most two stretches of rows that it hides. A mask with more is run band by band, merged by LSE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lcbench.kernels.base import Gradients, Kernel, Merged, OutLse, Platform, Prepared, Saved, half_on_cuda, importable
from lcbench.masks.band import BandMask, Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FlashMask(Kernel):
    """FlashMask on Hopper, half types, head dims up to 256, softcaps."""

    softcaps: ClassVar[bool] = True
    contiguous_kv: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("flashmask",)

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "FlashMask", least=(9, 0), most=(9, 0))

    def missing(self) -> str | None:
        return importable("flashmask._C")

    def pads(self, heads: Heads, platform: Platform) -> bool:
        return True  # forward takes some others, backward none

    def calls(self, mask: BandMask, platform: Platform) -> int:
        return 1 if len(mask) and hidden_rows(mask) is not None else len(mask)

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BandMask)
        hidden = hidden_rows(mask) if len(mask) else None
        parts = [BandMask(mask.num_q, mask.num_k, mask.bands[i : i + 1]) for i in range(len(mask))]
        return Merged([_Part(x, device) for x in ([hidden] if hidden is not None else map(hidden_rows, parts)) if x is not None])


def hidden_rows(mask: BandMask) -> Ints | None:
    """Rows that each column hides, (Tk, 4): begin and end of the lower stretch, begin and end of the upper one.

    The order matters: the library's backward walks the rows of a block of columns from the first to the last, past the upper
    stretches and then past the lower ones, and asks the mask near their bounds only. So no upper stretch ends below the lower
    one of its column. A lone stretch is the upper one if it begins at row 0, else the lower one. Without an upper one: (0, 0),
    without a lower one: (Tq, Tq). None where a column hides more than two.
    """
    columns = np.arange(mask.num_k)
    at, begin, end = mask.transpose().intervals(columns)
    order = np.lexsort((begin, at))
    at, begin, end = at[order], begin[order], end[order]
    # Gaps before each seen stretch, and after the last one of each column.
    first = np.append(True, np.diff(at) != 0)[: len(at)]
    last = np.append(first[1:], True)[: len(at)]
    before = np.where(first, 0, np.append(0, end[:-1])[: len(at)])
    blind = np.setdiff1d(columns, at)
    column = np.concatenate([at, at[last], blind])
    gap = np.concatenate([
        np.stack([before, begin], axis=1),
        np.stack([end[last], np.full(int(last.sum()), mask.num_q)], axis=1),
        np.tile([0, mask.num_q], (len(blind), 1)),
    ])  # fmt: skip
    real = gap[:, 0] < gap[:, 1]
    column, gap = column[real], gap[real]
    order = np.lexsort((gap[:, 0], column))
    column, gap = column[order], gap[order]
    place = np.arange(len(column)) - np.searchsorted(column, column)
    if place.max(initial=0) > 1:
        return None
    lower, upper = np.full((mask.num_k, 2), mask.num_q), np.zeros((mask.num_k, 2), dtype=np.int64)
    number = np.bincount(column, minlength=mask.num_k)[column]
    above = (place == 0) & ((number == 2) | (gap[:, 0] == 0))
    upper[column[above]], lower[column[~above]] = gap[above], gap[~above]
    return np.concatenate([lower, upper], axis=1)


class _Part:
    calls = 1

    def __init__(self, hidden: Ints, device: torch.device) -> None:
        import torch

        self._rows = torch.from_numpy(hidden.astype(np.int32)).to(device)[None, None].contiguous()  # (1, 1, Tk, 4)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        import torch

        out, lse = torch.ops.flashmask.fwd(
            q=q[None].contiguous(), k=k[None].contiguous(), v=v[None].contiguous(), startend_row_indices=self._rows,
            block_mask=None, softmax_scale=softmax_scale, is_causal=False, window_size_left=-1, window_size_right=-1,
            softcap=softcap,
        )  # fmt: skip
        return out[0], lse[0].T.contiguous()

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float, softcap: float = 0.0) -> Gradients:
        import torch

        q, k, v, out, lse = saved
        dout, q, k, v, out = (x[None].contiguous() for x in (dout, q, k, v, out.to(q.dtype)))
        dq, dk, dv, *_ = torch.ops.flashmask.bwd(
            dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse.T[None].contiguous(), dq=None, dk=None, dv=None, cu_seqlens_q=None,
            cu_seqlens_k=None, seqused_q=None, seqused_k=None, startend_row_indices=self._rows, block_mask=None, max_seqlen_q=None,
            max_seqlen_k=None,
            softmax_scale=softmax_scale, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=softcap,
            deterministic=False, sm_margin=0,
        )  # fmt: skip
        return dq[0], dk[0], dv[0]
