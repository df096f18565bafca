"""The plan, printed: what would run where and for how long, what cannot run and why. Writes and submits nothing.

A plan beyond the budget is shown too, and the exit code is that of the command that would refuse it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from hydra_plugins.lcbench.base import PackLauncher
from hydra_plugins.lcbench.slurm import arrays, sbatch_text

from lcbench.grid.expand import Plan
from lcbench.grid.labels import labels
from lcbench.grid.site import runs_here
from lcbench.grid.values import parse_scale
from lcbench.report.ending import BAD_INPUT, OK
from lcbench.runs.budget import Cost, alone
from lcbench.runs.budget import said as duration
from lcbench.runs.launch import Todo, make_packs, settings_of, sweep_of, todo_of
from lcbench.runs.pack import Pack, Settings
from lcbench.runs.store import Sweep

MANY = 40  # packs of an array that are listed one by one


class DryLauncher(PackLauncher):
    name = "dry"
    measures = False

    def launch_plan(self, plan: Plan) -> int:
        sweep, settings = sweep_of(plan), settings_of(plan)
        todo = todo_of(plan, sweep)
        packs = make_packs(sweep, todo.cells, launcher=plan.site["launcher"], settings=settings)
        cost = Cost.of(packs, here=runs_here(plan.site["launcher"]))
        print(f"sweep {sweep.name}: {len(plan.cells)} cells, {len(todo.cells)} to run; estimated {cost.gpu_hours}")
        print(cost)
        self.say_trace(plan)
        said = {"done before": todo.done, "under way": todo.under_way, "given up: killed its gang twice": todo.given_up}
        fates = {cell.id: fate for fate, cells in said.items() for cell in cells}
        named = labels(planned.cell for planned in plan.cells)
        for planned in plan.cells:
            cell = planned.cell
            ready = "to run, its strategy on one rank: nothing is parallel" if alone(cell) else "to run"
            fate = f"skipped: {planned.skip}" if planned.skip else fates.get(cell.id, ready)
            print(f"  {cell.id}  {named[cell.id]:<44} {fate}")
        code = _show(packs)
        if refusal := cost.refusal(plan.options["budget"], settings.hang["max_s"]):
            sys.stdout.flush()
            print(f"error: {refusal}", file=sys.stderr)
            return BAD_INPUT
        return code

    def launch_cells(self, sweep: Sweep, choose: Callable[[], Todo], *, settings: Settings, **_: Any) -> int:
        packs = make_packs(sweep, choose().cells, launcher=settings.site["launcher"], settings=settings)
        cost = Cost.of(packs, here=runs_here(settings.site["launcher"]))
        print(f"sweep {sweep.name}: {len(cost.seconds)} cells to run; estimated {cost.gpu_hours}")
        return _show(packs)


def _show(packs: Sequence[Pack]) -> int:
    for array in arrays(packs) if packs else ():
        scale = parse_scale(array[0].scale)
        limit = max(p.timeout_min for p in array)
        print(f"\n{len(array)} jobs on {scale.nodes} nodes x {scale.gpus_per_node} GPUs each, time limit {limit} min")
        for pack in array[:MANY]:
            print(f"  {len(pack.cells)} cells, about {duration(sum(pack.seconds[cell] for cell in pack.cells))}")
        if len(array) > MANY:
            print(f"  and {len(array) - MANY} more")
        if array[0].launcher == "slurm":
            print("\n".join(f"  | {line}" for line in sbatch_text(array).splitlines()))
    print(f"\n{len(packs)} jobs; nothing was submitted")
    return OK
