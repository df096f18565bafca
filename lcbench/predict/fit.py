"""Fit a machine's kernels, links and implementations to measured times.

Kernels called alone and collectives called alone are fitted first; whole cells then correct what is still unsure, and say what
implementations of strategies take besides. How far predictions are off is found by leaving groups out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcbench.grid.cell import Cell
from lcbench.predict.composed import Composed
from lcbench.predict.fitted import Coefficients, DenseFit, Fit, Residual, regime
from lcbench.predict.machines import peak_flops
from lcbench.predict.memory import memory_fits
from lcbench.predict.observations import CellMemory, CellTime, CollectiveTime, KernelTime, Observation
from lcbench.predict.search import search
from lcbench.predict.unknowns import GUESSED, PHASES, Key, Unknown, Unknowns, kernel_unknowns
from lcbench.problem import Heads, Problem, Scale, itemsize
from lcbench.schedule.machine import Floats, Machine, Tiles
from lcbench.schedule.simulate import Prepared

FOLDS = 5
# Where nothing was fitted: a share of the peak, and FLOP/s of a CPU rank.
UNFITTED_SHARE, UNFITTED_CPU = 0.5, 1e10
# How far unknowns may well be from where a fit begins, in logarithms: what was measured alone, links of data sheets, and by how
# much the kernels of an implementation differ from the kernel alone.
ALONE, SHEET, IMPLEMENTED = 0.1, 0.3, 0.1
# On a device a piece costs what a block of threads costs to begin, and tables of whole batches say nothing better of it.
PIECES = 0.05
NO_CELLS = 0.5  # error where no whole cell was seen
PERCENTILE = 0.95


def guess(machine: Machine, dtype: str) -> Coefficients:
    """What a kernel may take of which nothing is known: a share of the peak, and one pass over its operands."""
    peak = peak_flops(machine, dtype)
    flop_s = 1 / (UNFITTED_SHARE * peak if peak else UNFITTED_CPU)
    element_s = 2 * itemsize(dtype) / machine.memory_bytes_per_s
    # A device is full of blocks, of which some 100 run at once; a CPU rank runs one after the other.
    at_once = 100.0 if peak else 1.0
    return Coefficients(
        call_s=machine.launch_s, flop_s=flop_s, pair_s=20 * flop_s, waste_s=flop_s, tail_s=0.3 * at_once * flop_s,
        row_s=element_s, key_s=element_s, piece_s=1e-6 / at_once, gather_s=4 * element_s,
    )  # fmt: skip


def guess_dense(machine: Machine, dtype: str) -> DenseFit:
    """What may be of products and of what goes element by element, of which nothing is known."""
    peak = peak_flops(machine, dtype)
    return DenseFit(
        dtype=dtype, flop_s=1 / (UNFITTED_SHARE * peak if peak else UNFITTED_CPU), byte_s=1 / machine.memory_bytes_per_s
    )


def error_key(cell: Cell, phase: str) -> str:
    """Under which name a fit holds the error of a phase: as it is, of what has a cache with its regime's name before it, and of
    what runs another workload with the workload's."""
    if cell.problem.rectangular:
        return f"{regime(cell.problem)}/{phase}"
    said = cell.config.get("workload")
    return phase if said is None else f"{said['name']}/{phase}"


def fit(observations: Iterable[Observation], machine: Machine, *, folds: int = FOLDS) -> Fit:
    """What explains the observations best on a machine.

    Args:
        machine: with the numbers of conf/machine, which stay where no observation says more.
        folds: parts of the groups of cells, each of which is left out once; 1: none is, and the error is that of the fit itself.

    Raises:
        ValueError: there are no observations.
        CannotPredict: nothing is known of how a cell's strategy works.
    """
    seen = list(observations)
    if not seen:
        raise ValueError("there is nothing to fit on: no row is a measured time of this machine")
    kernels = [each for each in seen if isinstance(each, KernelTime)]
    collectives = [each for each in seen if isinstance(each, CollectiveTime)]
    cells = [played for each in seen if isinstance(each, CellTime) for played in _Played.all_of(each, machine)]
    unknowns = _of_kernels(_begin(machine, kernels, cells, {each.operation for each in collectives}), kernels)
    unknowns = _of_collectives(unknowns, collectives)
    found = _of_cells(unknowns, cells)
    left_out = _left_out(unknowns, found, cells, folds)
    left_out = [out for cell, out in zip(cells, left_out, strict=True) if cell.part == "whole"]
    cells = [cell for cell in cells if cell.part == "whole"]
    residuals = (*_kernel_residuals(unknowns, kernels), *_collective_residuals(unknowns, collectives),
                 *_cell_residuals(found, cells, left_out))  # fmt: skip
    memory = memory_fits([each for each in seen if isinstance(each, CellMemory)], machine)
    return _written(found, seen, cells, left_out, residuals).model_copy(update={"memory": memory})


