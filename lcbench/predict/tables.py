"""Files of measured times as observations. What a file is, its columns say, never its name.

Three forms are known: tables of calls of kernels and collectives alone (CSV), tables of published context parallelism (CSV), and
what ``make gpu-check`` writes (JSON). ``names.yaml`` says which cell a published row is, and which machine a GPU.
"""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.grid.devices import known_devices
from lcbench.grid.values import parse_heads
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.predict.cells import PEAK
from lcbench.predict.draws import draws_of
from lcbench.predict.observations import CellMemory, CellTime, CollectiveTime, KernelTime, Observation
from lcbench.predict.unknowns import PHASES
from lcbench.problem import Heads
from lcbench.schedule.machine import Machine, Tiles

DATA = Path(__file__).parent / "data"
NAMES = DATA / "names.yaml"
CALLS = {
    "gpu",
    "framework",
    "kernel",
    "op",
    "batch",
    "tokens",
    "q_heads",
    "kv_heads",
    "head_dim",
    "bytes",
    "unit",
    "latency",
    "gpus",
}
PUBLISHED = {"mask", "world_size", "phase", "tflops_per_gpu"}
GPU_CHECK = {"provenance", "timings"}
SECONDS = {"ms": 1e-3, "us": 1e-6, "s": 1.0}
FORMS = (
    f"a table of calls ({', '.join(sorted(CALLS))}), one of published rows ({', '.join(sorted(PUBLISHED))} and strategy or cp), "
    "or what make gpu-check writes"
)


@dataclass(frozen=True)
class Row:
    """A published row: TFLOP/s per GPU of a phase of a cell; ``name``: of its strategy, as published."""

    cell: Cell
    name: str
    phase: str
    tflops: float


@dataclass
class Read:
    """What files hold for a machine.

    Attributes:
        observations: measured times.
        rows: published rows, among them those that observations are made of.
        left_out: how many rows were not taken, by why.
    """

    observations: list[Observation] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, other: Read) -> None:
        self.observations += other.observations
        self.rows += other.rows
        self.left_out += other.left_out


@cache
def names() -> dict[str, Any]:
    """What ``names.yaml`` says."""
    return dict(OmegaConf.to_container(OmegaConf.load(NAMES)))  # type: ignore[arg-type]


def read(path: Path, machine: Machine, *, ranks: int | None = None, kernel: str | None = None) -> Read:
    """The rows of a file that are of a machine.

    Args:
        ranks: of published rows, those of more are none to fit on; None: all are.
        kernel: of published rows; None: the one that their GPU's were computed with.

    Raises:
        ValueError: no such form, or a value that is none, with its line.
        OSError: the file cannot be read.
    """
    text = path.read_text()
    if text.lstrip().startswith("{"):
        return _gpu_check(path, text, machine)
    lines = list(csv.DictReader(text.splitlines()))
    columns = set(lines[0]) if lines else set()
    if columns >= CALLS:
        return _calls(path, lines, machine)
    if columns >= PUBLISHED and columns & {"strategy", "cp"}:
        return _published(path, lines, machine, ranks, kernel)
    raise ValueError(f"{path} is nothing to fit on: its columns are {', '.join(map(str, columns)) or 'none'}; wanted is {FORMS}")


