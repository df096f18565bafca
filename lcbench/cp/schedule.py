"""A strategy is data: where tokens live, which tiles each rank computes in which step, and what moves meanwhile.

Four things read a schedule and no strategy knows of them: ``verify`` proves it, ``execute`` runs it forward and (by the
adjoint of each move, in reverse) backward, and simulation and drawing use the same steps.

Vocabulary. Ranks form a ``Mesh``. A rank starts with its own tokens and all heads. A *shard* is the set of tokens that is
together during the compute steps; without a head exchange it is what one rank owns, after one it is what the ranks of one
exchange group own together, each with its share of the heads. A tile ``q3k1`` is the queries of shard 3 on the keys of
shard 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from lcbench.cp.layout import Layout
from lcbench.masks.band import Ints


@dataclass(frozen=True)
class Mesh:
    """Ranks as a grid of named dimensions, the last one fastest: ``Mesh(ring=4, ulysses=2)`` puts ranks 0, 1 in one group."""

    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, **sizes: int) -> Mesh:
        return cls(tuple(sizes.items()))

    @cached_property
    def _grid(self) -> Ints:
        return np.arange(self.world_size, dtype=np.int64).reshape([size for _, size in self.sizes])

    @property
    def world_size(self) -> int:
        return int(np.prod([size for _, size in self.sizes], dtype=np.int64))

    def size(self, dim: str) -> int:
        return dict(self.sizes)[dim]

    def _axis(self, dim: str) -> int:
        return [name for name, _ in self.sizes].index(dim)

    def coordinate(self, dim: str) -> Ints:
        """Coordinate of every rank on a dimension, shape (P,)."""
        return np.indices(self._grid.shape)[self._axis(dim)].reshape(-1)

    def groups(self, dim: str) -> list[list[int]]:
        """The groups of ranks that differ only on ``dim``, each in the order of that coordinate."""
        rows: list[list[int]] = np.moveaxis(self._grid, self._axis(dim), -1).reshape(-1, self.size(dim)).tolist()
        return rows

    def source(self, dim: str, shift: int) -> Ints:
        """From which rank each rank receives when everything moves by ``shift`` along ``dim``, shape (P,)."""
        return np.roll(self._grid, shift, axis=self._axis(dim)).reshape(-1)


@dataclass(frozen=True)
class Exchange:
    """Heads <-> sequence over one mesh dimension, all-to-all; its adjoint is the exchange the other way.

    ``gather``: q, k, v from (own tokens, all heads) to (tokens of the group, own heads). ``scatter``: out goes back.
    """

    dim: str
    way: Literal["gather", "scatter"]

    def __str__(self) -> str:
        return f"{self.way}({self.dim})"


@dataclass(frozen=True)
class Hop:
    """The held keys and values move by ``shift`` along a (sub-)ring; the adjoint shifts their gradient back."""

    dim: str
    shift: int = 1

    def __str__(self) -> str:
        return f"kv({self.dim}{self.shift:+d})"


Move = Exchange | Hop


@dataclass(frozen=True)
class Step:
    """Tiles computed while the moves are under way; what moves is usable from the next step on.

    ``tiles``: int64 (n, 3), rows (rank, q shard, k shard).
    """

    tiles: Ints
    moves: tuple[Move, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """``layout``: tokens of each rank, ``shards``: tokens of each compute shard, ``shard_of``: the shard of each rank (P,)."""

    mesh: Mesh
    layout: Layout
    shards: Layout
    shard_of: Ints
    steps: tuple[Step, ...]

    @property
    def exchanges(self) -> bool:
        """Whether heads are dealt out by an exchange before anything is computed."""
        return any(isinstance(move, Exchange) for step in self.steps for move in step.moves)

    @property
    def head_shares(self) -> Ints:
        """Which share of the heads each rank computes, shape (P,); all 0 where every rank has all heads."""
        return self.mesh.coordinate("ulysses") if self.exchanges else np.zeros(self.mesh.world_size, dtype=np.int64)

    def __str__(self) -> str:
        """The schedule as a grid of steps x ranks; a bug report is this text."""
        ranks = range(self.mesh.world_size)
        rows = [["step", *(f"rank {r}" for r in ranks), "moves"]]
        for number, step in enumerate(self.steps):
            cells: list[list[str]] = [[] for _ in ranks]
            for rank, q, k in step.tiles.tolist():
                cells[rank].append(f"q{q}k{k}")
            rows.append([str(number), *(" ".join(c) or "-" for c in cells), " ".join(map(str, step.moves)) or "-"])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def tiles(columns: Iterable[tuple[int, int, int]] | Ints = ()) -> Ints:
    """(rank, q shard, k shard) rows as the array that a step holds."""
    return np.array(columns if isinstance(columns, np.ndarray) else list(columns), dtype=np.int64).reshape(-1, 3)


def ring_steps(mesh: Mesh, dim: str) -> tuple[Step, ...]:
    """Every rank keeps its queries; keys and values go once around ``dim``, one hop a step, none after the last."""
    own = mesh.coordinate(dim)
    ranks = np.arange(mesh.world_size)
    size = mesh.size(dim)
    return tuple(
        Step(tiles(np.stack([ranks, own, (own - i) % size], axis=1)), (Hop(dim),) if i < size - 1 else ()) for i in range(size)
    )
