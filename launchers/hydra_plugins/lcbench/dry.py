"""The plan, printed: what would run where and for how long, what cannot run and why. Writes and submits nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra_plugins.lcbench._plan import (
    OK,
    PackLauncher,
    default_name,
    default_tracking_uri,
    is_done,
    known_devices,
    make_packs,
)
from hydra_plugins.lcbench.slurm import sbatch_text

from lcbench.grid.cell import Cell
from lcbench.grid.expand import Plan
from lcbench.grid.values import parse_scale
from lcbench.runs.pack import Pack
from lcbench.runs.store import Sweep


class DryLauncher(PackLauncher):
    name = "dry"

    def launch_plan(self, plan: Plan) -> int:
        options = plan.options
        sweep = Sweep(Path(options["results"]).absolute(), str(options["sweep"] or default_name(plan)))
        print(f"sweep {sweep.name}: {len(plan.cells)} cells")
        todo = []
        for planned in plan.cells:
            done = not planned.skip and not options["force"] and is_done(sweep, planned.cell)
            fate = f"skipped: {planned.skip}" if planned.skip else "done before" if done else "to run"
            print(f"  {planned.cell.id}  {planned.cell.label:<44} {fate}")
            if fate == "to run":
                todo.append(planned.cell)
        return self._print_packs(
            make_packs(
                sweep,
                todo,
                site=plan.site,
                devices=known_devices(),
                tracking_uri=options["tracking_uri"] or plan.site.get("tracking_uri") or default_tracking_uri(),
                max_cells=options["pack"] or plan.site.get("max_cells"),
            )
        )

    def launch_cells(self, sweep: Sweep, cells: list[Cell], **options: Any) -> int:
        for key in ("wait", "report"):
            options.pop(key)
        return self._print_packs(make_packs(sweep, cells, **options))

    def _print_packs(self, packs: list[Pack]) -> int:
        hours = 0.0
        for pack in packs:
            scale = parse_scale(pack.scale)
            hours += scale.world_size * pack.timeout_min / 60
            print(
                f"\npack {pack.id}: {len(pack.cells)} cells on {scale.nodes} nodes x {scale.gpus_per_node} GPUs, "
                f"time limit {pack.timeout_min} min: {' '.join(pack.cells)}"
            )
            if pack.site["launcher"] == "slurm":
                print("\n".join(f"  | {line}" for line in sbatch_text(pack).splitlines()))
        print(f"\n{len(packs)} packs, at most {hours:.1f} GPU-hours; nothing was submitted")
        return OK