# -- what is looked for ------------------------------------------------------------------------------------------------------


def _begin(machine: Machine, kernels: Sequence[KernelTime], cells: Sequence[_Played], alone: set[str]) -> Unknowns:
    """Every unknown that an observation may say something of, at what is believed of it; ``alone``: collectives called alone."""
    of: dict[Key, Unknown] = {}
    for name, dtype in dict.fromkeys([(k.kernel, k.dtype) for k in kernels] + [c.kernel for c in cells]):
        widths = {"piece_s": PIECES} if peak_flops(machine, dtype) else {}
        of |= kernel_unknowns(name, dtype, dict.fromkeys(PHASES, guess(machine, dtype)), GUESSED, widths)
    for dtype in dict.fromkeys(c.kernel[1] for c in cells if c.composed.more):
        dense = guess_dense(machine, dtype)
        of |= {("dense", dtype, number): Unknown(getattr(dense, number), GUESSED) for number in ("flop_s", "byte_s")}
    for name in ("inside", "across"):
        link = getattr(machine, name)
        of[("link", name, "latency_s")] = Unknown(link.latency_s, 2 * SHEET)
        of[("link", name, "bytes_per_s")] = Unknown(link.bytes_per_s, SHEET)
    for operation, how in machine.collectives.items():
        of[("collective", operation, "latency_s")] = Unknown(how.latency_s, 2 * SHEET)
        of[("collective", operation, "efficiency")] = Unknown(how.efficiency, SHEET)
        if operation in alone:  # of sets of several sizes
            of[("collective", operation, "fewer")] = Unknown(max(how.fewer, 0.1), GUESSED)
    for number in ("memory_bytes_per_s", "launch_s", "message_s"):
        of[("machine", number)] = Unknown(getattr(machine, number), 2 * SHEET)
    for strategy in dict.fromkeys(c.strategy for c in cells if not c.time.own):
        for phase in PHASES:
            of[("factor", strategy, phase, "compute")] = Unknown(1.0, IMPLEMENTED)
            of[("factor", strategy, phase, "operand_s")] = Unknown(2.0 / machine.memory_bytes_per_s, GUESSED)
    return Unknowns(machine, of)


# -- kernels alone -----------------------------------------------------------------------------------------------------------


def _of_kernels(unknowns: Unknowns, kernels: Sequence[KernelTime]) -> Unknowns:
    """Each kernel fitted to its calls; its backward, where none was timed, takes as long per FLOP as forward."""
    by: dict[tuple[str, str, bool], list[KernelTime]] = defaultdict(list)
    for each in kernels:
        by[each.kernel, each.dtype, each.backward].append(each)
    for (name, dtype, backward), calls in by.items():
        path = ("kernel", name, dtype, PHASES[backward])
        free = [p for p in unknowns.of if p[:4] == path]
        observed = np.array([call.seconds for call in calls])
        found = search(unknowns, free, _Calls(calls).seconds, observed)
        unknowns = found.with_values({p: found.of[p].value for p in free}, ALONE)
        other = ("kernel", name, dtype, PHASES[not backward])
        if (name, dtype, not backward) not in by:
            unknowns = unknowns.with_values({(*other, p[4]): found.of[p].value for p in free}, 5 * ALONE)
    return _neighbours(unknowns, kernels)


def _neighbours(unknowns: Unknowns, kernels: Sequence[KernelTime]) -> Unknowns:
    """Kernels that were not called alone begin at those of one that was: the device is the same."""
    known = list(dict.fromkeys((k.kernel, k.dtype) for k in kernels))
    for name, dtype in dict.fromkeys((p[1], p[2]) for p in unknowns.of if p[0] == "kernel"):
        like = next((k for k in known if k[1] == dtype), None)
        if like is not None and (name, dtype) not in known:
            values = {p: unknowns.of["kernel", *like, p[3], p[4]].value for p in unknowns.of if p[:3] == ("kernel", name, dtype)}
            unknowns = unknowns.with_values(values, 5 * ALONE)
    return unknowns


class _Calls:
    """Calls of one kernel and type. Those of like heads and direction are joined once, and timed as often as a fit wants."""

    def __init__(self, calls: Sequence[KernelTime]) -> None:
        by: dict[tuple[Heads, bool], list[int]] = defaultdict(list)
        for number, call in enumerate(calls):
            by[call.heads.of(1, 1), call.backward].append(number)
        self._kernel, self._count = (calls[0].kernel, calls[0].dtype), len(calls)
        self._parts = [
            (numbers, _joined([calls[n].tiles for n in numbers]), _problem(calls[numbers[0]]), backward)
            for (_, backward), numbers in by.items()
        ]

    def seconds(self, at: Unknowns, _: Key | None = None) -> Floats:
        """Predicted, (n,)."""
        kernel, found = at.kernel(*self._kernel), np.zeros(self._count)
        for numbers, tiles, problem, backward in self._parts:
            found[numbers] = kernel.seconds(tiles, problem, backward=backward)
        return found


