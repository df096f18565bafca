"""What a kernel is to the rest.

Shapes, packed ("THD"): q, out, dout, dq (Tq, Hq, D); k, v, dk, dv (Tk, Hk, D); lse (Tq, Hq), natural logarithm, float32
(float64 for float64 inputs), -inf for a row without keys. Query head h reads key/value head ``h // (Hq // Hk)``.
"""

from __future__ import annotations

import importlib
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lcbench.masks.band import BandMask
from lcbench.masks.block import BlockMap
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

HALVES = ("bfloat16", "float16")
LOG2_E = 1.4426950408889634  # times this, a natural logarithm is one in powers of two, in which some libraries give LSE


@dataclass(frozen=True)
class Platform:
    """What a kernel may ask about a machine, so that a machine can be asked about that is not here.

    Attributes:
        type: ``cpu`` or ``cuda``.
        capability: compute capability of a CUDA device.
        memory_bytes: of one device; 0 where it is not known.
    """

    type: str
    capability: tuple[int, int] = (0, 0)
    memory_bytes: int = 0

    @classmethod
    def of(cls, device: torch.device) -> Platform:
        if device.type != "cuda":
            return cls(device.type, memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        import torch

        return cls("cuda", torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).total_memory)


@dataclass(frozen=True)
class Rounding:
    """Where a kernel rounds to the inputs' type, besides its weights and results: how far off it may be follows from it.

    Attributes:
        scores: scores leave the product of queries and keys in the inputs' type.
        sums_every: gradients are summed in the inputs' type, and so rounded once per so many tokens; 0: in the accumulation type.
        exponential: relative error of its exponential for inputs of half types, where that is less exact than float32.
    """

    scores: bool = False
    sums_every: int = 0
    exponential: float = 0.0


class Unsupported(ValueError):
    """Raised by ``prepare`` for a tile that the kernel cannot run though the whole mask looked well: the cell is skipped."""


class Prepared(Protocol):
    """A kernel made ready for one mask on one device; ``calls`` native calls make it up (more than one: it was split)."""

    calls: int

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) over the keys given; out may have the inputs' type or the accumulation type."""
        ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of these keys, given out and lse over *all* keys of the row, wherever they were computed."""
        ...


class Kernel(Protocol):
    """One way to compute attention. Modules import torch and libraries lazily: a plan on a login node asks without loading them.

    Three questions, each answered by None or by a reason that is stored word for word in the skipped result.
    ``takes`` says what ``prepare`` is given: ``bands``, or ``blocks``, a block map in one piece. ``contiguous_kv``: k and v are
    to be contiguous each, because it reads them as (T, H, D) whatever their strides, or would copy them in every call; else they
    are rows of one tensor, (T, Hk, 2, D). What is written out here holds for a kernel that does not say otherwise.
    """

    takes: ClassVar[str] = "bands"
    contiguous_kv: ClassVar[bool] = False

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        """Why no machine can run this problem with it."""
        return None

    @abstractmethod
    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        """Why such a machine cannot, whatever is installed."""
        ...

    def missing(self) -> str | None:
        """Why it cannot run in this process: what is not installed."""
        return None

    def calls(self, mask: BandMask, platform: Platform) -> int:
        """How many native calls compute a band mask; more than one are merged by LSE."""
        return 1

    def rounding(self, platform: Platform) -> Rounding:
        """Where it rounds more than others do."""
        return Rounding()

    def launch(self, heads: Heads, dtype: str, platform: Platform) -> dict[str, Any]:
        """How it is laid on such a device, where it chooses that itself and no option of the cell says it; stored with results."""
        return {}

    @abstractmethod
    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        """Ready for a mask of the kind that ``takes`` says; ``prepare`` below makes any mask of it."""
        ...


def refusal(kernel: Kernel, problem: Problem, device: torch.device) -> str | None:
    """Why a kernel cannot run a problem in this process, on this device; None if it can."""
    return kernel.unavailable(problem, Platform.of(device)) or kernel.missing()


def importable(*modules: str) -> str | None:
    """None if every module can be imported, else why not."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            # Compiled libraries that were built for another torch, or find no driver, or half of another version, raise anything.
            lines = str(error).strip().splitlines()
            return f"{module} cannot be imported: {lines[0] if lines else type(error).__name__}"
    return None


def half_on_cuda(
    problem: Problem,
    platform: Platform,
    name: str,
    *,
    least: tuple[int, int] = (8, 0),
    most: tuple[int, int] = (99, 0),
    head_dim: int = 256,
    dtypes: tuple[str, ...] = HALVES,
) -> str | None:
    """The limits that CUDA kernels share: type of device, its capability, type of numbers, head dims up to ``head_dim`` by 8."""
    if platform.type != "cuda":
        return f"{name} runs on CUDA devices only"
    if not least <= platform.capability <= most:
        wanted = f"{_dotted(least)} or later" if most[0] == 99 else f"{_dotted(least)} to {_dotted(most)}"
        return f"{name} needs compute capability {wanted}, this device has {_dotted(platform.capability)}"
    if problem.dtype not in dtypes:
        return f"{name} takes {' and '.join(dtypes)}, not {problem.dtype}"
    if problem.heads.dim % 8 or problem.heads.dim > head_dim:
        return f"{name} takes head dims up to {head_dim} in steps of 8, not {problem.heads.dim}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def only_blocks(mask: Mask) -> str | None:
    """The reason of a kernel that takes block maps only."""
    return None if isinstance(mask, BlockMap) else "takes dynamic block masks only (mask=block_...); dense kernels run this one"


