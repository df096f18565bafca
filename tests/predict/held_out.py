"""Cells on CPU ranks of one machine: 12 to fit on and 60 others, measured, kept in a file, predicted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.measure.environment import describe
from lcbench.predict.cells import cell_times, group_of
from lcbench.predict.fitted import Fit
from lcbench.predict.machines import machine_of
from lcbench.predict.observations import CellTime
from lcbench.predict.predictor import Predictor
from lcbench.runs.store import Sweep

DATA = Path(__file__).parent / "data"
MEDIAN, MOST, SHARE = 0.15, 0.35, 0.9  # the median error, and an error that so many cells stay within
FIT = ("+experiment=fit_cpu_short,fit_cpu_long",)
HERE = (
    "dtype=float32", "site.device=cpu", "measure.blocks=4", "measure.warmup=1", "measure.min_iterations=12",
    "measure.max_iterations=16", "measure.budget_s=2.0", "measure.precision=0.03",
)  # fmt: skip
TWO, ONE = ("scale=1x2",), ("scale=1x1", "cp=none")
# Six strategies, ten masks, heads and lengths that the fit has not seen; two ranks with a thread each and one rank with both.
OTHERS = (
    (*HERE, *TWO, "cp=ring,ulysses,allgather,groupcast,tokenring,lightseq",
     "mask=full,document,share_question,sliding_window_full", "lengths=uniform", "lengths.low=128", "lengths.high=512",
     "seqlen=2k", "heads=4x2x64"),
    (*HERE, *TWO, "cp=ring,ulysses,allgather,groupcast", "mask=causal,causal_document", "lengths=log_normal",
     "lengths.median=256", "seqlen=1k", "heads=8x4x128"),
    (*HERE, *TWO, "cp=ulysses,groupcast,tokenring,allgather", "mask=causal,prefix_lm_causal", "seqlen=4k", "heads=4x2x64"),
    (*HERE, *TWO, "cp=ring,ulysses,groupcast", "mask=sliding_window,causal_document", "lengths=uniform", "lengths.low=64",
     "lengths.high=1k", "seqlen=8k", "heads=4x2x64"),
    (*HERE, *ONE, "mask=full,causal,document,causal_document,sliding_window_full,global_sliding,prefix_lm_causal",
     "lengths=uniform", "lengths.low=64", "lengths.high=1k", "seqlen=2k,4k", "heads=4x4x64"),
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """A cell that no fit has seen: its measured and its predicted seconds, by phase."""

    cell: Cell
    measured: dict[str, float]
    predicted: dict[str, float]

    @property
    def error(self) -> float:
        """Of the sum of all phases, relative to what was measured."""
        return sum(self.predicted.values()) / sum(self.measured.values()) - 1


def judged(fitted: Fit, others: Iterable[CellTime], *, one_thread: bool = False) -> list[Judged]:
    """Every cell predicted with a fit of machine=this; ``one_thread``: each rank had one, whatever the machine has."""
    found = []
    for time in others:
        ranks = time.cell.scale.world_size
        kernels = tuple(k.model_copy(update={"cores": ranks if one_thread else k.cores}) for k in fitted.kernels)
        own = fitted.model_copy(update={"kernels": kernels})
        prediction = Predictor(own.links.of(machine_of("this")), own).predict(time.cell, memory=False)
        found.append(Judged(time.cell, time.phases, {name: prediction.phases[name].seconds for name in time.phases}))
    return found


def verdict(rows: Sequence[Judged]) -> tuple[float, float]:
    """(median of the absolute error, share of the cells whose error is at most ``MOST``)."""
    errors = np.abs([row.error for row in rows])
    return float(np.median(errors)), float(np.mean(errors <= MOST))


def holds(rows: Sequence[Judged]) -> bool:
    """Whether the cells are predicted as well as they must be."""
    median, share = verdict(rows)
    return median <= MEDIAN and share >= SHARE


def table(rows: Sequence[Judged]) -> str:
    """Row by row, milliseconds and errors."""
    lines = [f"{'cell':<66} {'measured':>10} {'predicted':>10} {'error':>7}   by phase"]
    for row in rows:
        of_phases = [f"{row.predicted[name] / seconds - 1:+.0%}" for name, seconds in row.measured.items()]
        measured, predicted = (1e3 * sum(each.values()) for each in (row.measured, row.predicted))
        name, phases = f"{row.cell.label} {row.cell.heads}", " ".join(f"{each:>7}" for each in of_phases)
        lines.append(f"{name:<66} {measured:>7.1f} ms {predicted:>7.1f} ms {row.error:>+7.0%}   {phases}")
    median, share = verdict(rows)
    most = float(np.quantile(np.abs([row.error for row in rows]), 0.9))
    lines.append(
        f"{len(rows)} cells: median error {median:.1%} (at most {MEDIAN:.0%}), "
        f"{share:.0%} within {MOST:.0%} (at least {SHARE:.0%}), 90 % "
        f" within {most:.1%}"
    )
    return "\n".join(lines)


# -- where times are from ------------------------------------------------------------------------------------------------


def of_sweep(sweep: Sweep) -> list[CellTime]:
    """The measured cells of a sweep."""
    records = sweep.look().records.values()
    return cell_times([(record.entry.cell, record.attempts) for record in records], machine_of("this"), sweep.name)


def cells(*grids: Sequence[str]) -> list[Cell]:
    """The cells of grids."""
    return [planned.cell for grid in grids for planned in look(list(grid)).cells]


def provenance(**more: Any) -> dict[str, Any]:
    """What is measured here, and now."""
    found = describe(torch.device("cpu"))
    kept = {key: found[key] for key in ("device", "cpus", "platform")}
    return {**kept, "torch": found["versions"]["torch"], "commit": found["git"]["commit"], **more}


def write(path: Path, sets: dict[str, Sequence[CellTime]], said: dict[str, Any]) -> None:
    """Times of cells as a file; seconds."""
    cells = {
        name: [{"config": t.cell.config, "phases": t.phases, "compute": t.compute, "communication": t.communication} for t in times]
        for name, times in sets.items()
    }  # fmt: skip
    path.write_text(json.dumps({"provenance": said, **cells}, indent=1) + "\n")


def read(path: Path) -> dict[str, list[CellTime]]:
    """What ``write`` has written, by set, and the cores of that machine under its provenance."""
    known = json.loads(path.read_text())
    return {name: [time_of(c, path.stem) for c in cells] for name, cells in known.items() if name != "provenance"}


def time_of(known: dict[str, Any], source: str) -> CellTime:
    """A cell as ``write`` has written it."""
    cell = Cell.from_config(known["config"])
    return CellTime(
        cell, known["phases"], group_of(cell), source, own=True, compute=known["compute"], communication=known["communication"]
    )
