"""Band masks in the forms that kernels take: pieces, varlen groups with a window, slices, counts per block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lcbench.masks.band import OPEN, Band, BandMask, Ints, areas, cropped, spread
from lcbench.masks.block import BlockMap, stretches
from lcbench.masks.cover import blocks_of, by_rows
from lcbench.masks.mask import Mask

if TYPE_CHECKING:
    import torch


class Piece(NamedTuple):
    """A rectangle that is full, ``causal`` (row i sees its first i+1 keys) or ``inverse`` (the same, counted from the end)."""

    kind: Literal["full", "causal", "inverse"]
    q0: int
    q1: int
    k0: int
    k1: int


def pieces(mask: BandMask) -> list[Piece]:
    """Disjoint pieces that make up the mask: what a kernel with no more than a top-left causal flag can run."""
    return [piece for band in mask for piece in _band_pieces(band)]


def _band_pieces(band: Band) -> Iterator[Piece]:
    """Cut a tight band into stretches of rows whose key ranges all overlap: each is upper triangle, rectangle, lower triangle."""
    q0, q1, k0, k1, lo, hi = band

    def first(q: int) -> int:
        return max(k0, q + lo)

    def last(q: int) -> int:
        return min(k1 - 1, q + hi)

    top = q0
    while top < q1:
        # The tallest stretch whose bottom row still begins at a key that its top row sees.
        bottom = min(q1 - 1, last(top) - lo) if first(q1 - 1) > last(top) else q1 - 1
        begin, end = first(bottom), last(top)
        left, right = first(top), last(bottom)
        # Triangles are inclusive of the corner key, which both have only when the overlap is one key wide.
        inverse, causal = left < begin, end < right
        if inverse and causal and begin == end and bottom > top:
            bottom -= 1
            begin = first(bottom)
            right = last(bottom)
            inverse, causal = left < begin, end < right
        full_begin = begin + 1 if inverse else begin
        full_end = end if causal else end + 1
        if inverse:  # the top row sees all of [left, begin], the bottom row sees begin only
            yield Piece("inverse", top, bottom + 1, left, begin + 1)
        if full_begin < full_end:
            yield Piece("full", top, bottom + 1, full_begin, full_end)
        if causal:  # the top row sees end only, rows below one more each until the band's last key
            yield Piece("causal", top, bottom + 1, end, right + 1)
        top = bottom + 1


@dataclass(frozen=True)
class Varlen:
    """One varlen call: sequence i is rows ``cu_q[i]:cu_q[i+1]`` against keys ``cu_k[i]:cu_k[i+1]``.

    ``window``: (left, right), aligned to the bottom right corner of each sequence, -1 for no bound, as flash-attn has it.
    Gaps between the bands are sequences without keys or without queries, so that q, k and v are used where they lie.
    """

    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]
    window: tuple[int, int]


def varlen(mask: BandMask) -> list[Varlen]:
    """The mask as varlen calls: bands with compatible windows and ordered, disjoint queries and keys share one.

    Each band joins the call whose last keys end nearest before its own begin, which leaves the others to bands that only
    they can take.

    A band with more rows than keys is cut into slices unless it is full: flash-attn 2 takes a bound that reaches the number of
    keys for no bound (Dao-AILab/flash-attention issue 895), which is right only where there are as many keys as rows.
    """
    groups: list[tuple[list[Band], list[int]]] = []
    for band in sorted(_upright(mask), key=lambda b: (b.q0, b.k0)):
        window = _window(band)
        fitting = [g for g in groups if g[0][-1].q1 <= band.q0 and g[0][-1].k1 <= band.k0]
        for bands, own in sorted(fitting, key=lambda g: -g[0][-1].k1):
            if _join(own, window, band):
                bands.append(band)
                break
        else:
            groups.append(([band], list(window)))
    return [_varlen(bands, (window[0], window[1]), mask) for bands, window in groups]


def _upright(mask: BandMask) -> Iterator[Band]:
    for band in mask:
        tall = band.q1 - band.q0 > band.k1 - band.k0 and (band.cuts_below or band.cuts_above)
        yield from sliced(BandMask.of(mask.num_q, mask.num_k, [band])) if tall else [band]


def without_right_windows(mask: BandMask) -> tuple[BandMask, BandMask]:
    """The mask as (full bands and bands with a causal bound, with or without a left one; bands with a left bound only)."""
    rights = [_window(band) for band in mask]
    stays = np.array([right == 0 or (left, right) == (-1, -1) for left, right in rights], dtype=bool)
    cut = sliced(BandMask(mask.num_q, mask.num_k, mask.bands[~stays]))
    below_only = np.array([band.cuts_below and not band.cuts_above for band in cut], dtype=bool)
    causal = np.concatenate([mask.bands[stays], cut.bands[~below_only]])
    return BandMask(mask.num_q, mask.num_k, causal), BandMask(mask.num_q, mask.num_k, cut.bands[below_only])


def sliced(mask: BandMask) -> BandMask:
    """The same mask in bands that are slices (below)."""
    bands = [Band(q0, q1, k0, k1, *_corners(q0, q1, k0, k1, kind)) for q0, q1, k0, k1, kind in slices(mask)]
    return BandMask.of(mask.num_q, mask.num_k, bands)


def _corners(q0: int, q1: int, k0: int, k1: int, kind: str) -> tuple[int, int]:
    """The diagonal bounds of a slice."""
    return k0 - q0 if kind in ("inverse", "both") else -OPEN, k1 - q1 if kind in ("causal", "both") else OPEN


def _window(band: Band) -> tuple[int, int]:
    """A tight band's window relative to its bottom right corner; both sides are >= 0, or -1 where nothing is cut."""
    corner = (band.k1 - 1) - (band.q1 - 1)
    left = corner - band.lo if band.cuts_below else -1
    right = band.hi - corner if band.cuts_above else -1
    return left, right


