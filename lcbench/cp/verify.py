"""Proof that a schedule computes a mask: every unmasked pair once, nothing used before it arrived, moves that match.

Pure numpy, no processes, so that it runs for any number of ranks in a test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcbench.cp.schedule import Exchange, Hop, Schedule
from lcbench.masks.band import Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Heads


class ScheduleError(AssertionError):
    """A strategy's schedule is wrong; the message shows the grid and the offending step."""


@dataclass(frozen=True)
class Report:
    """What a valid schedule costs.

    Attributes:
        rank_pairs: unmasked pairs per rank, over the query heads that it computes, shape (P,).
        step_pairs: the same per step, shape (steps, P).
        forward_bytes, backward_bytes: sent per rank, shape (P,).
    """

    rank_pairs: Ints
    step_pairs: Ints
    forward_bytes: Ints
    backward_bytes: Ints

    @property
    def imbalance(self) -> float:
        """Time of the steps, each as long as its busiest rank, over the mean work of a rank: 1.0 is perfect."""
        mean = self.rank_pairs.mean()
        return float(self.step_pairs.max(axis=1).sum() / mean) if mean else 1.0


def verify(schedule: Schedule, mask: Mask, heads: Heads, itemsize: int) -> Report:
    """Check a schedule against a mask and count its work and its bytes.

    Args:
        itemsize: bytes per element of q, k, v.
    Raises:
        ScheduleError: naming the step and showing the grid.
    """
    world = schedule.mesh.world_size
    _check_layouts(schedule, mask.num_q)

    # Ranks of one exchange group hold the same shard with different heads: each pair must be computed once per share.
    shares = schedule.head_shares
    pairs = _tile_pairs(schedule, mask, heads)
    done: set[tuple[int, int, int]] = set()
    held_kv = schedule.shard_of.copy()
    gathered = not schedule.exchanges
    step_pairs = np.zeros((len(schedule.steps), world), dtype=np.int64)
    for number, step in enumerate(schedule.steps):
        for rank, q, k in step.tiles.tolist():
            if not gathered:
                raise _error(schedule, number, f"rank {rank} computes before its heads are exchanged")
            if q != schedule.shard_of[rank]:
                raise _error(schedule, number, f"rank {rank} does not hold the queries of shard {q}")
            if k != held_kv[rank]:
                raise _error(schedule, number, f"rank {rank} holds keys of shard {held_kv[rank]}, not of shard {k}")
            if pairs[shares[rank], q, k] and (q, k, int(shares[rank])) in done:
                raise _error(schedule, number, f"rank {rank} computes q{q}k{k} a second time")
            done.add((q, k, int(shares[rank])))
            step_pairs[number, rank] += pairs[shares[rank], q, k]
        for move in step.moves:
            if isinstance(move, Hop):
                source = schedule.mesh.source(move.dim, move.shift)
                if not np.array_equal(np.sort(source), np.arange(world)):
                    raise _error(schedule, number, f"{move}: sends and receives do not match")
                held_kv = held_kv[source]
            else:
                gathered = move.way == "gather"
    for share, q, k in np.argwhere(pairs).tolist():
        if (q, k, share) not in done:
            raise _error(schedule, len(schedule.steps) - 1, f"nobody computed q{q}k{k} (head share {share})")
    forward, backward = _bytes(schedule, heads, itemsize)
    return Report(step_pairs.sum(axis=0), step_pairs, forward, backward)


def _tile_pairs(schedule: Schedule, mask: Mask, heads: Heads) -> Ints:
    """Unmasked pairs of every tile over the heads of every share, shape (head shares, shards, shards)."""
    shards, shares = schedule.shards, int(schedule.head_shares.max()) + 1
    count = heads.q // shares
    tables: dict[int, list[list[int]]] = {}  # by mask: bands are the same for every share
    masks = [mask.of_heads(share * count, count, heads.q) for share in range(shares)]
    for part in masks:
        if id(part) not in tables:
            every = range(len(shards))
            tables[id(part)] = [[shards.tile(part, q, k).pairs(count) for k in every] for q in every]
    pairs = np.array([tables[id(part)] for part in masks])
    if pairs.sum() != mask.pairs(heads.q):
        raise ScheduleError(f"the tiles hold {pairs.sum()} pairs, the mask {mask.pairs(heads.q)}")
    return pairs


