"""What one iteration of a cell would take on a site's devices: simulated, or within limits of FLOPs and bytes, which it says.

A plan of ten thousand cells is to take seconds, so a plan may simulate only so much, and no cell of which one simulation takes
too long. Seeds of one mask are simulated once, and follow their FLOPs. A batch of documents is estimated as if nobody planned it,
which takes time itself, and makes the batch faster. Beyond its allowance a length follows the nearest simulated one of the same
cell by its FLOPs; what has none, more ranks than are simulated, and what cannot be simulated (a library of which nobody says how
it works, a mask whose file is gone) has a bound: its FLOPs at the pace of its kernel on one rank, and then all keys and values
from the others, and their gradients back, over one rank's link. With a cache it takes at least as long as reading that once. What
a workload computes beside its attention has the pace of the kernel there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lcbench.grid import own
from lcbench.grid.build import SAMPLES, build_planner, input_bytes, made_of
from lcbench.grid.cell import Cell
from lcbench.grid.devices import known_devices
from lcbench.grid.refusals import mask_of, pairs
from lcbench.masks.band import BandMask
from lcbench.measure.gpus import gpus_here
from lcbench.measure.peak import entry_of
from lcbench.problem import Problem, Scale
from lcbench.runs.files import BROKEN
from lcbench.schedule.payload import PAYLOADS, element_bytes
from lcbench.workloads.parts import Made, Share, flops_of

if TYPE_CHECKING:
    from lcbench.planners.base import Cost
    from lcbench.predict.predictor import Predictor

# What simulating costs, in units of about 10 us on a core of 2026: of any cell, per band of its mask, per 128 x 128 block of a
# drawn map and head, and per pair of ranks, which on CPU has each of its tiles counted by itself. A plan has ALLOWANCE (5 s), a
# cell at most MOST of it: 256 GPUs, or 50 CPU ranks.
ANY, BAND, BLOCK, BLOCK_SIDE = 700, 10, 1 / 150, 128
PAIR, PAIR_ON_CPU = 1, 30
ALLOWANCE, MOST = 500_000, 80_000
# A longer or shorter one of the same has at least this share of the other's time: what takes as long whatever the length.
LEAST_SHARE = 0.05
# A bound, and what is scaled from another length, may be off by so much: its time by a factor of two.
ROUGH = 1.0
# The cell whose pace is that of a kernel: full attention on one rank.
PACE_TOKENS = 16384
ALONE = {
    "cp": {"name": "none", "_target_": "lcbench.cp.none.Local"},
    "mask": {"name": "full", "_target_": "lcbench.masks.full.full"},
    "scale": "1x1",
}
NOT_ALONE = ("workload", "recompute", "mesh", "batch")  # which attention of one sequence on one rank has not
NOT_OF_SHAPE = ("seqlen", "seed", "measure", "planner")
CURVE = 20  # simulations of a sub-group of a batch that is planned, by which its documents' costs are known

_made: dict[str, Passes] = {}  # by device


@dataclass(frozen=True)
class Expected:
    """An iteration of a cell.

    Attributes:
        seconds: forward and, with backward, backward; of a rank with a device, or a core, of its own (but see ``turns_of``).
        error: relative half-width of the 95 % interval of ``seconds``.
        flops: of all ranks.
        peak_bytes: of the rank with most, inputs included; where it was not simulated, what a rank holds at least.
        basis: what it rests on: ``simulation``, or ``FLOPs and bytes`` and why.
        simulated: whether its own schedule and mask were.
    """

    seconds: float
    error: float
    flops: float
    peak_bytes: float
    basis: str
    simulated: bool


@dataclass
class Passes:
    """Iterations of cells on one kind of device. ``slower``: how many times as long as the predictor's its kernels take.
    ``allowance``: how much may still be simulated.
    """

    predictor: Predictor
    slower: float = 1.0
    allowance: float = ALLOWANCE
    _simulated: dict[str, dict[int, Expected]] = field(default_factory=dict)
    _refused: dict[tuple[str, int], str] = field(default_factory=dict)
    _paces: dict[str, float] = field(default_factory=dict)

    def of(self, cell: Cell) -> Expected:
        """What an iteration of a cell would take; each cell's answer depends on what was asked before it, and on nothing else."""
        tokens, shape, work = cell.problem.seqlen, _shape(cell), flops(cell)
        known = self._simulated.setdefault(shape, {})
        reason = self._refused.get((shape, tokens)) or (None if tokens in known else self._simulate(cell, shape, work))
        if tokens in known:
            return _scaled(known[tokens], work, 1.0)
        if known:
            nearest = min(known, key=lambda other: abs(other - tokens))
            found = _scaled(known[nearest], work, tokens / nearest)
            return replace(found, error=max(found.error, ROUGH), basis="simulation of another length", simulated=False)
        return self._bound(cell, work, reason or "")

    def cost(self, cell: Cell) -> Cost:
        """What documents cost a cell whose workload takes a planner, by the same predictor.

        Raises:
            ValueError: it takes none.
        """
        from lcbench.predict.costs import cost_of  # with scipy, which commands that plan nothing do without

        return cost_of(cell, self.predictor, slower=self.slower)

    def turns_of(self, scale: Scale) -> float:
        """How many ranks share a core by what was fitted, which was fitted on nodes whose ranks share their cores."""
        cores = self.predictor.machine.cores if self.predictor.fitted is not None else 0
        return max(1.0, scale.gpus_per_node / cores) if cores else 1.0

    def _simulate(self, cell: Cell, shape: str, work: float) -> str | None:
        """Simulate a cell, if it can be and the allowance holds it; else why not."""
        try:
            cost = _cost(cell, PAIR_ON_CPU if self.predictor.machine.device == "cpu" else PAIR)
            if cost > MOST:
                raise ValueError("simulating it takes longer than a plan may")
            if cost > self.allowance:
                return "the plan has simulated as much as it may"
            self.allowance -= cost
            config: dict[str, Any] = {key: value for key, value in cell.config.items() if key != "planner"}
            one = Cell.from_config(config | {"mask": {k: v for k, v in config["mask"].items() if k != SAMPLES}})
            found = self.predictor.predict(one, memory=self.predictor.machine.memory_bytes > 0)
        except Exception as error:
            if not isinstance(error, (*BROKEN, OSError)) and not own.named_in(cell.config["cp"]):
                raise
            return self._refused.setdefault((shape, cell.problem.seqlen), _why(error))  # code of the user's may raise anything
        self._simulated[shape][cell.problem.seqlen] = Expected(
            self.slower * found.seconds, found.error, work, found.needs_bytes, "simulation", True
        )
        return None

    def _bound(self, cell: Cell, work: float, reason: str) -> Expected:
        problem, machine = cell.problem, self.predictor.machine
        link = machine.across if problem.scale.nodes > 1 else machine.inside
        made = _parts(cell)
        sent = exchanged_bytes(problem) * made.attends() / (2 if problem.backward else 1)
        read = problem.rectangular * cached_bytes(problem) / problem.scale.world_size / machine.memory_bytes_per_s
        seconds = self.slower * max(work / cell.scale.world_size / self._pace(cell), read) + sent / link.bytes_per_s
        held = input_bytes(cell) + (sum(made.room.classes.values()) if made.room else 0.0)
        return Expected(seconds, ROUGH, work, held, f"FLOPs and bytes: {reason}", False)

    def _pace(self, cell: Cell) -> float:
        """FLOP/s of a cell's kernel on one rank."""
        config = {key: value for key, value in cell.config.items() if key not in NOT_ALONE}
        alone = Cell.from_config({**config, **ALONE, "seqlen": PACE_TOKENS})
        shape = _shape(alone)
        if shape not in self._paces:
            self._paces[shape] = flops(alone) / self.predictor.predict(alone, memory=False).seconds
        return self._paces[shape]


