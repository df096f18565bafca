"""A micro-batch of a batch of documents, as a problem of all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

from lcbench.masks.band import BandMask, Ints
from lcbench.problem import Problem
from lcbench.schedule.schedule import Schedule


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Documents packed behind one another, which some ranks share.

    Attributes:
        schedule: of all ranks.
        tokens: which token of the batch each token of its sequence is, (T,).
    """

    schedule: Schedule
    mask: BandMask
    problem: Problem
    tokens: Ints

    @cached_property
    def key(self) -> bytes:
        """The same for micro-batches in which all ranks do the same, token for token."""
        schedule, found = self.schedule, blake2b()
        found.update(repr((self.problem, schedule.world_size, schedule.heads, schedule.k is schedule.q)).encode())
        for side in schedule.sides.values():
            found.update(repr(side.bundles).encode())
            for array in (side.shards.spans, side.shards.begins, side.owner):
                found.update(array.tobytes())
        for step in schedule.steps:
            for move in step.moves:
                found.update(repr((move.kind, move.kept, move.steps, move.channel, len(move.rows))).encode())
                found.update(move.rows.tobytes())
            for array in (step.tiles, step.returns):
                found.update(repr(len(array)).encode())
                found.update(array.tobytes())
        found.update(self.mask.bands.tobytes())
        return found.digest()
