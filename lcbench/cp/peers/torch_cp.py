"""torch's own ring attention, on the kernel of the cell: a peer to compare with.

``torch.distributed.tensor.experimental.context_parallel`` runs on CUDA only, with torch's kernels. What is behind it, a ring that
calls any attention operation, runs anywhere; it is private to torch, so another version of torch may not have it any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Place, RankRun, Scheduled
from lcbench.cp.peers.library import LibraryStrategy, refused_length, refused_mask, segments
from lcbench.cp.ring import Ring
from lcbench.kernels.base import Kernel, Prepared, Saved, heads_first, prepare
from lcbench.masks.band import Band, BandMask, Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_choice
from lcbench.schedule.layout import Layout, zigzag

if TYPE_CHECKING:
    import torch

    from lcbench.schedule.simulate import Modelled

# Our own strategy that moves the same in each way to rotate.
ROTATIONS: dict[str, Scheduled] = {"allgather": AllGather(layout="zigzag"), "alltoall": Ring(layout="zigzag")}
MODULE = "torch.distributed.tensor.experimental._context_parallel._attention"


@dataclass(frozen=True)
class TorchCP(LibraryStrategy):
    """``rotate``: how torch moves keys and values, all gathered at once (its default) or hop by hop."""

    own_kernel: ClassVar[bool] = False
    rotate: Literal["allgather", "alltoall"] = "allgather"

    def __post_init__(self) -> None:
        check_choice("rotate", self.rotate, ROTATIONS)

    @property
    def value_dims(self) -> bool:
        return True  # a hop sends keys and values end to end and takes each apart by its own shape

    def refused(self, problem: Problem, mask: Mask) -> str | None:
        refused = refused_mask(mask, known="full and causal")
        return refused or refused_length(problem, 2 * problem.scale.world_size)

    def missing(self) -> str | None:
        try:
            _ring()
        except ImportError as error:
            return f"this torch has no {MODULE}: {error}"
        return None

    def layout(self, problem: Problem) -> Layout:
        # Causal or not, zigzag is a layout like any other; torch asks for it only where it is causal.
        return zigzag(problem.seqlen, problem.scale.world_size)

    def modelled(self, problem: Problem, mask: Mask) -> Modelled | None:
        """The same messages of ours. All gathered, torch still computes tile by tile, which ours does in one call."""
        return ROTATIONS[self.rotate].modelled(problem, mask)

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> TorchRing:
        found = segments(mask)
        assert found is not None
        return TorchRing(problem, found.causal, kernel, self.rotate, self.layout(problem).tokens(place.rank), place)


def _ring() -> Any:
    import importlib

    module = importlib.import_module(MODULE)
    for name in ("_templated_ring_attention", "_templated_ring_attention_backward", "_cp_options", "_RotateMethod"):
        if not hasattr(module, name):
            raise ImportError(f"no {name}")
    return module


class TorchRing(RankRun):
    """A run of torch's ring: (1, H, T, D) inside, packed outside."""

    def __init__(self, problem: Problem, causal: bool, kernel: Kernel, rotate: str, tokens: Ints, place: Place) -> None:
        import torch

        self.tokens = tokens
        self._problem, self._causal, self._rotate = problem, causal, rotate
        self._ring, self._group = _ring(), place.group
        size = problem.seqlen // problem.scale.world_size
        shapes = {(size, size, False), (size, size, True), (size, size // 2, False), (size // 2, size, False)}
        self._kernels: dict[tuple[int, int, bool], Prepared] = {}
        for q, k, bounded in shapes:
            tile = BandMask.of(q, k, [Band(0, q, 0, k, hi=0) if bounded else Band(0, q, 0, k)])
            self._kernels[q, k, bounded] = prepare(kernel, tile, problem.heads, getattr(torch, problem.dtype), place.device)

    @contextmanager
    def _options(self, dtype: torch.dtype) -> Iterator[None]:
        """torch keeps these in a global."""
        import torch

        options = self._ring._cp_options
        before = options.convert_to_f32, options.enable_load_balance, options.rotate_method
        method = self._ring._RotateMethod
        options.convert_to_f32 = dtype != torch.float64
        options.enable_load_balance = self._causal
        options.rotate_method = method.ALL_TO_ALL if self._rotate == "alltoall" else method.ALL_GATHER
        try:
            yield
        finally:
            options.convert_to_f32, options.enable_load_balance, options.rotate_method = before

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        query, key, value = (heads_first(x) for x in (q, k, v))
        with self._options(q.dtype):
            out, lse, *_ = self._ring._templated_ring_attention(
                self._group, 2, partial(_forward, self._kernels, self._problem.softmax_scale), query, key, value, self._causal
            )
        out = out.to(q.dtype)
        return _packed(out), (query, key, value, out, lse)

    def lse(self, saved: Any) -> torch.Tensor:
        lse: torch.Tensor = saved[4][0].T
        return lse

    def backward(self, dout: torch.Tensor, saved: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with self._options(dout.dtype):
            grads = self._ring._templated_ring_attention_backward(
                self._group,
                2,
                partial(_backward, self._kernels, self._problem.softmax_scale),
                heads_first(dout),
                "grad_out",
                *saved,
                self._causal,
            )
        dq, dk, dv = (_packed(grad).to(dout.dtype) for grad in grads[:3])
        return dq, dk, dv


def _packed(x: torch.Tensor) -> torch.Tensor:
    return x[0].transpose(0, 1)


def _forward(
    kernels: dict[tuple[int, int, bool], Prepared], scale: float, query: Any, key: Any, value: Any, is_causal: bool
) -> tuple[Any, Any]:
    q, k, v = (_packed(x) for x in (query, key, value))
    out, lse = kernels[len(q), len(k), is_causal].forward(q, k, v, softmax_scale=scale)
    return heads_first(out), lse.T[None]


def _backward(
    kernels: dict[tuple[int, int, bool], Prepared],
    scale: float,
    *,
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    is_causal: bool,
) -> list[Any]:
    dout, q, k, v, out = (_packed(x) for x in (grad_out, query, key, value, out))
    lse = logsumexp[0].T.contiguous()
    grads = kernels[len(q), len(k), is_causal].backward(dout, Saved(q, k, v, out, lse), softmax_scale=scale)
    return [heads_first(grad) for grad in grads]
