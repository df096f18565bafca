"""Keys and values as a serving engine keeps them: contiguous or in pages, in the inputs' type, in bfloat16 or in float8.

A cache is what one rank has of a batch: tokens of each request, back to back where they are contiguous. Shapes, with Tk tokens,
Hk key/value heads, D numbers of a key and Dv of a value: k (Tk, Hk, D) and v (Tk, Hk, Dv), or (pages, page, Hk, D) and
(pages, page, Hk, Dv) with a table of pages ("PagedAttention", arXiv 2309.06180, section 4.1). Latent heads are stored once: v is
the view k[..., :Dv].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from lcbench.kernels.base import Kernel, OutLse, Platform, Prepared
from lcbench.masks.band import spread
from lcbench.problem import Problem, itemsize

if TYPE_CHECKING:
    import torch

STORAGES = ("input", "bfloat16", "float8")
FLOAT8 = "float8_e4m3fn"  # sign, 4 bits of exponent, 3 of fraction, no infinity: OCP 8-bit floating point, E4M3
# What rounding to nearest changes at most: relative to the number, and absolutely among the smallest (half of a subnormal's step).
ROUNDING = {"bfloat16": (2.0**-8, 2.0**-134), "float8": (2.0**-4, 2.0**-10)}


@dataclass(frozen=True)
class CacheKind:
    """How keys and values are stored, as a plan knows it.

    Attributes:
        page: tokens of a page; None: every request's tokens are one stretch of memory.
        storage: ``input``: in the inputs' type; ``bfloat16``; ``float8``: float8_e4m3fn with a scale for each key/value head.

    Raises:
        ValueError: a page without a token, or a storage that is none of ``STORAGES``.
    """

    page: int | None = None
    storage: str = "input"

    def __post_init__(self) -> None:
        if self.page is not None and (isinstance(self.page, bool) or not isinstance(self.page, int) or self.page < 1):
            raise ValueError(f"a page of {self.page} tokens is none: a whole number of at least 1, or null for a contiguous cache")
        if self.storage not in STORAGES:
            raise ValueError(f"a cache is stored as {', '.join(STORAGES)}, not as {self.storage}")

    def stored_as(self, dtype: str) -> str:
        """The type that numbers have in memory, for inputs of a type."""
        return {"input": dtype, "float8": FLOAT8}.get(self.storage, self.storage)

    def stored_bytes(self, dtype: str) -> int:
        """Bytes of a number in memory, for inputs of a type."""
        return 1 if self.storage == "float8" else itemsize(self.stored_as(dtype))

    def read_bytes(self, dtype: str) -> int:
        """Bytes that ``Cache.read`` reads and writes for a number: pages are gathered, then numbers cast, then scaled."""
        stored, given = self.stored_bytes(dtype), itemsize(dtype)
        gathered, cast = self.page is not None, self.stored_as(dtype) != dtype
        return 2 * stored * gathered + (stored + given) * cast + 2 * given * (self.storage == "float8")

    def __str__(self) -> str:
        return ("contiguous" if self.page is None else f"in pages of {self.page}") + f", stored as {self.storage}"


CONTIGUOUS = CacheKind()


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of one rank as they are stored.

    Attributes:
        kind: contiguous or paged, and in which type.
        lengths: tokens of each request on this rank; 0 where it has none of it.
        dtype: the inputs' type, which ``read`` gives.
        k, v: see above; of latent heads v is a view of k.
        latent: whether it is.
        table: (requests, most pages of one), int32: the pages of each request in order; entries beyond its last page are 0.
        places: (Tk,): where each token lies among the tokens of all pages.
        k_scale, v_scale: (Hk,) float32, powers of two: what stored numbers of each head are multiplied with; only of ``float8``.
    """

    kind: CacheKind
    lengths: tuple[int, ...]
    dtype: torch.dtype
    k: torch.Tensor
    v: torch.Tensor
    latent: bool = False
    table: torch.Tensor | None = None
    places: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: tuple[int, ...],
        kind: CacheKind = CONTIGUOUS,
        *,
        latent: bool = False,
        seed: int = 0,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Cache:
        """A cache of dense keys (Tk, Hk, D) and values (Tk, Hk, Dv), requests back to back.

        A contiguous cache in the inputs' type holds the tensors given. Pages are handed out in an order that ``seed`` decides,
        since those of a real allocator are scattered; a request's last page may be partly filled, and zero in the rest, as
        engines allocate it. A scale of ``float8`` is taken from the data of its head: the smallest power of two that brings the
        head's largest number within 448. Engines take the largest number / 448 itself (vLLM) or this power of two (the UE8M0
        scales of DeepSeek-V3.1); with a power of two, stored numbers are numbers of the inputs' type too, so all kernels read
        the same.

        Raises:
            ValueError: the lengths do not sum to the tokens; latent values are not the first numbers of the keys.
        """
        import torch

        if min(lengths, default=0) < 0 or sum(lengths) != len(k) or len(k) != len(v):
            raise ValueError(f"requests of {sum(lengths)} tokens together cannot be those of {len(k)} keys and {len(v)} values")
        if latent and not (v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and v.shape[:2] == k.shape[:2]):
            raise ValueError("latent values are the view k[..., :Dv] of their keys")
        k_scale, v_scale = scales or (None, None)
        stored_k, k_scale = _stored(k, kind, k_scale)
        stored_v, v_scale = (stored_k[..., : v.shape[2]], k_scale) if latent else _stored(v, kind, v_scale)
        if kind.page is None:
            return cls(kind, lengths, k.dtype, stored_k, stored_v, latent, None, None, k_scale, v_scale)
        table, places, pages = _paged(lengths, kind.page, seed)
        on_device = torch.from_numpy(places).to(k.device)

        def in_pages(x: torch.Tensor) -> torch.Tensor:
            found = torch.zeros(pages * kind.page, *x.shape[1:], dtype=x.dtype, device=x.device)  # type: ignore[operator]
            found[on_device] = x
            return found.unflatten(0, (pages, kind.page))  # type: ignore[arg-type]

        paged_k = in_pages(stored_k)
        paged_v = paged_k[..., : v.shape[2]] if latent else in_pages(stored_v)
        on_gpu = torch.from_numpy(table).to(k.device)
        return cls(kind, lengths, k.dtype, paged_k, paged_v, latent, on_gpu, on_device, k_scale, v_scale)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """k (Tk, Hk, D) and v (Tk, Hk, Dv) in the inputs' type: what a kernel needs that cannot read the cache.

        It costs a gather of pages and a cast; a contiguous cache in the inputs' type is given as it is. Both are exact.
        """
        return self._dense(self.dtype)

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as ``read`` in float64: exactly the numbers that are stored, for references."""
        import torch

        return self._dense(torch.float64)

    def _dense(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        k = self._whole(self.k, self.k_scale, dtype)
        return k, k[..., : self.v.shape[-1]] if self.latent else self._whole(self.v, self.v_scale, dtype)

    def _whole(self, x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        if self.places is not None:
            import torch

            # Indexing knows no float8 everywhere; bytes are bytes.
            flat = x.flatten(0, 1)
            x = flat[self.places] if scale is None else flat.view(torch.uint8)[self.places].view(x.dtype)
        return x.to(dtype) if scale is None else x.to(dtype) * scale.to(dtype)[:, None]

    def negate(self) -> None:
        """Negate all that is stored, in place."""
        import torch

        for x in (self.k,) if self.latent else (self.k, self.v):
            if x.dtype == torch.float8_e4m3fn:  # few operations know it: its highest bit is the sign
                x.view(torch.uint8).bitwise_xor_(0x80)
            else:
                x.neg_()

    @property
    def held_bytes(self) -> int:
        """Bytes of its tensors, rest of pages included."""
        every = (self.k, None if self.latent else self.v, self.table, self.places, self.k_scale, self.v_scale)
        return sum(x.numel() * x.element_size() for x in every if x is not None)

    @property
    def tokens(self) -> int:
        """Tokens of all requests, Tk."""
        return sum(self.lengths)

    @property
    def bytes(self) -> int:
        """Bytes that an attention call has to read of it: keys, values, scales and entries of the table, each once."""
        width = self.k.shape[-1] + (0 if self.latent else self.v.shape[-1])
        scales = 0 if self.k_scale is None else self.k_scale.nbytes * (1 if self.latent else 2)
        entries = 0 if self.kind.page is None else sum(-(-length // self.kind.page) for length in self.lengths)
        return self.tokens * self.k.shape[-2] * width * self.k.element_size() + scales + 4 * entries


def _stored(x: torch.Tensor, kind: CacheKind, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Numbers in the type that they are stored in, and their scales, which are given or those of the numbers."""
    import torch

    if kind.storage == "input":
        return x, None
    if kind.storage == "bfloat16":
        return x.to(torch.bfloat16), None
    scale = head_scales(x) if scale is None else scale
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(wide) / scale.to(wide)[:, None]).to(torch.float8_e4m3fn), scale


