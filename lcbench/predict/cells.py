"""Measured cells as results hold them, to fit on.

A cell has been timed in blocks, perhaps in several attempts. What counts is the fastest block of each phase: whatever else runs on
a machine takes time and gives none. Its kernels and its messages alone, which are timed once, count as in that block. So a sweep
may be measured again (``force=true``) where others work on the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, Protocol

from lcbench.grid.build import build_planner
from lcbench.grid.cell import Cell
from lcbench.grid.devices import known_devices
from lcbench.predict.draws import unforeseen
from lcbench.predict.observations import CellMemory, CellTime
from lcbench.schedule.machine import Machine

PEAK = "memory/peak_bytes"
TIME = re.compile(r"time/\w+/median_s")


class Result(Protocol):
    """What is read of an attempt at a cell (``runs.attempt.Attempt``)."""

    @property
    def status(self) -> str: ...

    @property
    def no_speed(self) -> str: ...

    @property
    def metrics(self) -> dict[str, float]: ...

    @property
    def samples(self) -> dict[str, list[float]]: ...

    @property
    def provenance(self) -> dict[str, Any]: ...


def cell_times(results: Iterable[tuple[Cell, Sequence[Result]]], machine: Machine, source: str) -> list[CellTime]:
    """A ``CellTime`` of each cell with a good result. Left out are those whose ranks shared a GPU, which say nothing of its speed,
    those of several context-parallel groups, which meet on links that no cell of one group tells of, those whose documents a
    planner shares out, and those that do what no prediction knows of (``unforeseen``).

    Args:
        results: cells with their attempts.
        source: where they are from, in words.

    Raises:
        ValueError: there is none, or one is of another device than the machine's.
    """
    return [_cell_time(cell, attempts, source) for cell, attempts in _good(results, machine, source)]


def cell_peaks(results: Iterable[tuple[Cell, Sequence[Result]]], machine: Machine, source: str) -> list[CellMemory]:
    """A ``CellMemory`` of each cell with a good result that has a peak: the median of its attempts. Ranks that shared a GPU sent by
    another backend, with other buffers, and are left out.

    Raises:
        ValueError: as ``cell_times``.
    """
    found = []
    for cell, attempts in _good(results, machine, source):
        if peaks := [a.metrics[PEAK] for a in attempts if a.metrics.get(PEAK, 0) > 0]:
            words = f"{cell.config['cp']['name']} {cell.config['mask']['name']}"
            found.append(CellMemory(cell, float(median(peaks)), words, source))
    return found


def group_of(cell: Cell) -> str:
    """What a cell's time is left out of a fit with: cells of its mask; of another workload than the default, of its strategy,
    recomputation and selector too, since a step's mask says little of it; with a cache, of its batch, which says most of what is
    computed."""
    words = cell.words
    if cell.problem.rectangular:
        return f"{words['mask']} {cell.batch}"
    axes = ("cp", "mask", "recompute", "selector") if "workload" in words else ("mask",)
    return " ".join(words[axis] for axis in axes if axis in words)


def _good(results: Iterable[tuple[Cell, Sequence[Result]]], machine: Machine, source: str) -> list[tuple[Cell, list[Result]]]:
    """Cells with their good attempts."""
    good = [(cell, [a for a in attempts if a.status == "ok" and not a.no_speed]) for cell, attempts in results]
    good = [(cell, attempts) for cell, attempts in good if attempts and _tells(cell)]
    if not good:
        raise ValueError(f"{source}: no cell has a good result with a time")
    for _, attempts in good:
        for attempt in attempts:
            _check_device(attempt.provenance, machine, source)
    return good


def _tells(cell: Cell) -> bool:
    """Whether a cell's time says something of kernels and links."""
    softmax = cell.problem.rule is None
    return softmax and cell.mesh.count == 1 and build_planner(cell.config) is None and unforeseen(cell) is None


def _check_device(provenance: dict[str, Any], machine: Machine, source: str) -> None:
    name, gpu = str(provenance.get("device")), bool(provenance.get("cuda"))
    of = next((d["name"] for d in known_devices() if gpu and name in d["names"]), name if gpu else "cpu")
    if of != machine.device:
        raise ValueError(f"{source} was measured on {name}, which is no device of machine={machine.name} ({machine.device})")
    if machine.cores and provenance.get("cpus") != machine.cores:
        raise ValueError(
            f"{source} was measured on {provenance.get('cpus')} cores, and this machine has {machine.cores}; fit it there"
        )


def _cell_time(cell: Cell, attempts: Sequence[Result], source: str) -> CellTime:
    phases = [key.removeprefix("time/").removesuffix("/median_s") for key in attempts[0].metrics if TIME.fullmatch(key)]
    phases = [phase for phase in phases if phase != "total"]

    def alone(part: str) -> dict[str, float]:
        keys = {phase: f"overlap/{phase}/{part}_s" for phase in phases}
        every = {
            phase: [a.metrics[key] * _fastest_of_first(a, phase) for a in attempts if key in a.metrics]
            for phase, key in keys.items()
        }
        return {phase: min(seconds) for phase, seconds in every.items() if seconds}

    return CellTime(
        cell, {phase: min(_of_blocks(attempt, phase) for attempt in attempts) for phase in phases},
        group=group_of(cell), source=source, own=True,
        compute=alone("compute"), communication=alone("communication"),
    )  # fmt: skip


def _fastest_of_first(attempt: Result, phase: str) -> float:
    """The fastest block of a phase over the first one. Kernels and messages are timed alone in the first block only, whatever else
    runs then: were they taken as they are beside the fastest block of the whole, a fit would take a busy moment for the kernel's.
    """
    blocks = attempt.samples.get(f"block_{phase}_s")
    return min(blocks) / blocks[0] if blocks else 1.0


def _of_blocks(attempt: Result, phase: str) -> float:
    """The fastest block of a phase, in seconds; the only one of a result that is from before there were blocks."""
    return min(attempt.samples.get(f"block_{phase}_s") or [attempt.metrics[f"time/{phase}/median_s"]])
