"""Tensors that autograd saves, in the host's memory between forward and backward.

A pass goes layer by layer. In forward what a layer saves is copied out as it comes, and at most two layers' tensors are on the
device: those of a layer stay until its copies have ended, for which the layer after the next waits. In backward two buffers on the
device hold what came back, one for even layers and one for odd ones (the rounding buffers of MEMO, arXiv 2407.12117): while a layer
is in one of them, the layer before it is fetched into the other.

On CUDA copies have a stream of their own and pinned memory. Whose memory a copy reads is kept until the stream of computation has
waited for the copy, so the allocator hands it out again no earlier, and no tensor need be recorded on the stream of copies. On CPU
"the host" is another pool of memory, and a copy has ended when it was asked for: the order of copies and what is kept is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lcbench.workloads.sharing import like, local
from lcbench.workloads.transformer import Layer, Rope

Halves = tuple[torch.Tensor, torch.Tensor]  # what a layer gives, (T, hidden), and what its attention did, (T, Hq, D)
Mark = torch.cuda.Event | None
# How many rows of a tensor that is the n-th that a part of a layer saves go to the host; None: it is left to autograd.
Rows = Callable[[torch.Tensor, int], int | None]


class HostMemory:
    """Host memory by whose it is, made once and used again in every pass; pinned where the device is a GPU.

    Attributes:
        bytes: of all of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._made: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        return sum(map(len, self._made.values()))

    def of(self, layer: int, index: int, size: int) -> torch.Tensor:
        """``size`` bytes for the tensor of that index of a layer; more are kept for a larger one."""
        key = layer, index
        if key not in self._made or len(self._made[key]) < size:
            self._made.pop(key, None)
            self._made[key] = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return self._made[key][:size]


class Lane:
    """Copies between the device and the host, one behind the other. The host waits for none of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Mark:
        """Copy (where to, what) after all that was computed by now; what ``wait`` takes."""
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, mark: Mark) -> None:
        """What is computed from now on comes after a copy."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)


