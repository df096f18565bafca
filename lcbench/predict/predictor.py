"""The prediction of a cell: its draws, simulated on a machine with what was fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.grid.build import build_kernel, build_strategy
from lcbench.grid.cell import Cell
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.predict.draws import CannotPredict, draws_of
from lcbench.predict.fit import UNFITTED_SHARE, guess
from lcbench.predict.fitted import Fit, KernelFit, MemoryFit, Workspace
from lcbench.predict.machines import fit_of, machine_of, peak_flops, platform_of
from lcbench.predict.memory import SCORE
from lcbench.schedule.machine import Machine
from lcbench.schedule.simulate import Phase, Simulated, play

__all__ = ["CannotPredict", "Prediction", "Predictor"]

# How far a prediction may be off whose kernel was not fitted: with another one of the device in its place, and with a mere guess.
NEIGHBOUR_ERROR, UNFITTED_ERROR = 0.5, 1.0
# How far a peak may be off whose kernel was not fitted for memory: from what the schedule holds, down, and from the guess, up. On
# an H200 peaks of eight kernels were 0.87 to 3.8 times what the schedule holds, but for one mask of one of them (results/h200).
OWN_ERROR, UNFITTED_MEMORY = 0.2, 3.0
# And one of a strategy that no observed cell had, where implementations of others took something besides.
STRATEGY_ERROR = 0.5
NO_FIT = f"no fit: {UNFITTED_SHARE:.0%} of the peak is guessed"


@dataclass(frozen=True)
class Prediction:
    """What a cell would take; means over the draws of its mask.

    Attributes:
        phases: by name.
        pairs: unmasked, over all query heads.
        buffer_bytes, peak_bytes: of the rank with most, see ``Simulated``.
        peak_interval: bytes, 95 %.
        error: relative half-width of the 95 % interval of every time.
        basis: what it rests on, in words.
        draws: the simulated draws.
    """

    cell: Cell
    machine: Machine
    phases: dict[str, Phase]
    pairs: float
    buffer_bytes: int
    peak_bytes: int
    peak_interval: tuple[float, float]
    error: float
    basis: str
    draws: tuple[Simulated, ...]

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def interval(self) -> tuple[float, float]:
        """Of ``seconds``, 95 %."""
        return self.seconds / (1 + self.error), self.seconds * (1 + self.error)

    @property
    def needs_bytes(self) -> float:
        """Of a rank: inputs, results, gradients, buffers and what its kernel needs inside."""
        return self.peak_bytes + self.cell.problem.input_bytes

    @property
    def needs_interval(self) -> tuple[float, float]:
        """Of ``needs_bytes``, 95 %."""
        low, high = self.peak_interval
        return low + self.cell.problem.input_bytes, high + self.cell.problem.input_bytes

    def metrics(self) -> dict[str, float]:
        """By the keys of ``measure.metrics``."""
        heads, ranks = self.cell.problem.heads, self.cell.problem.scale.world_size
        flops = {"forward": forward_flops(self.pairs, heads), "backward": backward_flops(self.pairs, heads)}
        found: dict[str, float] = {}
        for name, phase in self.phases.items():
            found[f"time/{name}/median_s"] = phase.seconds
            found[f"compute/{name}/tflops_per_gpu"] = flops[name] / phase.seconds / ranks / 1e12
            if ranks > 1:
                found[f"overlap/{name}/compute_s"] = phase.seconds - phase.exposed_s
                found[f"overlap/{name}/exposed_s"] = phase.exposed_s
        found["time/total/median_s"] = self.seconds
        found["compute/tflops_per_gpu"] = sum(flops[name] for name in self.phases) / self.seconds / ranks / 1e12
        if peak := peak_flops(self.machine, self.cell.problem.dtype):
            found["compute/peak_tflops"] = peak / 1e12
            found["compute/mfu"] = found["compute/tflops_per_gpu"] * 1e12 / peak
            found |= {f"compute/{n}/mfu": found[f"compute/{n}/tflops_per_gpu"] * 1e12 / peak for n in self.phases}
        found["memory/peak_bytes"], found["memory/buffer_bytes"] = float(self.peak_bytes), float(self.buffer_bytes)
        return found


@dataclass(frozen=True)
class Predictor:
    """Predicts cells on a machine.

    Attributes:
        fitted: None where nothing was fitted, and a share of the peak is guessed.
        fit: the file that it is from; None: from none.
    """

    machine: Machine
    fitted: Fit | None = None
    fit: Path | None = None

    @classmethod
    def of(cls, machine: str, fit: Path | None = None) -> Predictor:
        """``fit``: a file of lcbench.fit; None: the one that lcbench has of the machine, if somebody made one.

        Raises:
            ValueError: there is no such machine, or the file is no fit of it.
        """
        found, path = machine_of(machine), fit or fit_of(machine)
        if path is None:
            return cls(found)
        fitted = Fit.read(path)
        if fitted.machine != machine:
            raise ValueError(f"{path} is a fit of machine={fitted.machine}, not of machine={machine}")
        return cls(fitted.links.of(found), fitted, path)

    def refusal(self, cell: Cell) -> str | None:
        """Why a cell runs on no machine like this one, whatever is installed here, as ``cp te_p2p: ...``; None: it does.

        ``predict`` does not ask: what a plan takes is estimated also where nobody knows yet on what.
        """
        platform = platform_of(self.machine)
        for axis, choice in (("kernel", build_kernel(cell.config["kernel"])), ("cp", build_strategy(cell.config["cp"]))):
            if reason := choice.unavailable(cell.problem, platform):
                return f"{axis} {cell.config[axis]['name']}: {reason}"
        return None

    def predict(self, cell: Cell, *, memory: bool = True) -> Prediction:
        """Raises:
        CannotPredict: nothing is known of how the strategy or the workload works.
        """
        kernel, basis, error = self._kernel(cell)
        inside = self._memory(cell)
        if inside is not None:
            kernel = kernel.model_copy(update={"workspace": inside.workspace})
        elif build_kernel(cell.config["kernel"]).holds_scores(platform_of(self.machine)):
            kernel = kernel.model_copy(update={"workspace": Workspace(score=SCORE)})
        draws, pairs = [], []
        for prepared, found in draws_of(cell, self.machine):
            draws.append(play(prepared, self.machine, kernel, memory=memory))
            pairs.append(found)
        peak, own = (max(getattr(draw, name) for draw in draws) for name in ("peak_bytes", "own_bytes"))
        if inside is not None:
            bounds = peak / (1 + inside.error), peak * (1 + inside.error)
        else:  # what the schedule itself holds is known, and what the kernel adds is not
            bounds = own / (1 + OWN_ERROR), peak * (1 + UNFITTED_MEMORY)
        phases = {name: _mean([draw.phases[name] for draw in draws]) for name in draws[0].phases}
        fitted = self.fitted.error if self.fitted is not None else {}
        return Prediction(
            cell, self.machine, phases, float(np.mean(pairs)),
            max(d.buffer_bytes for d in draws), peak, bounds,
            max(error, *(fitted.get(name, UNFITTED_ERROR) for name in phases)), basis, tuple(draws),
        )  # fmt: skip

    def _memory(self, cell: Cell) -> MemoryFit | None:
        """What was fitted of the memory of the cell's kernel; None where nothing was, or a library holds what it likes."""
        if self.fitted is None or not isinstance(build_strategy(cell.config["cp"]), Scheduled):
            return None
        return self.fitted.memory_of(cell.config["kernel"]["name"], cell.problem)

    def _kernel(self, cell: Cell) -> tuple[KernelFit, str, float]:
        """The kernel as the cell's strategy calls it, what that rests on, and the least error of it."""
        name, dtype, strategy = cell.config["kernel"]["name"], cell.problem.dtype, cell.config["cp"]["name"]
        if self.fitted is None:
            mere = guess(self.machine, dtype)
            return KernelFit(kernel=name, dtype=dtype, forward=mere, backward=mere), NO_FIT, UNFITTED_ERROR
        factors = (self.fitted.factor(strategy, "forward"), self.fitted.factor(strategy, "backward"))
        error = 0.0
        said: tuple[str, ...] = ()
        found = self.fitted.kernel(name, dtype)
        if found is None and (found := self.fitted.neighbour(dtype)) is not None:
            error, said = NEIGHBOUR_ERROR, (f"kernel {name} was not fitted, {found.kernel} stands in for it",)
        if found is None:
            mere = guess(self.machine, dtype)
            found = KernelFit(kernel=name, dtype=dtype, forward=mere, backward=mere, sources=(NO_FIT,))
            error = UNFITTED_ERROR
        if not factors[0].sources:
            said = (*said, f"cp={strategy} was not fitted: its schedule with the kernel alone")
            error = max(error, STRATEGY_ERROR if self.fitted.factors else 0.0)
        return found.model_copy(update={"factors": factors}), "; ".join([*said, *found.sources]), error


def _mean(phases: Sequence[Phase]) -> Phase:
    """The mean of draws."""
    return Phase(**{name: float(np.mean([getattr(phase, name) for phase in phases])) for name in Phase.__dataclass_fields__})
