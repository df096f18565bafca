"""A step's memory, placed before it runs: MEMO's two levels (arXiv 2407.12117).

First the transient tensors of one layer, which are neither saved for backward nor anybody's gradient for good, in its forward and
in its backward. Their lifetimes are recorded on torch's meta device, where nothing is computed. Then layers as blocks of what that
took, with all that lives longer. The attention's own room, its kernel's and its strategy's, is in neither.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lcbench.kernels.base import accumulation_dtype
from lcbench.workloads.models import Model
from lcbench.workloads.recompute.base import Recompute
from lcbench.workloads.recompute.placement import Lifetime, Placement, place
from lcbench.workloads.recompute.sizes import LayerBytes, head_bytes
from lcbench.workloads.transformer import After, Before, rotations

META = torch.device("meta")
GRAIN = 512  # what bytes are rounded up to, as by torch's CUDA allocator


@dataclass(frozen=True)
class Plan:
    """A step's memory, placed.

    Attributes:
        levels: ``forward`` and ``backward``: transient tensors of one layer; ``alone``: those of a forward that saves nothing;
            ``step``: all of it.
        seconds: that it took.
    """

    levels: dict[str, Placement]
    seconds: float

    @property
    def peak(self) -> int:
        return self.levels["step"].peak

    def notes(self) -> dict[str, Any]:
        """For the provenance: of each level its peak, the largest sum that lives at once, and whether no lower peak is possible."""
        levels = {name: {"peak": one.peak, "bound": one.bound, "exact": one.exact} for name, one in self.levels.items()}
        return {**levels, "seconds": self.seconds}


def planned(model: Model, layer: LayerBytes, policy: Recompute, *, layers: int, dtype: str, loss_rows: int) -> Plan:
    """The plan of a step on one rank, without an optimizer.

    Args:
        model: heads and ``ffn`` as this rank has them.
        layers: how many are run.
        loss_rows: tokens whose logits exist at once.
    """
    begun = time.perf_counter()
    levels = {name: place(lifetimes) for name, lifetimes in transients(model, layer.x.rows, dtype).items()}
    held, again = policy.kept(layer), policy.again()
    saves = held.device + held.passing // 2 >= layer.all
    forward = levels["forward" if saves else "alone"].peak
    backward = max(levels["backward"].peak, levels["forward"].peak if again.token_wise else 0)
    size = getattr(torch, dtype).itemsize
    head, end = layers, 2 * layers + 1  # moments: a layer's forward each, the head, a layer's backward each
    found = [Lifetime(head_bytes(model, dtype, loss_rows), head, head + 1)]
    found += [Lifetime(model.head_parameters() * size, head, end)] + [Lifetime(layer.x.bytes, at, end) for at in (head - 1, head)]
    if held.buffered:
        found.append(Lifetime(held.working, head + 1, end))
    for number in range(layers):
        back = 2 * layers - number
        found.append(Lifetime(forward, number, number + 1))
        found.append(Lifetime(backward, back, back + 1))
        found.append(Lifetime(held.device - (0 if number else held.inputs), number, back + 1))
        found.append(Lifetime(held.passing // 2, number, number + 2 if number < layers - 2 else head + 1))
        found.append(Lifetime(0 if held.buffered else held.working, back, back + 1))
        found.append(Lifetime(model.layer_parameters() * size, back, end))
    levels["step"] = place([each for each in found if each.bytes])
    return Plan(levels, time.perf_counter() - begun)


def transients(model: Model, tokens: int, dtype: str) -> dict[str, list[Lifetime]]:
    """Lifetimes of the transient tensors of one layer, by operations: ``forward`` and ``backward`` of a layer whose saved tensors
    are elsewhere, and ``alone``, a forward that saves nothing."""
    typed: torch.dtype = getattr(torch, dtype)
    before, after = Before(model, typed, META), After(model, typed, META)
    rope = rotations(np.arange(tokens), model, typed, META)
    x = torch.empty(tokens, model.hidden, dtype=typed, device=META, requires_grad=True)
    watch = _Watch()

    def forward() -> torch.Tensor:
        out: torch.Tensor = _Attended.apply(*before(x, rope))  # type: ignore[no-untyped-call]
        y: torch.Tensor = after(x, out)
        return y

    with watch, torch.no_grad():
        y = forward()
        alone = watch.ended()
    with watch, watch.saving():
        y = forward()
        found = {"alone": alone, "forward": watch.ended()}
    dy = torch.empty_like(y)
    with watch:
        y.backward(dy)
        found["backward"] = watch.ended()
    return found


class _Attended(torch.autograd.Function):
    """An attention's tensors, without an attention."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))
        ctx.save_for_backward(q, torch.stack([k, v], dim=2), out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        q, kv, _, _ = ctx.saved_tensors
        wide = accumulation_dtype(q.dtype)
        dq, dkv = torch.empty_like(q, dtype=wide), torch.empty_like(kv, dtype=wide).to(q.dtype)
        return dq.to(q.dtype), dkv[:, :, 0], dkv[:, :, 1]


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


class _Watch(TorchDispatchMode):
    """Notes from when to when the memory of each tensor lives that an operation made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._now = 0
        self._live: dict[int, tuple[StorageWeakRef, int, int]] = {}
        self._saved: set[int] = set()
        self._gone: list[Lifetime] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see()
        self._now += 1
        made = func(*args, **kwargs or {})
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self._live:
                self._live[key] = _weak(x.untyped_storage()), x.untyped_storage().nbytes(), self._now
        return made

    def _see(self) -> None:
        """Take note of the memory that is gone before the next operation."""
        for key, (storage, size, begun) in list(self._live.items()):
            if storage.expired():
                del self._live[key]
                if key not in self._saved:
                    self._gone.append(Lifetime(-(-size // GRAIN) * GRAIN, begun, self._now + 1))
                self._saved.discard(key)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What autograd saves within is not transient."""

        def pack(x: torch.Tensor) -> torch.Tensor:
            self._saved.add(x.untyped_storage()._cdata)
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            yield

    def ended(self) -> list[Lifetime]:
        """What has come and gone since this was asked last. What is still there is forgotten."""
        self._see()
        gone, self._gone = self._gone, []
        self._live = {key: value for key, value in self._live.items() if key in self._saved}
        return [each for each in gone if each.bytes]