def _check_layouts(schedule: Schedule, seqlen: int) -> None:
    for name in ("layout", "shards"):
        layout = getattr(schedule, name)
        tokens = np.sort(np.concatenate([layout.tokens(i) for i in range(len(layout))]))
        if not np.array_equal(tokens, np.arange(seqlen)):
            raise ScheduleError(f"{name} does not own each of {seqlen} tokens exactly once")


def _bytes(schedule: Schedule, heads: Heads, itemsize: int) -> tuple[Ints, Ints]:
    """Bytes that ``execute`` sends per rank, forward and backward, each of shape (P,)."""
    mesh = schedule.mesh
    group = int(schedule.head_shares.max()) + 1
    own = np.array([schedule.layout.size(rank) for rank in range(mesh.world_size)])
    kv_heads = max(heads.kv // group, 1)
    sum_itemsize = max(itemsize, 4)  # gradients in transit are summed in fp32 at least
    # Replicated KV heads are summed on arrival; all other gradients are complete and travel in the inputs' type.
    kv_itemsize = sum_itemsize if heads.kv < group else itemsize
    held = np.array([schedule.shards.size(int(s)) for s in schedule.shard_of])
    forward, backward = np.zeros_like(own), np.zeros_like(own)
    for step in schedule.steps:
        for move in step.moves:
            if isinstance(move, Exchange):
                remote = own * (group - 1) * heads.dim
                others = held - own
                share = heads.q // group
                if move.way == "gather":
                    forward += remote * (share + 2 * kv_heads) * itemsize
                    # The gradients come back: each rank returns, to each other rank, that rank's tokens.
                    backward += others * heads.dim * (share * itemsize + 2 * kv_heads * kv_itemsize)
                else:
                    forward += others * heads.dim * share * itemsize
                    backward += remote * share * itemsize
    kv_elements = 2 * kv_heads * heads.dim
    hops = [m for step in schedule.steps for m in step.moves if isinstance(m, Hop)]
    position = np.arange(mesh.world_size)
    sizes = held
    for hop in hops:
        source = mesh.source(hop.dim, hop.shift)
        if not np.array_equal(source, position):
            forward += sizes * kv_elements * itemsize
            # dKV of what arrived by this hop goes back over it.
            backward += sizes[source] * kv_elements * sum_itemsize
        sizes = sizes[source]
    # Backward starts where forward ended: the last held KV is fetched at once, then walked back hop by hop.
    sizes = held
    for dim, net in net_shifts(schedule).items():
        source = mesh.source(dim, net)
        if not np.array_equal(source, position):
            backward += sizes * kv_elements * itemsize
        sizes = sizes[source]
    for index in range(len(hops) - 1, 0, -1):
        source = mesh.source(hops[index].dim, -hops[index].shift)
        if not np.array_equal(source, position):
            backward += sizes * kv_elements * itemsize
        sizes = sizes[source]
    return forward, backward


def net_shifts(schedule: Schedule) -> dict[str, int]:
    """How far keys and values have moved along each dimension when forward ends."""
    net: dict[str, int] = {}
    for step in schedule.steps:
        for move in step.moves:
            if isinstance(move, Hop):
                net[move.dim] = (net.get(move.dim, 0) + move.shift) % schedule.mesh.size(move.dim)
    return net


def _error(schedule: Schedule, step: int, message: str) -> ScheduleError:
    if schedule.mesh.world_size > 16:
        return ScheduleError(f"step {step}: {message}")
    lines = str(schedule).splitlines()
    lines[step + 1] += f"   <-- {message}"
    return ScheduleError(f"step {step}: {message}\n" + "\n".join(lines))
