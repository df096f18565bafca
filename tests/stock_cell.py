"""One rank of one cell, for ``tests.stock_app``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lcbench.grid.cell import Cell
from lcbench.measure.cell import measure_cell
from lcbench.measure.session import Gang
from lcbench.runs.worker import work_of
from lcbench.schedule.groups import Groups


def measured(config: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cell = Cell.from_config(json.loads(config))
    gang = Gang(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), Groups(), [])
    result = measure_cell(work_of(cell), gang, lambda _: None)
    if gang.rank == 0:
        folder = Path(os.environ["LCBENCH_STOCK_OUT"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{cell.id}.json").write_text(json.dumps({"config": cell.config, "metrics": result.metrics}))
    dist.destroy_process_group()


if __name__ == "__main__":
    measured(sys.argv[1])
