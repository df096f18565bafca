"""Our own decode kernel in Triton: keys of each request split over programs, read where a cache has them; no library needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.kernels.base import Platform, importable
from lcbench.kernels.cache import CacheKind
from lcbench.kernels.requests import RequestCall, RequestKernel, RequestRun
from lcbench.kernels.tiled import check_tiles, where_triton_runs
from lcbench.kernels.triton_shapes import REST, SHARED, Shape
from lcbench.problem import Heads, Problem, itemsize

if TYPE_CHECKING:
    import torch

FLOAT8_SINCE = (8, 9)  # the compute capability from which on the hardware converts float8


@dataclass(frozen=True)
class TritonDecode(RequestKernel):
    """Requests against a contiguous or paged cache of any type, any head dims up to 576, forward only.

    Attributes:
        split: keys of a program; None: so many that the device is busy.
        block_k: keys of a tile; None: what fits the device, 64 or less.
    """

    split: int | None = None
    block_k: int | None = None
    called: ClassVar[str] = "triton_decode"
    any_bound: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises ValueError for a tile that Triton cannot have, or a split that is not made of tiles."""
        check_tiles(self.split, self.block_k)
        if self.split is not None and self.split < (self.block_k or 64):
            raise ValueError(f"a split of {self.split} keys is less than a tile of {self.block_k or 64}")

    def shape(self, heads: Heads, rows: int, itemsize: int, capability: tuple[int, int]) -> Shape:
        """The launch shape for sequences of up to ``rows`` rows; a block of 16 to 64 has all query heads of a key/value head."""
        from lcbench.kernels.triton_split import Dims, padded

        dims = Dims.of(heads)
        room = (SHARED.get(capability, 99) - REST) << 10
        # Values of more numbers would take the registers that sums of 64 rows need.
        height = min(64 if dims.value <= 256 else 32, padded(rows * (heads.q // heads.kv)))
        numbers = dims.first + dims.rest + (0 if heads.latent and dims.first == heads.v else dims.value)

        def fits(width: int, stages: int) -> bool:
            return (height * (dims.first + dims.rest) + stages * width * numbers) * itemsize <= room

        # Pointers to a tile of 64 keys of 512 numbers would spill registers.
        width, stages = self.block_k or (64 if dims.first <= 256 else 32), 3
        while self.block_k is None and width > 16 and not fits(width, 2):
            width //= 2
        while stages > 1 and not fits(width, stages):
            stages -= 1
        return Shape(height, width, width, 8 if height * dims.value > 64 * 128 else 4, stages, False)

    def launch(self, heads: Heads, dtype: str, platform: Platform) -> dict[str, Any]:
        return {"one_row": self.shape(heads, 1, itemsize(dtype), platform.capability)._asdict()}

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return where_triton_runs(problem, platform)

    def missing(self) -> str | None:
        return importable("triton")

    def reads(self, kind: CacheKind, problem: Problem, platform: Platform) -> str | None:
        if kind.storage == "float8" and platform.type == "cuda" and platform.capability < FLOAT8_SINCE:
            return "Triton reads float8_e4m3fn from compute capability 8.9 on"
        return None

    def ready(self, call: RequestCall, heads: Heads, dtype: torch.dtype) -> RequestRun:
        from lcbench.kernels.triton_split import SplitRun

        device = call.cu_q.device
        shape = self.shape(heads, call.max_q, dtype.itemsize, Platform.of(device).capability)
        return SplitRun(call, heads, shape, self.split)
