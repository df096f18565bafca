"""The protocol of kernels, and what several of them share.

Shapes, packed ("THD"): q, dq (Tq, Hq, D); k, dk (Tk, Hk, D); v, dv (Tk, Hk, Dv); out, dout (Tq, Hq, Dv); lse (Tq, Hq), natural
logarithm, float32 (float64 for float64 inputs), -inf for a row without keys. Query head h reads key/value head ``h // (Hq // Hk)``.
Every docstring of this folder uses these names.

Where heads are latent, v is the view ``k[..., :Dv]``. A kernel still gives dv by itself: its caller adds dv to the first Dv numbers
of dk. A sink is not for kernels: their callers apply it to out and LSE of all keys.
"""

from __future__ import annotations

import importlib
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

from lcbench.masks.band import BandMask
from lcbench.masks.block import BlockMap
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

HALVES = ("bfloat16", "float16")
LOG2_E = 1.4426950408889634  # LSE in powers of two, as some libraries give it, is the natural one times this

OutLse: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"  # out and lse over the keys of a call
Gradients: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"  # dq, dk, dv


@dataclass(frozen=True)
class Platform:
    """What a kernel may ask about a machine. It describes any machine, so a plan can ask about one that is not here.

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
        """The platform of a device of this machine; on a CPU ``memory_bytes`` is the host's memory."""
        if device.type != "cuda":
            return cls(device.type, memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        import torch

        return cls("cuda", torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).total_memory)


@dataclass(frozen=True)
class Work:
    """What a kernel does for a mask, of each head, where it says more than the mask itself.

    Attributes:
        calls: native calls.
        pairs: that it computes, those that are masked in blocks that it does not leave out among them.
        gathered_rows, gathered_keys: that are copied for its calls and merged or added up after them; a call that takes q, k and
            v as they are copies none.
        most_rows, most_keys: of the largest of these calls, each as often as a copy of it is held at once.
    """

    calls: int
    pairs: int
    gathered_rows: int = 0
    gathered_keys: int = 0
    most_rows: int = 0
    most_keys: int = 0


@dataclass(frozen=True)
class Rounding:
    """Where a kernel rounds to the inputs' type, besides its weights and results. The bounds of the check follow from it.

    Attributes:
        scores: scores leave the product of queries and keys in the inputs' type.
        sums_every: tokens after which a sum of gradients is rounded to the inputs' type; 0: sums are of the accumulation type.
        exponential: relative error of its exponential for inputs of half types, where that is less exact than float32.
    """

    scores: bool = False
    sums_every: int = 0
    exponential: float = 0.0


class Unsupported(ValueError):
    """Raised by ``prepare`` for a tile that the kernel cannot run though ``unsupported`` found nothing; the cell is skipped."""


class Saved(NamedTuple):
    """What backward takes besides dout. ``out`` and ``lse`` are over *all* keys of a row, wherever they were computed.

    Attributes:
        q: (Tq, Hq, D).
        k: (Tk, Hk, D).
        v: (Tk, Hk, Dv).
        out: (Tq, Hq, Dv), in the inputs' type or the accumulation type.
        lse: (Tq, Hq), natural logarithm, -inf for a row without keys.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor

    def empty_gradients(self) -> Gradients:
        """Where a library writes dq, dk and dv."""
        import torch

        return torch.empty_like(self.q), torch.empty_like(self.k), torch.empty_like(self.v)


class Prepared(Protocol):
    """A kernel made ready for one mask on one device. ``calls``: its native calls; more than one, and the mask was split.

    Where ``Kernel.softcaps``, both methods take ``softcap`` too, 0 for none: a scaled score is then ``softcap * tanh(score /
    softcap)``. Callers name it only where it is not 0 (``softmax_arguments``).
    """

    calls: int

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float) -> OutLse:
        """(out, lse) over the keys given; out has the inputs' type or the accumulation type."""
        ...

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float) -> Gradients:
        """(dq, dk, dv) of the keys in ``saved``, in the inputs' type or the accumulation type."""
        ...


