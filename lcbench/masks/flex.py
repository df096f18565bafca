"""Masks for FlexAttention: a mask function, and a BlockMask built from the bands, never from S x S points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lcbench.masks.band import BandMask, Ints, spread
from lcbench.masks.block import BlockMap
from lcbench.masks.convert import block_areas
from lcbench.masks.mask import Mask

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # FlexAttention's default block, in tokens


def mask_mod(mask: Mask, device: torch.device, q_heads: int = 1) -> Any:
    """``mod(batch, head, q, k) -> bool`` as FlexAttention wants it: looks bands up by row, as many as a row can touch."""
    lookup, tables = mask_lookup(mask, device, q_heads)
    return lambda batch, head, q, k: lookup(batch, head, q, k, *tables)


def mask_lookup(mask: Mask, device: torch.device, q_heads: int = 1) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """The same with the tables that it reads as further arguments: (``mod(batch, head, q, k, *tables) -> bool``, tables)."""
    if isinstance(mask, BandMask):
        return _band_lookup(mask, device)
    blocks, tables = _block_lookup(mask, device, q_heads)
    if mask.within is None:
        return blocks, tables
    bands, of_bands = _band_lookup(mask.within, device)
    own = len(tables)

    def lookup(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *every: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = blocks(batch, head, q, k, *every[:own]) & bands(batch, head, q, k, *every[own:])
        return found

    return lookup, (*tables, *of_bands)


def block_mask(mask: Mask, device: torch.device, q_heads: int = 1, block: int = BLOCK, mod: Any = None) -> BlockMask:
    """The BlockMask of a mask: which blocks are empty, whole or partial follows from exact areas.

    A block at the end of the sequence that is cut short counts as partial, as FlexAttention pads it. ``mod`` is the mask function,
    if there is one already.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    maps = [mask] if isinstance(mask, BandMask) else [mask.bands(i) for i in range(mask.maps)]
    rows, columns = -(-mask.num_q // block), -(-mask.num_k // block)
    # One map for all heads stays one: FlexAttention broadcasts it.
    repeat = q_heads // len(maps) if len(maps) > 1 else 1
    tables = [_tables(part, rows, columns, block) for part in maps]
    # Of the partial blocks, then of the whole ones: how many per row, and where.
    counts, places, whole_counts, whole_places = (
        torch.from_numpy(np.stack(arrays).repeat(repeat, axis=0)[None].astype(np.int32)).to(device)
        for arrays in zip(*tables, strict=True)
    )
    return BlockMask.from_kv_blocks(
        counts, places, whole_counts, whole_places, BLOCK_SIZE=block, mask_mod=mod or mask_mod(mask, device, q_heads),
        seq_lengths=(mask.num_q, mask.num_k),
    )  # fmt: skip


def _tables(mask: BandMask, rows: int, columns: int, block: int) -> list[Ints]:
    """Of the partial blocks, then of the whole ones: blocks per row (rows,), and their columns (rows, columns)."""
    q_edges = np.minimum(np.arange(rows + 1) * block, mask.num_q)
    k_edges = np.minimum(np.arange(columns + 1) * block, mask.num_k)
    row, column, area = block_areas(mask, q_edges, k_edges)
    found: list[Ints] = []
    for kept in (area < block * block, area == block * block):
        count, place = _places(row[kept], rows)
        # What follows a row's own columns is never read, but has to name a column.
        index = np.zeros((rows, columns), dtype=np.int64)
        index[row[kept], place] = column[kept]
        found += [count, index]
    return found


def _places(group: Ints, groups: int) -> tuple[Ints, Ints]:
    """Of sorted group numbers: (members of each group, place of each member in its group)."""
    count = np.bincount(group, minlength=groups)
    return count, np.arange(len(group)) - (np.cumsum(count) - count)[group]


def _band_lookup(mask: BandMask, device: torch.device) -> tuple[Any, tuple[torch.Tensor, ...]]:
    import torch

    bands = mask.bands
    edges = np.unique(np.concatenate([[0, mask.num_q], bands[:, 0], bands[:, 1]]))
    segments = len(edges) - 1
    band, segment = spread(np.searchsorted(edges, bands[:, 0]), np.searchsorted(edges, bands[:, 1]))
    order = np.argsort(segment, kind="stable")
    band, segment = band[order], segment[order]
    count, place = _places(segment, segments)
    slots = int(count.max(initial=0))
    table = np.zeros((slots, segments, 4), dtype=np.int64)  # k0, k1, lo, hi; nothing where no band is
    table[place, segment] = bands[band, 2:]
    which = torch.from_numpy(np.repeat(np.arange(segments), np.diff(edges))).to(device)
    bounds = [torch.from_numpy(table[..., i].ravel()).to(device) for i in range(4)]

    def lookup(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
        which, k0, k1, lo, hi = tables
        row, allowed = which[q], k < 0
        for slot in range(slots):
            # A number among the indices would become a constant tensor of the trace, which Inductor does not take here.
            at = row + slot * segments
            allowed = allowed | ((k >= k0[at]) & (k < k1[at]) & (k - q >= lo[at]) & (k - q <= hi[at]))
        return allowed

    return lookup, (which, *bounds)


def _block_lookup(mask: BlockMap, device: torch.device, q_heads: int) -> tuple[Any, tuple[torch.Tensor, ...]]:
    import torch

    row, column = (
        torch.from_numpy(np.repeat(np.arange(len(edges) - 1), np.diff(edges))).to(device) for edges in (mask.q_edges, mask.k_edges)
    )
    keep = torch.from_numpy(mask.keeps()).to(device)
    each = q_heads // mask.maps

    def lookup(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
        keep, row, column = tables
        return keep[head // each, row[q], column[k]]

    return lookup, (keep, row, column)
