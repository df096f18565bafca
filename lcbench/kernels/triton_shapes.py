"""Launch shapes of our Triton kernels: which tile, how many warps, how many tiles in flight, written down per device."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """How one kernel is laid on the machine.

    Attributes:
        rows: tokens of a block that one program owns.
        columns: tokens of a tile that it visits and sees whole.
        tested: tokens of a tile whose pairs are tested; divides ``columns``.
        warps: warps of a program.
        stages: tiles in flight.
        described: tiles are read by tensor descriptors (TMA) where strides allow it.
    """

    rows: int
    columns: int
    tested: int
    warps: int
    stages: int
    described: bool = False


class Shapes(NamedTuple):
    """The shapes of forward and dq (queries x keys) and of dk and dv (keys x queries)."""

    forward: Shape
    dq: Shape
    dkv: Shape
