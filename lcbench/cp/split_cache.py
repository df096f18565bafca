"""Keys and values of requests split among ranks: what strategies share whose ranks compute the same queries on parts of the keys.

Ranks are a grid of G rows and D columns. The ranks of a row have the same heads, and of every request each has some of the tokens.
All ranks of a row compute the same queries on their own keys; the partial results are merged by their LSE, and each rank ends with
one part in D of the row's query heads, so with one in P of all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from lcbench.masks.band import BandMask, Ints, TokenSpan
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.build import indivisible_heads, only_forward
from lcbench.schedule.held import Held, Part
from lcbench.schedule.layout import Layout, by_document
from lcbench.schedule.lowering import Operation
from lcbench.schedule.payload import element_bytes
from lcbench.schedule.schedule import Schedule, Side, Step, head_groups, rows, singles

if TYPE_CHECKING:
    from lcbench.schedule.simulate import Around, Modelled

Merge = Literal["reduce_scatter", "all_to_all"]
MERGES: tuple[Merge, ...] = ("reduce_scatter", "all_to_all")
NO_TOKENS = (TokenSpan(0, 0),)


def shares(k_bounds: Ints, parts: int, interleave: int | None) -> Layout:
    """The tokens of each of ``parts`` ranks, of requests that begin at ``k_bounds`` (requests + 1,), the end with them.

    Args:
        interleave: tokens of a request that go to one rank before the next ones go to the next; None: of every request each rank
            has one stretch.
    """
    if interleave is None:
        return by_document(k_bounds, parts, folded=False)
    requests = list(pairwise(k_bounds.tolist()))
    spans = [[span for ends in requests for span in share(*ends, parts, part, interleave)] for part in range(parts)]
    return Layout(tuple(tuple(each) or NO_TOKENS for each in spans))


def share(begin: int, end: int, parts: int, part: int, interleave: int | None) -> list[TokenSpan]:
    """The tokens of a request that one of several ranks has, as ``shares`` deals them out; of stretches the first ranks have those
    left over."""
    if interleave is None:
        size, left = divmod(end - begin, parts)
        first = begin + part * size + min(part, left)
        return [TokenSpan(first, size + (part < left))] if size + (part < left) else []
    starts = range(begin + part * interleave, end, parts * interleave)
    if interleave == 1:
        return [TokenSpan(starts.start, len(starts), parts)] if starts else []
    return [TokenSpan(start, min(interleave, end - start)) for start in starts]


def query_runs(begin: int, end: int, parts: int, interleave: int | None) -> list[TokenSpan]:
    """Queries of a request in an order in which a tile of them with keys of ``share`` has few bands.

    Every ``parts``-th query is a run of its own where every ``parts``-th key is: a diagonal stays one only between runs of the
    same stride. A single query has any stride.
    """
    stride = parts if interleave == 1 and end - begin > 1 else 1
    return [TokenSpan(start, len(range(start, end, stride)), stride) for start in range(begin, min(begin + stride, end))]


@dataclass(frozen=True)
class Split:
    """What one rank has to do.

    Attributes:
        rows: the ranks of every row of the grid, ascending.
        members: those of this rank's row; ``column``: its place among them.
        q_runs: all queries, in the order in which its kernel takes them.
        k_runs: its keys, in the order of its tensors.
        heads: of its kernel's call, those of the row; ``first``: the first of its query heads.
        gathers: whether it is given the queries of its own heads alone, and gathers those of the row.
        held: see ``RankRun``.
    """

    rows: tuple[tuple[int, ...], ...]
    members: tuple[int, ...]
    column: int
    q_runs: tuple[TokenSpan, ...]
    k_runs: tuple[TokenSpan, ...]
    heads: Heads
    first: int
    gathers: bool
    held: Held


def split(problem: Problem, grid: Ints, rank: int, interleave: int | None, *, gathers: bool) -> Split:
    """What a rank of a (G, D) grid has to do; every row of it is ascending.

    Args:
        interleave: see ``shares``.
        gathers: see ``Split``.
    """
    (count, degree), heads = grid.shape, problem.heads
    row, column = (int(place[0]) for place in np.nonzero(grid == rank))
    keys = shares(problem.requests.k_bounds, degree, interleave)
    each, kv_each, part = heads.q // count, max(1, heads.kv // count), heads.q // grid.size
    first, kv_first = row * each, row * heads.kv // count
    every = np.arange(problem.queries, dtype=np.int64)
    own = Part(every, range(first + column * part, first + (column + 1) * part))
    held = Held(
        q=own if gathers else Part(every, range(first, first + each)),
        kv=Part(keys.tokens(column), range(kv_first, kv_first + kv_each)),
        out=own,
    )
    rows = tuple(map(tuple, grid.tolist()))
    queries = tuple(run for ends in pairwise(problem.requests.q_bounds.tolist()) for run in query_runs(*ends, degree, interleave))
    of_row = heads.of(each, kv_each)
    return Split(rows, rows[row], column, queries, keys.shards[column], of_row, first, gathers, held)


def fewest(problem: Problem) -> int:
    """The fewest ranks of a row with which no key/value head is held by two rows."""
    ranks, heads = problem.scale.world_size, problem.heads
    return next(d for d in range(1, ranks + 1) if ranks % d == 0 and heads.kv % (ranks // d) == 0)


def modelled(problem: Problem, mask: Mask, grid: Ints, interleave: int | None, merge: Merge, *, gathers: bool) -> Modelled:
    """What is simulated: the tile of the rank with most pairs, and the collectives of its row; arguments as of ``split``."""
    from lcbench.schedule.simulate import Modelled  # with scipy, which planning does without

    tiles = []
    for rank in (grid[:1] if isinstance(mask, BandMask) else grid).ravel().tolist():
        of_rank = split(problem, grid, rank, interleave, gathers=gathers)
        tile = mask.of_heads(of_rank.first, of_rank.heads.q, problem.heads.q).tile(of_rank.q_runs, of_rank.k_runs).merged()
        tiles.append((tile.pairs(of_rank.heads.q), of_rank, tile))
    _, of_rank, tile = max(tiles, key=lambda each: each[0])
    queries, keys = (
        Side(Layout(((TokenSpan(0, tokens),),)), np.zeros(1, dtype=np.int64), singles(1)) for tokens in (tile.num_q, tile.num_k)
    )
    schedule = Schedule(1, queries, keys, head_groups(of_rank.heads, 1), (Step(rows(0, 0, 0, 0)),))
    alone = replace(problem, heads=of_rank.heads, scale=Scale(1, 1), seqlen=tile.num_k, batch=None)
    held = len(grid) * of_rank.heads.kv // problem.heads.kv
    return Modelled(schedule, tile, alone, _around(problem, of_rank, merge) if len(of_rank.members) > 1 else (), held)


def _around(problem: Problem, of_rank: Split, merge: Merge) -> tuple[Around, ...]:
    """The collectives of a row, as ``SplitRun`` makes them."""
    from lcbench.schedule.simulate import COPIED, MERGED, Around

    ranks, heads = len(of_rank.members), of_rank.heads
    each = problem.queries * heads.q // ranks  # rows of the heads of one rank
    inputs, reduced, sums = (element_bytes(precision, problem) for precision in ("input", "reduce", "sum"))

    def around(operation: Operation, block: int, moved: int, launches: int, buffers: int) -> Around:
        return Around(operation, block, of_rank.rows, problem.scale.gpus_per_node, moved, launches, buffers)

    q, result, lse = each * heads.dim * inputs, each * heads.v, each * sums
    gathered = [around("all_gather", q, COPIED * ranks * q, 1, 2 * ranks * q)] if of_rank.gathers else []
    part = result * reduced
    if merge == "all_to_all":
        packed, merged = (sums + reduced) * ranks * result, MERGED * sums * (ranks - 1) * result
        merging = [
            around("all_to_all", part, packed + merged, ranks, 2 * ranks * part),
            around("all_to_all", lse, COPIED * ranks * lse, 1, 2 * ranks * lse),
        ]
    else:
        scaled = (COPIED * sums + sums + reduced) * ranks * result
        merging = [
            around("all_gather", ranks * lse, COPIED * ranks * lse, 2, ranks**2 * lse),
            around("reduce_scatter", part, scaled, 3, (ranks + 1) * part),
        ]
    return (*gathered, *merging)


def refused(problem: Problem, option: str, degree: int) -> str | None:
    """Why ranks cannot be a grid of rows of ``degree`` ranks with these heads, or not for this problem; or None."""
    ranks, heads = problem.scale.world_size, problem.heads
    if reason := only_forward(problem):
        return reason
    if ranks % degree:
        return f"{option}={degree} does not divide the {ranks} ranks of scale={problem.scale}"
    if heads.q % ranks:
        return f"cannot split {heads.q} query heads evenly over {ranks} ranks"
    return indivisible_heads(heads, ranks // degree)
