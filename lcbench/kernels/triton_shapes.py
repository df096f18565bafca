"""Launch shapes of our Triton kernels: tile, warps, tiles in flight, with what was tuned. A plan asks for them, without torch."""

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
        described: tiles are read by tensor descriptors (TMA) where device and strides allow it, else by pointers.
    """

    rows: int
    columns: int
    tested: int
    warps: int
    stages: int
    described: bool = True


class Shapes(NamedTuple):
    """The shapes of forward and dq (queries x keys) and of dk and dv (keys x queries)."""

    forward: Shape
    dq: Shape
    dkv: Shape


# By compute capability and head dim, for half types: the fastest of ``lcbench.testing.gpu_tune`` on an H200 that spill no register.
TUNED = {
    (9, 0): {
        64: Shapes(Shape(64, 64, 64, 4, 3), Shape(64, 64, 32, 4, 2), Shape(64, 64, 32, 4, 2)),
        128: Shapes(Shape(64, 64, 64, 4, 3), Shape(128, 64, 64, 8, 3), Shape(64, 64, 32, 4, 2)),
    }
}
# Shared memory of one block in KiB (CUDA programming guide, technical specifications); other devices have 99.
SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
# What a kernel has there besides its tiles.
REST = 3


def fitting(
    rows: int | None, columns: int | None, kept: int, stages: int, tested: int, dim: int, itemsize: int, room: int
) -> Shape:
    """The tile asked for, or one of 64 x 64, with as many tiles in flight as fit; a side that was left open shrinks until one does.

    ``kept`` tensors of a block of rows lie in shared memory throughout, and two of every tile in flight; ``room`` in KiB.
    """
    padded = max(16, 1 << (dim - 1).bit_length())

    def fits(height: int, width: int, stages: int) -> bool:
        return (kept * height + 2 * stages * width) * padded * itemsize <= room << 10

    height, width = rows or 64, columns or 64
    while columns is None and width > 16 and not fits(height, width, 1):
        width //= 2
    while rows is None and height > 16 and not fits(height, width, 1):
        height //= 2
    while stages > 1 and not fits(height, width, stages):
        stages -= 1
    return Shape(height, width, min(tested, width), 8 if height * padded > 64 * 128 else 4, stages)
