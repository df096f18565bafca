"""Blocks of keys that queries see a part of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lcbench.masks.band import Ints
from lcbench.masks.block import Keep
from lcbench.selectors.base import Rows
from lcbench.selectors.choosing import seen_keys

if TYPE_CHECKING:
    import torch

CACHE = 1 << 18  # scores that are in memory at once: on a CPU as many as its cache holds
MEMORY = 1 << 26


def at_once(rows: Rows, heads: int, size: int) -> int:
    """How many blocks of ``size`` keys so many heads of a block of queries are scored against at once."""
    return max(1, (CACHE if rows.q.device.type == "cpu" else MEMORY) // (heads * len(rows.q) * size))


def runs(blocks: Keep, most: int) -> Iterator[range]:
    """Adjacent blocks, of bool (columns,), at most so many at once."""
    ends = np.concatenate([[False], blocks, [False]])
    for first, last in np.flatnonzero(ends[1:] != ends[:-1]).reshape(-1, 2).tolist():
        for begin in range(first, last, most):
            yield range(begin, min(begin + most, last))


def hide(x: torch.Tensor, rows: Rows, edges: Ints, columns: range, fill: float, group: int = 1) -> torch.Tensor:
    """x (..., T / group, keys of adjacent blocks ``columns``), changed: ``fill`` where none of ``group`` queries sees a key.

    Only blocks that the queries do not see whole are looked at key by key: of a causal mask, those of the diagonal.
    """
    import torch

    offset, whole = int(edges[columns.start]), rows.pairs == len(rows.q) * np.diff(edges)
    for part in runs(~whole[columns.start : columns.stop], len(columns)):
        begin, end = (int(edges[columns.start + at]) for at in (part.start, part.stop))
        seen = seen_keys(rows, begin, end, x.device)
        seen = seen if group == 1 else torch.stack([own.any(0) for own in seen.split(group)])
        x[..., begin - offset : end - offset].masked_fill_(~seen, fill)
    return x
