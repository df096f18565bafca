"""CPU seconds of batches of documents on gloo ranks with a thread each, as of ``cpu_seconds``: cells to fit on, and batches.

A batch is measured sub-group by sub-group: forward and backward of each take as long as its slowest rank is at work. Its makespan
is what these come to when every sub-group begins as soon as the last of its ranks is done with what it has before.

python -m tests.predict.batch_seconds FILE    # measures all, writes FILE, and prints each with its prediction
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from lcbench.grid.build import cell_mask
from lcbench.grid.cell import Cell
from lcbench.masks.band import BandMask
from lcbench.measure.session import Gang
from lcbench.planners.base import Assignment
from lcbench.predict.batches import Batched
from lcbench.predict.fit import fit
from lcbench.predict.fitted import Fit
from lcbench.predict.machines import machine_of
from lcbench.predict.predictor import Predictor
from lcbench.runs.worker import work_of
from lcbench.schedule.groups import Groups
from lcbench.workloads.batching import BatchSession
from lcbench.workloads.planned import as_assigned
from tests.predict import cpu_seconds, held_out
from tests.predict.cpu_seconds import by_ranks

ITERATIONS = 3
COMMON = ("dtype=float32", "site.device=cpu", "heads=8x4x64", "mask=causal_document", "seed=1")
FIT = ((*COMMON, "scale=1x2", "cp=ring,ulysses", "lengths=log_normal", "lengths.median=512,4k", "seqlen=512,2k,4k"),)
BATCH = (*COMMON, "workload=batch", "workload.capacity=4k", "planner=none,fixed,megatron_hybrid,flexsp,bytescale_hdp")
LENGTHS = ("lengths=web_text",), ("lengths=log_normal", "lengths.median=1k", "lengths.sigma=1.2", "lengths.high=8k")
OTHERS = (
    *((*BATCH, *lengths, "seqlen=8k", "scale=1x2", "cp=ring") for lengths in LENGTHS),
    *((*BATCH, *lengths, "seqlen=16k", "scale=1x4", "cp=ring", "cp.layout=documents") for lengths in LENGTHS),
    (*BATCH, *LENGTHS[1], "seqlen=8k", "scale=1x2", "cp=ulysses"),
    (*BATCH, *LENGTHS[1], "seqlen=12k", "scale=1x4", "cp=ulysses"),
)


@dataclass(frozen=True)
class BatchTime:
    """A measured batch.

    Attributes:
        assignment: of its documents.
        seconds: of each sub-group, in the order of the assignment.
    """

    cell: Cell
    assignment: Assignment
    seconds: tuple[float, ...]

    @property
    def makespan_s(self) -> float:
        return float(self.assignment.played(self.seconds, self.cell.scale.world_size)[1].max())


@dataclass(frozen=True)
class Judged:
    """A batch that no fit has seen: measured and predicted makespan and sum over its sub-groups, and what planners go by."""

    time: BatchTime
    predicted_s: float
    by_cost_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.time.makespan_s - 1

    @property
    def cost_error(self) -> float:
        """Of the cost that planners have, which adds documents up."""
        return self.by_cost_s / self.time.makespan_s - 1


def measured(cells: Sequence[Cell], iterations: int) -> list[BatchTime]:
    """Every batch, the fastest of the iterations of each sub-group."""
    found = by_ranks(cells, iterations, _rank)
    return [BatchTime(cell, Assignment.of_plain(found[cell.id][0]), tuple(found[cell.id][1])) for cell in cells]


def _rank(rank: int, configs: list[dict[str, Any]], iterations: int, path: str) -> None:
    gang = Gang(rank, dist.get_world_size(), torch.device("cpu"), Groups(), [])
    found = {cell.id: _cell(cell, gang, iterations) for cell in map(Cell.from_config, configs)}
    if rank == 0:
        Path(path).write_text(json.dumps(found))


def _cell(cell: Cell, gang: Gang, iterations: int) -> tuple[Any, list[float]]:
    work = work_of(cell)
    session = cast(BatchSession, work.start(0, work.arranged(gang)))
    assert session.refused is None, session.refused
    session.draw()
    _once(session)
    every: list[Any] = [None] * gang.world_size
    dist.all_gather_object(every, [_once(session) for _ in range(iterations)])
    assignment = session.planned.assignment
    seconds = []
    for number, group in assignment.groups:
        # (iterations, ranks of the group, 2)
        own = np.array([[every[rank][i][number] for rank in group.ranks if number in every[rank][i]] for i in range(iterations)])
        seconds.append(float(own.max(axis=1).min(axis=0).sum()))
    return assignment.plain(), seconds


def _once(session: BatchSession) -> dict[int, tuple[float, float]]:
    """CPU seconds of forward and backward of each micro-batch that this rank is in."""
    shard, found = session.shard, {}
    assert shard.dout is not None
    dist.barrier()
    for part in session.run.parts:
        rows = part.rows
        begun = time.process_time()
        _, saved = part.run.forward(shard.q[rows], shard.k[rows], shard.v[rows])
        forward = time.process_time() - begun
        begun = time.process_time()
        part.run.backward(shard.dout[rows], saved)
        found[part.number] = (forward, time.process_time() - begun)
    return found


def judged(fitted: Fit, times: Sequence[BatchTime]) -> list[Judged]:
    """Every batch, as it was assigned, predicted with a fit of machine=this, of ranks with a thread each."""
    found = []
    for one in times:
        kernels = tuple(k.model_copy(update={"cores": one.cell.scale.world_size}) for k in fitted.kernels)
        own = fitted.model_copy(update={"kernels": kernels})
        batch = Batched.of(one.cell, Predictor(own.links.of(machine_of("this")), own), memory=False)
        mask = cell_mask(one.cell)
        assert isinstance(mask, BandMask)
        drawn = batch.drawn(mask, as_assigned(mask, one.assignment, batch.fleet, batch.cost, 0.0))
        found.append(Judged(one, drawn.phase.seconds, drawn.planned.predicted_s))
    return found


def table(rows: Sequence[Judged]) -> str:
    """Row by row, milliseconds and errors."""
    lines = [f"{'batch':<88} {'groups':>6} {'measured':>10} {'predicted':>10} {'error':>6} {'cost':>6}"]
    for row in rows:
        lines.append(
            f"{row.time.cell.label:<88} {len(row.time.seconds):>6} {1e3 * row.time.makespan_s:>7.1f} ms "
            f"{1e3 * row.predicted_s:>7.1f} ms {row.error:>+6.0%} {row.cost_error:>+6.0%}"
        )
    errors, costs = (np.abs([getattr(row, name) for row in rows]) for name in ("error", "cost_error"))
    lines.append(
        f"{len(rows)} batches: median error {np.median(errors):.1%}, 90 % within {np.quantile(errors, 0.9):.1%}; "
        f"of the costs that planners have {np.median(costs):.1%} and {np.quantile(costs, 0.9):.1%}"
    )
    return "\n".join(lines)


def write(path: Path, fitted: Sequence[Any], times: Sequence[BatchTime]) -> None:
    held_out.write(path, {"fit": fitted}, held_out.provenance(clock="CPU seconds of ranks with one thread"))
    known = json.loads(path.read_text())
    known["batches"] = [{"config": t.cell.config, "assignment": t.assignment.plain(), "seconds": t.seconds} for t in times]
    path.write_text(json.dumps(known, indent=1) + "\n")


def read(path: Path) -> tuple[list[Any], list[BatchTime]]:
    """The cells to fit on, and the batches."""
    known = json.loads(path.read_text())
    batches = [
        BatchTime(Cell.from_config(b["config"]), Assignment.of_plain(b["assignment"]), tuple(b["seconds"]))
        for b in known["batches"]
    ]
    return [held_out.time_of(one, path.stem) for one in known["fit"]], batches


def main() -> int:
    wanted, others = held_out.cells(*FIT), held_out.cells(*OTHERS)
    seen, held = cpu_seconds.measured(wanted, ITERATIONS), measured(others, ITERATIONS)
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]), seen, held)
    print(table(judged(fit(seen, machine_of("this"), folds=1), held)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