@dataclass
class Item:
    """A saved tensor of a layer.

    Attributes:
        shape, stride, dtype: its own.
        cut: how many of its rows, from the first on, go to the host.
        source: the part of the layer that computes the other rows again; None: they stay on the device.
        host: its first rows there, as stretches of memory.
        rest: the rows that stay.
        back: all rows, on the device again.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    cut: int
    source: str | None
    host: list[torch.Tensor] = field(default_factory=list)
    rest: torch.Tensor | None = None
    back: torch.Tensor | None = None

    def bytes_of(self, rows: int) -> int:
        return self.shape[1:].numel() * rows * self.dtype.itemsize


@dataclass
class Shelf:
    """What one layer has saved in a pass.

    Attributes:
        items: each tensor once, however often it was saved.
        parts: by part of the layer the index in ``items`` of each saved tensor, in the order of saving; None: left to autograd.
        again: by part, what computes rows again that are on no host, and fills them in; it is called once, where they are needed.
    """

    number: int
    items: list[Item] = field(default_factory=list)
    parts: dict[str, list[int | None]] = field(default_factory=dict)
    again: dict[str, Callable[[Shelf], None]] = field(default_factory=dict)
    _known: dict[tuple[int, int, torch.dtype], int] = field(default_factory=dict)
    _read: list[torch.Tensor] = field(default_factory=list)
    _out: Mark = None

    def find(self, x: torch.Tensor) -> int | None:
        """The index of a tensor that was put before, in this shape or another one."""
        return self._known.get((x.data_ptr(), x.numel(), x.dtype))

    def add(self, x: torch.Tensor, cut: int, source: str | None) -> Item:
        """A tensor that was not there; it stays alive until ``leave``, so that no other one has its address."""
        self._known[x.data_ptr(), x.numel(), x.dtype] = len(self.items)
        self._read.append(x)
        self.items.append(Item(x.shape, x.stride(), x.dtype, cut, source if cut < len(x) else None))
        return self.items[-1]

    def read_by(self, mark: Mark) -> None:
        """A copy reads tensors that were added; those before it have ended when it has."""
        self._out = mark

    def leave(self, lane: Lane) -> None:
        """Let go of the tensors, once their copies have ended."""
        lane.wait(self._out)
        self._known.clear()
        self._read.clear()

    def rows(self, index: int, cut: int) -> torch.Tensor:
        """The rows from ``cut`` on of a tensor that is back, to compute with again."""
        back = self.items[index].back
        assert back is not None
        return back[cut:].detach().requires_grad_()

    def fill(self, index: int | None, x: torch.Tensor) -> None:
        """Take rows that were computed again; those of a tensor that was saved several times once.

        Raises:
            RuntimeError: rows of another tensor: the layer did not do again what it had done.
        """
        item = None if index is None else self.items[index]
        if item is None or item.source is None:
            return
        assert item.back is not None
        rows = item.back[item.cut :]
        if x.shape != rows.shape or x.dtype != rows.dtype:
            raise RuntimeError(f"a layer saved {tuple(x.shape)} {x.dtype} where it had saved {tuple(rows.shape)} {rows.dtype}")
        rows.copy_(x.detach())


class Swap:
    """What a stack's passes have in common.

    Attributes:
        weighs: nothing is copied, only counted.
        host: where tensors are between forward and backward.
        moved: bytes that the last pass has copied, ``forward``: to the host, ``backward``: from it.
    """

    def __init__(self, device: torch.device, *, weighs: bool = False) -> None:
        self.device, self.host, self.lane, self.weighs = device, HostMemory(device), Lane(device), weighs
        self.moved = {"forward": 0, "backward": 0}
        self._begun = 0

    def begin(self) -> Pass:
        """A forward pass and its backward. The pass before is over then: its host memory is used again."""
        self._begun += 1
        self.moved = dict.fromkeys(self.moved, 0)
        return Pass(self, self._begun)

    def is_last(self, number: int) -> bool:
        return number == self._begun


class Pass:
    """A forward pass under way, and then its backward. It lives as long as autograd's graph of it."""

    def __init__(self, swap: Swap, number: int) -> None:
        self._swap, self._number = swap, number
        self._shelves: list[Shelf] = []
        self._buffers: tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]] = ({}, {})  # of even and of odd layers
        self._coming: dict[int, Mark] = {}
        self._there: set[int] = set()

    # -- forward ---------------------------------------------------------------------------------------------------

    def layer(self) -> Shelf:
        """The next layer begins. The one before the last is off the device then."""
        for shelf in self._shelves[-2:-1]:
            shelf.leave(self._swap.lane)
        self._shelves.append(Shelf(len(self._shelves)))
        return self._shelves[-1]

    @torch.no_grad()
    def put(self, shelf: Shelf, x: torch.Tensor, cut: int, source: str | None = None) -> int:
        """Save a tensor, its first ``cut`` rows on the host; its index. The others are computed again by the part ``source``, or
        stay on the device."""
        index = shelf.find(x)
        if index is not None:
            return index
        x = x.detach()
        item, index = shelf.add(x, cut, source), len(shelf.items) - 1
        self._swap.moved["forward"] += item.bytes_of(cut)
        if self._swap.weighs:
            return index
        memory, begin = self._swap.host.of(shelf.number, index, item.bytes_of(cut)), 0
        for stretch in stretches(x[:cut]):
            size = stretch.numel() * item.dtype.itemsize
            item.host.append(memory[begin : begin + size].view(item.dtype).view(stretch.shape))
            begin += size
        shelf.read_by(self._swap.lane.copy(zip(item.host, stretches(x[:cut]), strict=True)))
        if cut < len(x) and source is None:
            item.rest = x[cut:].clone()
        return index

    def halves(
        self, shelf: Shelf, layer: Layer, x: torch.Tensor, rope: Rope, token_wise: Rows, attention: Rows, *, again: bool = False
    ) -> Halves:
        """Run a layer, with what its halves save by one rule and what its attention saves by another. Its weights and the positions
        are left alone. Collective.

        Args:
            again: whether rows that do not go to the host are computed again; else they stay on the device.
        """
        before, after = ("before", "after") if again else (None, None)
        with self.saving(shelf, "before", _but(token_wise, layer.before, rope), before):
            q, k, v, given = layer.inputs(x, rope)
        with self.saving(shelf, "attention", attention, before):
            out = layer.attention(q, k, v, given=given)
        with self.saving(shelf, "after", _but(token_wise, layer.after, rope), after):
            return layer.after(x, out), out

    def saving(self, shelf: Shelf, part: str, rows: Rows, source: str | None = None) -> saved_tensors_hooks:
        """Hooks under which a part of a layer runs: what it saves goes to the shelf."""
        indices = shelf.parts.setdefault(part, [])

        @torch.no_grad()
        def pack(x: torch.Tensor) -> torch.Tensor | _View:
            own = local(x)
            own = own if _is_dense(own) else own.contiguous()
            index, cut = shelf.find(own), rows(own, len(indices))
            if index is None and cut is not None:
                index = self.put(shelf, own, cut, source)
            indices.append(index)
            return x if index is None else _View(self, shelf.number, index, own.shape, own.stride(), like(x))

        return saved_tensors_hooks(pack, _unpack)

    # -- backward --------------------------------------------------------------------------------------------------

    def item(self, number: int, index: int) -> torch.Tensor:
        """A saved tensor of a layer, all of its rows."""
        self._arrive(number)
        shelf = self._shelves[number]
        item = shelf.items[index]
        if item.source is not None and (again := shelf.again.pop(item.source, None)):
            again(shelf)
        assert item.back is not None
        return item.back

    @torch.no_grad()
    def _arrive(self, number: int) -> None:
        """Have a layer's tensors on the device, and begin to fetch those of the layer before it.

        All that has been computed by now is of layers behind this one, so the other buffer is free.
        """
        if number in self._there:
            return
        if not self._swap.is_last(self._number):
            raise RuntimeError("another pass has begun since, and its saved tensors are where those of this one were")
        if not self._there:  # backward begins
            for shelf in self._shelves[-2:]:
                shelf.leave(self._swap.lane)
        if number not in self._coming:
            self._fetch(number)
        self._swap.lane.wait(self._coming.pop(number))
        self._there.add(number)
        for item in self._shelves[number].items:
            if item.rest is not None and item.back is not None:
                item.back[item.cut :].copy_(item.rest)
                item.rest = None
        if number:
            self._fetch(number - 1)

    def _fetch(self, number: int) -> None:
        shelf, buffers = self._shelves[number], self._buffers[number % 2]
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, item in enumerate(shelf.items):
            size = item.bytes_of(item.shape[0])
            if index not in buffers or len(buffers[index]) != size:
                buffers[index] = torch.empty(size, dtype=torch.uint8, device=self._swap.device)
            item.back = buffers[index].view(item.dtype).as_strided(item.shape, item.stride)
            pairs += zip(stretches(item.back[: item.cut]), item.host, strict=True)
            self._swap.moved["backward"] += item.bytes_of(item.cut)
        self._coming[number] = self._swap.lane.copy(pairs)


