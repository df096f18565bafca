"""How long a cell will take, and whether it will fit, before it runs: simulated, and corrected by what results were like.

An iteration is what a simulation on the site's machine says (``runs/passes.py``). Where there are results of like cells, the same
but for length, draw and options, the nearest one's time counts, times what the simulation says of the two; else the simulation
times how much longer than simulated results of the same kernel and type took. A result of another device says nothing here; one
that cannot be read, or whose mask or code is not known here, is ignored, or its stored FLOPs count.

Only packing, deadlines and time limits depend on estimates: one that is wrong by a factor costs queue time and nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from lcbench.grid.axes import PACE, value_of
from lcbench.grid.build import draws
from lcbench.grid.cell import Cell
from lcbench.measure.blocks import blocks_of, shared, short_warmup
from lcbench.measure.cores import usable_cores
from lcbench.measure.peak import entry_of
from lcbench.runs.attempt import Attempt
from lcbench.runs.files import BROKEN
from lcbench.runs.passes import LEAST_SHARE, Passes, device_of, flops, passes_on
from lcbench.runs.store import newest_attempts

# Newest results that are looked at for like cells, and how many of these say what others of a kernel take.
HISTORY, COMPARED = 3000, 8
# What cells of one kernel share, whatever they compute.
KERNEL = ("kernel", "dtype", "direction", "workload")
# By results of like cells an iteration takes up to this much more; a time limit holds that and what a prediction's error adds.
LIKE_ERROR = 0.5
# Besides its passes and its check: building, drawing, and what ranks need to agree, each with each: 2, 4, 8, 16 CPU ranks on two
# busy cores took 1.6, 1.7, 1.8 and 3.3 s, and 96 of them 105 to 170 s. Of very many each has a core. One H200 took 0.1 to 0.4 s;
# what many GPUs take was not measured.
CELL_S = {"cpu": 1.5, "cuda": 0.5}
PAIR_S, RANK_S = {"cpu": 0.0165, "cuda": 2e-4}, {"cpu": 1.6, "cuda": 0.02}
# The check takes rows and columns, so it grows with the elements of q, which all ranks share: 3.1 to 5.4 s of 64k x 32 x 128 on an
# H200 (results/h200/long), 1.4 and 8.8 s of 1k and 8k x 4 x 64 on two busy cores.
CHECK_S = {"cpu": 3e-6, "cuda": 1.5e-8}
# A later block's passes besides its warm-up and those that are timed: the first, a probe and the last, which are checked.
AGAIN_PASSES = 3


@dataclass(frozen=True)
class Estimate:
    """Wall time of a cell, all draws of its mask and all blocks of its timings.

    Attributes:
        seconds: expected.
        most_s: if its iterations take as long as they may.
        basis: what it rests on, in words.
    """

    seconds: float
    most_s: float
    basis: str


@dataclass(frozen=True)
class _Known:
    cell: Cell
    flops: float
    pass_s: float
    prepare_s: float
    first_s: float  # what the first pass took more than a later one: compiling, say
    check_s: float


@dataclass(frozen=True)
class _Pass:
    """An iteration, and what comes before it is timed: ``once_s`` is the first pass and the check."""

    seconds: float
    error: float
    prepare_s: float
    once_s: float
    basis: str


@dataclass
class Estimator:
    """Seconds and bytes of cells on a site; ``device`` is the site's ``conf/device`` entry, None for CPU ranks. ``cores``: of all
    nodes that are one machine, and of a node; what is not known is enough.
    """

    device: dict[str, Any] | None = None
    cores: tuple[float, float] = (math.inf, math.inf)
    known: dict[tuple[Any, ...], list[_Known]] = field(default_factory=lambda: defaultdict(list))
    of_kernel: dict[tuple[Any, ...], list[_Known]] = field(default_factory=lambda: defaultdict(list))
    too_large: dict[tuple[Any, ...], int] = field(default_factory=dict)  # tokens of the shortest that did not fit
    _ratios: dict[tuple[Any, ...], float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path, site: dict[str, Any], devices: list[dict[str, Any]], *, here: bool = False) -> Estimator:
        """An estimator that knows the newest results below ``root``. ``here``: for this machine, and its GPUs by default."""
        device = device_of(site, devices, here=here)
        node_cores = float(site.get("cpus_per_task") or math.inf)
        cores = (float(usable_cores()), math.inf) if here else (math.inf, node_cores)
        made = cls(device, cores)
        for attempt in itertools.islice(newest_attempts(root), HISTORY):
            with suppress(*BROKEN):  # another version's, or no cell at all
                if made.is_of_this_device(attempt, devices):
                    made.learn(Cell.from_config(attempt.config), attempt)
        return made

    @cached_property
    def passes(self) -> Passes:
        """Raises:
        ValueError: the fit that lcbench has of the machine is none.
        """
        return passes_on(self.device)

    def is_of_this_device(self, attempt: Attempt, devices: list[dict[str, Any]]) -> bool:
        """Whether a result was measured on such a device, or does not say on what."""
        name = attempt.provenance.get("device")
        found = entry_of(devices, name) if isinstance(name, str) else self.device
        return (found or {}).get("name") == (self.device or {}).get("name")

    def learn(self, cell: Cell, attempt: Attempt) -> None:
        """Remember how a cell went."""
        like, metrics = _values(cell, PACE), attempt.metrics
        if attempt.failure is not None and attempt.failure.kind == "oom":
            tokens = cell.problem.seqlen
            self.too_large[like] = min(tokens, self.too_large.get(like, tokens))
        timed = {"time/total/median_s", "compute/tflops_per_gpu"} <= metrics.keys() and not attempt.no_speed
        if attempt.status == "ok" and timed:
            pass_s = metrics["time/total/median_s"]
            work = metrics["compute/tflops_per_gpu"] * 1e12 * pass_s * cell.scale.world_size
            prepare_s, first_pass_s, check_s = (metrics.get(f"time/{what}_s", 0.0) for what in ("prepare", "first_pass", "check"))
            known = _Known(cell, work, pass_s, prepare_s, max(0.0, first_pass_s - pass_s), check_s)
            if all(0.0 <= value < math.inf for value in (work, pass_s, prepare_s, known.first_s, check_s)):
                self.known[like].append(known)
                self.of_kernel[_values(cell, KERNEL)].append(known)

    def estimate(self, cell: Cell) -> Estimate:
        """Wall time of the cell, all draws of its mask and all blocks of its timings."""
        one = self._pass(cell)
        ranks = cell.scale.world_size
        besides = CELL_S[self._kind] + min(PAIR_S[self._kind] * ranks**2, RANK_S[self._kind] * ranks)
        every, most = (_every_s(cell, one, one.seconds * factor) for factor in (1.0, 1.0 + one.error))
        count = draws(cell.config["mask"])
        return Estimate(float(besides + count * every), float(besides + count * most), one.basis)

    def seconds(self, cell: Cell) -> float:
        """Of ``estimate``."""
        return self.estimate(cell).seconds

    def will_fail(self, cell: Cell) -> bool:
        """Whether a cell is expected not to fit: by the memory of the device, or because a like cell, no longer, did not fit."""
        known = self.too_large.get(_values(cell, PACE))
        if known is not None and cell.problem.seqlen >= known:
            return True
        return self.device is not None and self.passes.of(cell).peak_bytes > self.device["memory_bytes"]

    @property
    def _kind(self) -> str:
        return "cuda" if self.device else "cpu"

    def _pass(self, cell: Cell) -> _Pass:
        like = self.known.get(_values(cell, PACE))
        if like:
            work = flops(cell)
            return self._like(cell, work, min(like, key=lambda k: abs(math.log((k.flops + 1.0) / (work + 1.0)))))
        expected = self.passes.of(cell)
        seconds, error, basis = expected.seconds * self._turns(cell), expected.error, expected.basis
        if ratio := self._ratio(_values(cell, KERNEL)):
            seconds, basis = seconds * ratio, f"{basis}, by results of its kernel"
        heads = cell.problem.heads
        groups = 1 if self.device else cell.mesh.count  # which check at once, and on CPU share the cores
        check_s = CHECK_S[self._kind] * cell.problem.queries * heads.q * heads.dim * groups
        return _Pass(seconds, max(error, LIKE_ERROR), 0.0, seconds + check_s, basis)

    def _like(self, cell: Cell, work: float, nearest: _Known) -> _Pass:
        """By the nearest result of like cells."""
        expected, before = self.passes.of(cell), self.passes.of(nearest.cell)
        if expected.simulated and before.simulated:
            ratio = expected.seconds / before.seconds
        else:
            ratio = max(work / nearest.flops if nearest.flops else 1.0, LEAST_SHARE)
        seconds, longer = ratio * nearest.pass_s, cell.problem.seqlen / nearest.cell.problem.seqlen
        check_s = max(longer * nearest.check_s, min(nearest.check_s, CELL_S[self._kind]))
        once_s = seconds + nearest.first_s + check_s
        return _Pass(seconds, LIKE_ERROR, max(longer, 1.0) * nearest.prepare_s, once_s, "results of like cells")

    def _ratio(self, kernel: tuple[Any, ...]) -> float | None:
        """How many times as long as simulated the newest results of a kernel took, the median; None without any."""
        if kernel not in self._ratios:
            found = [
                known.pass_s / (expected.seconds * self._turns(known.cell))
                for known in self.of_kernel.get(kernel, [])[:COMPARED] if (expected := self.passes.of(known.cell)).simulated
            ]  # fmt: skip
            self._ratios[kernel] = median(found) if found else None
        return self._ratios[kernel]

    def _turns(self, cell: Cell) -> float:
        """How many times as long as simulated CPU ranks take because they share cores, and take turns at them."""
        if self.device:
            return 1.0
        scale = cell.scale
        turns = max(1.0, scale.world_size / self.cores[0], scale.gpus_per_node / self.cores[1])
        return max(1.0, turns / self.passes.turns_of(scale))


def _every_s(cell: Cell, one: _Pass, pass_s: float) -> float:
    """A draw of a cell, all blocks, if an iteration takes ``pass_s``."""
    measure = cell.config["measure"]
    first, later = shared(measure), shared(measure, first=False)
    # What computes and what is sent are timed apart, where there is something to send, and a group alone where there are several.
    extra = 2 * (cell.problem.scale.world_size > 1) + (cell.mesh.count > 1)
    apart = extra * (short_warmup(first) * pass_s + _timed_s(first, pass_s, first["budget_s"] / 4))
    once = one.prepare_s + one.once_s + (first["warmup"] + 1) * pass_s + _timed_s(first, pass_s, first["budget_s"]) + apart
    again = one.prepare_s + (later["warmup"] + AGAIN_PASSES) * pass_s + _timed_s(later, pass_s, later["budget_s"])
    return float(once + (blocks_of(measure) - 1) * again)


def _timed_s(measure: dict[str, Any], pass_s: float, budget_s: float) -> float:
    return float(max(measure["min_iterations"] * pass_s, min(budget_s, measure["max_iterations"] * pass_s)))


def _values(cell: Cell, axes: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(value_of(cell.config, axis) for axis in axes)
