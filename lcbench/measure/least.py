"""What a mask makes ranks move at the least, from who owns which tokens: for numbers that cannot be true."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lcbench.masks.band import BandMask, Ints
from lcbench.masks.mask import Mask
from lcbench.masks.sums import Visible
from lcbench.measure.plausible import lower_bound_bytes, lower_bound_memory, lower_bound_sent
from lcbench.measure.ranks import EVERY, Ranks
from lcbench.problem import Problem


@dataclass(frozen=True)
class Least:
    """Bytes in one pass: ``sent`` by the rank that sends most, ``memory`` read and written by phase, of the rank with most."""

    sent: float
    memory: dict[str, float]


def least_traffic(mask: Mask, problem: Problem, tokens: Ints, device: torch.device, ranks: Ranks) -> Least:
    """The least traffic of the rank with most, of all ranks. Collective.

    Args:
        tokens: those of this rank.
        ranks: those that share the sequence.
    """
    own = np.zeros(problem.seqlen)
    own[tokens] = 1.0
    lines = torch.from_numpy(np.stack([own, np.ones(problem.seqlen)])).to(device)
    maps = 1 if isinstance(mask, BandMask) else mask.maps
    remote, rows, keys = 0.0, 0, 0
    for number in range(maps):
        mine, every = Visible(mask, tokens, device, number).sums(lines, whole=True)
        remote += float((every - mine).sum()) / maps
        rows = max(rows, int((every > 0).sum()))
        keys = max(keys, int((Visible(mask.transpose(), tokens, device, number).sums(lines[1:], whole=True)[0] > 0).sum()))
    bound = lower_bound_bytes(len(tokens), remote, problem.seqlen - len(tokens), problem.heads, problem.itemsize)
    memory = {
        phase: lower_bound_memory(rows, keys, problem.heads, problem.itemsize, backward=phase == "backward")
        for phase in ("forward", "backward")
    }
    sent = lower_bound_sent(ranks.all_gather_object(bound))
    every, memories = zip(*EVERY.all_gather_object((sent, memory)), strict=True)
    return Least(max(every), {phase: float(max(m[phase] for m in memories)) for phase in memory})
