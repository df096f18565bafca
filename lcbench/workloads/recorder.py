"""What a training step computes on its way, for its check: caught by hooks of modules and tensors in a pass that is not timed.

Of every layer: rows of some tokens, a number per token of what goes from half to half and from layer to layer, and of every weight
what its gradient must sum to, from what the module that has it got and what came back to it. Of one layer all of its attention's
tensors. A layer that is computed again in backward is caught in forward only, so what is computed again shows in the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lcbench.measure.ranks import Ranks
from lcbench.workloads.sharing import local
from lcbench.workloads.training import Training

ELEMENTS = 1 << 22  # in float64 at a time
SIGNS = 2  # vectors of signs that the rows of a weight's gradient are multiplied by
AGAIN = "x of after"  # a layer's x, as its second half gets it
DIGESTED = ("x", AGAIN, "y")  # what goes on between halves and layers
# Whose gradients are caught. That of x is dy of the layer before: what a half gets may be another tensor with a part of it (FSDP2).
BACK = ("q", "k", "v", "out", "y")


@dataclass
class Sums:
    """Of a weight's gradient, on this rank: its rows times vectors of signs, or its elements where it is a vector.

    Attributes:
        value: (out, SIGNS) or (out,).
        squares: (out,), of the terms: how far roundings of each carry it.
        rounded: (out,), the squares of what each micro-batch has added: how far rounding that to the inputs' type carries it.
    """

    value: torch.Tensor
    squares: torch.Tensor
    rounded: torch.Tensor
    _before: torch.Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, ...], device: torch.device) -> Sums:
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in (shape, shape[:1], shape[:1], shape)))

    def settle(self) -> None:
        """A micro-batch ends."""
        added = (self.value - self._before).square()
        self.rounded += added if added.ndim == 1 else added.mean(1)
        self._before = self.value.clone()


@dataclass
class Caught:
    """Pieces of a tensor in the order of tokens: rows of some, a number per token, or all."""

    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    digest: dict[int, torch.Tensor] = field(default_factory=dict)
    whole: dict[int, torch.Tensor] = field(default_factory=dict)


def joined(pieces: dict[int, torch.Tensor]) -> torch.Tensor:
    """Pieces by where they begin, as one tensor."""
    return torch.cat([pieces[at] for at in sorted(pieces)])


class Recorder:
    """Catches one pass of a training step.

    Args:
        sample: local positions of the tokens whose rows are kept, ascending.
        layer: whose attention's tensors are kept, and the inputs of whose norms.
        divided: ranks that have the other heads and classes of the same tokens.
    """

    def __init__(self, training: Training, sample: torch.Tensor, layer: int, seed: int, divided: Ranks) -> None:
        self._training, self._sample, self.layer, self._divided = training, sample, layer, divided
        self._seed = seed
        self._signs: dict[int, torch.Tensor] = {}
        self._on = False
        self._caught: dict[str, Caught] = {}
        self._begin: dict[str, int] = {}  # tokens that a module has had so far
        self._sums: dict[str, Sums] = {}
        self.watched: set[str] = set()  # weights of whose gradients sums are kept
        self.losses: list[torch.Tensor] = []  # of labelled tokens, added up
        self._heads: list[Any] = []  # what each micro-batch's head gave: (x, y, dy, loss)

    def run(self) -> None:
        """One pass. Collective."""
        with self._hooks():
            self._on = True
            self.passed = self._training.step(self._done)

    def _done(self, part: str, passed: Any) -> None:
        """Modules are caught up to the head of a micro-batch; what comes after it computes again, or goes back."""
        if part == "head":
            self._on = False
            self._heads.append(passed)
        elif part == "backward":
            self._on = True
            for sums in self._sums.values():
                sums.settle()

    # -- what was caught -------------------------------------------------------------------------------------------

    @property
    def head(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y and dy (T, hidden) of all micro-batches, and this rank's part of the loss."""
        none = self._training.x[:0]
        y, dy = (torch.cat([none, *(given[at].detach() for given in self._heads)]) for at in (1, 2))
        return y, dy, sum((given[3] for given in self._heads), none.new_zeros(()))

    @property
    def dx(self) -> torch.Tensor:
        """(T, hidden), of what the first layer gets."""
        dx: torch.Tensor = self.passed[0]
        return dx

    def sums(self, name: str, shape: tuple[int, ...]) -> Sums:
        """What the gradient of a weight must sum to; of no tokens zeros."""
        if name not in self._sums:
            self._sums[name] = Sums.zeros(shape, self._training.x.device)
        return self._sums[name]

    def rows(self, name: str) -> torch.Tensor:
        return joined(self._of(name).rows)

    def digest(self, name: str) -> torch.Tensor:
        return joined(self._of(name).digest)

    def all_of(self, name: str) -> torch.Tensor:
        return joined(self._of(name).whole)

    def _of(self, name: str) -> Caught:
        if name not in self._caught:
            raise AssertionError(
                f"the pass went by {name} without a trace: a module was not called, or no gradient came back to it"
            )
        return self._caught[name]

    def signs(self, width: int) -> torch.Tensor:
        """(width, SIGNS) of +1 and -1, float64; the same on every rank and in every pass."""
        if width not in self._signs:
            drawn = np.random.default_rng([self._seed, width]).choice([-1.0, 1.0], (width, SIGNS))
            self._signs[width] = torch.from_numpy(drawn).to(self._training.x.device)
        return self._signs[width]

    def digested(self, x: torch.Tensor) -> torch.Tensor:
        """(T,) of x (T, ...): elements with signs of their own, added up in float64."""
        flat = x.detach().flatten(1)
        signs = self.signs(flat.shape[1])[:, 0]
        return torch.cat([some.double() @ signs for some in _few(flat)])

    # -- hooks -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for number, layer in enumerate(self._training.stack.layers):
            name = f"layer {number}"
            handles += self._half(layer.before, name, ("x", ""), ("q", "k", "v"))
            handles += self._half(layer.after, name, (AGAIN, "out"), ("y",))
            modules = layer.named_modules(prefix=f"layers.{number}")
            handles += self._weighted(modules, norms=number == self.layer)
        handles += self._weighted(self._training.head.named_modules(prefix="head"), norms=True)
        handles.append(self._training.head.logits.register_forward_hook(self._logits))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _half(self, half: nn.Module, layer: str, given: tuple[str, ...], gives: tuple[str, ...]) -> list[Any]:
        """Of half a layer: what it gets and gives, and the gradients of that."""
        begin = 0

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal begin
            if self._on:
                begin = self._placed(f"{layer} {gives[0]}", len(args[0]))
                catch(given, args)

        def after(module: nn.Module, args: tuple[Any, ...], results: Any) -> None:
            if self._on:
                catch(gives, results if isinstance(results, tuple) else (results,))

        def catch(names: tuple[str, ...], tensors: tuple[Any, ...]) -> None:
            for name, x in zip(names, tensors, strict=True):
                if name:
                    self._catch(layer, name, x, begin, digested=name in DIGESTED)

        # Ahead of FSDP2's hook, which hands the half a tensor of its own: what comes back to that is this half's part alone.
        return [half.register_forward_pre_hook(before, prepend=True), half.register_forward_hook(after)]

    def _placed(self, key: str, count: int) -> int:
        """Where the tokens begin that a module is called with."""
        begin = self._begin.get(key, 0)
        self._begin[key] = begin + count
        return begin

    def _catch(self, layer: str, name: str, x: torch.Tensor, begin: int, *, digested: bool) -> None:
        self._keep(layer, name, x.detach(), begin, digested=digested)
        if x.requires_grad and name in BACK:

            def back(grad: torch.Tensor) -> None:
                self._keep(layer, f"d{name}", grad.detach(), begin, digested=digested)

            x.register_hook(back)

    def _keep(self, layer: str, name: str, x: torch.Tensor, begin: int, *, digested: bool) -> None:
        caught = self._caught.setdefault(f"{layer} {name}", Caught())
        inside = self._sample[(self._sample >= begin) & (self._sample < begin + len(x))] - begin
        caught.rows[begin] = x[inside]
        if digested:
            caught.digest[begin] = self.digested(x)
        elif layer == f"layer {self.layer}":
            caught.whole[begin] = x

    def _weighted(self, modules: Iterator[tuple[str, nn.Module]], *, norms: bool) -> list[Any]:
        handles = []
        for name, module in modules:
            if isinstance(module, nn.Linear):
                self.watched.add(f"{name}.weight")
                handles.append(module.register_forward_hook(self._linear(f"{name}.weight")))
            elif isinstance(module, nn.RMSNorm) and norms:
                self.watched.add(f"{name}.weight")
                handles.append(module.register_forward_hook(self._norm(f"{name}.weight")))
        return handles

    def _linear(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, args: tuple[torch.Tensor], result: torch.Tensor) -> None:
            if not self._on or not result.requires_grad:
                return
            x = local(args[0].detach()).flatten(0, -2)
            signs = self.signs(x.shape[1])
            products = [(some.double() @ signs, some.double().square().sum(1, keepdim=True)) for some in _few(x)]
            shared, squares = (torch.cat(parts) for parts in zip(*products, strict=True))

            def back(grad: torch.Tensor) -> None:
                flat, at = self._settled(grad).flatten(0, -2), 0
                sums = self.sums(name, (flat.shape[1], SIGNS))
                for some in _few(flat):
                    wide, until = some.double(), at + len(some)
                    sums.value += wide.T @ shared[at:until]
                    sums.squares += (wide.square().T @ squares[at:until])[:, 0]
                    at = until

            result.register_hook(back)

        return hook

    def _norm(self, name: str) -> Callable[..., None]:
        def hook(module: nn.RMSNorm, args: tuple[torch.Tensor], result: torch.Tensor) -> None:
            if not self._on or not result.requires_grad:
                return
            x, eps = local(args[0].detach()).flatten(0, -2), module.eps
            assert eps is not None

            def back(grad: torch.Tensor) -> None:
                flat = self._settled(grad).flatten(0, -2)
                sums = self.sums(name, (flat.shape[1],))
                for one, other in zip(_few(flat), _few(x), strict=True):
                    wide = other.double()
                    terms = one.double() * wide / (wide.square().mean(1, keepdim=True) + eps).sqrt()
                    sums.value += terms.sum(0)
                    sums.squares += terms.square().sum(0)

            result.register_hook(back)

        return hook

    def _settled(self, grad: torch.Tensor) -> torch.Tensor:
        """A gradient as this rank has it, summed where ranks have parts of a sum; then collective among these."""
        own = local(grad.detach())
        parts = any(each.is_partial() for each in getattr(grad, "placements", ()))
        return self._divided.reduce(own.clone()) if parts else own

    def _logits(self, module: nn.Linear, args: tuple[torch.Tensor], result: torch.Tensor) -> None:
        if not self._on:
            return
        own = local(result.detach())
        begin = self._placed("head", len(own))
        labels = self._training.head_labels[begin : begin + len(own)]
        for logits, some in zip(_few(own), labels.split(_count(own.shape[1])), strict=True):
            self.losses.append(self._loss(logits.double(), some))

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum of the cross-entropies of rows (n, classes) of this rank's classes; collective where these are divided."""
        at = labels - self._first_class
        mine = (at >= 0) & (at < logits.shape[1]) & (labels >= 0)
        chosen = torch.where(mine, logits.gather(1, at.clamp(0, logits.shape[1] - 1)[:, None])[:, 0], 0.0)
        top = self._divided.reduce(logits.amax(1), "max")
        total, chosen = self._divided.reduce_together((logits - top[:, None]).exp().sum(1), chosen)
        return ((top + total.log() - chosen) * (labels >= 0)).sum()

    @property
    def _first_class(self) -> int:
        """The first of this rank's classes: the vocabulary is divided as torch's ``chunk`` does."""
        tp = self._training.sharing.tp
        if tp is None:
            return 0
        return -(-self._training.head.logits.out_features // tp.size()) * tp.get_local_rank()


def _count(width: int) -> int:
    """Rows of so many elements that are few enough to be had in float64."""
    return max(1, ELEMENTS // max(1, width))


def _few(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.split(_count(x.shape[1]))
