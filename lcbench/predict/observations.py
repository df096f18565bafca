"""Measured times to fit on, each with what it depends on: of a kernel's call, of a collective, of a whole cell.

Readers make them: of tables (``tables.py``), of the results store (``cells.py``). ``group`` is what is looked at together, and left
out together by cross-validation; ``source`` says in words where a time is from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lcbench.grid.cell import Cell
from lcbench.problem import Heads
from lcbench.schedule.machine import Tiles


@dataclass(frozen=True)
class KernelTime:
    """A kernel called alone.

    Attributes:
        tiles: one entry: what was computed; a batch of n sequences is n pieces of one call.
        seconds: of the call.
    """

    kernel: str
    dtype: str
    heads: Heads
    tiles: Tiles
    backward: bool
    seconds: float
    group: str
    source: str


@dataclass(frozen=True)
class CollectiveTime:
    """A collective called alone.

    Attributes:
        operation: as of ``schedule.lowering``.
        block: bytes from each rank to each other.
        ranks: of the set; together: those of them that are in one node at most.
    """

    operation: str
    block: float
    ranks: int
    together: int
    seconds: float
    group: str
    source: str


@dataclass(frozen=True)
class CellTime:
    """A cell, or the row of a table that is one.

    Attributes:
        phases: seconds of the slowest rank, by phase (``forward``, ``backward``), means over the draws of the mask.
        own: whether our own engine ran the strategy's schedule, so that no other implementation takes anything besides.
        compute, communication: seconds of the same phases without messages, and without kernels, where these were timed.
    """

    cell: Cell
    phases: dict[str, float]
    group: str
    source: str
    own: bool = False
    compute: dict[str, float] = field(default_factory=dict)
    communication: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CellMemory:
    """The peak of a cell: bytes of the rank with most, as ``memory/peak_bytes``."""

    cell: Cell
    peak_bytes: float
    group: str
    source: str


Observation = CellMemory | KernelTime | CollectiveTime | CellTime