def head_scales(x: torch.Tensor) -> torch.Tensor:
    """(H,) float32: for each head of x (T, H, D) the smallest power of two that brings its largest number within 448.

    It is never so small that the smallest number of float8 times it is none of x's type; 1 for a head of zeros.
    """
    import torch

    if not len(x):
        return torch.ones(x.shape[1], dtype=torch.float32, device=x.device)
    most = x.abs().amax((0, 2)).double()
    part, exponent = torch.frexp(most)  # most = part * 2 ** exponent, part from 1/2 to below 1; 448 = 7/8 * 2 ** 9
    exponent = exponent - 9 + (part > 0.875).to(exponent.dtype)
    limits = torch.finfo(x.dtype)
    least = int(np.log2(max(limits.tiny * limits.eps, 2.0**-126))) + 9
    return torch.where(most > 0, torch.exp2(exponent.clamp(min=least).double()), 1.0).float()


def cast_error(x: torch.Tensor, storage: str, scale: torch.Tensor | None = None) -> torch.Tensor:
    """How far what is stored can be from x (T, H, D) at most, of each number, in float64.

    Rounding to nearest changes a number by half a unit of its last place at most: 2**-8 of it in bfloat16, 2**-4 in float8_e4m3fn;
    among subnormal numbers by half of their step. A number of float64 is rounded to float32 on its way.

    Args:
        storage: one of ``STORAGES``.
        scale: (H,), of ``float8``.
    """
    import torch

    wide = x.double().abs()
    if storage == "input":
        return torch.zeros_like(wide)
    relative, absolute = ROUNDING[storage]
    relative += 2.0**-23 if x.dtype == torch.float64 else 0.0
    least = torch.full((x.shape[1],), absolute, dtype=torch.float64, device=x.device)
    return torch.maximum(wide * relative, (least if scale is None else least * scale.double())[:, None])


