"""Sums over what each row of a mask sees: exact for whole numbers. Time grows with the length, not with the pairs.

Uses a mask by rows alone, on global indices: the intervals of keys that bands give a row, the look-up of a block map, and for a map
within bands the look-up of the intervals. It shares neither layouts nor tiles with what is checked by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import BandMask, Ints
from lcbench.masks.by_head import BandsByHead
from lcbench.masks.mask import Computed

if TYPE_CHECKING:
    import torch

FIXED = 2.0**20  # what is summed is cut at this fraction of one: the whole part is summed as integers, the rest is below it
ROWS = 1 << 20  # rows and intervals that are looked at together
BLOCK_ELEMENTS = 1 << 24  # of a block map, at a time


class Visible:
    """What ``rows`` (any order, global indices) of a mask see, ready for sums.

    Args:
        number: which map, of a mask that has several; bands hold for all heads.
    """

    def __init__(self, mask: Computed, rows: Ints, device: torch.device, number: int = 0) -> None:
        if isinstance(mask, BandsByHead):
            mask = mask.bands(number)
        self._device, self._count, self._keys = device, len(rows), mask.num_k
        self._order = np.argsort(rows, kind="stable")
        self._sorted = bool((np.diff(rows) >= 0).all())
        self._rows = rows[self._order]
        self._chunks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._keep: torch.Tensor | None = None
        self._within: list[_Within] | None = None
        if isinstance(mask, BandMask):
            self._chunks = [self._intervals(mask, begin, begin + ROWS) for begin in range(0, len(rows), ROWS)]
        else:
            # As they were drawn: which of them have a pair within bands is worked out here, by rows.
            self._keep = self._at(mask.drawn(number))
            self._edges = self._at(mask.k_edges)
            blocks = np.searchsorted(mask.q_edges, self._rows, side="right") - 1
            self._blocks = self._at(blocks)
            if mask.within is not None:
                self._within = list(self._looked_up(mask.within, blocks, mask.k_edges))
        self._places = self._at(self._order)

    def _at(self, values: NDArray[np.generic]) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

    def _intervals(self, mask: BandMask, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = self._rows[first:last]
        inside = mask.bands[(mask.bands[:, 0] <= rows[-1]) & (rows[0] < mask.bands[:, 1])]
        at, begin, end = BandMask(mask.num_q, mask.num_k, inside).intervals(rows)
        return self._at(at + first), self._at(begin), self._at(end)

    def _looked_up(self, within: BandMask, blocks: Ints, k_edges: Ints) -> Iterator[_Within]:
        """The intervals of a band mask that sorted rows see, and where they are in a block map; ``blocks``: of each row."""
        import torch

        step = max(1, BLOCK_ELEMENTS // len(k_edges))
        edges = self._at(k_edges)
        for top in range(0, int(blocks[-1]) + 1 if len(blocks) else 0, step):
            first, last = np.searchsorted(blocks, [top, top + step]).tolist()
            for row in range(first, last, ROWS):
                at, *interval = self._intervals(within, row, min(row + ROWS, last))
                columns = (torch.searchsorted(edges, token, right=True) - 1 for token in interval)
                yield _Within(slice(top, top + step), at, self._blocks[at] - top, tuple(zip(interval, columns, strict=True)))

    def sums(self, values: torch.Tensor, *, whole: bool = False) -> torch.Tensor:
        """(C, rows) float64: the sum over each row's keys of every line of ``values`` (C, keys).

        Args:
            whole: all values are whole numbers, so that running sums of them are exact as they are.
        """
        import torch

        values = values.double()
        if whole:
            found = self._of_running(torch.cumsum(values, 1))
        else:
            # Whole parts add up exactly; what is left is so small that its running sum loses nothing that counts.
            units = torch.floor(values * FIXED)
            found = self._of_running(torch.cumsum(units.long(), 1).double() / FIXED)
            found += self._of_running(torch.cumsum(values - units / FIXED, 1))
        if self._sorted:
            return found
        result = torch.empty_like(found)
        result[:, self._places] = found
        return result

    def _of_running(self, running: torch.Tensor) -> torch.Tensor:
        """(C, rows): sums of the sorted rows from running sums (C, keys)."""
        import torch

        running = torch.nn.functional.pad(running, (1, 0))
        if self._within is not None:
            return self._of_kept(running)
        if self._keep is not None:
            blocks = (running[:, self._edges[1:]] - running[:, self._edges[:-1]]).T
            step = max(1, BLOCK_ELEMENTS // max(1, self._keep.shape[1]))
            return torch.cat([part.double() @ blocks for part in self._keep.split(step)]).T[:, self._blocks]
        found = torch.zeros((len(running), self._count), dtype=torch.float64, device=self._device)
        for at, begin, end in self._chunks:
            found.index_add_(1, at, running[:, end] - running[:, begin])
        return found

    def _of_kept(self, running: torch.Tensor) -> torch.Tensor:
        """(C, rows): sums of the sorted rows over the kept keys of their intervals, from running sums (C, keys + 1)."""
        import torch

        assert self._keep is not None
        assert self._within is not None
        found = torch.zeros((len(running), self._count), dtype=torch.float64, device=self._device)
        begins = running[:, self._edges]
        for some in self._within:
            kept = torch.nn.functional.pad(self._keep[some.blocks].double(), (0, 1))  # an interval may end with the last block
            places = [(token, column, some.block * kept.shape[1] + column) for token, column in some.interval]
            parts = [kept.take(place) * (running[:, token] - begins[:, column]) for token, column, place in places]
            for number, (tokens, line) in enumerate(zip(begins, found, strict=True)):
                # Of each row of blocks, running sums of the kept keys before each column.
                before = torch.nn.functional.pad(torch.cumsum(kept[:, :-1] * torch.diff(tokens), 1), (1, 0))
                begin, end = (before.take(place) + part[number] for (_, _, place), part in zip(places, parts, strict=True))
                line.index_add_(0, some.at, end - begin)
        return found


@dataclass(frozen=True)
class _Within:
    """Intervals of keys that rows see, of rows of blocks that are looked at together.

    Attributes:
        blocks: the rows of blocks.
        at: the row of each interval, among the sorted ones, (n,).
        block: its row of blocks, among ``blocks``, (n,).
        interval: where each begins and where it ends: keys and the columns of blocks that they lie in, (n,) each.
    """

    blocks: slice
    at: torch.Tensor
    block: torch.Tensor
    interval: tuple[tuple[torch.Tensor, torch.Tensor], ...]
