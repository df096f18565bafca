"""A pack: cells that share one allocation, and so one job; and how cells are grouped into packs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lcbench.grid.build import draws
from lcbench.grid.cell import Cell
from lcbench.problem import Scale
from lcbench.runs.store import Sweep, read_json, write_json

# What a gang needs before its first cell (imports, rendezvous, process groups), once more after one restart, and a grace
# at the end; on an oversubscribed machine ranks start one after the other.
STARTUP_S = 180.0
STARTUP_PER_RANK_S = 3.0
# A cell may overrun its estimate by this factor before the job's time limit ends it.
SLACK = 1.5


@dataclass(frozen=True)
class Pack:
    """The content of ``pack.json``: all that a job needs besides the code."""

    id: str
    sweep: str
    root: str  # results root, absolute
    scale: str
    cells: tuple[str, ...]  # ids, in the order in which they run: the shortest estimate first
    configs: dict[str, dict[str, Any]]  # cell id -> canonical config
    site: dict[str, Any]  # resolved conf/site of the submitting command
    devices: list[dict[str, Any]]  # every conf/device file: peaks by device name
    timeout_min: int
    tracking_uri: str | None

    @property
    def folder(self) -> Path:
        return Sweep(Path(self.root), self.sweep).pack_folder(self.id)

    @property
    def path(self) -> Path:
        return self.folder / "pack.json"

    def write(self) -> Path:
        write_json(self.path, asdict(self))
        return self.path

    @classmethod
    def read(cls, path: Path) -> Pack:
        data = read_json(path)
        return cls(**{**data, "cells": tuple(data["cells"])})


def group(
    cells: Sequence[Cell], estimate_s: Callable[[Cell], float], *, max_cells: int | None, max_minutes: int | None
) -> list[tuple[Scale, list[Cell], int]]:
    """Group cells by scale, shortest estimate first, so that a job that ends early has lost the fewest.

    Returns (scale, cells, time limit in minutes) per pack. ``max_minutes`` caps the limit and splits what would exceed it;
    a single cell that alone exceeds it keeps a pack of its own at the cap.
    """
    by_scale: dict[Scale, list[Cell]] = {}
    for cell in sorted(cells, key=estimate_s):
        by_scale.setdefault(cell.scale, []).append(cell)
    packs: list[tuple[Scale, list[Cell], int]] = []
    for scale, members in by_scale.items():
        current: list[Cell] = []
        for cell in members:
            full = max_cells is not None and len(current) >= max_cells
            late = max_minutes is not None and _limit_min(scale, [*current, cell], estimate_s) > max_minutes
            if current and (full or late):
                packs.append((scale, current, _limit_min(scale, current, estimate_s, max_minutes)))
                current = []
            current.append(cell)
        packs.append((scale, current, _limit_min(scale, current, estimate_s, max_minutes)))
    return packs


def _limit_min(scale: Scale, cells: Sequence[Cell], estimate_s: Callable[[Cell], float], cap: int | None = None) -> int:
    startup_s = STARTUP_S + STARTUP_PER_RANK_S * scale.world_size
    minutes = math.ceil((startup_s + SLACK * sum(map(estimate_s, cells))) / 60)
    return minutes if cap is None else min(minutes, cap)


def estimate_s(cell: Cell) -> float:
    """Seconds that a cell takes at most if all goes well: for each draw of its mask twice its timing budget (warm-up, check,
    memory), and 10 s to set up.

    Never more than its timeout, which ends it.
    """
    measure = cell.config["measure"]
    return float(min(2 * measure["budget_s"] + 10.0, measure["timeout_s"])) * draws(cell.config["mask"])
