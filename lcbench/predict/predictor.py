"""The prediction of a cell: its draws, simulated on a machine with what was fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcbench.grid import build
from lcbench.grid.cell import Cell
from lcbench.masks.band import DoesNotFit
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.predict.fitted import Coefficients, Fitted, KernelFit
from lcbench.predict.machines import machine_of, peak_flops
from lcbench.schedule.lowering import OPERATIONS, Operation
from lcbench.schedule.machine import Machine
from lcbench.schedule.simulate import Phase, Simulated, simulate

# Where nothing was fitted: a share of the peak, FLOP/s of a CPU rank, and how far such a prediction may be off.
UNFITTED_SHARE, UNFITTED_CPU, UNFITTED_ERROR = 0.5, 5e9, 1.0
DRAWS = 4  # of a mask that are simulated at most


class CannotPredict(ValueError):
    """Why there is no prediction of a cell, in one line."""


@dataclass(frozen=True)
class Prediction:
    """What a cell would take; means over the draws of its mask.

    Attributes:
        phases: by name.
        pairs: unmasked, over all query heads.
        buffer_bytes, peak_bytes: of the rank with most, see ``Simulated``.
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
    """Predicts cells on a machine; ``fitted``: None where nothing was fitted, and a share of the peak is guessed."""

    machine: Machine
    fitted: Fitted | None = None

    @classmethod
    def of(cls, machine: str, fit: Path | None = None) -> Predictor:
        """Raises:
        ValueError: there is no such machine, or the file is no fit.
        """
        return cls(machine_of(machine), Fitted.read(fit) if fit is not None else None)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The collectives of the machine's backend."""
        return OPERATIONS["gloo" if self.machine.device == "cpu" else "nccl"]

    def predict(self, cell: Cell, *, memory: bool = True) -> Prediction:
        """Raises:
        CannotPredict: nothing is known of how the strategy or the workload works.
        """
        kernel = self._kernel(cell)
        draws, pairs = [], []
        for number in range(min(build.draws(cell.config["mask"]), DRAWS)):
            simulated, found = self._draw(cell, kernel, number, memory=memory)
            draws.append(simulated)
            pairs.append(found)
        phases = {name: _mean([draw.phases[name] for draw in draws], self._factor(cell, name)) for name in draws[0].phases}
        return Prediction(
            cell, self.machine, phases, float(np.mean(pairs)),
            max(d.buffer_bytes for d in draws), max(d.peak_bytes for d in draws),
            max((self.fitted.error.get(name, UNFITTED_ERROR) for name in phases), default=UNFITTED_ERROR)
            if self.fitted is not None and kernel.sources else UNFITTED_ERROR,
            "; ".join(kernel.sources) or f"no fit: {UNFITTED_SHARE:.0%} of the peak is guessed", tuple(draws),
        )  # fmt: skip

    def _draw(self, cell: Cell, kernel: KernelFit, number: int, *, memory: bool) -> tuple[Simulated, float]:
        config, problem = cell.config, cell.problem
        strategy = build.build_strategy(config["cp"])
        try:
            mask = build.build_mask(config["mask"], problem.seqlen, problem.heads, config["seed"], number)
        except DoesNotFit as error:
            raise CannotPredict(str(error)) from error
        if reason := strategy.unsupported(problem, mask):
            raise CannotPredict(reason)
        modelled = strategy.modelled(problem, mask)
        if modelled is None:
            raise CannotPredict(f"cp={config['cp']['name']} is a library's, and nothing says how it works")
        lowering = getattr(strategy, "lowering", "auto")
        operations = self.operations if lowering == "auto" else ()
        return simulate(modelled, self.machine, kernel, operations=operations, memory=memory), mask.pairs(problem.heads.q)

    def _kernel(self, cell: Cell) -> KernelFit:
        name, dtype = cell.config["kernel"]["name"], cell.problem.dtype
        found = self.fitted.kernel(name, dtype) if self.fitted is not None else None
        if found is not None:
            return found
        peak = peak_flops(self.machine, dtype)
        rate = UNFITTED_SHARE * peak if peak else UNFITTED_CPU
        guess = Coefficients(flop_s=1 / rate, waste_s=1 / rate, call_s=self.machine.launch_s)
        return KernelFit(kernel=name, dtype=dtype, forward=guess, backward=guess)

    def _factor(self, cell: Cell, phase: str) -> float:
        return self.fitted.factors.get(f"{cell.config['cp']['name']}/{phase}", 1.0) if self.fitted is not None else 1.0


def _mean(phases: Sequence[Phase], factor: float) -> Phase:
    """The mean of draws, times what an implementation takes more."""
    means = {name: factor * float(np.mean([getattr(phase, name) for phase in phases])) for name in Phase.__dataclass_fields__}
    return Phase(**means)
