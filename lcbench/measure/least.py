"""What a mask makes ranks move at the least, from who owns which tokens: for numbers that cannot be true."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lcbench.masks.mask import Computed, maps_of
from lcbench.masks.sums import Visible
from lcbench.measure.owners import Owners
from lcbench.measure.plausible import lower_bound_bytes, lower_bound_memory, lower_bound_sent
from lcbench.measure.ranks import EVERY, Ranks
from lcbench.problem import Problem
from lcbench.schedule.held import Part


@dataclass(frozen=True)
class Least:
    """Bytes in one pass: ``sent`` by the rank that sends most, ``memory`` read and written by phase, of the rank with most."""

    sent: float
    memory: dict[str, float]


def least_traffic(mask: Computed, problem: Problem, owners: Owners, device: torch.device, ranks: Ranks) -> Least:
    """The least traffic of the rank with most, of all ranks. Collective.

    Args:
        owners: what this rank holds, and what others hold of the same.
        ranks: those that share the sequence.
    """
    held, heads, transposed = owners.held, problem.heads, mask.transpose()
    here = np.zeros(problem.seqlen)
    here[held.kv.tokens] = 1.0
    keys = torch.from_numpy(np.stack([here, np.ones(problem.seqlen)])).to(device)
    queries = torch.ones((1, problem.queries), device=device)
    group, maps = heads.q // heads.kv, maps_of(mask)
    has_keys = np.repeat(_held(held.kv, heads.kv), group)
    remote, rows, seen_rows, seen_keys = 0.0, 0, 0, np.zeros(heads.kv)
    for number in range(maps):
        of_map = np.arange(heads.q) // (heads.q // maps) == number
        results, given = (of_map & _held(part, heads.q) for part in (held.out, held.q))
        mine, every = Visible(mask, held.out.tokens, device, number).sums(keys, whole=True)
        remote += int((results & has_keys).sum()) * float((every - mine).sum())
        remote += int((results & ~has_keys).sum()) * float(every.sum())
        rows += int(results.sum()) * int((every > 0).sum())
        seen = every if held.q is held.out else Visible(mask, held.q.tokens, device, number).sums(keys[1:], whole=True)[0]
        seen_rows += int(given.sum()) * int((seen > 0).sum())
        # A key/value head is read where one of its query heads reads it.
        reads = np.unique(np.nonzero(of_map & has_keys)[0] // group)
        count = int((Visible(transposed, held.kv.tokens, device, number).sums(queries, whole=True)[0] > 0).sum())
        seen_keys[reads] = np.maximum(seen_keys[reads], count)
    elsewhere = problem.seqlen - (len(held.kv.tokens) if has_keys[_held(held.out, heads.q)].all() else 0)
    bound = lower_bound_bytes(
        len(held.out.tokens), remote, elsewhere, heads, problem.itemsize, queries_elsewhere=not owners.queries_once
    )
    unique = seen_rows if owners.queries_once else 0, rows, float(seen_keys.sum()) if owners.keys_once else 0.0
    memory = {
        phase: lower_bound_memory(*unique, heads, problem.itemsize, backward=phase == "backward")
        for phase in ("forward", "backward")
    }
    sent = lower_bound_sent(ranks.all_gather_object(bound))
    every_sent, memories = zip(*EVERY.all_gather_object((sent, memory)), strict=True)
    return Least(max(every_sent), {phase: float(max(m[phase] for m in memories)) for phase in memory})


def _held(part: Part, count: int) -> NDArray[np.bool_]:
    """Which of ``count`` heads a part has, (count,)."""
    has = np.zeros(count, dtype=bool)
    has[slice(None) if part.heads is None else slice(part.heads.start, part.heads.stop)] = True
    return has
