"""How long a cell will take, and whether it will fit, before it runs: from results of like cells, else from its FLOPs.

An estimate uses only figures that a result stores: rate x time x ranks = FLOPs. It builds no mask of a stored cell, because the
mask's file may have changed, its code may be gone, or both may be somebody else's. A result that cannot be read is ignored.

Only packing, deadlines and time limits depend on estimates: one that is wrong by a factor costs queue time and nothing else.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcbench.grid.axes import PACE, value_of
from lcbench.grid.build import draws
from lcbench.grid.cell import Cell
from lcbench.grid.expand import pairs
from lcbench.measure.blocks import blocks_of, shared
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.measure.gpus import gpus_here
from lcbench.measure.peak import entry_of
from lcbench.problem import Problem
from lcbench.runs.store import BROKEN, Attempt, newest_attempts

# Newest results that are looked at for like cells.
HISTORY = 3000
# What a rank reaches where nothing is known: a share of a device's peak, and FLOP/s of a CPU rank.
EFFICIENCY = 0.25
CPU_FLOPS = 5e9
# Besides its passes: building, drawing, checking, and what ranks need to agree: 96 CPU ranks on two cores took 105 s.
CELL_S = 2.0
RANK_S = {"cpu": 1.0, "cuda": 0.02}
# A later block's passes besides its warm-up and those that are timed: the first, a probe and the last, which are checked.
AGAIN_PASSES = 3
BYTES_OF_SUMS = 4  # gradients are summed in float32


@dataclass(frozen=True)
class _Known:
    flops: float
    pass_s: float
    prepare_s: float
    once_s: float  # the first pass and the check


@dataclass
class Estimator:
    """Seconds and bytes of cells on a site; ``device`` is the site's ``conf/device`` entry, None for CPU ranks. ``cores``: of all
    nodes that are one machine, and of a node; what is not known is enough.
    """

    device: dict[str, Any] | None = None
    cores: tuple[float, float] = (math.inf, math.inf)
    known: dict[tuple[Any, ...], list[_Known]] = field(default_factory=lambda: defaultdict(list))
    too_large: dict[tuple[Any, ...], int] = field(default_factory=dict)  # tokens of the shortest that did not fit

    @classmethod
    def of(cls, root: Path, site: dict[str, Any], devices: list[dict[str, Any]], *, here: bool = False) -> Estimator:
        """An estimator that knows the newest results below ``root``. ``here``: for this machine, and its GPUs by default."""
        device = next((d for d in devices if d["name"] == site.get("device")), None)
        if here and site.get("device") is None:
            device = next((entry_of(devices, gpu["name"]) for gpu in gpus_here() or ()), None)
        node_cores = float(site.get("cpus_per_task") or math.inf)
        made = cls(device, (float(os.cpu_count() or math.inf), math.inf) if here else (math.inf, node_cores))
        for attempt in itertools.islice(newest_attempts(root), HISTORY):
            with suppress(*BROKEN):  # another version's, or no cell at all
                made.learn(Cell.from_config(attempt.config), attempt)
        return made

    def learn(self, cell: Cell, attempt: Attempt) -> None:
        """Remember how a cell went."""
        like, metrics = _likeness(cell), attempt.metrics
        if attempt.failure is not None and attempt.failure.kind == "oom":
            tokens = cell.problem.seqlen
            self.too_large[like] = min(tokens, self.too_large.get(like, tokens))
        timed = {"time/total/median_s", "compute/tflops_per_gpu"} <= metrics.keys() and not attempt.no_speed
        if attempt.status == "ok" and timed:
            pass_s = metrics["time/total/median_s"]
            work = metrics["compute/tflops_per_gpu"] * 1e12 * pass_s * cell.problem.scale.world_size
            prepare_s, first_pass_s, check_s = (metrics.get(f"time/{what}_s", 0.0) for what in ("prepare", "first_pass", "check"))
            known = _Known(work, pass_s, prepare_s, first_pass_s + check_s)
            if all(0.0 <= value < math.inf for value in (work, pass_s, prepare_s, known.once_s)):
                self.known[like].append(known)

    def seconds(self, cell: Cell) -> float:
        """Wall time of the cell, all draws of its mask and all blocks of its timings."""
        measure, ranks, work = cell.config["measure"], cell.problem.scale.world_size, flops(cell)
        like = self.known.get(_likeness(cell))
        if like:
            nearest = min(like, key=lambda k: abs(k.flops - work))
            ratio = max(work / nearest.flops if nearest.flops else 1.0, 0.05)
            pass_s = ratio * nearest.pass_s
            prepare_s, once_s = (max(ratio, 1.0) * besides_s for besides_s in (nearest.prepare_s, nearest.once_s))
        else:
            rate = EFFICIENCY * 1e12 * self.device["peak_tflops"].get(cell.config["dtype"], 1.0) if self.device else CPU_FLOPS
            pass_s = work / ranks / rate
            if not self.device:  # ranks that share a core take turns
                scale = cell.problem.scale
                pass_s *= max(1.0, ranks / self.cores[0], scale.gpus_per_node / self.cores[1])
            prepare_s, once_s = 0.0, 2 * pass_s
        first, later = shared(measure), shared(measure, first=False)
        apart = 2 * (pass_s + _timed_s(first, pass_s, first["budget_s"] / 4)) if ranks > 1 else 0.0
        one = prepare_s + once_s + (first["warmup"] + 1) * pass_s + _timed_s(first, pass_s, first["budget_s"]) + apart
        again = prepare_s + (later["warmup"] + AGAIN_PASSES) * pass_s + _timed_s(later, pass_s, later["budget_s"])
        every = one + (blocks_of(measure) - 1) * again
        return float(CELL_S + RANK_S["cuda" if self.device else "cpu"] * ranks + draws(cell.config["mask"]) * every)

    def will_fail(self, cell: Cell) -> bool:
        """Whether a cell is expected not to fit: by the memory of the device, or because a like cell, no longer, did not fit."""
        known = self.too_large.get(_likeness(cell))
        if known is not None and cell.problem.seqlen >= known:
            return True
        return self.device is not None and memory_bytes(cell.problem, cell.config["cp"]["name"]) > self.device["memory_bytes"]


def _timed_s(measure: dict[str, Any], pass_s: float, budget_s: float) -> float:
    return float(max(measure["min_iterations"] * pass_s, min(budget_s, measure["max_iterations"] * pass_s)))


def flops(cell: Cell) -> float:
    """FLOPs of one pass of a cell over all ranks. Where its mask cannot be built here (its file has changed, say), a full mask
    counts; the attempt reports the reason.
    """
    heads = cell.problem.heads
    try:
        work = pairs(cell)
    except (*BROKEN, OSError):
        work = float(cell.problem.seqlen) ** 2 * heads.q
    return forward_flops(work, heads) + (backward_flops(work, heads) if cell.problem.backward else 0.0)


def memory_bytes(problem: Problem, strategy: str) -> int:
    """Bytes that a rank holds at least: its inputs, output, gradients with their sums, and the keys and values of others.

    Of others: all of them for an all-gather, two blocks (one in use, one arriving) for the rest.
    """
    tokens = problem.seqlen / problem.scale.world_size
    q, kv = (tokens * n * problem.heads.dim for n in (problem.heads.q, problem.heads.kv))
    blocks = problem.scale.world_size if strategy == "allgather" else 2
    total = problem.itemsize * (2 * q + 2 * kv + 2 * kv * blocks)
    if problem.backward:
        total += problem.itemsize * (2 * q + 2 * kv) + BYTES_OF_SUMS * (q + 2 * kv * blocks)
    return int(total)


def _likeness(cell: Cell) -> tuple[Any, ...]:
    return tuple(value_of(cell.config, axis) for axis in PACE)
