"""Star Attention (arXiv 2411.17116; NVIDIA/Star-Attention, ``star_attention/star_flash_attn``): an approximation.

Phase 1, prompts: rank r computes its block causally over itself and the anchor, the first block, which every rank is given; nothing
is sent. Each rank computes the anchor's own queries as well, and drops them, as the model needs them in its next layer. Phase 2,
requests with a cache: each rank has a block of it and is given the query; partial results are all-gathered with their LSE and
merged on every rank, which is exact over the cache. It sends (P-1) Hq (Dv b + s) bytes per new token, s bytes being those of LSE
and b those of ``reduce_dtype``, whatever the context.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lcbench.cp.base import Place, Strategy
from lcbench.cp.blocks import BlockRun, Blocks, refusal, spans
from lcbench.kernels.base import Kernel
from lcbench.masks.band import BandMask, TokenSpan
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_count
from lcbench.schedule.layout import Layout
from lcbench.schedule.schedule import Schedule, Step, head_groups, rows, singles

if TYPE_CHECKING:
    from lcbench.schedule.simulate import Modelled


@dataclass(frozen=True)
class Star(Strategy):
    """``anchor``: tokens of the anchor; None: all of the first block."""

    anchor: int | None = None

    def __post_init__(self) -> None:
        if self.anchor is not None:
            check_count("anchor", self.anchor)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return refusal(problem, mask, self.anchor)

    def computes(self, problem: Problem, mask: Mask) -> Mask:
        assert isinstance(mask, BandMask)
        blocks = Blocks.of(problem, self.anchor)
        if not blocks.prompts.any():
            return mask
        found = blocks.within(mask)
        # Two ranks, or a mask that is as local, leave out nothing: then it is exact.
        return mask if found.area == mask.area else found

    def modelled(self, problem: Problem, mask: Mask) -> Modelled | None:
        """Of prompts, of which nothing is sent; of no batch with a cache."""
        assert isinstance(mask, BandMask)
        blocks = Blocks.of(problem, self.anchor)
        return _without_messages(problem, mask, blocks) if blocks.prompts.all() else None

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> BlockRun:
        assert isinstance(mask, BandMask)
        return BlockRun(problem, mask, kernel, place, Blocks.of(problem, self.anchor))


def _without_messages(problem: Problem, mask: BandMask, blocks: Blocks) -> Modelled:
    """What ranks do with prompts of which nothing is sent: as if each rank's anchors and blocks were a sequence of its own."""
    from lcbench.schedule.simulate import Modelled  # with scipy, which planning does without

    tiles = [blocks.within(mask).tile(*map(spans, blocks.stretches(rank))) for rank in range(blocks.ranks)]
    ends = np.cumsum([tile.num_q for tile in tiles]).tolist()
    bands = [tile.bands + (end - tile.num_q) * np.array([1, 1, 1, 1, 0, 0]) for end, tile in zip(ends, tiles, strict=True)]
    apart = BandMask(ends[-1], ends[-1], np.concatenate(bands)).merged()
    shards = Layout(tuple((TokenSpan(end - tile.num_q, tile.num_q),) for end, tile in zip(ends, tiles, strict=True)))
    every = np.arange(blocks.ranks)
    steps = (Step(rows(every, 0, every, every)),)
    schedule = Schedule.of(blocks.ranks, shards, every, head_groups(problem.heads, 1), singles(blocks.ranks), steps)
    return Modelled(schedule, apart, replace(problem, seqlen=apart.num_q, batch=None))
