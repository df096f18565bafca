"""The prediction of a cell: its draws, simulated on a machine with what was fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lcbench.cp.base import Scheduled
from lcbench.grid.build import build_kernel, build_planner, build_strategy, input_bytes
from lcbench.grid.cell import Cell
from lcbench.grid.own import answer
from lcbench.measure.derived import derived
from lcbench.predict.batches import Batched
from lcbench.predict.composed import Composed, Together
from lcbench.predict.draws import CannotPredict
from lcbench.predict.fit import UNFITTED_SHARE, error_key, guess, guess_dense
from lcbench.predict.fitted import Coefficients, DenseFit, Factor, Fit, KernelFit, MemoryFit, Workspace, regime
from lcbench.predict.machines import fit_of, machine_of, peak_flops, platform_of
from lcbench.predict.memory import SCORE
from lcbench.schedule.machine import Machine
from lcbench.schedule.schedule import Side
from lcbench.schedule.simulate import Phase, Simulated
from lcbench.workloads.parts import Attend, Made, Share

__all__ = ["CannotPredict", "Prediction", "Predictor"]

# How far a prediction may be off whose kernel was not fitted: with another one of the device in its place, and with a mere guess.
NEIGHBOUR_ERROR, UNFITTED_ERROR = 0.5, 1.0
# And one of a kernel that was fitted in other regimes only. What a decode takes beside reading its cache is how the kernel shares a
# request's keys among blocks, which nothing with more rows shows.
UNSEEN = {"whole": "a batch without a cache", "cache": "a batch with a cache", "decode": "a decode"}
UNSEEN_ERROR = {"whole": UNFITTED_ERROR, "cache": UNFITTED_ERROR, "decode": 3.0}
# How far a peak may be off whose kernel was not fitted for memory: from what the schedule holds, down, and from the guess, up. On
# an H200 peaks of eight kernels were 0.87 to 3.8 times what the schedule holds, but for one mask of one of them (results/h200).
OWN_ERROR, UNFITTED_MEMORY = 0.2, 3.0
# And one of a strategy that no observed cell had, where implementations of others took something besides.
STRATEGY_ERROR = 0.5
RATE = "tflops_per_gpu"
NO_DENSE = f"what is beside the attention was not fitted: {UNFITTED_SHARE:.0%} of the peak is guessed"
NO_LINEAR = f"no kernel of linear attention was fitted: {UNFITTED_SHARE:.0%} of the peak is guessed for its recurrence"
# And one of an attention whose mask was drawn: as many blocks as are asked for, in other places than a selector's.
DRAWN_ERROR = 0.5
NO_FIT = f"no fit: {UNFITTED_SHARE:.0%} of the peak is guessed"


@dataclass(frozen=True)
class Prediction:
    """What a cell would take; means over the draws of its mask.

    Attributes:
        phases: by name.
        attention: passes of the attention, by direction.
        made: what the cell is made of.
        flops: by phase, over all ranks; again: of what the phase does that has been done before.
        alone_s: by phase, of the slowest context-parallel group while the others are idle; empty where there are no others, or
            none of them can do without them.
        buffer_bytes, peak_bytes: of the rank with most, see ``Simulated``; 0 where nobody asked.
        peak_interval: bytes, 95 %.
        error: relative half-width of the 95 % interval of every time.
        basis: what it rests on, in words.
        draws: the simulated draws.
        least_s: with a cache: what the rank with most needs to read its keys and values at the speed of its memory.
        known: of a batch that is planned, what its plan comes to, by keys of ``measure.metrics``.
        notes: of the first draw, what a result would have in its provenance.
        share: what the rank with most has of the cell.
        queries: how the tokens of the first draw are dealt out.
    """

    cell: Cell
    machine: Machine
    phases: dict[str, Phase]
    attention: dict[str, Phase]
    made: Made
    flops: dict[str, float]
    again: dict[str, float]
    alone_s: dict[str, float]
    buffer_bytes: int
    peak_bytes: int
    peak_interval: tuple[float, float]
    error: float
    basis: str
    draws: tuple[Simulated, ...]
    least_s: float = 0.0
    known: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    share: Share | None = None
    queries: Side | None = None

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def interval(self) -> tuple[float, float]:
        """Of ``seconds``, 95 %."""
        return max(self.seconds / (1 + self.error), self.least_s), self.seconds * (1 + self.error)

    @property
    def needs_bytes(self) -> float:
        """Of a rank: inputs, results, gradients, weights, buffers and what its kernel needs inside."""
        return self.peak_bytes + input_bytes(self.cell)

    @property
    def needs_interval(self) -> tuple[float, float]:
        """Of ``needs_bytes``, 95 %."""
        low, high = self.peak_interval
        return low + input_bytes(self.cell), high + input_bytes(self.cell)

    def metrics(self) -> dict[str, float]:
        """By the keys of ``measure.metrics``."""
        ranks = self.cell.scale.world_size
        found: dict[str, float] = {}
        for name, phase in self.phases.items():
            found[f"time/{name}/median_s"] = phase.seconds
            if self.flops[name]:
                found[f"compute/{name}/tflops_per_gpu"] = self.flops[name] / phase.seconds / ranks / 1e12
            if ranks > 1 and self.made.room is None and name in self._attending:  # of a step nobody measures it
                found[f"overlap/{name}/compute_s"] = phase.seconds - phase.exposed_s
                found[f"overlap/{name}/exposed_s"] = phase.exposed_s
        found["time/total/median_s"] = self.seconds
        found["compute/tflops_per_gpu"] = sum(self.flops.values()) / self.seconds / ranks / 1e12
        if peak := peak_flops(self.machine, self.cell.problem.dtype):
            found["compute/peak_tflops"] = peak / 1e12
            found |= {key.replace("tflops_per_gpu", "mfu"): rate * 1e12 / peak for key, rate in found.items() if key.endswith(RATE)}
        if self.peak_bytes:
            found["memory/peak_bytes"], found["memory/buffer_bytes"] = float(self.peak_bytes), float(self.buffer_bytes)
        return found | self._of_mesh() | self._of_step(found) | self._of_workload(found)

    @property
    def _attending(self) -> list[str]:
        """Phases with an attention."""
        return [name for name, parts in self.made.phases.items() if any(isinstance(part, Attend) for part in parts)]

    def _of_mesh(self) -> dict[str, float]:
        """What groups cost one another."""
        if not self.alone_s:
            return {}
        alone = {**self.alone_s, "total": sum(self.alone_s.values())}
        whole = {**{name: phase.seconds for name, phase in self.phases.items()}, "total": self.seconds}
        found = {f"mesh/{name}/alone_s": seconds for name, seconds in alone.items()}
        slowdowns = {name: whole[name] / seconds for name, seconds in alone.items()}
        return found | {"mesh/slowdown" if name == "total" else f"mesh/{name}/slowdown": each for name, each in slowdowns.items()}

    def _of_workload(self, found: dict[str, float]) -> dict[str, float]:
        """What a pass over a cache, or a batch, comes to."""
        own = (self.made.metrics if "step/layers" not in self.made.metrics else {}) | self.known
        return own | derived(found | own)

    def _of_step(self, found: dict[str, float]) -> dict[str, float]:
        """What a step is made of, and what follows from it."""
        made = self.made
        if made.room is None or "step/layers" not in made.metrics:
            return (
                {f"memory/{name}_bytes": size for name, size in made.room.classes.items()} if made.room and self.peak_bytes else {}
            )
        attending = sum(
            part.times * self.attention[part.direction].seconds
            for parts in made.phases.values() for part in parts if isinstance(part, Attend)
        )  # fmt: skip
        classes = made.room.classes if self.peak_bytes else {}
        own = made.metrics | {f"memory/{name}_bytes": size for name, size in classes.items()} | {
            "attention/share": attending / self.seconds,
            "step/recomputed_flops_per_gpu": sum(self.again.values()) / self.cell.scale.world_size,
        }  # fmt: skip
        return own | derived(found | own)


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
            if reason := answer(axis, cell.config[axis], choice.unavailable, cell.problem, platform):
                return f"{axis} {cell.config[axis]['name']}: {reason}"
        return None

    def predict(self, cell: Cell, *, memory: bool = True) -> Prediction:
        """What a cell would take; ``memory``: whether its peak is worked out too, which takes longer than its time.

        Raises:
            CannotPredict: nothing is known of how the strategy works.
        """
        return self._batch(cell, memory) if build_planner(cell.config) is not None else self.predict_alike([cell], memory=memory)[0]

    def _batch(self, cell: Cell, memory: bool) -> Prediction:
        """Of a batch that is planned."""
        inside = self._memory(cell)
        composed = Batched.of(cell, self, memory=memory)
        found, basis, error = composed.play(), composed.cost.basis, composed.cost.error
        made = found.made
        if made.room is not None:
            basis, error = self._beside(cell, basis, error)
        peak, bounds = self._peak(found, inside) if memory else (0, (0.0, 0.0))
        return Prediction(
            cell, self.machine, found.phases, found.attention, made,
            {name: composed.flops(made, name) for name in made.phases},
            {name: composed.flops(made, name, again=True) for name in made.phases}, {},
            max(d.buffer_bytes for d in found.draws), peak, bounds,
            max(error, self._error(cell, found)), basis, found.draws,
            known=found.metrics, notes=found.notes,
        )  # fmt: skip

    def predict_alike(self, cells: Sequence[Cell], *, memory: bool = True) -> list[Prediction]:
        """Predictions of cells with one attention, which is played once: they differ in the options of their workload and in what
        is recomputed.

        Raises:
            CannotPredict: nothing is known of how the strategy works.
        """
        cell = cells[0]
        kernel, basis, error = self.kernel(cell, cell.config["cp"]["name"])
        kernel, inside = self._with_memory(cell, kernel)
        model = self.dense(cell)
        composed = Composed.of(cell, self.machine, memory=memory)
        attended, alone = composed.attended(self.machine, kernel, model), {}
        if composed.more:
            basis, error = self._beside(cell, basis, error)
        elif cell.mesh.count > 1:
            alone = {name: phase.seconds for name, phase in composed.play(self.machine, kernel, model, alone=True).phases.items()}
        least_s = self._least_s(composed, kernel, model) if cell.problem.rectangular else 0.0
        queries, found = composed.draws[0].modelled.schedule.q, []
        for each in cells:
            own = composed.like(each)
            together = own.together(attended)
            made, phases = together.made, together.phases
            peak, bounds = self._peak(together, inside) if memory else (0, (0.0, 0.0))
            drawn = made.drawn
            found.append(Prediction(
                each, self.machine, phases, together.attention, made,
                {name: own.flops(made, name) for name in made.phases},
                {name: own.flops(made, name, again=True) for name in made.phases}, alone,
                max(d.buffer_bytes for d in attended.draws), peak, bounds,
                max(error, self._error(each, together), DRAWN_ERROR if drawn else 0.0),
                f"{basis}; {drawn}" if drawn else basis, attended.draws, least_s, notes={"foreseen": drawn} if drawn else {},
                share=own.share(), queries=queries,
            ))  # fmt: skip
        return found

    def _with_memory(self, cell: Cell, kernel: KernelFit) -> tuple[KernelFit, MemoryFit | None]:
        """A kernel with what it needs inside, and what of that was fitted."""
        inside = self._memory(cell)
        if inside is not None:
            kernel = kernel.model_copy(update={"workspace": inside.workspace})
        elif build_kernel(cell.config["kernel"]).holds_scores(platform_of(self.machine)):
            kernel = kernel.model_copy(update={"workspace": Workspace(score=SCORE)})
        return kernel, inside

    def _beside(self, cell: Cell, basis: str, error: float) -> tuple[str, float]:
        """What a prediction rests on and its error where there is more than attention."""
        dense = self.fitted.dense_of(cell.problem.dtype) if self.fitted is not None else None
        return f"{basis}; {'; '.join(dense.sources) if dense else NO_DENSE}", error if dense else UNFITTED_ERROR

    def _least_s(self, composed: Composed, kernel: KernelFit, dense: DenseFit) -> float:
        """Of the busiest rank, were its kernels to do nothing but read."""
        nothing = kernel.model_copy(update={"forward": Coefficients(), "backward": Coefficients(), "factors": (Factor(), Factor())})
        found = replace(composed, memory=False).play(self.machine, nothing, dense)
        return sum(found.made.attends(direction) * phase.busiest_s for direction, phase in found.attention.items())

    def _error(self, cell: Cell, found: Together) -> float:
        """Of phases of cells like this one, by cross-validation. No batch that is planned is fitted on; it is made of attention."""
        if self.fitted is None:
            return UNFITTED_ERROR
        keys = found.attention if build_planner(cell.config) is not None else [error_key(cell, name) for name in found.phases]
        return max(self.fitted.error.get(key, UNFITTED_ERROR) for key in keys)

    def _peak(self, found: Together, inside: MemoryFit | None) -> tuple[int, tuple[float, float]]:
        """The peak of the rank with most, and its 95 % interval."""
        names, held = ("peak_bytes", "own_bytes"), int(found.made.held)
        peak, own = (held + max(getattr(draw, name) for draw in found.draws) for name in names)
        if found.made.room is None:
            if inside is not None:
                return peak, (peak / (1 + inside.error), peak * (1 + inside.error))
            # What the schedule itself holds is known, and what the kernel adds is not.
            return peak, (own / (1 + OWN_ERROR), peak * (1 + UNFITTED_MEMORY))
        room, buffers = found.made.room, max(draw.buffer_bytes for draw in found.draws)
        whole, least = (int(max(room.peak + buffers, room.attending + each)) for each in (peak, own))
        more = inside.error if inside is not None else UNFITTED_MEMORY
        most = (1 + OWN_ERROR) * max(room.peak + buffers, room.attending + (1 + more) * peak)
        if not self.machine.memory_bytes:  # a peak of the process, in which the C library keeps what was freed
            most = max(most, (1 + UNFITTED_MEMORY) * whole)
        return whole, (least / (1 + OWN_ERROR), most)

    def _memory(self, cell: Cell) -> MemoryFit | None:
        """What was fitted of the memory of the cell's kernel; None where nothing was, or a library holds what it likes."""
        if self.fitted is None or not isinstance(build_strategy(cell.config["cp"]), Scheduled):
            return None
        return self.fitted.memory_of(cell.config["kernel"]["name"], cell.problem)

    def dense(self, cell: Cell) -> DenseFit:
        """What treats every token alone, as far as anything is known of it."""
        found = self.fitted.dense_of(cell.problem.dtype) if self.fitted is not None else None
        return found or guess_dense(self.machine, cell.problem.dtype)

    def kernel(self, cell: Cell, strategy: str) -> tuple[KernelFit, str, float]:
        """The kernel of a cell as a strategy calls it, what that rests on, and the least error of it."""
        name, dtype = cell.config["kernel"]["name"], cell.problem.dtype
        if self.fitted is None or cell.problem.rule is not None:
            mere, said_so = guess(self.machine, dtype), NO_FIT if self.fitted is None else NO_LINEAR
            return KernelFit(kernel=name, dtype=dtype, forward=mere, backward=mere), said_so, UNSEEN_ERROR[regime(cell.problem)]
        factors = (self.fitted.factor(strategy, "forward"), self.fitted.factor(strategy, "backward"))
        error, of = 0.0, regime(cell.problem)
        said: tuple[str, ...] = ()
        found = self.fitted.kernel(name, dtype)
        if found is None and (found := self.fitted.neighbour(dtype)) is not None:
            error, said = NEIGHBOUR_ERROR, (f"kernel {name} was not fitted, {found.kernel} stands in for it",)
        if found is None:
            mere = guess(self.machine, dtype)
            found = KernelFit(kernel=name, dtype=dtype, forward=mere, backward=mere, sources=(NO_FIT,))
            error = UNSEEN_ERROR[of]
        elif of not in found.regimes:
            said = (*said, f"kernel {found.kernel} was fitted on nothing like {UNSEEN[of]}")
            error = max(error, UNSEEN_ERROR[of])
        if not factors[0].sources:
            said = (*said, f"cp={strategy} was not fitted: its schedule with the kernel alone")
            error = max(error, STRATEGY_ERROR if self.fitted.factors else 0.0)
        return found.model_copy(update={"factors": factors}), "; ".join([*said, *found.sources]), error
