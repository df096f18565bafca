"""The mask of a batch: each request has a mask of its own length, whose last rows are those of its new tokens.

Requests see nothing of one another. They lie along the diagonal of the plane of all new tokens and all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lcbench.masks.band import BandMask, DoesNotFit, Ints, TokenSpan, shifted
from lcbench.masks.block import MAX_BLOCKS, BlockMap, Keep
from lcbench.masks.full import full
from lcbench.masks.mask import Mask
from lcbench.problem import Batch, Requests


def of_requests(batch: Batch, make: Callable[[int, int], Mask], *, alike: bool) -> Mask:
    """The mask of a batch, (new tokens, all tokens).

    Args:
        make: the whole mask of a request, (total, total), from its tokens in all and its number in the batch.
        alike: whether requests of one length have one mask, which is then made once.

    Raises:
        DoesNotFit: a request's mask cannot exist, which names the request; or all of them have more blocks than can be held.
        ValueError: some requests have bands and others blocks, or their block maps are not of the same heads.
    """
    made: dict[int, Mask] = {}
    wholes: list[Mask] = []
    for number, (new, total) in enumerate(zip(batch.new.tolist(), batch.total.tolist(), strict=True)):
        if not alike or total not in made:
            try:
                made[total] = make(total, number)
            except DoesNotFit as error:
                raise DoesNotFit(f"request {number + 1} of {len(batch)}, {Requests(1, new, total)}: {error}") from error
        wholes.append(made[total])
    bands = [whole for whole in wholes if isinstance(whole, BandMask)]
    blocks = [whole for whole in wholes if isinstance(whole, BlockMap)]
    if bands and blocks:
        raise ValueError(f"{len(bands)} requests of batch={batch} have a mask of bands and {len(blocks)} a block map")
    return _of_bands(batch, bands) if bands else _of_blocks(batch, blocks)


def _of_bands(batch: Batch, wholes: list[BandMask]) -> BandMask:
    known: dict[tuple[int, int], BandMask] = {}
    parts = []
    for whole, new in zip(wholes, batch.new.tolist(), strict=True):
        key = (id(whole), new)
        if key not in known:
            known[key] = whole.crop(whole.num_q - new, whole.num_q, 0, whole.num_k)
        parts.append(known[key])
    counts = [len(part) for part in parts]
    first_q, first_k = (np.repeat(bounds[:-1], counts) for bounds in (batch.q_bounds, batch.k_bounds))
    bands = np.concatenate([part.bands for part in parts])
    return BandMask(batch.queries, batch.tokens, shifted(bands, first_q, first_k))


def _of_blocks(batch: Batch, wholes: list[BlockMap]) -> BlockMap:
    maps = {whole.maps for whole in wholes}
    if len(maps) > 1:
        raise ValueError(f"requests of batch={batch} have {' and '.join(map(str, sorted(maps)))} block maps; all have as many")
    parts = [_new_rows(whole, new) for whole, new in zip(wholes, batch.new.tolist(), strict=True)]
    of_q, of_k = [part.q_edges for part in parts], [part.k_edges for part in parts]
    rows, columns = (np.cumsum([0, *(len(edges) - 1 for edges in sides)]) for sides in (of_q, of_k))
    if rows[-1] * columns[-1] > MAX_BLOCKS:
        raise DoesNotFit(
            f"{rows[-1]} x {columns[-1]} blocks of {len(batch)} requests are more than {MAX_BLOCKS}; take larger blocks or fewer "
            "requests"
        )

    def draw(number: int) -> Keep:
        keep = np.zeros((rows[-1], columns[-1]), dtype=bool)
        for place, (whole, new) in enumerate(zip(wholes, batch.new.tolist(), strict=True)):
            # Of a copy, which goes with what it drew: the map of the batch keeps it, and the requests' would be held beside it.
            part = _new_rows(replace(whole), new).draw(number)
            keep[rows[place] : rows[place + 1], columns[place] : columns[place + 1]] = part
        return keep

    within = None
    if any(whole.within is not None for whole in wholes):
        within = _of_bands(batch, [full(whole.num_q) if whole.within is None else whole.within for whole in wholes])
    return BlockMap(_behind(of_q, batch.q_bounds), _behind(of_k, batch.k_bounds), maps.pop(), draw, within)


def _behind(sides: list[Ints], bounds: Ints) -> Ints:
    """Edges of blocks of all requests, which lie behind one another."""
    return np.concatenate([[0], *(edges[1:] + first for edges, first in zip(sides, bounds[:-1], strict=True))]).astype(np.int64)


def _new_rows(whole: BlockMap, new: int) -> BlockMap:
    """The last ``new`` rows of a request's map."""
    return whole.tile([TokenSpan(whole.num_q - new, new)], [TokenSpan(0, whole.num_k)])