def _join(window: list[int], other: tuple[int, int], band: Band) -> bool:
    """Whether a band can run under a group's window; narrows an open side of the group only where that cuts nothing."""
    # An open side of the band stands any bound that lies outside it.
    needs = (band.k1 - band.k0 - 1, band.q1 - band.q0 - 1)
    return all(mine == theirs or (theirs == -1 and mine >= need) for mine, theirs, need in zip(window, other, needs, strict=True))


def _varlen(bands: list[Band], window: tuple[int, int], mask: BandMask) -> Varlen:
    cu_q, cu_k = [0], [0]

    def extend(q: int, k: int) -> None:
        if (q, k) != (cu_q[-1], cu_k[-1]):
            cu_q.append(q)
            cu_k.append(k)

    for band in bands:
        extend(band.q0, cu_k[-1])
        extend(band.q0, band.k0)
        extend(band.q1, band.k1)
    extend(mask.num_q, cu_k[-1])
    extend(mask.num_q, mask.num_k)
    return Varlen(tuple(cu_q), tuple(cu_k), window)


class Slice(NamedTuple):
    """A rectangle whose diagonal bounds run through its corners, as MagiAttention (arXiv 2505.13211) writes masks.

    ``causal``: bounded above by the diagonal of the bottom right corner; ``inverse``: below by that of the top left one;
    ``both``: by both.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    kind: Literal["full", "causal", "inverse", "both"]


def slices(mask: BandMask) -> list[Slice]:
    """The mask as disjoint slices, at most three a band: cut where a diagonal bound begins or ceases to bind."""
    found = []
    for q0, q1, k0, k1, lo, hi in mask:
        # The row whose bound runs through the corner belongs to the bounded part, though it is whole.
        cuts = sorted({q0, q1, min(max(k1 - hi, q0), q1), min(max(k0 - lo, q0), q1)})
        for a, b in pairwise(cuts):
            for part in BandMask.of(mask.num_q, mask.num_k, [Band(a, b, k0, k1, lo, hi)]):
                kind: Literal["full", "causal", "inverse", "both"]
                kind = "inverse" if part.cuts_below else "full"
                if part.cuts_above:
                    kind = "both" if part.cuts_below else "causal"
                found.append(Slice(part.q0, part.q1, part.k0, part.k1, kind))
    return found


def block_areas(mask: BandMask, q_edges: Ints, k_edges: Ints) -> tuple[Ints, Ints, Ints]:
    """(row, column, unmasked pairs) of every block of a grid that holds any, sorted by row, then column.

    Built band by band: the work goes with the number of blocks that bands touch, not with the plane.
    """
    parts, row = by_rows(mask.bands, q_edges)
    number, column = spread(*blocks_of(k_edges, parts[:, 2], parts[:, 3]))
    blocks, kept = cropped(parts[number], None, None, k_edges[column], k_edges[column + 1])
    row, column = row[number][kept], column[kept]
    key, place = np.unique(row * (len(k_edges) - 1) + column, return_inverse=True)
    total = np.zeros(len(key), dtype=np.int64)
    np.add.at(total, place, areas(blocks))
    return key // (len(k_edges) - 1), key % (len(k_edges) - 1), total


def needed_keys(mask: Mask, q_edges: Ints) -> tuple[Ints, Ints, Ints]:
    """(row, first key, last key + 1) of the stretches of keys that each block of rows sees, in any head; they may overlap."""
    if isinstance(mask, BlockMap) and mask.within is not None:
        mask = mask.in_any_head().bands(0)
    if isinstance(mask, BandMask):
        parts, row = by_rows(mask.bands, q_edges)
        return row, parts[:, 2], parts[:, 3]  # a tight band touches every one of its columns
    found = []
    for block, (top, bottom) in enumerate(pairwise(q_edges.tolist())):
        blocks = slice(np.searchsorted(mask.q_edges, top, side="right") - 1, np.searchsorted(mask.q_edges, bottom))
        seen = np.logical_or.reduce([mask.keep(i)[blocks].any(axis=0) for i in range(mask.maps)])
        _, first, last = stretches(seen[None])
        found.append(np.column_stack([np.full(len(first), block), mask.k_edges[first], mask.k_edges[last]]))
    rows, begin, end = np.concatenate(found).T
    return rows, begin, end


def points(mask: BandMask, device: torch.device) -> torch.Tensor:
    """The mask as a matrix on a device, bool (queries, keys): for kernels that hold every score."""
    import torch

    allowed = torch.zeros((mask.num_q, mask.num_k), dtype=torch.bool, device=device)
    q, k = torch.arange(mask.num_q, device=device)[:, None], torch.arange(mask.num_k, device=device)
    for q0, q1, k0, k1, lo, hi in mask:
        distance = k[k0:k1] - q[q0:q1]
        allowed[q0:q1, k0:k1] |= (lo <= distance) & (distance <= hi)
    return allowed
