"""Kernels that compute requests against a cache, forward only: what a mask says of requests, and calls of a library for them.

A *sequence* is a stretch of rows that see keys from one first key on, each row one key more than the row before, until they see
all. A token that is decoded, a chunk of a prompt and a whole prompt under a causal mask are sequences; so is a chunk that sees all
of a rank's keys.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from lcbench.kernels.base import (
    Gradients,
    Kernel,
    OutLse,
    Platform,
    Prepared,
    Saved,
    Unsupported,
    accumulation_dtype,
    forward_only,
    heads_whole,
)  # fmt: skip
from lcbench.kernels.cache import Cache, CacheKind
from lcbench.masks.band import BandMask, Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


COMPUTES = "it computes requests: rows that see all keys of theirs, or causally"
FLASH_OPTIONS = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q", "max_seqlen_k", "page_table", "softmax_scale", "causal", "softcap",
)  # fmt: skip


@dataclass(frozen=True)
class Sequences:
    """Sequences by their rows.

    Attributes:
        q: (n, 2): first row, last row + 1; ascending, no row is in two.
        k: (n, 2): first key, last key + 1.
        first: (n,): keys that the first row sees.
    """

    q: Ints
    k: Ints
    first: Ints

    @property
    def rows(self) -> Ints:
        """Rows of each, (n,)."""
        return self.q[:, 1] - self.q[:, 0]

    @property
    def keys(self) -> Ints:
        """Keys of each, (n,)."""
        return self.k[:, 1] - self.k[:, 0]

    @property
    def full(self) -> NDArray[np.bool_]:
        """Whether every row of it sees all its keys, (n,); so it is of a single row."""
        return self.first == self.keys

    @property
    def causal(self) -> NDArray[np.bool_]:
        """Whether its last row alone sees all keys, or it has one row only: a causal mask aligned to the bottom right, (n,)."""
        return self.first + self.rows - 1 == self.keys

    def of(self, members: NDArray[np.bool_]) -> Sequences:
        """Some of them."""
        return Sequences(self.q[members], self.k[members], self.first[members])


def sequences_of(mask: Mask) -> Sequences:
    """A mask as sequences.

    Raises:
        Unsupported: it is none: a dynamic block mask, a window that is bounded on the left, or a row with gaps.
    """
    if not isinstance(mask, BandMask):
        raise Unsupported(f"{COMPUTES}; not a dynamic block mask")
    bands = mask.merged().bands
    bands = bands[np.argsort(bands[:, 0], kind="stable")]
    q0, q1, k0, _, lo, hi = bands.T
    # Bands are tight, so a left bound that binds nowhere is the one of the corner.
    if (lo > k0 - q1 + 1).any():
        raise Unsupported(f"{COMPUTES}; this mask has bounds on the left")
    if (q1[:-1] > q0[1:]).any():
        raise Unsupported(f"{COMPUTES}; rows of this mask see keys with gaps")
    return Sequences(bands[:, 0:2], bands[:, 2:4], q0 + hi - k0 + 1)


@dataclass(frozen=True)
class RequestCall:
    """One call: some sequences, their rows back to back.

    Attributes:
        sequences: them, ``q`` counted among the rows of the call.
        causal: whether rows see keys causally, aligned to the bottom right; False: all keys.
        cu_q: (n + 1,), int32 on the device: where each one's rows begin, and the end.
        lengths: (n,), int32 on the device: keys of each.
        begins: (n,), int32 on the device: its first key among the tokens of a contiguous cache.
        table: (n, most pages), int32 on the device: its pages; None: the cache is contiguous.
        kind: how the cache is stored.
    """

    sequences: Sequences
    causal: bool
    cu_q: torch.Tensor
    lengths: torch.Tensor
    begins: torch.Tensor
    table: torch.Tensor | None
    kind: CacheKind

    @property
    def max_q(self) -> int:
        """The most rows of a sequence."""
        return int(self.sequences.rows.max())

    @property
    def max_k(self) -> int:
        """The most keys of a sequence."""
        return int(self.sequences.keys.max())


class RequestRun(Protocol):
    """A library's functions made ready for one call."""

    def forward(self, q: torch.Tensor, cache: Cache, scale: float, softcap: float) -> OutLse:
        """out (T, Hq, Dv) and lse (T, Hq), natural logarithm, of the rows of the call, q (T, Hq, D)."""
        ...