@dataclass(frozen=True)
class _View:
    """What autograd holds instead of a tensor.

    Attributes:
        wrap: makes the tensor that was saved of what this rank has of it.
    """

    of: Pass
    number: int
    index: int
    shape: torch.Size
    stride: tuple[int, ...]
    wrap: Callable[[torch.Tensor], torch.Tensor]


def _unpack(saved: torch.Tensor | _View) -> torch.Tensor:
    if isinstance(saved, torch.Tensor):
        return saved
    return saved.wrap(saved.of.item(saved.number, saved.index).as_strided(saved.shape, saved.stride))


def stretches(x: torch.Tensor) -> list[torch.Tensor]:
    """A tensor as the stretches of memory that it is made of."""
    if x.is_contiguous():
        return [x]
    widest = max(range(x.ndim), key=x.stride)
    return [stretch for part in x.movedim(widest, 0).unbind(0) for stretch in stretches(part)]


def _is_dense(x: torch.Tensor) -> bool:
    """Whether it fills the memory between its first and its last element."""
    return sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1 == x.numel()


def _but(rows: Rows, module: nn.Module, rope: Rope) -> Rows:
    """A rule, but for what shows a module's weights or the positions."""

    def found(x: torch.Tensor, number: int) -> int | None:
        # Asked for each time, since a module whose weights are sharded has others while it runs.
        known = {local(y).untyped_storage().data_ptr() for y in (*module.parameters(), *rope)}
        return None if x.untyped_storage().data_ptr() in known else rows(x, number)

    return found


def fill_by(shelf: Shelf, part: str, function: Callable[..., Any], *args: torch.Tensor, whole: bool) -> Any:
    """Run a part of a layer again on rows of its arguments, for what it saves of them.

    Args:
        whole: also for what it gives; else it ends with the last that it saves, and None is returned.

    Raises:
        RuntimeError: it saves something else than it did in forward.
    """
    indices, count = shelf.parts[part], 0

    def pack(x: torch.Tensor) -> None:
        nonlocal count
        if count == len(indices):
            raise RuntimeError(f"{part} has saved {count} tensors, and now one more")
        shelf.fill(indices[count], local(x.detach()))
        count += 1
        if count == len(indices) and not whole:
            raise _Enough

    found = None
    with torch.enable_grad(), saved_tensors_hooks(pack, _unpack), suppress(_Enough):
        found = function(*args)
    if count != len(indices):
        raise RuntimeError(f"{part} has saved {len(indices)} tensors, and now {count}")
    return found


class _Enough(Exception):
    """All that was saved is there."""