def _paged(lengths: tuple[int, ...], page: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(table, places, pages) of requests, the pages in an order of their own."""
    counts = -(-np.array(lengths, dtype=np.int64) // page)
    pages = int(counts.sum())
    order = np.random.default_rng(seed).permutation(pages)
    table = np.zeros((len(lengths), max(1, int(counts.max(initial=0)))), dtype=np.int32)
    request, column = spread(np.zeros_like(counts), counts)
    table[request, column] = order
    request, token = spread(np.zeros_like(counts), np.array(lengths, dtype=np.int64))
    places = table[request, token // page].astype(np.int64) * page + token % page
    return table, places, max(1, pages)


class PreparedForCache(Prepared, Protocol):
    """A kernel made ready for one mask that reads keys and values where a cache has them."""

    def forward_cache(self, q: torch.Tensor, cache: Cache, *, softmax_scale: float) -> OutLse:
        """(out, lse) of q (Tq, Hq, D) over the keys of the cache, in the order of its requests."""
        ...


@runtime_checkable
class ReadsCache(Protocol):
    """A kernel that reads caches: what it prepares is a ``PreparedForCache``."""

    def reads(self, kind: CacheKind, problem: Problem, platform: Platform) -> str | None:
        """Why it does not read such a cache where it lies, on such a machine; None: it does."""
        ...


def unread(kernel: Kernel, kind: CacheKind, problem: Problem, platform: Platform) -> str | None:
    """Why a kernel does not read such a cache where it lies, so that it needs ``Cache.read``; None: it does."""
    if isinstance(kernel, ReadsCache):
        return kernel.reads(kind, problem, platform)
    return "it takes keys and values back to back in the inputs' type"