class RequestKernel(Kernel):
    """A kernel of requests: a subclass says which caches it reads and how one call is made.

    Attributes:
        called: what reasons call it.
        softcaps: whether it takes a softcap.
        equal_rows: whether the sequences of a call have equally many rows.
        any_bound: whether sequences that are neither full nor causal, and both in one call, run.
    """

    called: ClassVar[str]
    softcaps: ClassVar[bool] = True
    equal_rows: ClassVar[bool] = False
    any_bound: ClassVar[bool] = False

    @abstractmethod
    def reads(self, kind: CacheKind, problem: Problem, platform: Platform) -> str | None:
        """Why it does not read such a cache where it lies, on such a machine; None: it does."""
        ...

    @abstractmethod
    def ready(self, call: RequestCall, heads: Heads, dtype: torch.dtype) -> RequestRun:
        """The library's functions for one call."""
        ...

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if reason := super().unsupported(problem, mask):
            return reason
        try:
            self._groups(mask)
        except Unsupported as error:
            return f"{self.called}: {error}"
        return forward_only(problem, self.called) or self.refused_heads(problem.heads)

    def refused_heads(self, heads: Heads) -> str | None:
        """Why it runs heads of these dimensions nowhere, or None."""
        return None

    def calls(self, mask: BandMask, platform: Platform) -> int:
        return len(self._groups(mask))

    def _groups(self, mask: Mask) -> list[tuple[Sequences, bool]]:
        """Sequences that one call can have, and whether it is a causal one.

        Raises:
            Unsupported: the mask is none of requests, or the library does not know its bounds.
        """
        found = sequences_of(mask)
        if self.any_bound:
            return [(found, False)] if len(found.q) else []
        odd = ~(found.full | found.causal)
        if odd.any():
            rows = "{}:{}".format(*found.q[odd][0])
            raise Unsupported(f"rows {rows} see keys neither all of them nor causally, aligned to the bottom right")
        causal = ~found.full
        if causal.any():
            causal |= found.rows == 1  # a single row is both, and goes with the others
        kinds = np.stack([causal, found.rows if self.equal_rows else np.zeros_like(found.rows)], axis=1)
        return [(found.of((kinds == kind).all(1)), bool(kind[0])) for kind in np.unique(kinds, axis=0)]

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> PreparedRequests:
        if reason := self.refused_heads(heads):
            raise Unsupported(reason)
        return PreparedRequests(self, self._groups(mask), heads, dtype, device)


