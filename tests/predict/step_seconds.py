"""CPU seconds of training steps on gloo ranks with a thread each, as of ``cpu_seconds``: some to fit on, and others.

python -m tests.predict.step_seconds FILE    # measures all, writes FILE, and prints each with its prediction
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lcbench.grid.cell import Cell
from lcbench.measure.session import Gang
from lcbench.predict.cells import group_of
from lcbench.predict.fit import fit
from lcbench.predict.machines import machine_of
from lcbench.predict.observations import CellTime
from lcbench.runs.worker import work_of
from lcbench.schedule.groups import Groups
from tests.predict import held_out
from tests.predict.cpu_seconds import by_ranks

ITERATIONS = 3
MODEL = ("workload=block", "model=tiny", "model.heads_q=8", "model.heads_kv=4", "model.head_dim=64", "dtype=float32",
         "site.device=cpu", "mask=causal")  # fmt: skip
SMALL = ("model.hidden=256", "model.ffn=704", "model.vocab=1024")
LARGE = ("model.hidden=384", "model.ffn=1056", "model.vocab=2048")
ONE, TWO = ("scale=1x1", "cp=none"), ("scale=1x2",)
# On two ranks all, so that each has the one thread that a fit of two cores takes it to have.
FIT = (
    (*MODEL, *SMALL, *TWO, "cp=ring,ulysses", "recompute=none,full", "seqlen=512,2k"),
    (*MODEL, *LARGE, *TWO, "cp=ring,ulysses", "recompute=none", "seqlen=1k"),
)
OTHERS = (
    (*MODEL, *LARGE, *TWO, "cp=allgather", "recompute=none,full,selective", "seqlen=1k", "layers=3"),
    (*MODEL, *LARGE, *TWO, "cp=ring,ulysses", "recompute=full", "seqlen=2k"),
    (*MODEL, *SMALL, *TWO, "cp=ring", "recompute=attention_out", "seqlen=2k", "workload.fsdp=true", "workload.optimizer=adamw"),
    (*MODEL, *LARGE, *ONE, "recompute=full,selective", "seqlen=1k", "workload.loss_chunk=256"),
)


def measured(cells: Sequence[Cell], iterations: int) -> list[CellTime]:
    """Every step's CPU seconds by phase, the fastest of the iterations."""
    found = by_ranks(cells, iterations, _rank)
    return [CellTime(cell, found[cell.id], group_of(cell), "CPU seconds", own=True) for cell in cells]


def _rank(rank: int, configs: list[dict[str, Any]], iterations: int, path: str) -> None:
    gang = Gang(rank, dist.get_world_size(), torch.device("cpu"), Groups(), [])
    found = {cell.id: _cell(cell, gang, iterations) for cell in map(Cell.from_config, configs)}
    if rank == 0:
        Path(path).write_text(json.dumps(found))


def _cell(cell: Cell, gang: Gang, iterations: int) -> dict[str, float]:
    work = work_of(cell)
    session = work.start(0, work.arranged(gang))
    assert session.refused is None, session.refused
    names = list(session.phases())
    _once(session.phases())
    every = torch.tensor([_once(session.phases()) for _ in range(iterations)], dtype=torch.float64)
    dist.all_reduce(every, op=dist.ReduceOp.MAX)
    return dict(zip(names, every.min(dim=0).values.tolist(), strict=True))


def _once(phases: Any) -> list[float]:
    """CPU seconds of each phase."""
    passed, found = None, []
    for run in phases.values():
        dist.barrier()
        begun = time.process_time()
        passed = run(passed)
        found.append(time.process_time() - begun)
    return found


def run(fitted: Sequence[tuple[str, ...]], unseen: Sequence[tuple[str, ...]], iterations: int, *, one_thread: bool = True) -> int:
    """Measure cells, fit some of them and predict the others: print how near that comes; written to the file that is named.

    Args:
        one_thread: whether the fit has seen ranks that have a core each; of cells of one rank alone all count as having every core.
    """
    wanted, others = held_out.cells(*fitted), held_out.cells(*unseen)
    times = measured([*wanted, *others], iterations)
    seen, held = times[: len(wanted)], times[len(wanted) :]
    if len(sys.argv) > 1:
        said = held_out.provenance(clock="CPU seconds of ranks with one thread")
        held_out.write(Path(sys.argv[1]), {"fit": seen, "others": held}, said)
    rows = held_out.judged(fit(seen, machine_of("this"), folds=1), held, one_thread=one_thread)
    print(held_out.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run(FIT, OTHERS, ITERATIONS))
