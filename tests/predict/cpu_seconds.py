"""CPU seconds of cells on gloo ranks with a thread each, for a machine that others use as well.

Time on the clock says how busy such a machine is. A rank that computes on one thread hardly waits for anything but messages, so the
CPU seconds of the slowest rank are what the clock would show were nobody else there. No sweep does this: its times are the clock's.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lcbench.cp.base import Passes, Place
from lcbench.grid import build
from lcbench.grid.cell import Cell
from lcbench.inputs.drawing import draw
from lcbench.predict.observations import CellTime
from lcbench.schedule.groups import Groups
from lcbench.testing.spawn import run_ranks

PHASES = ("forward", "backward")


def measured(cells: Sequence[Cell], iterations: int) -> list[CellTime]:
    """Every cell's CPU seconds, the fastest of the iterations, those of one number of ranks together."""
    found = by_ranks(cells, iterations, _rank)
    return [
        CellTime(cell, found[cell.id]["whole"], cell.config["mask"]["name"], "CPU seconds", own=True,
                 compute=found[cell.id].get("compute", {}), communication=found[cell.id].get("communication", {}))
        for cell in cells
    ]  # fmt: skip


def by_ranks(cells: Sequence[Cell], iterations: int, rank: Callable[..., None]) -> dict[str, Any]:
    """What ``rank(rank, configs, iterations, path)`` writes to the path of all cells of a number of ranks, by the cells' ids."""
    found: dict[str, Any] = {}
    for ranks in sorted({cell.scale.world_size for cell in cells}):
        configs = [cell.config for cell in cells if cell.scale.world_size == ranks]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "seconds.json"
            run_ranks(ranks, rank, configs, iterations, str(path))
            found |= json.loads(path.read_text())
    return found


def _rank(rank: int, configs: list[dict[str, Any]], iterations: int, path: str) -> None:
    place = Place(rank, torch.device("cpu"), Groups())
    found = {cell.id: _cell(cell, place, iterations) for cell in map(Cell.from_config, configs)}
    if rank == 0:
        Path(path).write_text(json.dumps(found))


def _cell(cell: Cell, place: Place, iterations: int) -> dict[str, dict[str, float]]:
    problem, config = cell.problem, cell.config
    mask = build.build_mask(config["mask"], problem.seqlen, problem.heads, config["seed"])
    run = build.build_strategy(config["cp"]).start(problem, mask, build.build_kernel(config["kernel"]), place)
    made = [draw(name, run.tokens, problem, config["seed"], place.device) for name in ("q", "k", "v", "dout")]
    saved, _ = _once(run, made, None)
    variants: dict[str, Passes | None] = {
        "whole": run,
        "compute": run.replay(compute=True, communicate=False),
        "communication": run.replay(compute=False, communicate=True),
    }
    found = {}
    for name, passes in variants.items():
        if passes is not None:
            every = torch.tensor([_once(passes, made, saved)[1] for _ in range(iterations)], dtype=torch.float64)
            dist.all_reduce(every, op=dist.ReduceOp.MAX)
            found[name] = dict(zip(PHASES, every.min(dim=0).values.tolist(), strict=True))
    return found


def _once(passes: Passes, inputs: Sequence[torch.Tensor], saved: Any) -> tuple[Any, list[float]]:
    """What backward needs, and CPU seconds of both phases; ``saved``: None: of this forward."""
    q, k, v, dout = inputs
    dist.barrier()
    begun = time.process_time()
    _, own = passes.forward(q, k, v)
    forward = time.process_time() - begun
    dist.barrier()
    begun = time.process_time()
    passes.backward(dout, own if saved is None else saved)
    return own, [forward, time.process_time() - begun]
