"""The draws of a cell's mask, each made ready to be played on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from lcbench.cp.base import Scheduled, Strategy
from lcbench.grid import build
from lcbench.grid.cell import Cell
from lcbench.masks.band import DoesNotFit
from lcbench.masks.mask import Mask
from lcbench.predict.counted import counted
from lcbench.problem import Problem
from lcbench.schedule.lowering import OPERATIONS, Operation
from lcbench.schedule.machine import Floats, Machine
from lcbench.schedule.simulate import Prepared, prepare
from lcbench.selectors import foreseen
from lcbench.workloads.base import Attended

DRAWS = 4  # of a mask that are looked at, at most


class CannotPredict(ValueError):
    """Why there is no prediction of a cell, in one line."""


def operations_on(machine: Machine) -> tuple[Operation, ...]:
    """The collectives of the machine's backend."""
    return OPERATIONS["gloo" if machine.device == "cpu" else "nccl"]


def unforeseen(cell: Cell) -> str | None:
    """Why a cell does something that no prediction knows of, so that it is neither predicted nor fitted on; None: it does not."""
    strategy, workload = build.build_strategy(cell.config["cp"]), cell.config.get("workload")
    if isinstance(strategy, Scheduled) and strategy.apart:
        option = f"cp={cell.words['cp']}"
        return f"{option} exchanges q, k and v one by one while a layer projects them, which is not simulated yet"
    if workload is None:
        return None
    if reason := build.build_workload(workload).unforeseen():
        return reason
    selector = build.build_selector(cell.config)
    return None if selector is None else foreseen.unforeseen(selector, cell.problem)


@dataclass(frozen=True)
class Draw:
    """A draw of a cell that is looked at, by the context-parallel group with most to compute, or a part of one.

    Attributes:
        pairs: unmasked, over all query heads of all groups.
        share: of all passes of the attention that are looked at.
    """

    prepared: Prepared
    pairs: float
    share: float


def draws_of(cell: Cell, machine: Machine) -> Iterator[Draw]:
    """The draws of a cell that are looked at, or what passes of its attention are of where they differ.

    Raises:
        CannotPredict: nothing is known of how the strategy works, or it cannot run the cell.
    """
    config, problem = cell.config, cell.problem
    if reason := unforeseen(cell):
        raise CannotPredict(reason)
    strategy = build.build_strategy(config["cp"])
    try:
        masks = [build.cell_mask(cell, number) for number in range(build.draws(config["mask"]))]
    except DoesNotFit as error:
        raise CannotPredict(str(error)) from error
    pairs = cell.mesh.dp * np.array([float(mask.pairs(cell.heads.q)) for mask in masks])
    chosen = looked_at(pairs)
    for number in chosen:
        mask = masks[number] = _busiest(masks[number], cell)
        if reason := strategy.unsupported(problem, mask):
            raise CannotPredict(reason)
        for own, part, share in _attended(cell, mask):
            started = strategy if part is mask else strategy.settled(problem, mask)
            groups = cell.mesh.count
            of_part = float(pairs[number]) if part is mask else groups * float(part.pairs(own.heads.q))
            yield Draw(_prepared(cell, machine, started, own, part), of_part, share / len(chosen))


def _attended(cell: Cell, mask: Mask) -> list[Attended]:
    """What passes of a cell's attention are of."""
    said = cell.config.get("workload")
    if said is None:
        return [(cell.problem, mask, 1.0)]
    return build.build_workload(said).attends(cell.problem, mask, build.build_selector(cell.config))


def _prepared(cell: Cell, machine: Machine, strategy: Strategy, problem: Problem, mask: Mask) -> Prepared:
    modelled = strategy.modelled(problem, mask)
    if modelled is None:
        raise CannotPredict(f"nothing says how cp={cell.config['cp']['name']} works: no schedule does what it does")
    prepared = prepare(modelled, operations_on(machine) if getattr(strategy, "lowering", "auto") == "auto" else ())
    if machine.device == "cpu":
        prepared = replace(prepared, tiling=counted(prepared.tiling, modelled, build.build_kernel(cell.config["kernel"])))
    return prepared


def _busiest(mask: Mask, cell: Cell) -> Mask:
    """What the heads of the tensor-parallel rank see that see most."""
    own = cell.problem.heads.q
    if own == cell.heads.q:
        return mask
    parts = [mask.of_heads(first, own, cell.heads.q) for first in range(0, cell.heads.q, own)]
    return max(parts, key=lambda part: part.pairs(own))


def looked_at(pairs: Floats) -> list[int]:
    """Of more than ``DRAWS`` draws as many that stand for all: sorted by their pairs and cut into parts, of each part the one that
    is nearest to its mean.
    """
    parts = np.array_split(np.argsort(pairs, kind="stable"), min(DRAWS, len(pairs)))
    return [int(part[np.abs(pairs[part] - pairs[part].mean()).argmin()]) for part in parts]
