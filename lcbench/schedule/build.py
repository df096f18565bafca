"""The parts that strategies share: how tokens are dealt out, rings, grids of ranks, exchanges of heads, and reasons to refuse."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from lcbench.masks.band import BandMask, Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem
from lcbench.schedule.layout import Layout, by_document, contiguous, documents, striped, zigzag
from lcbench.schedule.schedule import NO_ROWS, HeadGroup, Move, Schedule, Side, Step, head_groups, rows, singles

Order = Literal["auto", "zigzag", "striped", "contiguous", "documents"]
DOCUMENTS = "documents"  # each by itself shared evenly, in zigzag if it is causal
ORDERS = {"zigzag": zigzag, "striped": striped, "contiguous": contiguous}

# -- options and refusals ------------------------------------------------------------------------------------------------


def check_choice(option: str, value: object, accepted: Collection[str]) -> None:
    """Raises ValueError, naming the accepted values, unless ``value`` is one of them."""
    if value not in accepted:
        raise ValueError(f"cp.{option}={value} is not one of {', '.join(accepted)}")


def check_order(order: str) -> None:
    """Raises ValueError unless ``deal`` knows the order."""
    check_choice("layout", order, ("auto", *ORDERS, DOCUMENTS))


def check_count(option: str, value: object) -> None:
    """Raises ValueError unless ``value`` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"cp.{option}={value} is no number of at least 1")


