"""How much of the softmax of full attention lies in the blocks that were chosen: float64, exact for the rows that are looked at.

Of a row, the *mass* of a block of keys is the sum of its softmax weights over the keys of the block that the cell's mask lets it
see; a row's masses add up to 1. *Recall* of a head is the mass of the blocks that it keeps, mean over rows that see a key. No
choice of as many blocks for each block of queries has a higher one, over the heads that share a map, than that of the blocks with
the most mass, summed over these queries and heads.

That mass is also ``exp(lse - full)``, of the LSE of what was chosen and of all that the mask has: two ways to one number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lcbench.masks.band import BandMask, Ints
from lcbench.masks.block import BlockMap
from lcbench.measure.ranks import Ranks
from lcbench.measure.reference import CHUNK_ELEMENTS, Shard, collected, owned
from lcbench.problem import Problem

ELEMENTS = 1 << 24  # rows times keys times heads that are looked at at the least
BLOCKS = 4  # of queries, however long the sequence is


@dataclass(frozen=True)
class Recall:
    """What was found of some blocks of queries, the same on every rank but for ``apart``.

    Attributes:
        kept, best: (Hq,), 0 to 1: the mass that each head keeps, and that of the best as many blocks; mean over rows.
        rows: how many rows that see a key were looked at.
        blocks: in how many blocks of queries.
        apart: of this rank's rows, (rows, Hq): the mass that is kept, once by its blocks and once by the LSE of the pass.
        spread: of the same, of the terms of that LSE, as the bounds of it take it: the root of the sum of the squares of each kept
            key's weight times its score.
        tokens: of these rows.
    """

    kept: NDArray[np.float64]
    best: NDArray[np.float64]
    rows: int
    blocks: int
    apart: tuple[torch.Tensor, torch.Tensor]
    spread: torch.Tensor
    tokens: Ints


def sample(mask: BandMask, size: int, heads: int, seed: list[int]) -> Ints:
    """Blocks of ``size`` queries to look at: all where that is cheap, else the last one and a seeded draw of the others."""
    blocks = -(-mask.num_q // size)
    wanted = max(BLOCKS, ELEMENTS // (heads * max(1, mask.num_k) * size))
    if wanted >= blocks:
        return np.arange(blocks)
    drawn = np.random.default_rng([*seed, blocks, 7]).choice(blocks - 1, wanted - 1, replace=False)
    return np.append(np.sort(drawn), blocks - 1)


def recall(
    choice: BlockMap, mask: BandMask, problem: Problem, shard: Shard, lse: torch.Tensor, numbers: Ints, ranks: Ranks
) -> Recall:
    """The recall of a choice within a mask. Collective.

    Args:
        shard: this rank's inputs, all heads of its tokens.
        lse: (T, Hq) of this rank's queries, of a pass that computed the choice.
        numbers: of the blocks of queries that are looked at.
    """
    heads, device = problem.heads, shard.q.device
    keys = shard.held.kv.tokens
    column = torch.from_numpy(np.searchsorted(choice.k_edges, keys, side="right") - 1).to(device)
    kept, best, rows = np.zeros(heads.q), np.zeros(heads.q), 0
    by_blocks, by_lse, spreads, tokens = [], [], [], []
    for number in numbers.tolist():
        begin, end = choice.q_edges[number : number + 2].tolist()
        wanted = np.arange(begin, end)
        own = mask.crop(begin, end, 0, mask.num_k)
        q = collected([shard.q], shard.held.q.tokens, wanted, ranks)[0]
        keep = torch.from_numpy(np.stack([choice.keep(i)[number] for i in range(choice.maps)])).to(device)
        keep = keep.repeat_interleave(heads.q // choice.maps, 0)
        shares, squares, full = _shares(q, shard.k, _seen(own, keys, device), column, keep.shape[1], problem, ranks)
        sees = full[0] > -torch.inf
        mass = shares.sum(1)
        kept += (mass * keep).sum(1).cpu().numpy()
        best += (mass * _best(mass, keep, choice.maps)).sum(1).cpu().numpy()
        rows += int(sees.sum())
        mine, at = (place.to(device) for place in owned(shard.held.q.tokens, wanted))
        some = sees[at]
        mine, at = mine[some], at[some]
        held = (shares * keep[:, None]).sum(-1).T[at]
        rough = (squares * keep[:, None]).sum(-1).sqrt().T[at]
        by_blocks.append(held)
        spreads.append(rough / torch.where(held == 0, 1.0, held))
        by_lse.append(torch.exp(lse[mine].double() - full.T[at]))
        tokens.append(wanted[at.cpu().numpy()])
    count = max(1, rows)
    return Recall(
        kept / count, best / count, rows, len(numbers), (torch.cat(by_blocks), torch.cat(by_lse)),
        torch.cat(spreads), np.concatenate(tokens),
    )  # fmt: skip


def _shares(
    q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor, column: torch.Tensor, columns: int, problem: Problem, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Hq, rows, columns): the mass of each block of keys of all ranks, and the sum of the squares of its weights times scores; and
    (Hq, rows): the LSE of all blocks. Collective.

    Args:
        q: (rows, Hq, D) in float64; k: (T, Hk, D) of this rank; seen: bool (rows, T); column: the block of each of these keys.
    """
    heads = problem.heads
    found: list[tuple[torch.Tensor, ...]] = []
    group, rows = heads.q // heads.kv, len(q)
    # As many rows and heads at a time on every rank, since each time is two messages.
    size = max(1, CHUNK_ELEMENTS[q.device.type] // (group * -(-problem.seqlen // problem.scale.world_size)))
    together = max(1, size // max(1, rows))
    for first in range(0, heads.kv, together):
        keys = k[:, first : first + together].double().permute(1, 2, 0)
        of_heads = q[:, first * group : (first + together) * group].transpose(0, 1).unflatten(0, (-1, group))
        parts = []
        for some in range(0, rows, size):
            s = (of_heads[:, :, some : some + size].flatten(1, 2) @ keys).unflatten(1, (group, -1)).flatten(0, 1)
            s = (s * problem.softmax_scale).masked_fill(~seen[some : some + size], -torch.inf)
            top = ranks.reduce(s.amax(-1) if len(k) else s.new_full(s.shape[:2], -torch.inf), "max")
            weights = torch.exp(s - torch.where(top == -torch.inf, 0.0, top)[..., None])
            terms = weights, torch.where(weights > 0, weights * s, 0.0).square()
            sums, squares = ranks.reduce_together(*(x.new_zeros((*s.shape[:2], columns)).index_add_(2, column, x) for x in terms))
            total = sums.sum(-1)
            whole = torch.where(total == 0, 1.0, total)[..., None]
            parts.append((sums / whole, squares / whole.square(), torch.log(total) + top))
        found.append(tuple(torch.cat(each, 1) for each in zip(*parts, strict=True)))
    shares, squares, full = (torch.cat(each) for each in zip(*found, strict=True))
    return shares, squares, full


def _best(mass: torch.Tensor, keep: torch.Tensor, maps: int) -> torch.Tensor:
    """bool (Hq, columns): as many blocks of each map as are kept, those with the most mass of the heads that share it."""
    of_maps = mass.unflatten(0, (maps, -1)).sum(1)
    order = torch.argsort(of_maps, dim=-1, descending=True, stable=True)
    counts = keep.unflatten(0, (maps, -1))[:, 0].sum(-1)
    first = torch.arange(keep.shape[1], device=keep.device) < counts[:, None]
    found = torch.zeros_like(first).scatter_(1, order, first)
    return found.repeat_interleave(len(mass) // maps, 0)


def _seen(mask: BandMask, keys: Ints, device: torch.device) -> torch.Tensor:
    """bool (rows, keys): which of some keys each row of a mask of few rows sees."""
    at, begin, end = mask.intervals(np.arange(mask.num_q))
    steps = np.zeros((mask.num_q, mask.num_k + 1), dtype=np.int8)
    np.add.at(steps, (at, begin), 1)
    np.add.at(steps, (at, end), -1)
    return torch.from_numpy(np.cumsum(steps, axis=1, dtype=np.int8)[:, keys] > 0).to(device)
