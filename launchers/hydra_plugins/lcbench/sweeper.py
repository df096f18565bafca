"""The sweeper: override lists become one plan, checked and composed once per value, handed to the launcher as a whole."""

from __future__ import annotations

import sys
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(Sweeper):
    """``params``: the sweep that an experiment file defines; ``expand`` reads it from the composed config."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader: ConfigLoader = hydra_context.config_loader
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from lcbench.grid.expand import expand, remembered

        if not hasattr(self.launcher, "launch_plan"):
            name = type(self.launcher).__name__
            sys.exit(f"error: hydra/launcher={name} cannot run a plan; take local, slurm or dry")
        loader: Any = self.loader
        sys.exit(self.launcher.launch_plan(remembered() or expand(arguments, loader)))
