"""What every tile of a schedule is made of, worked out for all tiles at once: pairs, blocks that hold some, pieces, sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from lcbench.masks.band import BandMask, Ints, areas, cropped, spread
from lcbench.masks.mask import Mask
from lcbench.schedule.machine import Floats, Tiles
from lcbench.schedule.schedule import Schedule

BLOCK = 128  # rows and keys of the blocks that kernels compute or skip


@dataclass(frozen=True)
class Tiling:
    """All tiles of a schedule: ``tiles``, and for each the step and the rank that computes it, (n,)."""

    tiles: Tiles
    step: Ints
    rank: Ints


def tiling(schedule: Schedule, mask: Mask) -> Tiling:
    """The tiles of a schedule in the order of its steps."""
    counts = [len(step.tiles) for step in schedule.steps]
    every = np.concatenate([np.empty((0, 4), dtype=np.int64), *(step.tiles for step in schedule.steps)])
    rank, group, q, k = every.T
    heads = np.array([[len(g), len(g.kv)] for g in schedule.heads], dtype=np.int64)
    inside = sparse.csr_array(
        (np.ones(sum(map(len, schedule.bundles))), *_incidence(schedule)), shape=(len(schedule.bundles), len(schedule.shards))
    )
    maps = [mask] if isinstance(mask, BandMask) else [mask.bands(i) for i in range(mask.maps)]
    found = np.zeros((len(every), 3))
    for each in maps:
        # Of heads with different maps a tile has the mean: heads of one group are computed by one call.
        found += _of_bundles(inside, _of_shards(schedule, each), q, k) / len(maps)
    sizes = inside @ schedule.sizes.astype(np.float64)
    tiles = Tiles(
        pairs=found[:, 0], covered=found[:, 1], rows=sizes[q].astype(np.int64), keys=sizes[k].astype(np.int64),
        pieces=np.ceil(found[:, 2]).astype(np.int64), q_heads=heads[group, 0], kv_heads=heads[group, 1],
    )  # fmt: skip
    return Tiling(tiles, np.repeat(np.arange(len(schedule.steps)), counts), rank)


def _incidence(schedule: Schedule) -> tuple[Ints, Ints]:
    """Columns and row starts of the matrix that says which shards a bundle has."""
    columns = np.array([shard for bundle in schedule.bundles for shard in bundle], dtype=np.int64)
    return columns, np.cumsum([0, *map(len, schedule.bundles)])


def _of_shards(schedule: Schedule, mask: BandMask) -> list[sparse.csr_array]:
    """Pairs, covered pairs and pieces of every two shards, each a sparse matrix (queries, keys)."""
    count = len(schedule.shards)
    rows, columns, values = [], [], []
    for q, k, parts in _cut(schedule, mask):
        rows.append(q)
        columns.append(k)
        values.append(np.stack([areas(parts).astype(np.float64), covered(parts), np.ones(len(parts))]))
    row, column = (np.concatenate([np.empty(0, dtype=np.int64), *each]) for each in (rows, columns))
    value = np.concatenate([np.empty((3, 0)), *values], axis=1)
    return [sparse.coo_array((v, (row, column)), shape=(count, count)).tocsr() for v in value]


def _cut(schedule: Schedule, mask: BandMask) -> list[tuple[Ints, Ints, Ints]]:
    """(q shard, k shard, band) of what is left of each band in each pair of stretches of shards."""
    shards = schedule.shards.shards
    if any(run.stride > 1 and run.size > 1 for runs in shards for run in runs):
        return [
            (np.full(len(tile), q), np.full(len(tile), k), tile.bands)
            for q in range(len(shards)) for k in range(len(shards))
            if len(tile := mask.tile(shards[q], shards[k]))
        ]  # fmt: skip
    runs = sorted((run.start, run.start + run.size, shard) for shard, spans in enumerate(shards) for run in spans if run.size)
    begin, end, shard = np.array(runs, dtype=np.int64).reshape(-1, 3).T
    edges = np.append(begin, end[-1:])
    number, row = spread(np.searchsorted(edges, mask.bands[:, 0], side="right") - 1, _last(edges, mask.bands[:, 1]))
    parts, kept = cropped(mask.bands[number], edges[row], edges[row + 1], None, None)
    row = row[kept]
    number, column = spread(np.searchsorted(edges, parts[:, 2], side="right") - 1, _last(edges, parts[:, 3]))
    blocks, kept = cropped(parts[number], None, None, edges[column], edges[column + 1])
    return [(shard[row[number][kept]], shard[column[kept]], blocks)]


def _last(edges: Ints, end: Ints) -> Ints:
    """One past the stretch that holds token ``end - 1``."""
    return np.searchsorted(edges, end - 1, side="right")


def covered(bands: Ints) -> Floats:
    """Pairs of the blocks of 128 x 128 that hold a pair of each band, (n,), where the blocks begin at the band's corner."""
    q0, q1, k0, k1, lo, hi = bands.T
    height, width = (q1 - q0).astype(np.float64), (k1 - k0).astype(np.float64)
    tall, wide = np.ceil(height / BLOCK) * BLOCK, np.ceil(width / BLOCK) * BLOCK
    # Along a diagonal that cuts the band each row of blocks computes half a block more.
    cuts = (lo > k0 - (q1 - 1)).astype(np.float64) + (hi < (k1 - 1) - q0)
    found: Floats = np.minimum(tall * wide, areas(bands) * (tall / np.maximum(height, 1)) * (wide / np.maximum(width, 1))
                               + cuts * 0.5 * BLOCK * np.minimum(tall, wide))  # fmt: skip
    return found


def _of_bundles(inside: sparse.csr_array, of_shards: list[sparse.csr_array], q: Ints, k: Ints) -> Floats:
    """The three numbers of each tile, bundle ``q`` on bundle ``k``, (n, 3)."""
    found = np.zeros((len(q), 3))
    for column, matrix in enumerate(of_shards):
        whole = (inside @ matrix @ inside.T).tocsr()
        found[:, column] = np.asarray(whole[q, k]).ravel()
    return found