def _problem(call: KernelTime) -> Problem:
    return Problem(1, call.heads, Scale(1, 1), call.dtype, "forward")


def _joined(tiles: Sequence[Tiles]) -> Tiles:
    return Tiles(**{name: np.concatenate([getattr(each, name) for each in tiles]) for name in Tiles.__dataclass_fields__})


# -- collectives alone -------------------------------------------------------------------------------------------------------


def _of_collectives(unknowns: Unknowns, collectives: Sequence[CollectiveTime]) -> Unknowns:
    """Latency and efficiency of each operation that was called alone."""
    for operation in dict.fromkeys(each.operation for each in collectives):
        calls = [each for each in collectives if each.operation == operation]
        free = [p for p in unknowns.of if p[:2] == ("collective", operation)]
        observed = np.array([call.seconds for call in calls])

        def predict(at: Unknowns, _: Key | None, calls: Sequence[CollectiveTime] = calls) -> Floats:
            machine = at.fitted()
            return np.array([machine.collective_s(c.operation, c.block, c.ranks, c.together) for c in calls])

        found = search(unknowns, free, predict, observed)
        unknowns = found.with_values({p: found.of[p].value for p in free}, ALONE)
    return unknowns


# -- whole cells -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Played:
    """A cell with its draws, ready to be played.

    Attributes:
        seen: seconds by phase, of those with a time.
        part: ``whole``: the cell itself; or its kernels alone, or its messages alone.
    """

    time: CellTime
    composed: Composed
    seen: dict[str, float]
    part: Literal["whole", "compute", "communication"] = "whole"

    @classmethod
    def all_of(cls, time: CellTime, machine: Machine) -> Iterator[_Played]:
        """The cell, and its kernels and its messages alone where these were timed."""
        whole = Composed.of(time.cell, machine, memory=False)
        yield cls(time, whole, time.phases)
        if time.compute:
            yield cls(time, whole.varied(Prepared.without_messages), time.compute, "compute")
        if time.communication:
            yield cls(time, whole.varied(Prepared.without_kernels), time.communication, "communication")

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(self.seen)

    @property
    def kernel(self) -> tuple[str, str]:
        return self.time.cell.config["kernel"]["name"], self.time.cell.problem.dtype

    @property
    def strategy(self) -> str:
        return str(self.time.cell.config["cp"]["name"])

    @property
    def observed(self) -> Floats:
        return np.array(list(self.seen.values()))

    def seconds(self, at: Unknowns) -> Floats:
        """Of each phase, the mean of the draws."""
        found = self.composed.play(at.fitted(), at.kernel(*self.kernel, self.strategy), at.dense(self.kernel[1]))
        return np.array([found.phases[phase].seconds for phase in self.phases])

    def depends_on(self, path: Key) -> bool:
        """Whether an unknown can change its times."""
        scale = self.time.cell.scale
        match path:
            case ("kernel", *_) if self.part == "communication":
                return False
            case ("link" | "collective", *_) | ("machine", "message_s") if self.part == "compute":
                return False
            case ("dense", dtype, _):
                return self.composed.more and dtype == self.kernel[1]
            case ("kernel", name, dtype, phase, _):
                return (name, dtype) == self.kernel and phase in self.phases
            case ("factor", strategy, phase, _):
                return strategy == self.strategy and phase in self.phases
            case ("link", "across", _):
                return scale.nodes > 1
            case ("machine", "memory_bytes_per_s" | "launch_s"):
                return True
        return scale.world_size > 1


def _of_cells(unknowns: Unknowns, cells: Sequence[_Played], begin: Unknowns | None = None) -> Unknowns:
    """Everything that cells depend on, fitted to them, from what is believed after kernels and collectives."""
    if not cells:
        return unknowns
    free = [path for path in unknowns.of if any(cell.depends_on(path) for cell in cells)]

    def predict(at: Unknowns, path: Key | None) -> Floats:
        return np.concatenate([
            cell.seconds(at) if path is None or cell.depends_on(path) else np.full(len(cell.phases), np.nan) for cell in cells
        ])  # fmt: skip

    return search(unknowns, free, predict, np.concatenate([cell.observed for cell in cells]), begin)


