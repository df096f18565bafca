"""Masks in the forms that kernels take: unmasked and causal pieces, and varlen groups with a window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lcbench.masks.band import Band, BandMask


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

    @property
    def max_q(self) -> int:
        return max(b - a for a, b in zip(self.cu_q, self.cu_q[1:], strict=False))

    @property
    def max_k(self) -> int:
        return max(b - a for a, b in zip(self.cu_k, self.cu_k[1:], strict=False))


def varlen(mask: BandMask) -> list[Varlen]:
    """The mask as varlen calls: bands with compatible windows and ordered, disjoint queries and keys share one."""
    groups: list[tuple[list[Band], list[int]]] = []
    for band in sorted(mask, key=lambda b: (b.q0, b.k0)):
        for bands, window in groups:
            if bands[-1].q1 <= band.q0 and bands[-1].k1 <= band.k0 and _join(window, _window(band), band):
                bands.append(band)
                break
        else:
            groups.append(([band], list(_window(band))))
    return [_varlen(bands, (window[0], window[1]), mask) for bands, window in groups]


def _window(band: Band) -> tuple[int, int]:
    """A tight band's window relative to its bottom right corner; both sides are >= 0, or -1 where nothing is cut."""
    q0, q1, k0, k1, lo, hi = band
    corner = (k1 - 1) - (q1 - 1)
    left = -1 if lo <= k0 - (q1 - 1) else corner - lo
    right = -1 if hi >= (k1 - 1) - q0 else hi - corner
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
