"""What one writes with Hydra's own submitit launcher: an app per cell, one Slurm job each. The yardstick of ``make bench``.

It measures the same cell with the same code; torch elastic starts its two ranks.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path="stock_conf", config_name="config")
def app(config: DictConfig) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from lcbench.grid.expand import cell_config

    plain: Any = OmegaConf.to_container(config, resolve=True)
    ranks = int(plain["scale"].partition("x")[2])
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", max_restarts=0,
        run_id=f"cell-{HydraConfig.get().job.num}",
    )  # fmt: skip
    elastic_launch(launch, sys.executable)("-m", "tests.stock_cell", json.dumps(cell_config(plain)))


if __name__ == "__main__":
    app()
    sys.exit(0)
