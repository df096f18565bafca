"""A strategy is data: where tokens live, which tiles each rank computes in which step, and what moves meanwhile.

Several things read a schedule and no strategy knows of them: ``adjoint`` derives the traffic of backward from the moves of
forward, ``verify`` proves it, ``execute`` runs it, ``draw`` shows it.

Vocabulary. A *shard* is a set of tokens that always moves together; each has an owner, which has its q, k and v for all heads
when it begins and its out when it ends. A *head group* is what is computed together of the heads. An *item* is the q, or the
k and v, of one shard for one head group. A *bundle* is a sequence of shards that lie behind one another as one operand. A *tile*
is a rank computing one bundle of queries on one bundle of keys, for one head group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lcbench.masks.band import Ints, TokenSpan, spread
from lcbench.problem import Heads
from lcbench.schedule.layout import Layout

EXPANDED = 1 << 22  # rows of tiles, one per pair of shards, that are looked at together

Kind = Literal["q", "kv"]


def rows(*values: ArrayLike) -> Ints:
    """Tiles, moves and returns, int64 (n, columns), from their columns; an integer stands for a column of it."""
    return np.stack(np.broadcast_arrays(*(np.asarray(v, dtype=np.int64).ravel() for v in values)), axis=1)


NO_ROWS = rows([], [], [], [])  # no tiles, or no returns
NO_ROWS.setflags(write=False)


@dataclass(frozen=True)
class HeadGroup:
    """Query heads ``begin ... end - 1`` with the key/value heads that they read, in order, possibly one several times.

    Query head i of the group reads entry ``i // (heads / entries)``, as in grouped-query attention of the whole.
    """

    begin: int
    end: int
    kv: tuple[int, ...]

    @classmethod
    def of(cls, heads: Heads, begin: int, end: int) -> HeadGroup:
        """The group of a range of query heads, with as few copies of key/value heads as grouped-query attention allows."""
        each = heads.q // heads.kv
        reads = [h // each for h in range(begin, end)]
        count = end - begin
        for size in range(count, 0, -1):
            runs = [reads[i : i + size] for i in range(0, count, size)]
            if count % size == 0 and all(run[0] == run[-1] for run in runs):
                return cls(begin, end, tuple(run[0] for run in runs))
        raise ValueError(f"query heads {begin} to {end} are none")

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def kv_heads(self) -> slice | list[int]:
        """The key/value heads as an index: a slice where they are a stretch of all, so that taking them copies nothing."""
        first, last = self.kv[0], self.kv[-1]
        return slice(first, last + 1) if self.kv == tuple(range(first, last + 1)) else list(self.kv)


def head_groups(heads: Heads, parts: int) -> tuple[HeadGroup, ...]:
    """All heads in ``parts`` groups whose sizes differ by at most one query head; groups without a head are left out."""
    cuts = [heads.q * i // parts for i in range(parts + 1)]
    return tuple(HeadGroup.of(heads, a, b) for a, b in pairwise(cuts) if a < b)


@dataclass(frozen=True)
class Move:
    """Items that travel while a step computes.

    Attributes:
        kind: what travels: ``q``, or ``kv`` together.
        rows: int64 (n, 4): from rank, to rank, shard, head group.
        kept: the receiver holds on to it for backward instead of fetching it again.
        steps: how many steps it may take; usable from the step after these on.
        channel: moves of different channels run over different communicators.
    """

    kind: Kind
    rows: Ints
    kept: bool = False
    steps: int = 1
    channel: str = "main"


@dataclass(frozen=True)
class Step:
    """One step of all ranks.

    Attributes:
        tiles: int64 (n, 4): rank, head group, bundle of queries, bundle of keys.
        moves: what travels meanwhile.
        returns: int64 (n, 4): from rank, to the owner, shard, head group: results of tiles of earlier steps, which the
            owner merges at the end of this step.
    """

    tiles: Ints
    moves: tuple[Move, ...] = ()
    returns: Ints = field(default_factory=lambda: NO_ROWS)


@dataclass(frozen=True)
class Schedule:
    """A whole strategy for one problem. ``owner``: the rank that owns each shard, (shards,)."""

    world_size: int
    shards: Layout
    owner: Ints
    heads: tuple[HeadGroup, ...]
    bundles: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]

    @cached_property
    def sizes(self) -> Ints:
        """Tokens of each shard."""
        return np.array([self.shards.size(i) for i in range(len(self.shards))], dtype=np.int64)

    def own(self, rank: int) -> list[int]:
        """The shards of a rank, in the order in which its tensors hold them."""
        found: list[int] = np.nonzero(self.owner == rank)[0].tolist()
        return found

    @cached_property
    def layout(self) -> Layout:
        """What each rank owns."""
        return Layout(tuple(self.runs(self.own(rank)) for rank in range(self.world_size)))

    def runs(self, shards: Iterable[int]) -> tuple[TokenSpan, ...]:
        """Tokens of shards that lie behind one another; stretches that continue one another are one run."""
        found: list[TokenSpan] = []
        for run in (run for shard in shards for run in self.shards.shards[shard] if run.size):
            if found and found[-1].stride == run.stride == 1 and found[-1].start + found[-1].size == run.start:
                found[-1] = TokenSpan(found[-1].start, found[-1].size + run.size)
            else:
                found.append(run)
        return tuple(found) or (TokenSpan(0, 0),)

    @cached_property
    def _members(self) -> tuple[Ints, Ints]:
        """Shards of all bundles, and where each bundle begins."""
        offsets = np.cumsum([0, *map(len, self.bundles)])
        return np.array([shard for bundle in self.bundles for shard in bundle], dtype=np.int64), offsets

    def spread(self, bundles: Ints) -> tuple[Ints, Ints]:
        """(position in ``bundles``, shard) of every shard of every bundle."""
        members, offsets = self._members
        number, place = spread(offsets[bundles], offsets[bundles + 1])
        return number, members[place]

    def shard_tiles(self, step: Step) -> Iterator[Ints]:
        """The tiles of a step by shards, in portions: rows (rank, head group, q shard, k shard)."""
        _, offsets = self._members
        counts = np.diff(offsets)
        portion = np.cumsum(counts[step.tiles[:, 2]] * counts[step.tiles[:, 3]]) // EXPANDED
        for part in np.split(step.tiles, np.nonzero(np.diff(portion))[0] + 1):
            number, q = self.spread(part[:, 2])
            again, k = self.spread(part[number, 3])
            yield np.column_stack([part[number[again], :2], q[again], k])

    def __str__(self) -> str:
        """The schedule as a grid of steps x ranks; a bug report is this text."""
        names = [",".join(map(str, bundle)) if len(bundle) < 4 else f"{bundle[0]}..{bundle[-1]}" for bundle in self.bundles]
        rows = [["step", *(f"rank {r}" for r in range(self.world_size)), "moves"]]
        for number, step in enumerate(self.steps):
            cells: list[list[str]] = [[] for _ in range(self.world_size)]
            for rank, group, q, k in step.tiles.tolist():
                heads = f" h{group}" if len(self.heads) > 1 else ""
                cells[rank].append(f"q{names[q]}k{names[k]}{heads}")
            moves = [f"{m.kind} x{len(m.rows)}" for m in step.moves] + (
                [f"return x{len(step.returns)}"] if len(step.returns) else []
            )
            rows.append([str(number), *(" ".join(c) or "-" for c in cells), ", ".join(moves) or "-"])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def singles(shards: int) -> tuple[tuple[int, ...], ...]:
    """A bundle per shard, of the same number."""
    return tuple((i,) for i in range(shards))