class PreparedRequests(Prepared):
    """Calls that compute a mask of requests. Rows without keys have out 0 and LSE -inf."""

    def __init__(
        self, kernel: RequestKernel, groups: list[tuple[Sequences, bool]], heads: Heads, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._kernel, self._heads, self._dtype, self._device = kernel, heads, dtype, device
        self._groups = groups
        self._rows = [_rows(group.q, device) for group, _ in groups]
        self.calls = len(groups)
        # Of the last cache that was seen: what a call takes depends on its kind and its table alone.
        self._of: tuple[CacheKind, torch.Tensor | None] | None = None
        self._runs: list[RequestRun] = []

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        k, v = heads_whole(k), heads_whole(v)
        return self.forward_cache(q, Cache.of(k, v, (len(k),)), softmax_scale=softmax_scale, softcap=softcap)

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float, softcap: float = 0.0) -> Gradients:
        raise AssertionError(f"{self._kernel.called} has no backward")

    def forward_cache(self, q: torch.Tensor, cache: Cache, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        """(out, lse) over the keys of a cache.

        Raises:
            ValueError: a sequence of the mask does not begin where a request of a paged cache does, or is longer than it; or a
                softmax scale that is not above 0.
        """
        import torch

        if not softmax_scale > 0:
            raise ValueError(f"{self._kernel.called} takes softmax scales above 0, not {softmax_scale}")
        q = heads_whole(q)
        if self._of is None or self._of[0] != cache.kind or self._of[1] is not cache.table:
            self._runs = [self._ready(group, causal, cache) for group, causal in self._groups]
            self._of = cache.kind, cache.table
        if len(self._runs) == 1 and self._rows[0] == slice(0, len(q)):
            return self._runs[0].forward(q, cache, softmax_scale, softcap)
        out = torch.zeros(*q.shape[:2], cache.v.shape[-1], dtype=q.dtype, device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
        for rows, run in zip(self._rows, self._runs, strict=True):
            out[rows], lse[rows] = run.forward(q[rows], cache, softmax_scale, softcap)
        return out, lse

    def _ready(self, group: Sequences, causal: bool, cache: Cache) -> RequestRun:
        import torch

        ends = np.cumsum(group.rows)
        own = Sequences(np.stack([ends - group.rows, ends], axis=1), group.k, group.first)

        def on_device(values: Ints) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(self._device)

        table = None
        if cache.table is not None:
            bounds = np.concatenate([[0], np.cumsum(cache.lengths)])
            request = np.searchsorted(bounds, own.k[:, 0], side="right") - 1
            if (bounds[request] != own.k[:, 0]).any() or (own.k[:, 1] > bounds[request + 1]).any():
                raise ValueError("the mask's keys are not those of the requests of this cache")
            table = cache.table[torch.from_numpy(request).to(cache.table.device)]
        call = RequestCall(
            own, causal, on_device(np.concatenate([[0], ends])), on_device(own.keys), on_device(own.k[:, 0]), table, cache.kind
        )
        return self._kernel.ready(call, self._heads, self._dtype)


def flash_arguments(call: RequestCall, scale: float, softcap: float) -> dict[str, Any]:
    """What flash-attn 3 and 4 are told of a call, some of ``FLASH_OPTIONS``. Keys are found by a table of pages, or by where each
    sequence begins, and the end."""
    found = {
        "cu_seqlens_q": call.cu_q, "seqused_k": call.lengths, "max_seqlen_q": call.max_q, "max_seqlen_k": call.max_k,
        "softmax_scale": scale, "causal": call.causal, "softcap": softcap,
    }  # fmt: skip
    if call.table is not None:
        return {**found, "page_table": call.table}
    import torch

    return {**found, "cu_seqlens_k": torch.cat([call.begins, call.begins[-1:] + call.lengths[-1:]])}


def of_equal_dims(called: str, heads: Heads) -> str | None:
    """Why a kernel whose values have the dimension of its keys does not run such heads, or None."""
    return None if heads.dim == heads.v else f"{called} takes values of the dimension of keys, not {heads.v} with {heads.dim}"


def of_input_type(called: str, kind: CacheKind, problem: Problem) -> str | None:
    """Why a kernel whose keys have the type of its queries does not read a cache, or None."""
    stored = kind.stored_as(problem.dtype)
    return None if stored == problem.dtype else f"{called} reads caches of the queries' type, {problem.dtype}, not {stored}"


def _rows(q: Ints, device: torch.device) -> slice | torch.Tensor:
    """Rows of sequences: a slice where they are one stretch."""
    import torch

    if (q[1:, 0] == q[:-1, 1]).all():
        return slice(int(q[0, 0]), int(q[-1, 1]))
    return torch.from_numpy(np.concatenate([np.arange(begin, end) for begin, end in q])).to(device)
