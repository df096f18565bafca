"""Strategies for several steps on inputs that change little: what a step may take from the step before, said and run.

A *step* is a pass through ``layers`` attention layers, as a diffusion model makes one for each noise level. Between layers there is
what a model's residual stream is: a latent h (T, Hq, D), 0 at first, to which each layer adds its result. With the inputs q, k, v
of a layer at a step::

    out = attention(q + h, k, v);   h = h + out

and h goes on from step to step. Which steps' keys a row sees is the strategy's: it says so (``views``), by which its run is
checked, and runs it (``advance``), which reads nothing of what it says.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lcbench.cp.base import Passes, Place, RankRun, Strategy
from lcbench.kernels.base import Kernel, Unsupported
from lcbench.masks.band import Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.held import Held

if TYPE_CHECKING:
    import torch

    from lcbench.schedule.execute import Counters

WARMUP, STEADY = "warmup", "steady"
NO_LAYER = "ranks that each have their own layers share none"


class Layer(NamedTuple):
    """Inputs of a layer at a step, of the tokens that a rank is given: q (T, Hq, D), k and v (T, Hk, D)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


Inputs = Sequence[Sequence[Layer]]  # [step][layer], of the layers that the rank has


@dataclass(frozen=True)
class Kept:
    """What a rank did with some rows at a step, for the check.

    Attributes:
        step, part: which step, and which part of its rows (0 where there is one).
        rows: their tokens, ascending within a part, (T,).
        before: the latent that the first of the rank's layers began with, (T, Hq, D); None: zeros.
        outs: the result of each of its layers, (T, Hq, D).
        after: the latent that it passed on, (T', Hq, D), of the last of the rows.
    """

    step: int
    part: int
    rows: Ints
    before: torch.Tensor | None
    outs: list[torch.Tensor]
    after: torch.Tensor


Keep = Callable[[Kept], None]


@dataclass(frozen=True)
class View:
    """What some rows see at a step, as the strategy says it, where ranks each have some of the keys.

    Attributes:
        rows: tokens of the rows, ascending, (R,); None: all.
        keys: tokens whose keys this rank has, (K,), each in one rank's view.
        ages: how many steps old each of these keys is to the rows, (K,).
    """

    rows: Ints | None
    keys: Ints
    ages: Ints


class StepRun(RankRun):
    """Steps on one rank. A subclass takes the defaults below.

    Attributes:
        tokens: of the results that this rank gives.
        given: of the inputs that it is given, in the order of its tensors.
        layers: those that it computes, of all.
        together: whether ranks share each attention, as parts of one sequence. Else each has all tokens of its own layers.
    """

    given: Ints
    layers: range
    together: bool = True

    @abstractmethod
    def phases(self) -> dict[str, range]:
        """The steps by phase, in their order."""

    @abstractmethod
    def advance(self, steps: range, inputs: Inputs, before: Sequence[torch.Tensor], keep: Keep | None) -> list[torch.Tensor]:
        """Run some steps, after all that are before them, and give the latent (T, Hq, D) after each, of ``tokens``. Collective.

        Args:
            inputs: of all steps.
            before: what the steps before these gave.
            keep: takes what was done, step by step.
        """

    @abstractmethod
    def views(self, step: int, part: int) -> Iterator[View]:
        """What rows of a part of a step see. Where ranks are ``together``, every rank gives as many, each of the same rows."""

    @abstractmethod
    def begins(self, results: Sequence[torch.Tensor], step: int, part: int) -> torch.Tensor | None:
        """What ``Kept.before`` of a rank with the first layer must be by what ``advance`` gave for all steps; None: zeros."""

    @abstractmethod
    def gave(self, results: Sequence[torch.Tensor], step: int, part: int) -> torch.Tensor:
        """What of these results ``Kept.after`` of a rank with the last layer must be."""

    def pairs(self, mask: Mask, q_heads: int, step: int) -> int:
        """Pairs over all query heads that a layer has at a step, on all ranks, each once."""
        return mask.pairs(q_heads)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        """One layer whose rows see the keys of their own step; where ranks are ``together``. Collective."""
        raise Unsupported(NO_LAYER)

    def lse(self, saved: Any) -> torch.Tensor:
        raise Unsupported(NO_LAYER)

    def backward(self, dout: torch.Tensor, saved: Any) -> tuple[torch.Tensor, ...]:
        raise Unsupported("steps have no backward pass")

    def bare(self, *, compute: bool, communicate: bool) -> StepRun | None:
        """The same run without kernels or without messages, whose results mean nothing; None where there is none."""
        return None