class Kernel(Protocol):
    """One way to compute attention. Modules import torch and libraries lazily, so that a plan on a login node loads neither.

    ``unsupported``, ``unavailable`` and ``missing`` answer None, or a reason that is stored word for word in the skipped result.
    Methods with a body are defaults.

    Attributes:
        takes: what ``prepare`` is given: ``bands``, or ``blocks``, a block map in one piece.
        contiguous_kv: k and v must each be contiguous, because the kernel ignores their strides or would copy them in every
            call; else both may be views of one tensor.
        softcaps: whether it computes softcapped scores (``Prepared``).
        operator: what attention it computes: ``softmax``, or ``linear`` (``kernels.linear``).
    """

    takes: ClassVar[str] = "bands"
    contiguous_kv: ClassVar[bool] = False
    softcaps: ClassVar[bool] = False
    operator: ClassVar[str] = "softmax"

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        """Why it runs this problem on no machine. A subclass that has other reasons asks this one first."""
        if problem.softmax.softcap and not self.softcaps:
            return f"computes no softcapped scores (softmax={problem.softmax})"
        return None

    @abstractmethod
    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        """Why it does not run on such a machine, whatever is installed."""
        ...

    def missing(self) -> str | None:
        """Why it does not run in this process: which library is not installed, or is of another release."""
        return None

    def calls(self, mask: BandMask, platform: Platform) -> int:
        """Native calls that compute a band mask; results of more than one are merged by LSE."""
        return 1

    def work(self, mask: BandMask, platform: Platform) -> Work | None:
        """What it does for a band mask; None: nothing says more than the mask's pairs and pieces."""
        return None

    def pads(self, heads: Heads, platform: Platform) -> bool:
        """Whether it runs heads, whose values have another dimension than their keys, with zeros added (``Padded``)."""
        return False

    def holds_scores(self, platform: Platform) -> bool:
        """Whether every score of a call is in memory at once, so that its memory grows with rows times keys."""
        return False

    def rounding(self, platform: Platform) -> Rounding:
        """Where it rounds more than others do."""
        return Rounding()

    def launch(self, heads: Heads, dtype: str, platform: Platform) -> dict[str, Any]:
        """The launch shape that it chooses on such a device where no option of the cell says it; stored with results."""
        return {}

    @abstractmethod
    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        """Make it ready for a mask of the kind that ``takes`` says; the function ``prepare`` below takes any mask.

        Raises:
            Unsupported: it cannot run this tile.
        """
        ...


class Refusing(Protocol):
    """What may not run on a machine, or in a process: kernels, and strategies too (``cp.base.Strategy``)."""

    def unavailable(self, problem: Problem, platform: Platform) -> str | None: ...

    def missing(self) -> str | None: ...


def refusal(choice: Refusing, problem: Problem, device: torch.device) -> str | None:
    """Why a kernel or a strategy does not run a problem in this process on this device, or None."""
    return choice.unavailable(problem, Platform.of(device)) or choice.missing()