def passes_on(device: dict[str, Any] | None) -> Passes:
    """Iterations on a device, an entry of conf/device or a slice of one (``measure.peak.entry_of``), or on CPU ranks (None), by the
    fit that lcbench has of the machine.

    A device without a machine in conf/machine has the links of the one whose memory is as fast, and its own memory and peak. A
    slice computes as much slower as its peak is lower. What a process has simulated it knows, and it may simulate as much again.

    Raises:
        ValueError: the file of that fit is none, or cannot be read.
    """
    key = json.dumps(device)
    made = _made[key] if key in _made else _made.setdefault(key, _passes_on(device))
    made.allowance = ALLOWANCE
    return made


def _passes_on(device: dict[str, Any] | None) -> Passes:
    from lcbench.predict import machines  # with scipy, which commands that plan nothing do without
    from lcbench.predict.predictor import Predictor

    found = [machines.machine_of(name) for name in machines.known()]
    entries = {entry["name"]: entry for entry in known_devices()}
    slower = 1.0
    if device is None:
        near, own_parts = next(m for m in found if m.device == "cpu"), {}
    else:
        whole = next((entry for entry in entries.values() if entry["names"] == device["names"]), device)
        speed = whole["memory_gbytes_per_s"]
        gpus = [m for m in found if m.device in entries]
        near = min(gpus, key=lambda m: (m.device != whole["name"], abs(entries[m.device]["memory_gbytes_per_s"] - speed)))
        own_parts = {"device": whole["name"], "memory_bytes": int(device["memory_bytes"])}
        slower = max(whole["peak_tflops"][dtype] / peak for dtype, peak in device["peak_tflops"].items())
    predictor = Predictor.of(near.name)
    return Passes(replace(predictor, machine=replace(predictor.machine, **own_parts)), slower)


