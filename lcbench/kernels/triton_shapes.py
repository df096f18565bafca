"""Launch shapes of our Triton kernels: tile, warps, tiles in flight, with what was tuned. A plan asks for them, without torch."""

from __future__ import annotations

from typing import NamedTuple

from lcbench.problem import Heads


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


# By compute capability and head dim, of keys and of values, for half types:
# the fastest of ``lcbench.testing.gpu_tune`` on an H200 that spill no register.
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
# Numbers of sums that a block keeps in registers: half of a multiprocessor's, of 32 bits.
SUMS = 1 << 15


class Width(NamedTuple):
    """A head as kernels read it, whose blocks are powers of two wide.

    Attributes:
        first: numbers of the first part.
        padded: what its blocks are wide.
        rest: numbers of the second part, 0 without one.
        rest_padded: what its blocks are wide.
    """

    first: int
    padded: int
    rest: int = 0
    rest_padded: int = 0

    @property
    def whole(self) -> int:
        """What the blocks of both parts are wide."""
        return self.padded + self.rest_padded


def key_width(dim: int) -> Width:
    """A query or key in the fewest numbers: 192 is read as 128 and 64, which a single block would be 256 wide for."""
    padded = max(16, 1 << (dim - 1).bit_length())
    first = padded // 2
    rest_padded = max(16, 1 << max(0, dim - first - 1).bit_length())
    if first < 16 or first + rest_padded >= padded:
        return Width(dim, padded)
    return Width(first, first, dim - first, rest_padded)


def value_width(dim: int) -> int:
    """What a block of values, whose sums are not to be in two parts, is wide."""
    return max(16, 1 << (dim - 1).bit_length())


def fitting(
    rows: int | None, columns: int | None, stages: int, tested: int, heads: Heads, itemsize: int, room: int, *, backward: bool,
    sums: int,
) -> Shape:  # fmt: skip
    """The tile asked for, or one of 64 x 64, with as many tiles in flight as fit; a side that was left open shrinks until one does.

    A block's queries lie in shared memory throughout, and of every tile in flight its keys and values; ``room`` in KiB. In
    ``backward``, gradients of results lie there too, or the block has keys and values and tiles have queries and gradients.
    ``sums`` numbers of each row are added up in registers.
    """
    key, value = key_width(heads.dim).whole, value_width(heads.v)

    def fits(height: int, width: int, stages: int) -> bool:
        kept = height * (key + value if backward else key)
        return (kept + stages * width * (key + value)) * itemsize <= room << 10

    height, width = rows or 64, columns or 64
    while rows is None and height > 16 and height * sums > SUMS:
        height //= 2
    # A tile that is not read ahead passes through registers, which sums of long heads leave no room in.
    while columns is None and width > 16 and not fits(height, width, 2):
        width //= 2
    while rows is None and height > 16 and not fits(height, width, 1):
        height //= 2
    while stages > 1 and not fits(height, width, stages):
        stages -= 1
    return Shape(height, width, min(tested, width), 8 if height * max(key, value) > 64 * 128 else 4, stages)
