"""What our Triton kernels share but for their tables of tiles. Torch is loaded by ``prepare`` only: a plan asks for shapes."""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.kernels.base import HALVES, Kernel, Platform, Prepared, half_on_cuda, importable
from lcbench.kernels.triton_shapes import REST, SHARED, TUNED, Shape, Shapes, fitting, key_width, value_width
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem, itemsize

if TYPE_CHECKING:
    import torch

    from lcbench.kernels.tile_tables import MakeTables

# Of keys and of values: what a decode of DeepSeek's latent heads has.
MOST_DIM, MOST_DIM_V = 576, 512


def check_tiles(*sizes: int | None) -> None:
    """Raises ValueError for a tile that Triton cannot have; None is none that is asked for."""
    for size in sizes:
        if size is not None and (not isinstance(size, int) or size < 16 or size & (size - 1)):
            raise ValueError(f"a tile of {size} tokens is no power of two from 16 on, such as 64")


def where_triton_runs(problem: Problem, platform: Platform) -> str | None:
    """Why a Triton kernel of ours does not run a problem on a platform, or None."""
    if platform.type == "cuda":
        return half_on_cuda(problem, platform, "Triton", head_dim=MOST_DIM, dim_v=MOST_DIM_V, dtypes=(*HALVES, "float32"))
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on CUDA devices; on a CPU under TRITON_INTERPRET=1 only, which is for checks and not for speed"
    if problem.dtype == "bfloat16":
        return "Triton's interpreter on a CPU multiplies no bfloat16"
    return None


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
    softcaps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises ValueError for a tile that Triton cannot have."""
        check_tiles(self.block_q, self.block_k, self.block_dk, self.block_dq)

    def shapes(self, heads: Heads, itemsize: int, capability: tuple[int, int]) -> Shapes:
        """The launch shapes for head dims, bytes of a number and a compute capability."""
        own = TUNED.get(capability, {}).get(heads.dim) if itemsize == 2 and heads.dim == heads.v else None
        room = SHARED.get(capability, 99) - REST
        queries, keys = (self.block_q, self.block_k), (self.block_dk, self.block_dq)
        key, value = key_width(heads.dim).whole, value_width(heads.v)

        def chosen(known: Shape | None, sides: tuple[int | None, int | None], stages: int, tested: int, sums: int) -> Shape:
            if known and sides == (None, None) and max(known.rows, known.columns) <= self.largest:
                return known
            return fitting(*sides, stages, tested, heads, itemsize, room, backward=stages == 2, sums=sums)

        return Shapes(
            chosen(own and own.forward, queries, 3, 64, value),
            chosen(own and own.dq, queries, 2, 64, key),
            chosen(own and own.dkv, keys, 2, 32, key + value),
        )

    def launch(self, heads: Heads, dtype: str, platform: Platform) -> dict[str, Any]:
        shapes = self.shapes(heads, itemsize(dtype), platform.capability)
        return {name: shape._asdict() for name, shape in shapes._asdict().items()}

    @abstractmethod
    def tables(self, mask: Mask) -> MakeTables:
        """How the tables of tiles of a mask are made, given sizes of blocks and tiles."""
        ...

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return where_triton_runs(problem, platform)

    def missing(self) -> str | None:
        return importable("triton")

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        from lcbench.kernels.triton_tiles import PreparedTiles

        shapes = self.shapes(heads, dtype.itemsize, Platform.of(device).capability)
        return PreparedTiles(self.tables(mask), self.tables(mask.transpose()), shapes, heads, device)