class OverSteps(Strategy):
    """A strategy that knows of steps: it runs nothing but ``workload=denoise``."""

    def only_in_a_step(self) -> str | None:
        return "takes keys and values of the step before, and attention alone has one step: workload=denoise direction=forward"

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        if problem.backward:
            return "takes keys and values of the step before, so it has no backward pass: workload=denoise direction=forward"
        if problem.rectangular:
            return f"every token has a query in a step, and here {problem.queries} of {problem.seqlen} have one"
        return None

    def approximates(self, problem: Problem, mask: Mask) -> bool:
        return True

    def too_few(self, steps: int, layers: int, problem: Problem) -> str | None:
        """Why it cannot run so many steps of so many layers, or None."""
        return None

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> RankRun:
        raise Unsupported(self.only_in_a_step())

    @abstractmethod
    def start_steps(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place, steps: int, layers: int) -> StepRun:
        """Make this rank ready to run so many steps. Collective.

        Raises:
            Unsupported: the kernel cannot run a tile of this rank.
        """


class LayerByLayer(StepRun):
    """A run of ranks that are ``together``, each with the same tokens in all steps and layers.

    Args:
        count: steps.
        layers: of a step.
    """

    def __init__(self, tokens: Ints, count: int, layers: int) -> None:
        self.tokens = self.given = tokens
        self.count, self.layers = count, range(layers)

    @abstractmethod
    def attend(self, step: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The result (T, Hq, D) of a layer at a step. Collective."""

    def begin(self) -> None:
        """Called before some steps are run."""

    def phases(self) -> dict[str, range]:
        return {STEADY: range(self.count)}

    def advance(self, steps: range, inputs: Inputs, before: Sequence[torch.Tensor], keep: Keep | None) -> list[torch.Tensor]:
        self.begin()
        latent = before[-1] if before else None
        results: list[torch.Tensor] = []
        for step in steps:
            begun, outs = latent, []
            for layer, (q, k, v) in enumerate(inputs[step]):
                out = self.attend(step, layer, q if latent is None else q + latent, k, v).to(q.dtype)
                latent = out if latent is None else latent + out
                outs.append(out)
            assert latent is not None
            results.append(latent)
            if keep is not None:
                keep(Kept(step, 0, self.tokens, begun, outs, latent))
        return results

    def begins(self, results: Sequence[torch.Tensor], step: int, part: int) -> torch.Tensor | None:
        return results[step - 1] if step else None

    def gave(self, results: Sequence[torch.Tensor], step: int, part: int) -> torch.Tensor:
        return results[step]


class Plain(LayerByLayer):
    """Any strategy's attention, once for each layer of each step: every row sees the keys of its own step.

    Args:
        run: the strategy at work.
        passes: what runs in its place; None: the run itself.
    """

    def __init__(self, run: RankRun, count: int, layers: int, passes: Passes | None = None) -> None:
        super().__init__(run.tokens, count, layers)
        self._run, self._passes = run, passes or run
        self._sent = self._between_nodes = 0
        self.own_lse = run.own_lse

    @property
    def held(self) -> Held:
        return self._run.held

    def begin(self) -> None:
        self._sent = self._between_nodes = 0

    def attend(self, step: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, _ = self._passes.forward(q, k, v)
        if self._passes is self._run and (counters := self._run.counters()) is not None:
            self._sent += counters.bytes_sent
            self._between_nodes += counters.bytes_between_nodes
        return out

    def views(self, step: int, part: int) -> Iterator[View]:
        yield View(None, self.tokens, np.zeros_like(self.tokens))

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        return self._run.forward(q, k, v)

    def lse(self, saved: Any) -> torch.Tensor:
        return self._run.lse(saved)

    def counters(self) -> Counters | None:
        counters = self._run.counters()
        return counters and replace(counters, bytes_sent=self._sent, bytes_between_nodes=self._between_nodes)

    def bare(self, *, compute: bool, communicate: bool) -> StepRun | None:
        passes = self._run.replay(compute=compute, communicate=communicate)
        return Plain(self._run, self.count, len(self.layers), passes) if passes else None


@dataclass(frozen=True)
class InSteps(Strategy):
    """A strategy as ``start`` makes it ready for ``steps`` steps of ``layers`` layers: its run is a ``StepRun``."""

    strategy: Strategy
    steps: int
    layers: int

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return self.strategy.unsupported(problem, mask)

    def computes(self, problem: Problem, mask: Mask) -> Mask:
        return self.strategy.computes(problem, mask)

    def approximates(self, problem: Problem, mask: Mask) -> bool:
        return self.strategy.approximates(problem, mask)

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> StepRun:
        if isinstance(self.strategy, OverSteps):
            return self.strategy.start_steps(problem, mask, kernel, place, self.steps, self.layers)
        return Plain(self.strategy.start(problem, mask, kernel, place), self.steps, self.layers)