def check_rate(option: str, value: object) -> None:
    """Raises ValueError unless ``value`` is a number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"cp.{option}={value} is no number above 0")


def too_short(problem: Problem, shards: int) -> str | None:
    """Why the sequence cannot be cut into a shard per rank, or None."""
    if problem.seqlen < (2 * shards if shards > 1 else 1):  # one rank's only token needs no other
        return f"needs at least two tokens per rank: seqlen={problem.seqlen} over {shards} ranks"
    return None


def too_few_queries(problem: Problem) -> str | None:
    """Why not every rank can have a query, or None."""
    ranks = problem.scale.world_size
    return f"needs at least a query per rank: {problem.queries} over {ranks} ranks" if problem.queries < ranks else None


def indivisible_heads(heads: Heads, ranks: int) -> str | None:
    """Why heads cannot be dealt out evenly to an exchange group of this size, or None."""
    if heads.q % ranks:
        return f"cannot split {heads.q} query heads evenly over {ranks} ranks"
    if heads.kv % ranks and ranks % heads.kv:
        return f"cannot split or replicate {heads.kv} key/value heads evenly over {ranks} ranks"
    return None


def too_few_heads(heads: Heads, parts: int) -> str | None:
    """Why there cannot be so many parts with a query head each, or None."""
    return f"cannot split {heads.q} query heads into {parts} parts" if heads.q < parts else None


def only_self_attention(problem: Problem) -> str | None:
    """Why a strategy that deals out queries and keys together does not run a problem whose keys are others, or None."""
    if problem.rectangular:
        return f"needs a query for every key: a batch has {problem.queries} new tokens of {problem.seqlen}"
    return None


def only_forward(problem: Problem) -> str | None:
    """Why a strategy of inference does not run a problem with gradients, or None."""
    return "is for inference and has no backward; direction=forward runs it" if problem.backward else None


def refused_grid(problem: Problem, degree: int) -> str | None:
    """Why ranks cannot form head exchanges of ``degree`` ranks with rings across them, or None."""
    ranks = problem.scale.world_size
    if ranks % degree:
        return f"ulysses_degree={degree} does not divide the {ranks} ranks of scale={problem.scale}"
    return indivisible_heads(problem.heads, degree) or too_short(problem, ranks)


# -- layouts and rings ---------------------------------------------------------------------------------------------------


def deal(mask: Mask, seqlen: int, shards: int, order: Order) -> Layout:
    """The layout that ``order`` names; ``auto``: zigzag or contiguous, whichever balances the mask better by exact area."""
    if order == DOCUMENTS:
        # A document that is seen whole needs no zigzag: one stretch per shard is as even, and in fewer pieces.
        whole = isinstance(mask, BandMask) and not any(band.cuts_above or band.cuts_below for band in mask)
        return by_document(documents(mask)[0], shards, folded=not whole)
    if order != "auto":
        return ORDERS[order](seqlen, shards)
    plain, balanced = contiguous(seqlen, shards), zigzag(seqlen, shards)
    # A gain below one percent is not worth a layout whose tiles fall into more pieces.
    return balanced if balanced.imbalance(mask) < 0.99 * plain.imbalance(mask) else plain


def sides(problem: Problem, mask: Mask, shards: int, order: Order) -> tuple[Layout, Layout]:
    """The layouts of queries and of keys; one and the same where there are no others.

    Where there is a cache both are dealt out by the same order, so that a rank's queries meet shares of all of it alike: ``auto``
    takes that of ``contiguous``, ``zigzag`` and ``documents``, each request by itself, which balances the mask best.
    """
    if not problem.rectangular:
        both = deal(mask, problem.seqlen, shards, order)
        return both, both
    assert problem.batch is not None
    if order == DOCUMENTS:
        bounds = problem.batch.q_bounds, problem.batch.k_bounds
        return by_document(bounds[0], shards, folded=True), by_document(bounds[1], shards, folded=True)
    if order != "auto":
        return ORDERS[order](problem.queries, shards), ORDERS[order](problem.seqlen, shards)
    orders: tuple[Order, ...] = ("contiguous", "zigzag", "documents")
    found = [sides(problem, mask, shards, each) for each in orders]
    # The earlier ones are in fewer pieces, which a gain below one percent does not make up for.
    balance = [queries.imbalance(mask) for queries, _ in found]
    return next(each for each, ratio in zip(found, balance, strict=True) if ratio <= 1.01 * min(balance))


def dealt(queries: Layout, keys: Layout, owner: Ints, bundles: Sequence[tuple[int, ...]]) -> tuple[Side, Side]:
    """Both sides, of the same owners and bundles; one and the same where the layouts are."""
    q = Side(queries, owner, tuple(bundles))
    return q, q if keys is queries else Side(keys, owner, q.bundles)


def rings(sizes: Sequence[int]) -> tuple[Step, ...]:
    """The steps of a ring over each group of neighbouring ranks, of these sizes, when rank r owns shard r.

    In each step a rank computes its own queries on the keys and values that it holds, and passes these on. A smaller ring is done
    earlier.
    """
    ranks = np.arange(sum(sizes))
    size = np.repeat(sizes, sizes)
    first = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    place = ranks - first
    neighbour = first + (place + 1) % size
    steps = []
    for hop in range(max(sizes)):
        held = first + (place - hop) % size
        computes, sends = ranks[hop < size], ranks[hop < size - 1]
        moves = (Move("kv", rows(sends, neighbour[sends], held[sends], 0)),) if len(sends) else ()
        steps.append(Step(rows(computes, 0, computes, held[computes]), moves))
    return tuple(steps)


# -- exchanges of heads --------------------------------------------------------------------------------------------------


def exchanged(grid: Ints) -> tuple[Ints, Ints, Ints]:
    """(owner, other rank, column of the other) of every ordered pair of ranks in one row of a grid; rank i owns shard i."""
    count, width = grid.shape
    owner, other = np.repeat(grid, width, axis=1), np.tile(grid, (1, width))
    column = np.tile(np.arange(width), (count, width))
    apart = owner != other
    return owner[apart], other[apart], column[apart]


def gathered(grid: Ints, groups: Ints) -> tuple[Move, ...]:
    """The moves that bring head group ``groups[c]`` of every rank of a row to the rank in column c, kept for backward."""
    owner, other, column = exchanged(grid)
    moved = rows(owner, other, owner, groups[column])
    return Move("q", moved, kept=True), Move("kv", moved, kept=True)


def returned(grid: Ints, groups: Ints) -> Ints:
    """The returns of what ``gathered`` brought: each result goes from the rank that computed it to the owner of its queries."""
    owner, other, column = exchanged(grid)
    return rows(other, owner, owner, groups[column])


# -- states of linear attention ------------------------------------------------------------------------------------------


def stretches(problem: Problem) -> Layout:
    """A stretch of tokens per rank, in their order; where there are fewer tokens than ranks, some have none."""
    return contiguous(problem.seqlen, problem.scale.world_size)


def state_blocks(heads: Heads, blocks: int) -> tuple[HeadGroup, ...]:
    """Head groups of whole key/value heads, whose numbers differ by at most one."""
    each, cuts = heads.q // heads.kv, [heads.kv * i // blocks for i in range(blocks + 1)]
    return tuple(HeadGroup.of(heads, range(a * each, b * each)) for a, b in pairwise(cuts))


def state_chain(problem: Problem, blocks: int) -> Schedule:
    """The state goes from every rank to the next in blocks of heads, one in each step behind the other.

    A rank computes its tokens, all heads in one call, once all blocks have come and are sent on: others wait for these.
    """
    ranks, groups = problem.scale.world_size, state_blocks(problem.heads, blocks)
    every, all_heads = np.arange(ranks), len(groups) if blocks > 1 else 0
    whole = state_blocks(problem.heads, 1) if blocks > 1 else ()
    sender, block = (each.ravel() for each in np.meshgrid(every[:-1], np.arange(blocks), indexing="ij"))
    steps = []
    for number in range(ranks + blocks - 1 if ranks > 1 else 1):
        # Block b leaves rank r in step r + b, and is there for rank r + 1 in the step after.
        now, tile = sender + block == number, every[every + blocks - 1 == number] if ranks > 1 else every
        moves = (Move("state", rows(sender[now], sender[now] + 1, sender[now], block[now])),) if now.any() else ()
        steps.append(Step(rows(tile, all_heads, tile, tile), moves))
    return Schedule.of(ranks, stretches(problem), every, (*groups, *whole), singles(ranks), tuple(steps))


# -- grids: heads exchanged along rows, rings along columns --------------------------------------------------------------


def ranks_of(world_size: int, degree: int, *, outside: bool) -> Ints:
    """A (ring, degree) grid of ranks. The ranks of a head exchange are neighbours, or, with ``outside``, those of a ring are."""
    every = np.arange(world_size)
    return every.reshape(degree, -1).T.copy() if outside else every.reshape(-1, degree)


def largest_degree(problem: Problem) -> int:
    """The most ranks of a node among which heads can be dealt out evenly."""
    per_node = problem.scale.gpus_per_node
    return max(u for u in range(1, per_node + 1) if per_node % u == 0 and not indivisible_heads(problem.heads, u))


def grid_schedule(problem: Problem, mask: Mask, grid: Ints, windows: int, order: Order) -> Schedule:
    """Heads exchanged along the rows of a (ring, degree) grid of ranks, a double ring of ``windows`` windows along its columns."""
    ring, degree = grid.shape
    queries, keys = sides(problem, mask, ring, order)
    where = np.argsort(grid, axis=None)  # of each rank; shards are numbered by rank, as the head exchange takes them
    steps = list(_double_ring(grid, where, windows))
    if degree > 1:
        lanes = np.arange(degree)
        steps = [Step(NO_ROWS, gathered(grid, lanes)), *steps, Step(NO_ROWS, (), returned(grid, lanes))]
    by_rank = _by_rank(queries, degree, where)
    other = by_rank if keys is queries else _by_rank(keys, degree, where)
    q, k = dealt(by_rank, other, np.arange(grid.size), [tuple(row) for row in grid.tolist()])
    return Schedule(grid.size, q, k, head_groups(problem.heads, degree), tuple(steps))


def _by_rank(layout: Layout, degree: int, where: Ints) -> Layout:
    """The shards of ring positions, each cut into ``degree``, in the order of the ranks that own them."""
    pieces = layout.split(degree)  # of ring position i: i * degree and what follows
    return Layout(tuple(pieces.shards[i] for i in where))


def _double_ring(grid: Ints, where: Ints, windows: int) -> list[Step]:
    """Steps of a ring inside each window, and of one across windows whose hop takes as long as the ring inside.

    Bundle i is row i of the grid: the shards of ring position i. ``where``: the place of each rank in the flattened grid.
    """
    ring, degree = grid.shape
    every, size = np.arange(grid.size), ring // windows
    position, lane = np.divmod(where, degree)
    window, place = np.divmod(position, size)
    steps = []
    for outer in range(windows):
        for inner in range(size):
            held = (window - outer) % windows * size + (place - inner) % size
            moves = []
            if inner < size - 1:
                to = grid[window * size + (place + 1) % size, lane]
                moves.append(_bundle_move(every, to, grid[held], lane, "main"))
            if inner == 0 and outer < windows - 1:
                to = grid[(window + 1) % windows * size + place, lane]
                moves.append(_bundle_move(every, to, grid[held], lane, "outer", steps=size))
            steps.append(Step(rows(every, lane, position, held), tuple(moves)))
    return steps


def _bundle_move(source: Ints, to: Ints, bundles: Ints, lane: Ints, channel: str, steps: int = 1) -> Move:
    """Every rank sends all shards of the bundle that it holds."""
    width = bundles.shape[1]
    moved = rows(np.repeat(source, width), np.repeat(to, width), bundles.ravel(), np.repeat(lane, width))
    return Move("kv", moved, steps=steps, channel=channel)
