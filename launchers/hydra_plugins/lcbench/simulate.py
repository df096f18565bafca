"""Predicts the cells of a plan instead of running them: the same command, the same cells, records that say that they are predicted.

Nothing is measured, so there are no packs: each cell is predicted in this process, on a machine that need not be here, and its
record is kept at once. What was measured of a cell stays as it is beside its prediction, and counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hydra_plugins.lcbench.base import NOT_PUBLISHED, PackLauncher

from lcbench.grid.cell import Cell
from lcbench.grid.expand import Plan
from lcbench.report.ending import BAD_INPUT, INTERRUPTED, bad_input
from lcbench.runs.launch import Todo, lacks_a_place, settings_of, sweep_of, write_cells
from lcbench.runs.manifest import Entry
from lcbench.runs.pack import Pack, Settings
from lcbench.runs.store import Sweep

if TYPE_CHECKING:
    from lcbench.runs.predictions import Source


class SimulateLauncher(PackLauncher):
    name = "simulate"
    measures = False

    def __init__(self, here: bool = True, predicts: bool = True) -> None:
        super().__init__(here)
        self.predicts = predicts

    def launch_plan(self, plan: Plan) -> int:
        from lcbench.runs.predictions import Source  # with SciPy, which other launchers need not load

        self.output = plan.options["output"]
        sweep, settings = sweep_of(plan), settings_of(plan)
        with bad_input():
            source = Source.of(plan.options["machine"], plan.options["fit"], plan.site)
        if lacks_a_place(plan, settings):
            self.say(NOT_PUBLISHED)
        sweep.check_writable([p.cell.id for p in plan.cells])
        entries = [Entry(p.cell, p.skip, predicted=True) for p in plan.cells]
        write_cells(sweep, entries, plan.overrides, self.name, settings, trace=plan.trace)
        self.say_trace(plan)
        records = sweep.look().records
        runnable = [p.cell for p in plan.cells if not p.skip]
        todo = [c for c in runnable if plan.options["force"] or not source.has_made(records[c.id].prediction)]
        self.say(
            f"sweep {sweep.name}: {len(plan.cells)} cells, {len(plan.cells) - len(runnable)} cannot run, "
            f"{len(runnable) - len(todo)} predicted before, {len(todo)} to predict {source}"
        )
        if measured := sum(records[c.id].last is not None for c in runnable):
            self.say(f"{measured} of them were measured: that stays, and counts; their predictions are kept beside it")
        try:
            self._predict(sweep, todo, source)
        except KeyboardInterrupt:
            print("\ninterrupted; what was predicted is kept, and the same command goes on", file=sys.stderr)
            return INTERRUPTED
        return self.finish(sweep, [p.cell.id for p in plan.cells], settings.tracking_uri, predicted=True)

    def _predict(self, sweep: Sweep, cells: Sequence[Cell], source: Source) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns: list[Any] = [
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        ]  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("predicting", total=len(cells))
            for cell in cells:
                progress.update(task, description=f"predicting {cell.label}")
                sweep.finish(source.predict(cell, sweep.name))
                progress.advance(task)

    def submit(self, sweep: Sweep, packs: list[Pack]) -> None:
        raise AssertionError("a prediction has no packs")

    def launch_cells(self, sweep: Sweep, choose: Callable[[], Todo], *, settings: Settings, wait: bool, report: list[str]) -> int:
        print(
            f"error: sweep {sweep.name} was only predicted: --launcher <name> measures cells of it, and its command, typed again, "
            "goes on predicting",
            file=sys.stderr,
        )
        return BAD_INPUT