def _number(path: Path, line: int, row: dict[str, str], column: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = np.nan
    if not 0 < value < np.inf:
        raise ValueError(f"{path}, line {line}: {column}={row[column]} is no number above 0")
    return float(value)


# -- calls of kernels and collectives ----------------------------------------------------------------------------------------


def _calls(path: Path, lines: Sequence[dict[str, str]], machine: Machine) -> Read:
    found = Read()
    operations = names()["operations"]
    for number, row in enumerate(lines, 2):
        if names()["gpus"].get(row["gpu"]) != machine.device:
            found.left_out[f"of {row['gpu']}"] += 1
        elif row["unit"] not in SECONDS:
            raise ValueError(f"{path}, line {number}: unit={row['unit']} is none of {', '.join(SECONDS)}")
        elif row["op"] in operations:
            found.observations.append(_collective(path, number, row, operations[row["op"]]))
        elif row["op"] in names()["calls"]:
            found.observations.append(_kernel(path, number, row))
        else:
            found.left_out[f"{row['op']}: no strategy does that"] += 1
    return found


def _collective(path: Path, line: int, row: dict[str, str], operation: str) -> CollectiveTime:
    ranks = int(_number(path, line, row, "gpus"))
    return CollectiveTime(
        operation, _number(path, line, row, "bytes") / ranks, ranks, ranks,
        _number(path, line, row, "latency") * SECONDS[row["unit"]],
        f"{row['op']} {ranks} GPUs", f"{row['op']} on {row['gpu']} ({row['framework']})",
    )  # fmt: skip


def _kernel(path: Path, line: int, row: dict[str, str]) -> KernelTime:
    from lcbench.schedule.tiling import covered  # with scipy

    batch, tokens, q, kv, dim = (int(_number(path, line, row, c)) for c in ("batch", "tokens", "q_heads", "kv_heads", "head_dim"))
    causal = names()["calls"][row["op"]] == "causal"
    pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
    blocks = float(covered(np.array([[0, tokens, 0, tokens, 1 - tokens, 0 if causal else tokens - 1]]))[0])
    tiles = Tiles(
        pairs=np.array([float(batch * pairs)]), covered=np.array([batch * blocks]), rows=np.array([batch * tokens]),
        keys=np.array([batch * tokens]), pieces=np.array([batch]), q_heads=np.array([q]), kv_heads=np.array([kv]),
    )  # fmt: skip
    return KernelTime(
        names()["kernels"].get(row["kernel"], row["kernel"]), "bfloat16", Heads(q, kv, dim), tiles, False,
        _number(path, line, row, "latency") * SECONDS[row["unit"]],
        f"{row['kernel']} {row['op']}", f"{row['kernel']} {row['op']} on {row['gpu']} ({row['framework']})",
    )  # fmt: skip


# -- published context parallelism -------------------------------------------------------------------------------------------


def _published(path: Path, lines: Sequence[dict[str, str]], machine: Machine, ranks: int | None, kernel: str | None) -> Read:
    found = Read()
    phases: dict[Cell, dict[str, float]] = defaultdict(dict)
    named: dict[Cell, str] = {}
    for number, bare in enumerate(lines, 2):
        row = names()["unsaid"] | bare
        name = row.get("strategy") or row["cp"]
        if names()["gpus"].get(row["gpu"]) != machine.device:
            found.left_out[f"of {row['gpu']}"] += 1
            continue
        strategy = next((words for words in names()["strategies"].values() if name in words["names"]), None)
        if strategy is None:
            found.left_out[f"{name}: no strategy does that"] += 1
            continue
        if row["mask"] not in names()["masks"] or row["phase"] not in PHASES:
            raise ValueError(f"{path}, line {number}: mask={row['mask']} phase={row['phase']} is none of "
                             f"{', '.join(names()['masks'])} x {', '.join(PHASES)}")  # fmt: skip
        parse_heads(str(row["heads"]))
        cell = _cell(tuple(strategy["cell"]), row["mask"], int(_number(path, number, row, "world_size")), str(row["heads"]),
                     int(_number(path, number, row, "tokens_per_gpu")), row["dtype"],
                     kernel or names()["published_kernels"][row["gpu"]])  # fmt: skip
        named[cell] = name
        phases[cell][row["phase"]] = _number(path, number, row, "tflops_per_gpu")
        found.rows.append(Row(cell, name, row["phase"], phases[cell][row["phase"]]))
    for cell, tflops in phases.items():
        if ranks is None or cell.scale.world_size <= ranks:
            found.observations.append(_time(cell, named[cell], tflops, machine))
    return found


@cache
def _cell(strategy: tuple[str, ...], mask: str, ranks: int, heads: str, tokens: int, dtype: str, kernel: str) -> Cell:
    """The cell of a published row: nodes of 8 GPUs."""
    per_node = min(8, ranks)
    words = [*strategy, *names()["masks"][mask], f"scale={ranks // per_node}x{per_node}", f"heads={heads}", f"kernel={kernel}",
             f"seqlen={tokens * ranks}", f"dtype={dtype}", "site=local"]  # fmt: skip
    (planned,) = look(words).cells
    if planned.skip is not None:
        raise ValueError(f"a published row is no cell: {' '.join(words)}: {planned.skip}")
    return planned.cell


def _time(cell: Cell, name: str, tflops: dict[str, float], machine: Machine) -> CellTime:
    """Seconds from TFLOP/s per GPU: of the pairs of the draws that are simulated, not of the published ones, which nobody has."""
    pairs = sum(draw.share * draw.pairs for draw in draws_of(cell, machine))
    flops = {"forward": forward_flops(pairs, cell.heads), "backward": backward_flops(pairs, cell.heads)}
    ranks = cell.scale.world_size
    return CellTime(
        cell, {phase: flops[phase] / (rate * 1e12) / ranks for phase, rate in tflops.items()},
        f"{name} {cell.config['mask']['name']}", f"published {name} on {ranks} {machine.device.upper()}",
    )  # fmt: skip


# -- make gpu-check ----------------------------------------------------------------------------------------------------------


def _gpu_check(path: Path, text: str, machine: Machine) -> Read:
    try:
        known = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from error
    if not known.keys() >= GPU_CHECK:
        raise ValueError(f"{path} is nothing to fit on: it has no {', '.join(sorted(GPU_CHECK - known.keys()))}; wanted is {FORMS}")
    found = Read()
    device = str(known["provenance"].get("device"))
    name = next((d["name"] for d in known_devices() if device in d["names"]), device)
    for row in known["timings"]:
        if name != machine.device:
            found.left_out[f"of {device}"] += 1
        elif row["status"] != "ok":
            found.left_out[f"{row['status']}"] += 1
        else:
            found.observations += _of_check(row, device, machine)
    return found


def _of_check(row: dict[str, Any], device: str, machine: Machine) -> Iterator[KernelTime | CellMemory]:
    words = [f"{axis}={row[axis]}" for axis in ("kernel", "mask", "seqlen", "heads", "dtype")]
    (planned,) = look([*words, "cp=none", "scale=1x1", "site=local"]).cells
    prepared = next(draws_of(planned.cell, machine)).prepared
    source = f"gpu-check of {row['kernel']} on {device}"
    for phase in PHASES:
        seconds = row["metrics"].get(f"time/{phase}/median_s")
        if seconds is not None:
            yield KernelTime(
                row["kernel"], row["dtype"], parse_heads(row["heads"]), prepared.tiling.tiles, phase == "backward", float(seconds),
                f"{row['kernel']} {phase}", source,
            )  # fmt: skip
    if peak := row["metrics"].get(PEAK):
        yield CellMemory(planned.cell, float(peak), row["mask"], source)
