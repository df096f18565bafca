"""What a kernel does for every tile of a schedule, counted tile by tile as the kernel itself counts it.

``schedule.tiling`` works tiles out all at once, by closed forms that hold for kernels of GPUs. On CPU ranks, of which there are
few, the kernel is asked.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np

from lcbench.kernels.base import Kernel, Platform, Work
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.schedule.simulate import Modelled
from lcbench.schedule.tiling import Tiling

CPU = Platform("cpu")
TOLD = tuple(field.name for field in fields(Work))


def counted(tiling: Tiling, modelled: Modelled, kernel: Kernel) -> Tiling:
    """The tiles with what the kernel says of each; as they were where it says nothing."""
    schedule, every = modelled.schedule, np.concatenate([step.tiles for step in modelled.schedule.steps])
    masks = [group.part(modelled.mask, modelled.problem.heads.q) for group in schedule.heads]
    known: dict[tuple[int, int, int], Work | None] = {}
    works: list[Work] = []
    for _, group, q, k in every.tolist():
        key = (id(masks[group]), q, k)
        if key not in known:
            runs = (side.runs(side.bundles[bundle]) for side, bundle in ((schedule.q, q), (schedule.k, k)))
            tile = masks[group].tile(*runs).merged()
            known[key] = _work(kernel, tile)
        if (work := known[key]) is None:
            return tiling
        works.append(work)
    of: dict[str, Any] = {name: np.array([getattr(work, name) for work in works], dtype=np.int64) for name in TOLD}
    return replace(tiling, tiles=replace(tiling.tiles, covered=of.pop("pairs").astype(np.float64), **of))


def _work(kernel: Kernel, tile: Mask) -> Work | None:
    """What the kernel does for a tile, of a map per head for the average head; None where it does not say."""
    if isinstance(tile, BandMask):
        return kernel.work(tile, CPU)
    if kernel.takes == "blocks":
        return None
    found = [kernel.work(tile.bands(number), CPU) for number in range(tile.maps)]
    works = [work for work in found if work is not None]
    if len(works) < len(found):
        return None
    mean = [round(sum(getattr(w, name) for w in works) / len(works)) for name in ("pairs", "gathered_rows", "gathered_keys")]
    # Maps are run one after the other, each for the heads that read it.
    most = [round(max(getattr(w, name) for w in works) / len(works)) for name in ("most_rows", "most_keys")]
    return Work(sum(w.calls for w in works), *mean, *most)
