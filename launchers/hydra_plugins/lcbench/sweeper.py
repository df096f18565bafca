"""The sweeper: the plan that the command made before Hydra started goes to the launcher as a whole."""

from __future__ import annotations

import sys
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(Sweeper):
    """``params``: the sweep that an experiment file defines; ``expand`` reads it from the composed config."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from lcbench.grid.expand import remembered
        from lcbench.report.ending import bad_input, run

        plan = remembered()
        if plan is None:
            sys.exit("error: hydra/sweeper=lcbench runs the plan of python -m lcbench.sweep, and here is none")
        if plan.search is not None:
            from lcbench.advice.longest import (
                run as look_for_longest,
            )  # with NumPy and predictions, which a plain sweep does without

            run(lambda _: look_for_longest(plan, self.launcher))
        with bad_input():
            run(lambda _: self.launcher.launch_plan(plan))
