"""A strategy is data: where tokens live, which tiles each rank computes in which step, and what moves meanwhile.

Strategies write schedules; ``adjoint`` derives the traffic of backward from the moves of forward, ``verify`` proves a schedule,
``program`` works out what one rank does, ``execute`` runs it, ``plot`` draws it. A strategy knows none of them.

A *side* is queries, or keys with values; in self-attention both are dealt out alike. A *shard* is a set of tokens of a side that
always move together. Its owner holds their q, or k and v, for all heads at the begin, and the out of queries at the end. A *head
group* is a range of query heads that are computed together, with the key/value heads that they read. An *item* is the q, or the k
and v, of one shard for one head group. A *bundle* is a sequence of shards that one kernel call takes as one operand. A *tile* is
the computation of one bundle of queries on one bundle of keys for one head group by one rank.

In linear attention a tile is a stretch of tokens on itself, from the state that all tokens before it leave. That state comes by
moves of states: as it is after some shard, or as what shards do to any state, one after the other.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from lcbench.masks.band import BandMask, Ints, TokenSpan, spread
from lcbench.masks.mask import Mask
from lcbench.problem import Heads
from lcbench.schedule.held import Held, Part
from lcbench.schedule.layout import Layout

EXPANDED = 1 << 22  # rows of tiles, one per pair of shards, that are looked at together

Kind = Literal["q", "kv"]
# Of linear attention: the state after a shard and all before it, or what a shard does to any state.
StateKind = Literal["state", "summary"]
STATES: tuple[StateKind, ...] = get_args(StateKind)


def rows(*values: ArrayLike) -> Ints:
    """Tiles, moves and returns, int64 (n, columns), from their columns; an integer stands for a column of it."""
    return np.stack(np.broadcast_arrays(*(np.asarray(v, dtype=np.int64).ravel() for v in values)), axis=1)


NO_ROWS = rows([], [], [], [])  # no tiles, or no returns
NO_ROWS.setflags(write=False)


class TileColumn:
    """Columns of tiles: a rank computes, for a head group, a bundle of queries on a bundle of keys."""

    RANK, GROUP, Q, K = range(4)


class MoveColumn:
    """Columns of moves, returns and messages: an item, shard and head group, goes from a rank to another."""

    SOURCE, TARGET, SHARD, GROUP = range(4)


@dataclass(frozen=True)
class HeadGroup:
    """Query heads ``q``, rising, with the key/value heads that they read, in order, possibly one several times.

    Query head number i of the group reads entry ``i // (heads / entries)``, as in grouped-query attention of the whole.
    """

    q: tuple[int, ...]
    kv: tuple[int, ...]

    @classmethod
    def of(cls, heads: Heads, q: Sequence[int]) -> HeadGroup:
        """The group of some query heads, rising, with as few copies of key/value heads as grouped-query attention allows.

        Raises:
            ValueError: no head.
        """
        each = heads.q // heads.kv
        reads = [h // each for h in q]
        count = len(reads)
        for size in range(count, 0, -1):
            runs = [reads[i : i + size] for i in range(0, count, size)]
            if count % size == 0 and all(run[0] == run[-1] for run in runs):
                return cls(tuple(q), tuple(run[0] for run in runs))
        raise ValueError("a head group needs a query head")

    def __len__(self) -> int:
        return len(self.q)

    def count(self, side: Kind) -> int:
        """How many heads it has of queries, or of keys and values."""
        return len(self.q if side == "q" else self.kv)

    @property
    def q_heads(self) -> slice | list[int]:
        """The query heads as an index: a slice where they are a stretch of all, so that taking them copies nothing."""
        return _index(self.q)

    @property
    def kv_heads(self) -> slice | list[int]:
        """The key/value heads as an index, as ``q_heads``."""
        return _index(self.kv)

    def part(self, mask: Mask, heads: int) -> Mask:
        """The mask of these query heads of all ``heads``."""
        if isinstance(self.q_heads, slice) or isinstance(mask, BandMask):
            return mask.of_heads(self.q[0], len(self), heads)
        maps, count = np.unique([head // (heads // mask.maps) for head in self.q], return_counts=True)
        if len(set(count.tolist())) > 1:  # query head i of n reads map i // (n / maps), so each has a map of its own
            maps = np.repeat(maps, count)
        return replace(mask, maps=len(maps), draw=lambda number: mask.drawn(int(maps[number])))


def _index(numbers: tuple[int, ...]) -> slice | list[int]:
    first, last = numbers[0], numbers[-1]
    return slice(first, last + 1) if numbers == tuple(range(first, last + 1)) else list(numbers)


def head_groups(heads: Heads, parts: int) -> tuple[HeadGroup, ...]:
    """All heads in ``parts`` groups whose sizes differ by at most one query head; groups without a head are left out."""
    cuts = [heads.q * i // parts for i in range(parts + 1)]
    return tuple(HeadGroup.of(heads, range(a, b)) for a, b in pairwise(cuts) if a < b)


@dataclass(frozen=True)
class Move:
    """Items that travel while a step computes.

    Attributes:
        kind: what travels: ``q``, or ``kv`` together; in linear attention also ``state`` or ``summary``.
        rows: int64 (n, 4): see ``MoveColumn``.
        kept: whether the receiver holds the items for backward instead of fetching them again.
        steps: how many steps the move may take; what it brings may be used in the step after them.
        channel: the communicator that it runs over, by name.
    """

    kind: Kind | StateKind
    rows: Ints
    kept: bool = False
    steps: int = 1
    channel: str = "main"


@dataclass(frozen=True)
class Step:
    """One step of all ranks.

    Attributes:
        tiles: int64 (n, 4): see ``TileColumn``.
        moves: what travels meanwhile.
        returns: int64 (n, 4): see ``MoveColumn``; results of tiles of earlier steps, which the owner, their target, merges at the
            end of this step.
    """

    tiles: Ints
    moves: tuple[Move, ...] = ()
    returns: Ints = field(default_factory=lambda: NO_ROWS)


@dataclass(frozen=True)
class Side:
    """Queries, or keys with values: how they are dealt out.

    Attributes:
        shards: the tokens of each shard.
        owner: the rank that owns each shard, int64 (shards,).
        bundles: the shards of each bundle, in the order in which they lie in memory.
    """

    shards: Layout
    owner: Ints
    bundles: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.shards)

    @cached_property
    def sizes(self) -> Ints:
        """Tokens of each shard, (shards,)."""
        number = np.repeat(np.arange(len(self.shards)), np.diff(self.shards.begins))
        sizes = np.zeros(len(self.shards), dtype=np.int64)
        np.add.at(sizes, number, self.shards.spans[:, 1])
        return sizes

    def own(self, rank: int) -> list[int]:
        """The shards of a rank, in the order in which its tensors hold them."""
        found: list[int] = np.nonzero(self.owner == rank)[0].tolist()
        return found

    def tokens(self, rank: int) -> Ints:
        """Indices of the tokens that a rank owns, in the order of its tensors."""
        return Layout((self.runs(self.own(rank)),)).tokens(0)

    def runs(self, shards: Iterable[int]) -> tuple[TokenSpan, ...]:
        """The token spans of shards that lie behind one another; spans that continue one another are one."""
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

    @property
    def lengths(self) -> Ints:
        """Shards of each bundle, (bundles,)."""
        return np.diff(self._members[1])

    def spread(self, bundles: Ints) -> tuple[Ints, Ints]:
        """(position in ``bundles``, shard) of every shard of every bundle."""
        members, offsets = self._members
        number, place = spread(offsets[bundles], offsets[bundles + 1])
        return number, members[place]

    def members(self, bundle: int) -> Ints:
        """The shards of a bundle, in order."""
        members, offsets = self._members
        return members[offsets[bundle] : offsets[bundle + 1]]


@dataclass(frozen=True)
class Schedule:
    """A whole strategy for one problem.

    Attributes:
        world_size: P, ranks.
        q: how queries are dealt out.
        k: how keys and values are; in self-attention the same object.
        heads: the head groups. Two of them may share heads: no shard is computed for both.
        steps: what happens, one after the other.
        kinds: where sub-groups of ranks are at work side by side, what kind of sub-group each rank is in, (P,): ranks of two kinds
            send one another nothing, and what each kind sends may be a collective by itself. None: all are of one.
    """

    world_size: int
    q: Side
    k: Side
    heads: tuple[HeadGroup, ...]
    steps: tuple[Step, ...]
    kinds: Ints | None = None

    @classmethod
    def of(
        cls,
        world_size: int,
        shards: Layout,
        owner: Ints,
        heads: tuple[HeadGroup, ...],
        bundles: tuple[tuple[int, ...], ...],
        steps: tuple[Step, ...],
    ) -> Schedule:
        """A schedule of self-attention, whose keys are dealt out as its queries."""
        side = Side(shards, owner, bundles)
        return cls(world_size, side, side, heads, steps)

    @cached_property
    def known(self) -> dict[Hashable, Any]:
        """What has been worked out of it by whoever was asked: a check, a simulation and a run ask for the same traffic."""
        return {}

    @cached_property
    def head_counts(self) -> dict[Kind, Ints]:
        """How many heads each head group has of queries, and of keys and values, (groups,)."""
        return {side: np.array([group.count(side) for group in self.heads]) for side in self.sides}

    def held(self, rank: int) -> Held:
        """What a rank is given, and gives: all heads of its tokens."""
        queries = Part(self.q.tokens(rank))
        return Held(queries, queries if self.k is self.q else Part(self.k.tokens(rank)), queries)

    def side(self, kind: Kind | StateKind) -> Side:
        """Queries, ``q``, or keys with values, ``kv``, of which there are states."""
        return self.q if kind == "q" else self.k

    @property
    def sides(self) -> dict[Kind, Side]:
        """Both, by kind."""
        return {"q": self.q, "kv": self.k}

    def shard_tiles(self, step: Step) -> Iterator[Ints]:
        """The tiles of a step by shards, in portions: rows (rank, head group, q shard, k shard)."""
        shards = self.q.lengths[step.tiles[:, TileColumn.Q]] * self.k.lengths[step.tiles[:, TileColumn.K]]
        portion = np.cumsum(shards) // EXPANDED
        for part in np.split(step.tiles, np.nonzero(np.diff(portion))[0] + 1):
            number, q = self.q.spread(part[:, TileColumn.Q])
            again, k = self.k.spread(part[number, TileColumn.K])
            yield np.column_stack([part[number[again], : TileColumn.Q], q[again], k])

    def __str__(self) -> str:
        """The schedule as a grid of steps x ranks; a bug report is this text.

        ``q0k1-3``: the rank computes the queries of shard 0 on the keys of shards 1 to 3. ``kv1>2``: it sends keys and values of
        shard 1 to rank 2. ``out0>3``: it returns the result of shard 0 to rank 3. ``h1``: head group 1, where there are several.
        """
        return self.grid()

    def grid(self, ranks: Sequence[int] | None = None, steps: int | None = None) -> str:
        """The text of ``str``, of these ranks and the first steps only; None: of all."""
        shown = range(self.world_size) if ranks is None else ranks
        q_names, k_names = ([_ranges(bundle) for bundle in side.bundles] for side in (self.q, self.k))
        grid = [["step", *(f"rank {r}" for r in shown), "moves"]]
        for number, step in enumerate(self.steps[:steps]):
            cells: list[list[str]] = [[] for _ in range(self.world_size)]
            for rank, group, q, k in step.tiles.tolist():
                heads = f" h{group}" if len(self.heads) > 1 else ""
                cells[rank].append(f"q{q_names[q]}k{k_names[k]}{heads}")
            moves = []
            for kind, sent, steps in [*((m.kind, m.rows, m.steps) for m in step.moves), ("out", step.returns, 1)]:
                for rank, text in _sends(kind, sent):
                    cells[rank].append(text)
                if len(sent):
                    duration = f" in {steps} steps" if steps > 1 else ""
                    moves.append(f"{'return' if kind == 'out' else kind} x{len(sent)}{duration}")
            grid.append([str(number), *(" ".join(cells[rank]) or "-" for rank in shown), ", ".join(moves) or "-"])
        widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in grid)


def _sends(kind: str, moved: Ints) -> Iterator[tuple[int, str]]:
    """(rank, what it sends to whom) of the rows of a move or of returns; receivers of the same shards are named together."""
    shards: dict[tuple[int, int], set[int]] = {}
    for source, to, shard, _ in moved.tolist():
        shards.setdefault((source, to), set()).add(shard)
    receivers: dict[tuple[int, frozenset[int]], list[int]] = {}
    for (source, to), several in sorted(shards.items()):
        receivers.setdefault((source, frozenset(several)), []).append(to)
    for (source, together), ranks in receivers.items():
        yield source, f"{kind}{_ranges(together)}>{_ranges(ranks)}"


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as ``0-3,5``."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] + 1 == number:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def singles(shards: int) -> tuple[tuple[int, ...], ...]:
    """A bundle per shard, of the same number."""
    return tuple((i,) for i in range(shards))
