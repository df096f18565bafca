"""The check of a training step: every part against float64, and every later pass against the first.

    attention          of one layer: as that of an attention cell, on the tensors that the step gave it
    layers, head       tokens of every rank: q, k, v, y, dx, dout of every layer, and dy of the head (``lcbench.workloads.exact``)
    loss               summed anew from the logits of all tokens
    weights            gradients of all weights against what they must sum to over all tokens of all ranks
    between layers     what one half or layer gives is what the next one gets, for every token, and so the gradients
    last passes        dx of every token, the loss and all weights' gradients as in the first pass with these inputs

The inputs have two signs in turn, so there are two first passes; each is checked, the attention of another layer in either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from lcbench.measure.bounds import Bounds, Check, Judge, verdict
from lcbench.measure.numerics import REFERENCE
from lcbench.measure.ranks import ALONE, EVERY, Ranks
from lcbench.measure.session import Gang
from lcbench.workloads import exact
from lcbench.workloads.models import Model
from lcbench.workloads.recorder import AGAIN, Recorder
from lcbench.workloads.sharing import whole
from lcbench.workloads.training import Training
from lcbench.workloads.transformer import Division

LEAST, WORK = 64, {"cpu": 1 << 30, "cuda": 1 << 36}  # tokens of a sample; products of a token and a weight that a sample may have
HIDDEN = ("x", "y", "dx", "dy")  # what has no heads
ROWS = 4096  # in float64 at a time
CHAIN, WEIGHTS, LOSS = "between layers", "weights", "loss"
# A later pass may sum in another order: in units of rounding, and beside it what rounds terms of which little is left.
AGAIN_HALF, AGAIN_SINGLE, USUAL = 16.0, 4.0, 16.0


@dataclass(frozen=True)
class Digest:
    """What later passes are compared with: a number per token of dx, numbers per row of each weight's gradient, and the loss.

    Attributes:
        dx, weights: signed sums.
        spread: of each number of a weight's, in units of rounding.
        loss: of this rank's tokens.
    """

    dx: torch.Tensor
    weights: dict[str, torch.Tensor]
    spread: dict[str, torch.Tensor]
    loss: float

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.dx, *self.weights.values(), *self.spread.values()))


class StepCheck:
    """The check of one draw of a block cell, on one rank. Methods are collective.

    Args:
        bounds: of the cell's attention.
        seed: of the samples: the cell's seed, the attempt and the draw.
    """

    def __init__(self, training: Training, model: Model, bounds: Bounds, seed: list[int], gang: Gang) -> None:
        self._training, self._model, self._bounds, self._gang = training, model, bounds, gang
        self._tokens = training.stack.attention.run.tokens
        self._judge = Judge()
        # Ranks that have the other heads of the same tokens look at the same ones.
        self._random = np.random.default_rng([*seed, gang.dp_index, gang.cp_rank])
        # Signs and the layer that is looked at are the same on all ranks, of all groups of a mesh.
        self._number = int(np.random.default_rng(seed[:3]).integers(0, 1 << 31))
        self._sample = self._sampled(len(self._tokens))
        self._firsts: dict[bool, Digest] = {}
        self._divided = _ranks(training.sharing.tp)
        self._same = _ranks(training.sharing.same)
        self.labelled = training.labelled

    def _sampled(self, count: int) -> torch.Tensor:
        """Local positions: all if that is little work, else the first, the last, and a draw."""
        budget = WORK[self._gang.device.type] // self._model.layer_parameters() // len(self._training.stack.layers)
        wanted = max(LEAST, budget)
        if wanted >= count:
            return torch.arange(count, device=self._gang.device)
        drawn = self._random.choice(count, wanted, replace=False)
        return torch.from_numpy(np.unique([0, count - 1, *drawn])).to(self._gang.device)

    @property
    def held_bytes(self) -> int:
        return self._sample.numel() * 8 + sum(first.bytes for first in self._firsts.values())

    def recorder(self, negated: bool) -> Recorder:
        """What catches a pass; with negated inputs the attention of the layer behind."""
        layers = len(self._training.stack.layers)
        return Recorder(self._training, self._sample, (self._number + negated) % layers, self._number, self._divided)

    def first(self, recorder: Recorder, negated: bool) -> None:
        """Check a pass, and keep what later ones with the same sign are compared with."""
        tokens = self._tokens[self._sample.cpu().numpy()]
        for number in range(len(self._training.stack.layers)):
            self._layer(recorder, number, tokens)
        self._head(recorder, tokens)
        self._between(recorder)
        spread = self._weights(recorder)
        self._firsts[negated] = self._digest(recorder, spread)

    def last(self, part: str, passed: Any, negated: bool) -> None:
        """Check a later pass, of which the last phase has just given ``passed``."""
        first, bounds = self._firsts[negated], self._bounds
        recorder = self.recorder(negated)
        recorder.passed = passed
        now = self._digest(recorder, first.spread)
        layers = len(self._training.stack.layers)
        unit = (AGAIN_HALF if bounds.half else AGAIN_SINGLE) * bounds.unit * (1 + layers)
        norm = _norms(passed[0])
        usual = (self._gang.ranks.reduce(norm.square().sum()) / bounds.problem.seqlen).sqrt()
        allowed = unit * (norm + USUAL * usual * (2.0**-10 if bounds.half else 1.0))
        self._judge.elements(part, "dx", now.dx, first.dx, allowed, self._tokens)
        for name, got in now.weights.items():
            self._rows(part, name, got, first.weights[name], unit * (1 if bounds.half else USUAL) * first.spread[name])
        self._judge.number(part, "loss", abs(now.loss - first.loss), unit * USUAL * abs(first.loss), "all tokens")

    def found(self) -> Check:
        """What all ranks have found so far."""
        own = self._judge.found, len(self._sample) if self._gang.tp_index == 0 else 0, len(self._sample) == len(self._tokens)
        judges, counts, wholes = zip(*EVERY.all_gather_object(own), strict=True)
        return verdict(judges, REFERENCE, sum(counts), sum(counts), all(wholes), {})

    # -- parts -----------------------------------------------------------------------------------------------------

    def _layer(self, recorder: Recorder, number: int, tokens: Any) -> None:
        """The token-wise halves of a layer."""
        names = ("x", "out", "dy", "dq", "dk", "dv")
        given = {name: self._every_head(name, recorder.rows(f"layer {number} {name}")) for name in names}
        weights = _whole(self._training.stack.layers[number].named_parameters())
        known = exact.layer(self._model, weights, tokens, given, self._number + number)
        for name, one in known.items():
            got = self._dx(recorder, number) if name == "dx" else self._every_head(name, recorder.rows(f"layer {number} {name}"))
            self._compare("layers", f"{name} of layer {number}", got, one, tokens)

    def _dx(self, recorder: Recorder, number: int) -> torch.Tensor:
        """Rows of what a layer gives back: what the layer before gets, or the step."""
        if number:
            return recorder.rows(f"layer {number - 1} dy")
        return recorder.dx[self._sample]

    def _every_head(self, name: str, own: torch.Tensor) -> torch.Tensor:
        """Rows (n, heads, D) of this rank's heads as those of all; of what has no heads as they are. Collective."""
        ranks = self._gang.mesh.tp
        if ranks == 1 or name in HIDDEN:
            return own
        found = own.new_zeros((len(own), ranks, *own.shape[1:]))
        found[:, self._gang.tp_index] = own
        return self._divided.reduce(found).flatten(1, 2)

    def _head(self, recorder: Recorder, tokens: Any) -> None:
        """dy of the head, and the loss."""
        y, dy, loss = recorder.head
        labels = self._training.labels[self._sample]
        weights = _whole(self._training.head.named_parameters())
        known = exact.head(self._model, weights, y[self._sample], labels, self._share, self._number)
        self._compare("head", "dy", dy[self._sample], known["dy"], tokens)
        want = float(torch.stack(recorder.losses).sum()) * self._share
        wide = torch.finfo(torch.float64 if self._bounds.dtype == torch.float64 else torch.float32).eps
        # Logits are had in the type of sums, and losses are added one by one.
        allowed = wide * max(64.0, len(self._tokens) ** 0.5) * 16 * abs(want)
        self._judge.number("head", LOSS, abs(float(loss) - want), allowed, "all tokens")

    @property
    def _share(self) -> float:
        """Of the loss that a labelled token has: it is the mean of all sequences' means."""
        return 1 / max(1, self.labelled) / self._gang.mesh.dp

    def _between(self, recorder: Recorder) -> None:
        """Whether halves and layers go on with what those before gave; ``_layer`` does so for gradients."""
        y, dy, _ = recorder.head
        at, end = recorder.digest, len(self._training.stack.layers) - 1
        links = [
            ("the step", recorder.digested(self._training.x), "x of layer 0", at("layer 0 x")),
            (f"layer {end}", at(f"layer {end} y"), "y of the head", recorder.digested(y)),
            ("the head", recorder.digested(dy), f"dy of layer {end}", at(f"layer {end} dy")),
        ]
        for i in range(end + 1):
            links.append((f"layer {i}", at(f"layer {i} x"), "its second half", at(f"layer {i} {AGAIN}")))
        for i in range(end):
            links.append((f"layer {i}", at(f"layer {i} y"), f"x of layer {i + 1}", at(f"layer {i + 1} x")))
        self._images(recorder, recorder.dx)
        for one, gave, other, got in links:
            self._judge.elements(CHAIN, f"{one} to {other}", got, gave, torch.zeros_like(gave), self._tokens)

    def _images(self, recorder: Recorder, dx: torch.Tensor) -> None:
        """Whether the gradients of images' tokens have come to where the images are. That their values arrived shows in ``x``."""
        if (reshard := self._training.reshard) is None:
            return
        every = torch.zeros(self._bounds.problem.seqlen, dtype=torch.float64, device=dx.device)
        every[torch.from_numpy(self._tokens).to(dx.device)] = recorder.digested(dx)
        gave = self._gang.ranks.reduce(every)[torch.from_numpy(reshard.tokens).to(dx.device)]
        got = recorder.digested(reshard.returned)
        if len(got):
            self._judge.elements(CHAIN, "dx of the step to images", got, gave, torch.zeros_like(gave), reshard.tokens)

    def _weights(self, recorder: Recorder) -> dict[str, torch.Tensor]:
        """Weights' gradients against their sums over all tokens of all ranks; the spread of each."""
        spreads = {}
        for name, got in self._gradients(recorder).items():
            if name not in recorder.watched:
                continue  # a norm of another layer
            sums = recorder.sums(name, tuple(got.shape))
            # What a rank has summed is rounded to the inputs' type, however little is left of it over all ranks.
            want, squares = self._same.reduce_together(sums.value, sums.squares + sums.rounded)
            if _by_head(self._training, name):
                want, squares = self._divided.reduce_together(want, squares)
            spreads[name] = spread = squares.sqrt()
            self._rows(WEIGHTS, name, got, want, self._bounds.factor * self._bounds.unit * spread)
        return spreads

    def _gradients(self, recorder: Recorder) -> dict[str, torch.Tensor]:
        """Of every weight's gradient its rows times signs, (out, SIGNS), or its elements, in float64."""
        found = {}
        for name, weight in self._training.weights().items():
            assert weight.grad is not None
            grad = self._own_part(name, whole(weight.grad))
            if grad.ndim == 1:
                found[name] = grad.double()
            else:
                signs = recorder.signs(grad.shape[1])
                found[name] = torch.cat([some.double() @ signs for some in grad.split(ROWS)])
        return found

    def _own_part(self, name: str, grad: torch.Tensor) -> torch.Tensor:
        """Of a whole gradient what this rank of tensor parallelism has."""
        division, module = _divided_by(self._training, name)
        ranks, own = self._gang.mesh.tp, self._gang.tp_index
        if ranks == 1 or module not in (*division.columns, *division.classes, *division.rows):
            return grad
        return grad.chunk(ranks, 1 if module in division.rows else 0)[own]

    def _digest(self, recorder: Recorder, spread: dict[str, torch.Tensor]) -> Digest:
        dx, loss = recorder.passed
        weights = {name: x.clone() for name, x in self._gradients(recorder).items() if name in spread}
        return Digest(recorder.digested(dx), weights, spread, float(loss))

    def _compare(self, part: str, name: str, got: torch.Tensor, known: exact.Known, tokens: Any) -> None:
        bounds = self._bounds
        allowed = bounds.factor * bounds.unit * known.spread + bounds.tiny
        self._judge.elements(part, name, got.double(), known.value, allowed, tokens)

    def _rows(self, part: str, name: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> None:
        """Numbers of rows of a weight's gradient, (out, SIGNS) or (out,), with a bound (out,)."""
        error = (got - want).abs().flatten(1).amax(1) if got.ndim > 1 else (got - want).abs()
        ratio = torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=torch.inf, posinf=torch.inf)
        row = int(ratio.argmax())
        self._judge.number(part, name, float(error[row]), float(bound[row]), f"row {row}")


def _norms(x: torch.Tensor) -> torch.Tensor:
    """(T,) of (T, hidden)."""
    return torch.cat([some.double().square().sum(1).sqrt() for some in x.split(ROWS)])


def _whole(named: Any) -> dict[str, torch.Tensor]:
    return {name: whole(weight.detach()) for name, weight in named}


def _ranks(mesh: DeviceMesh | None) -> Ranks:
    """Those along a dimension of a mesh; this one alone where there is none."""
    return Ranks(mesh.get_group()) if mesh is not None else ALONE


def _divided_by(training: Training, name: str) -> tuple[Division, str]:
    """How the half that has a weight is divided, and the name of the weight's module in it."""
    *path, module, _ = name.split(".")
    half = training.head if path == ["head"] else getattr(training.stack.layers[int(path[1])], path[2])
    return half.division, module


def _by_head(training: Training, name: str) -> bool:
    """Whether a weight sees some of the heads on each rank of tensor parallelism."""
    division, module = _divided_by(training, name)
    return module in division.by_head