def device_of(site: dict[str, Any], devices: list[dict[str, Any]], *, here: bool) -> dict[str, Any] | None:
    """The entry of conf/device that a site measures on; None: CPU ranks. ``here``: on this machine, by default on its GPUs."""
    found = next((d for d in devices if d["name"] == site.get("device")), None)
    if here and site.get("device") is None:
        found = next((entry_of(devices, gpu["name"]) for gpu in gpus_here() or ()), None)
    return found


def flops(cell: Cell) -> float:
    """FLOPs of one iteration of a cell over all ranks, what is computed again not counted. Where its mask cannot be built here (its
    file has changed, say), a full mask counts; the attempt reports the reason.
    """
    problem, made = cell.problem, _parts(cell)
    try:
        work = pairs(cell)
    except (*BROKEN, OSError):
        work = float(problem.plane) * problem.heads.q
    every = (part for parts in made.phases.values() for part in parts)
    return cell.mesh.count * flops_of(every, lambda attend: attend.share * work, problem, problem.scale.world_size)


def _parts(cell: Cell) -> Made:
    """What a cell is made of on a rank with its even share of the tokens."""
    problem = cell.problem
    return made_of(cell.config, Share(problem, math.ceil(problem.queries / problem.scale.world_size), cell.mesh))


def exchanged_bytes(problem: Problem) -> float:
    """Bytes that a rank gets at most: the keys and values of all others, with backward once more, and their gradients as sums; of
    linear attention the summaries of all others, each way."""
    ranks = problem.scale.world_size
    if problem.rule is not None:
        elements = PAYLOADS["summary"].elements(problem.heads, problem.rule) * problem.heads.kv * element_bytes("sum", problem)
        return float((2 if problem.backward else 1) * (ranks - 1) * elements)
    per_element = 2 * problem.itemsize + element_bytes("reduce", problem) if problem.backward else problem.itemsize
    return cached_bytes(problem) / problem.itemsize * (ranks - 1) / ranks * per_element


def cached_bytes(problem: Problem) -> float:
    """Of all keys and values, in the inputs' type."""
    return float(problem.seqlen * problem.heads.kv * problem.heads.kv_width * problem.itemsize)


def _cost(cell: Cell, pair: float) -> float:
    """What simulating a cell costs, if a pair of ranks costs ``pair``.

    Raises:
        ValueError: its mask cannot be built.
    """
    mask, ranks = mask_of(cell), cell.problem.scale.world_size
    planned = build_planner(cell.config) is not None
    each = pair * cell.mesh.count * (CURVE if planned else 1)  # all groups are played
    blocks = cell.problem.plane / BLOCK_SIDE**2
    drawn = BAND * len(mask) if isinstance(mask, BandMask) else BLOCK * mask.maps * blocks
    return float(ANY + each * ranks**2 + drawn)


def _why(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(str(error).split()) if isinstance(error, ValueError) else own.in_words(error)


def _scaled(found: Expected, work: float, longer: float) -> Expected:
    """What takes as long per FLOP, for another seed or length."""
    share = max(work / found.flops, LEAST_SHARE) if found.flops else 1.0
    return replace(found, seconds=share * found.seconds, flops=work, peak_bytes=longer * found.peak_bytes)


def _shape(cell: Cell) -> str:
    """What of a cell decides how its time depends on its length."""
    config: dict[str, Any] = {key: value for key, value in cell.config.items() if key not in NOT_OF_SHAPE}
    config["mask"] = {key: value for key, value in config["mask"].items() if key != SAMPLES}
    return json.dumps(config)
