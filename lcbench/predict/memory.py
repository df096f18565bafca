"""What kernels allocate inside, fitted to measured peaks of whole cells.

A cell's peak is what its schedule holds (``schedule.simulate.Holding``), which is exact, and what its kernel needs beside operands
and results, which no interface tells: sums of gradients per query head, copies, tables, scores. So a kernel has a handful of bytes
per element, positive and searched in logarithms as times are. How far peaks may be off is found by leaving groups out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from lcbench.cp.base import Scheduled
from lcbench.grid.build import build_kernel, build_strategy
from lcbench.predict.draws import draws_of
from lcbench.predict.fitted import MemoryFit, Workspace
from lcbench.predict.machines import platform_of
from lcbench.predict.observations import CellMemory
from lcbench.predict.search import search
from lcbench.predict.unknowns import GUESSED, Key, Unknown, Unknowns
from lcbench.problem import itemsize
from lcbench.schedule.machine import Floats, Machine
from lcbench.schedule.simulate import Holding, Prepared, holdings, peak_bytes

FOLDS = 5
# Where a search begins: bytes whatever is computed, shares of an element's bytes, and bytes per score of a kernel that holds all of
# them (naive held four in float32 on an H200: results/h200).
CALL, SHARE, SCORE = 2.0**20, 0.1, 16.0
LEAST, FEW = 0.05, 0.5  # the least error that is claimed, and that of a kernel of which one group was measured
PERCENTILE = 0.95
SMALLEST, WIDEST = 0.01, 1.0  # an error of a peak that counts as no smaller, and the widest band that few cells are taken to say


def guess(kernel: str, dtype: str, *, scores: bool) -> Workspace:
    """What a kernel is believed to need of which nothing was measured; ``scores``: whether it holds all of them."""
    share = SHARE * itemsize(dtype)
    return Workspace(call=CALL, row=share, key=share, spread=share, gathered=share, score=SCORE if scores else 0.0)


def memory_fits(seen: Iterable[CellMemory], machine: Machine, folds: int = FOLDS) -> tuple[MemoryFit, ...]:
    """A fit of each kernel, type of inputs and kind of iteration that was measured.

    Args:
        folds: parts of the groups of cells, each of which is left out once for the error.

    Raises:
        CannotPredict: nothing is known of how a cell's strategy works.
    """
    by: dict[tuple[str, str, bool], list[_Held]] = defaultdict(list)
    for each in seen:
        config, problem = each.cell.config, each.cell.problem
        if not isinstance(build_strategy(config["cp"]), Scheduled) or "workload" in config:
            continue  # a library holds what it likes, a step its weights and more, and that would be taken for the kernel's
        by[config["kernel"]["name"], problem.dtype, problem.backward].append(_Held.of(each, machine))
    return tuple(_fitted(*key, cells, machine, folds) for key, cells in by.items())


@dataclass(frozen=True)
class _Held:
    """A measured cell with what its draws hold."""

    seen: CellMemory
    draws: tuple[tuple[Prepared, tuple[Holding, ...]], ...]

    @classmethod
    def of(cls, seen: CellMemory, machine: Machine) -> _Held:
        return cls(seen, tuple((draw.prepared, holdings(draw.prepared)) for draw in draws_of(seen.cell, machine)))

    def bytes(self, workspace: Workspace) -> float:
        """The peak of the draw with most."""
        heads, backward = self.seen.cell.heads, self.seen.cell.problem.backward
        found = []
        for prepared, held in self.draws:
            tiles = prepared.tiling.tiles
            inside, none = workspace.bytes(tiles, heads), np.zeros(len(tiles))
            found.append(peak_bytes(held, (none, inside) if backward else (inside, none)))
        return float(max(found))


def _fitted(kernel: str, dtype: str, backward: bool, cells: Sequence[_Held], machine: Machine, folds: int) -> MemoryFit:
    config = cells[0].seen.cell.config["kernel"]
    begin = guess(kernel, dtype, scores=build_kernel(config).holds_scores(platform_of(machine)))
    unknowns = Unknowns(machine, {(name,): Unknown(value, GUESSED) for name, value in begin if value})
    groups = list(dict.fromkeys(cell.seen.group for cell in cells))
    parts = min(folds, len(groups))
    found = _searched(unknowns, cells)
    errors: list[float] = []
    for part in range(parts if parts > 1 else 0):
        out = set(groups[part::parts])
        without = _searched(unknowns, [cell for cell in cells if cell.seen.group not in out])
        errors += [abs(float(np.log(c.bytes(without) / c.seen.peak_bytes))) for c in cells if c.seen.group in out]
    error = _band(np.array(errors)) if errors else FEW
    return MemoryFit(
        kernel=kernel, dtype=dtype, backward=backward, workspace=found, error=max(error, LEAST), cells=len(cells),
        sources=tuple(dict.fromkeys(cell.seen.source for cell in cells)),
    )  # fmt: skip


def _band(errors: Floats) -> float:
    """The relative error that 95 % of other cells stay within, by those of cells that were left out, in logarithms, (n,).

    Of few cells the worst has less than 95 % below it. So it is no less than the bound of one more from a log-normal distribution
    (Student's t of the logarithms of absolute errors), which knows how few they are.
    """
    sizes = np.log(np.maximum(np.abs(errors), SMALLEST))
    worst, count = float(np.quantile(np.abs(errors), PERCENTILE, method="higher")), len(sizes)
    if count < 2:
        return float(np.expm1(worst))
    beyond = stdtrit(count - 1, PERCENTILE) * sizes.std(ddof=1) * np.sqrt(1 + 1 / count)
    return float(np.expm1(max(worst, min(np.exp(sizes.mean() + beyond), np.log1p(WIDEST)))))


def _searched(unknowns: Unknowns, cells: Sequence[_Held]) -> Workspace:
    def predict(at: Unknowns, _: Key | None) -> Floats:
        workspace = Workspace(**at.below())
        return np.array([cell.bytes(workspace) for cell in cells])

    return Workspace(**search(unknowns, list(unknowns.of), predict, np.array([c.seen.peak_bytes for c in cells])).below())