def native_calls(kernel: Kernel, mask: Mask, platform: Platform) -> int:
    """How many native calls of a kernel compute a mask."""
    if not isinstance(mask, BlockMap):
        return kernel.calls(mask, platform)
    return 1 if kernel.takes == "blocks" else sum(kernel.calls(mask.bands(i), platform) for i in range(mask.maps))


def prepare(kernel: Kernel, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
    """A kernel made ready for a mask; one that knows bands only runs a block map as bands, map by map."""
    if isinstance(mask, BlockMap) and kernel.takes == "bands":
        return PreparedMaps(kernel, mask, heads, dtype, device)
    return kernel.prepare(mask, heads, dtype, device)


class PreparedMaps:
    """A block map on a band kernel: each map for the query heads that read it, with their key/value heads."""

    def __init__(self, kernel: Kernel, mask: BlockMap, heads: Heads, dtype: torch.dtype, device: torch.device) -> None:
        each, group = heads.q // mask.maps, heads.q // heads.kv
        self._parts: list[tuple[Prepared, slice, slice]] = []
        self._contiguous_kv = kernel.contiguous_kv
        for i in range(mask.maps):
            own, kv = slice(i * each, (i + 1) * each), slice(i * each // group, -(-(i + 1) * each // group))
            part = kernel.prepare(mask.bands(i), Heads(each, kv.stop - kv.start, heads.dim), dtype, device)
            self._parts.append((part, own, kv))
        self.calls = sum(part.calls for part, _, _ in self._parts)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        parts = [part.forward(q[:, own], *self._of_heads(k, v, kv), softmax_scale=softmax_scale) for part, own, kv in self._parts]
        return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = zero_gradients(q, k, v)
        for part, own, kv in self._parts:
            grads = part.backward(
                dout[:, own], q[:, own], *self._of_heads(k, v, kv), out[:, own], lse[:, own], softmax_scale=softmax_scale
            )
            # Several maps may share a key/value head, so gradients add up.
            for total, heads, grad in zip((dq, dk, dv), (own, kv, kv), grads, strict=True):
                total[:, heads] += grad
        return dq, dk, dv

    def _of_heads(self, k: torch.Tensor, v: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = k[:, heads], v[:, heads]
        return (k.contiguous(), v.contiguous()) if self._contiguous_kv else (k, v)


class Merged:
    """Several native calls over disjoint pairs of one mask, merged by LSE; none at all is an empty mask."""

    def __init__(self, parts: Sequence[Prepared]) -> None:
        self._parts = parts
        self.calls = sum(part.calls for part in parts)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from lcbench.kernels.merge import merge_into

        total: tuple[torch.Tensor, torch.Tensor] | None = None
        for part in self._parts:
            out, lse = part.forward(q, k, v, softmax_scale=softmax_scale)
            if len(self._parts) == 1:
                return out, lse
            if total is None:
                total = out.to(lse.dtype), lse
            else:
                merge_into(*total, out, lse)
        if total is None:
            return torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
        return total

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        totals: list[torch.Tensor] = []
        for part in self._parts:
            grads = part.backward(dout, q, k, v, out, lse, softmax_scale=softmax_scale)
            if len(self._parts) == 1:
                return grads
            dtype = accumulation_dtype(q.dtype)
            totals = [t + g for t, g in zip(totals, grads, strict=True)] if totals else [g.to(dtype) for g in grads]
        if not totals:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        return totals[0], totals[1], totals[2]


def per_query_head(x: torch.Tensor, q_heads: int, dim: int) -> torch.Tensor:
    """Key/value heads, along ``dim``, repeated for the query heads that read them: for kernels that know no groups."""
    return x if x.shape[dim] == q_heads else x.repeat_interleave(q_heads // x.shape[dim], dim)


def per_kv_head(grad: torch.Tensor, kv_heads: int, dim: int) -> torch.Tensor:
    """The adjoint: gradients of the query heads of a group summed, in the accumulation type."""
    if grad.shape[dim] == kv_heads:
        return grad
    return grad.to(accumulation_dtype(grad.dtype)).unflatten(dim, (kv_heads, -1)).sum(dim + 1)


def heads_whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor (T, H, D) whose heads lie whole in memory, as every library wants them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """(T, H, D) to (1, H, T, D)."""
    return x.transpose(0, 1)[None]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What out, LSE and gradients are summed in: float64 for float64, float32 for all else."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


def zero_gradients(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Zeros like each input, in the accumulation type: what partial gradients are added to."""
    import torch

    return tuple(torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) for x in inputs)