def _left_out(unknowns: Unknowns, found: Unknowns, cells: Sequence[_Played], folds: int) -> list[Floats]:
    """Predicted over observed, in logarithms, of each cell's phases, by a fit that has not seen the cell's group."""
    # In an order that neither strategies nor masks have: a part must not be all there is of one.
    groups = np.random.default_rng(0).permutation(list(dict.fromkeys(cell.time.group for cell in cells))).tolist()
    folds = min(folds, len(groups))
    errors = [np.log(cell.seconds(found) / cell.observed) for cell in cells]
    if folds < 2:
        return errors
    for fold in range(folds):
        out = set(groups[fold::folds])
        fitted = _of_cells(unknowns, [cell for cell in cells if cell.time.group not in out], found)
        for number, cell in enumerate(cells):
            if cell.time.group in out:
                errors[number] = np.log(cell.seconds(fitted) / cell.observed)
    return errors


# -- what is written ---------------------------------------------------------------------------------------------------------


def _residual(group: str, errors: Floats, left_out: float | None = None) -> Residual:
    away = np.abs(np.expm1(errors))
    return Residual(
        group=group, count=len(away), median=float(np.median(away)), p90=float(np.quantile(away, 0.9)), left_out=left_out
    )  # fmt: skip


def _kernel_residuals(unknowns: Unknowns, kernels: Sequence[KernelTime]) -> list[Residual]:
    by: dict[tuple[str, str, str], list[KernelTime]] = defaultdict(list)
    for each in kernels:
        by[each.group, each.kernel, each.dtype].append(each)
    return [
        _residual(group, np.log(_Calls(calls).seconds(unknowns) / [call.seconds for call in calls]))
        for (group, *_), calls in by.items()
    ]


def _collective_residuals(unknowns: Unknowns, collectives: Sequence[CollectiveTime]) -> list[Residual]:
    machine, by = unknowns.fitted(), defaultdict(list)
    for c in collectives:
        by[c.group].append(np.log(machine.collective_s(c.operation, c.block, c.ranks, c.together) / c.seconds))
    return [_residual(group, np.array(errors)) for group, errors in by.items()]


def _cell_residuals(found: Unknowns, cells: Sequence[_Played], left_out: Sequence[Floats]) -> list[Residual]:
    fits: dict[str, list[float]] = defaultdict(list)
    outs: dict[str, list[float]] = defaultdict(list)
    for cell, out in zip(cells, left_out, strict=True):
        fits[cell.time.group] += np.log(cell.seconds(found) / cell.observed).tolist()
        outs[cell.time.group] += np.abs(np.expm1(out)).tolist()
    return [_residual(group, np.array(errors), float(np.median(outs[group]))) for group, errors in fits.items()]


def _error(cells: Sequence[_Played], left_out: Sequence[Floats]) -> dict[str, float]:
    """By phase, what 95 % of the cells that a fit has not seen were off by at most."""
    by: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for cell, errors in zip(cells, left_out, strict=True):
        for phase, error in zip(cell.phases, errors.tolist(), strict=True):
            by.setdefault(error_key(cell.time.cell, phase), []).append(abs(error))
    return {
        phase: float(np.expm1(np.quantile(errors, PERCENTILE, method="higher"))) if errors else NO_CELLS
        for phase, errors in by.items()
    }


def _written(
    found: Unknowns,
    seen: Sequence[Observation],
    cells: Sequence[_Played],
    left_out: Sequence[Floats],
    residuals: Sequence[Residual],
) -> Fit:
    sources: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    regimes: dict[tuple[str, str], set[str]] = defaultdict(set)
    by_strategy: dict[str, dict[str, None]] = defaultdict(dict)
    for each in seen:
        if isinstance(each, KernelTime):
            sources[each.kernel, each.dtype][each.source] = None
            regimes[each.kernel, each.dtype].add("whole")
    of_dense: dict[str, dict[str, None]] = defaultdict(dict)
    for cell in cells:
        sources[cell.kernel][cell.time.source] = None
        regimes[cell.kernel].add(regime(cell.time.cell.problem))
        if cell.composed.more:
            of_dense[cell.kernel[1]][cell.time.source] = None
        by_strategy[cell.strategy][cell.time.source] = None
    factors = {
        f"{strategy}/{phase}": found.factor(strategy, phase).model_copy(update={"sources": tuple(by_strategy[strategy])})
        for strategy in by_strategy for phase in PHASES
    }  # fmt: skip
    kernels = tuple(
        found.kernel(*key, sources=said).model_copy(update={"regimes": tuple(sorted(regimes[key]))})
        for key, said in sources.items()
    )  # fmt: skip
    return Fit(
        machine=found.machine.name, kernels=kernels,
        dense=tuple(found.dense(dtype, said) for dtype, said in of_dense.items()),
        factors=factors, links=found.links(), error=_error(cells, left_out), residuals=tuple(residuals),
        cells=tuple(cell.time.cell.id for cell in cells),
        sources=tuple(dict.fromkeys(each.source for each in seen)),
    )  # fmt: skip
