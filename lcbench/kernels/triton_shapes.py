"""Our Triton kernels but for their tables, and their launch shapes: tile, warps, tiles in flight, with what was tuned.

Nothing here loads torch before ``prepare``, since a plan on a login node asks for shapes.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lcbench.kernels.base import HALVES, Kernel, Platform, Prepared, half_on_cuda, importable
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

    from lcbench.kernels.tile_tables import MakeTables


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


@dataclass(frozen=True)
class Tiled(Kernel):
    """A Triton kernel of ours: a subclass says which tables of tiles a mask has.

    A side that is None is what was tuned for the device and the head dim, else 64 tokens or less.

    Attributes:
        block_q, block_k: queries and keys of a tile of forward and of dq.
        block_dk, block_dq: keys and queries of a tile of dk and dv.
        largest: the most tokens of a side of a tuned tile.
    """

    block_q: int | None = None
    block_k: int | None = None
    block_dk: int | None = None
    block_dq: int | None = None
    largest: ClassVar[int] = 128

    def __post_init__(self) -> None:
        """Raises ValueError for a tile that Triton cannot have."""
        for size in (self.block_q, self.block_k, self.block_dk, self.block_dq):
            if size is not None and (not isinstance(size, int) or size < 16 or size & (size - 1)):
                raise ValueError(f"a tile of {size} tokens is no power of two from 16 on, such as 64")

    def shapes(self, dim: int, itemsize: int, capability: tuple[int, int]) -> Shapes:
        """The launch shapes for a head dim, bytes of a number and a compute capability."""
        tuned = TUNED.get(capability, {}).get(dim) if itemsize == 2 else None
        room = SHARED.get(capability, 99) - REST
        queries, keys = (self.block_q, self.block_k), (self.block_dk, self.block_dq)

        def chosen(known: Shape | None, sides: tuple[int | None, int | None], kept: int, stages: int, tested: int) -> Shape:
            if known and sides == (None, None) and max(known.rows, known.columns) <= self.largest:
                return known
            return _fitting(*sides, kept, stages, tested, dim, itemsize, room)

        return Shapes(
            chosen(tuned and tuned.forward, queries, 1, 3, 64),
            chosen(tuned and tuned.dq, queries, 2, 2, 64),
            chosen(tuned and tuned.dkv, keys, 2, 2, 32),
        )

    def launch(self, heads: Heads, dtype: str, platform: Platform) -> dict[str, Any]:
        shapes = self.shapes(heads.dim, {"float64": 8, "float32": 4}.get(dtype, 2), platform.capability)
        return {name: shape._asdict() for name, shape in shapes._asdict().items()}

    @abstractmethod
    def tables(self, mask: Mask) -> MakeTables:
        """How the tables of tiles of a mask are made, given sizes of blocks and tiles."""
        ...

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        if platform.type == "cuda":
            return half_on_cuda(problem, platform, "Triton", dtypes=(*HALVES, "float32"))
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton runs on CUDA devices; on a CPU under TRITON_INTERPRET=1 only, which is for checks and not for speed"
        if problem.dtype == "bfloat16":
            return "Triton's interpreter on a CPU multiplies no bfloat16"
        return None

    def missing(self) -> str | None:
        return importable("triton")

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        from lcbench.kernels.triton_tiles import PreparedTiles

        shapes = self.shapes(heads.dim, dtype.itemsize, Platform.of(device).capability)
        return PreparedTiles(self.tables(mask), self.tables(mask.transpose()), shapes, heads, device)


def _fitting(
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