def importable(*modules: str) -> str | None:
    """Why one of the modules cannot be imported, or None."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            # Compiled libraries raise anything where they were built for another torch, find no driver or are mixed versions.
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
    dim_v: int = 0,
    besides: tuple[tuple[int, int], ...] = (),
    dtypes: tuple[str, ...] = HALVES,
) -> str | None:
    """Why a CUDA kernel does not run a problem on a platform, by the limits that such kernels share, or None.

    Args:
        problem: its dtype and head dims are looked at.
        platform: its type and compute capability are looked at.
        name: what the reason calls the kernel.
        least, most: the first and last compute capability that it runs on.
        head_dim: the largest head dim, of keys and of values; all are multiples of 8.
        dim_v: the largest of values, where it is another.
        besides: pairs of head dims, of keys and of values, that it takes beyond these limits.
        dtypes: the types of inputs that it takes.
    """
    if platform.type != "cuda":
        return f"{name} runs on CUDA devices only"
    if not least <= platform.capability <= most:
        wanted = f"{_dotted(least)} or later" if most[0] == 99 else f"{_dotted(least)} to {_dotted(most)}"
        return f"{name} needs compute capability {wanted}, this device has {_dotted(platform.capability)}"
    if problem.dtype not in dtypes:
        return f"{name} takes {' and '.join(dtypes)}, not {problem.dtype}"
    heads, most_v = problem.heads, dim_v or head_dim
    if (heads.dim, heads.v) in besides or not (heads.dim % 8 or heads.v % 8 or heads.dim > head_dim or heads.v > most_v):
        return None
    limits = str(head_dim) if most_v == head_dim else f"{head_dim} for keys and {most_v} for values"
    more = "".join(f" and {dim}:{v}" for dim, v in besides)
    return f"{name} takes head dims up to {limits} in steps of 8{more}, not {dims(heads)}"


def dims(heads: Heads) -> str:
    """The head dims as the axis ``heads`` writes them: ``128``, or ``192:128``, of keys and of values."""
    return str(heads.dim) if heads.v == heads.dim else f"{heads.dim}:{heads.v}"


def softmax_arguments(problem: Problem) -> dict[str, float]:
    """How scores become weights, as arguments of ``Prepared``. A softcap is among them only where there is one: not every kernel
    knows it."""
    found = {"softmax_scale": problem.softmax_scale}
    return found | {"softcap": problem.softmax.softcap} if problem.softmax.softcap else found


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def forward_only(problem: Problem, name: str) -> str | None:
    """Why a kernel without backward does not run a problem, or None."""
    return f"{name} has no backward; direction=forward runs" if problem.backward else None


def native_calls(kernel: Kernel, mask: Mask, platform: Platform) -> int:
    """Native calls of a kernel that compute a mask, a block map map by map if the kernel takes bands."""
    if not isinstance(mask, BlockMap):
        return kernel.calls(mask, platform)
    return 1 if kernel.takes == "blocks" else sum(kernel.calls(mask.bands(i), platform) for i in range(mask.maps))


def prepare(kernel: Kernel, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
    """A kernel made ready for any mask and any heads.

    A kernel that takes bands runs a block map as bands, map by map. One that knows one head dim runs with zeros added (``Padded``).

    Raises:
        Unsupported: the kernel cannot run this tile.
    """
    if heads.v != heads.dim and kernel.pads(heads, Platform.of(device)):
        return Padded(prepare(kernel, mask, one_dim(heads), dtype, device), heads)
    if isinstance(mask, BlockMap) and kernel.takes == "bands":
        return PreparedMaps(kernel, mask, heads, dtype, device)
    return kernel.prepare(mask, heads, dtype, device)


class PreparedMaps:
    """A block map on a kernel that takes bands: each map is run for the query heads that read it, with their key/value heads."""

    def __init__(self, kernel: Kernel, mask: BlockMap, heads: Heads, dtype: torch.dtype, device: torch.device) -> None:
        each, group = heads.q // mask.maps, heads.q // heads.kv
        self._parts: list[tuple[Prepared, slice, slice]] = []
        self._contiguous_kv = kernel.contiguous_kv
        for i in range(mask.maps):
            own, kv = slice(i * each, (i + 1) * each), slice(i * each // group, -(-(i + 1) * each // group))
            part = kernel.prepare(mask.bands(i), heads.of(each, kv.stop - kv.start), dtype, device)
            self._parts.append((part, own, kv))
        self.calls = sum(part.calls for part, _, _ in self._parts)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **softmax: float) -> OutLse:
        import torch

        parts = []
        for part, own, kv in self._parts:
            own_k, own_v = self._of_heads(k, v, kv)
            parts.append(part.forward(q[:, own], own_k, own_v, **softmax))
        return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)

    def backward(self, dout: torch.Tensor, saved: Saved, **softmax: float) -> Gradients:
        q, k, v, out, lse = saved
        dq, dk, dv = zero_gradients(q, k, v)
        for part, own, kv in self._parts:
            of_heads = Saved(q[:, own], *self._of_heads(k, v, kv), out[:, own], lse[:, own])
            grads = part.backward(dout[:, own], of_heads, **softmax)
            # Several maps may share a key/value head, so gradients add up.
            for total, heads, grad in zip((dq, dk, dv), (own, kv, kv), grads, strict=True):
                total[:, heads] += grad
        return dq, dk, dv

    def _of_heads(self, k: torch.Tensor, v: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = k[:, heads], v[:, heads]
        return (k.contiguous(), v.contiguous()) if self._contiguous_kv else (k, v)


class Padded:
    """Heads whose values have another dimension than their keys, on a kernel that knows one: the smaller ones get zeros.

    Zeros in q and k change no score, and those in v give columns of out that are dropped, as in Transformer Engine's
    ``_pad_qkv_head_dim`` before flash-attn 2. Where heads are latent, k itself stands for the longer values, which copies nothing.
    """

    def __init__(self, prepared: Prepared, heads: Heads) -> None:
        """``prepared`` is for ``one_dim(heads)``."""
        self._prepared, self._heads, self._dim = prepared, heads, max(heads.dim, heads.v)
        self.calls = prepared.calls

    def _longer(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        return x if x.shape[2] == self._dim else torch.nn.functional.pad(x, (0, self._dim - x.shape[2]))

    def _values(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return k if self._heads.latent else self._longer(v)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **softmax: float) -> OutLse:
        out, lse = self._prepared.forward(self._longer(q), self._longer(k), self._values(k, v), **softmax)
        return out[..., : self._heads.v], lse

    def backward(self, dout: torch.Tensor, saved: Saved, **softmax: float) -> Gradients:
        q, k, v, out, lse = saved
        # The columns that are added have no dout, so they give dv nothing and dq and dk neither, whatever stands there in v.
        longer = Saved(self._longer(q), self._longer(k), self._values(k, v), self._longer(out), lse)
        dq, dk, dv = self._prepared.backward(self._longer(dout), longer, **softmax)
        return dq[..., : self._heads.dim], dk[..., : self._heads.dim], dv[..., : self._heads.v]


def one_dim(heads: Heads) -> Heads:
    """The heads that ``Padded`` gives a kernel: keys and values of the larger dimension."""
    return Heads(heads.q, heads.kv, max(heads.dim, heads.v))


class Merged:
    """Several native calls over disjoint pairs of one mask, merged by LSE. Without calls it is an empty mask."""

    def __init__(self, parts: Sequence[Prepared]) -> None:
        self._parts = parts
        self.calls = sum(part.calls for part in parts)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **softmax: float) -> OutLse:
        import torch

        from lcbench.kernels.merge import merge_into

        total: OutLse | None = None
        for part in self._parts:
            out, lse = part.forward(q, k, v, **softmax)
            if len(self._parts) == 1:
                return out, lse
            if total is None:
                total = out.to(lse.dtype), lse
            else:
                merge_into(*total, out, lse)
        if total is None:
            return q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], -torch.inf, dtype=accumulation_dtype(q.dtype))
        return total

    def backward(self, dout: torch.Tensor, saved: Saved, **softmax: float) -> Gradients:
        import torch

        totals: list[torch.Tensor] = []
        for part in self._parts:
            grads = part.backward(dout, saved, **softmax)
            if len(self._parts) == 1:
                return grads
            dtype = accumulation_dtype(saved.q.dtype)
            totals = [t + g for t, g in zip(totals, grads, strict=True)] if totals else [g.to(dtype) for g in grads]
        if not totals:
            return torch.zeros_like(saved.q), torch.zeros_like(saved.k), torch.zeros_like(saved.v)
        return totals[0], totals[1], totals[2]


def per_query_head(x: torch.Tensor, q_heads: int, dim: int) -> torch.Tensor:
    """k or v with its heads, dimension ``dim``, repeated for the query heads that read them: for libraries without groups."""
    return x if x.shape[dim] == q_heads else x.repeat_interleave(q_heads // x.shape[dim], dim)


def per_kv_head(grad: torch.Tensor, kv_heads: int, dim: int) -> torch.Tensor:
    """The adjoint of ``per_query_head``: gradients of a group's query heads summed, in the accumulation type."""
    if grad.shape[dim] == kv_heads:
        return grad
    return grad.to(accumulation_dtype(grad.dtype)).unflatten(dim, (kv_heads, -1)).sum(dim + 1)


def heads_whole(x: torch.Tensor) -> torch.Tensor:
    """x (T, H, D), or a copy, with each head's D numbers side by side in memory, as every library reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """(T, H, D) to (1, H, T, D)."""
    return x.transpose(0, 1)[None]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that out, LSE and gradients are summed in: float64 for float64, float32 for all else."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


def zero_gradients(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Zeros of each input's shape in the accumulation type, which partial gradients are added to."""
    import torch

    return tuple(torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) for x in inputs)
