"""Run cells again, exactly: from their stored, resolved config, as a new attempt beside the old ones."""

from __future__ import annotations

import sys
from dataclasses import replace

from lcbench.arguments import (
    add_as_mine_argument,
    add_results_argument,
    agree_to_act,
    bad_input,
    chosen_cell,
    command_parser,
    find_sweep,
)
from lcbench.runs.jobs import Watch
from lcbench.runs.ownership import here_instead
from lcbench.runs.pack import Settings
from lcbench.runs.store import Record

EXAMPLES = """
python -m lcbench.rerun 1a2b3c4d5e6f
python -m lcbench.rerun --failed last
python -m lcbench.rerun --failed last --exclude n[03-05] --wait
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("rerun", __doc__, EXAMPLES)
    parser.add_argument("cell", nargs="?", help="cell id, or its beginning; <sweep>/<cell id> where several sweeps hold it")
    parser.add_argument("--failed", metavar="SWEEP", help="every failed or lost cell of a sweep ('last': the newest)")
    parser.add_argument("--launcher", choices=("local", "slurm", "dry"), help="default: that of the sweep")
    parser.add_argument("--wait", action="store_true", help="wait for Slurm jobs and print their table")
    parser.add_argument("--exclude", metavar="NODES", help="nodes to keep away from, as sbatch writes them, e.g. n[03-05]")
    add_as_mine_argument(parser)
    add_results_argument(parser)
    options = parser.parse_args(arguments)
    root = options.results.absolute()
    with bad_input():
        sweep, cell_id = (find_sweep(root, options.failed), None) if options.failed else chosen_cell(root, options.cell)
        if cell_id and (why := sweep.entries()[cell_id].skip):
            raise ValueError(f"cell {cell_id} cannot run: {why}")
        strange = options.launcher != "dry" and agree_to_act(sweep, "this runs cells again", as_mine=options.as_mine)
        standing = Watch(sweep, settles=strange or None).look()
        wanted = [r for i, r in standing.seen.records.items() if (_needs_it(r) if cell_id is None else i == cell_id)]
        records = [r for r in wanted if r.entry.cell.id not in standing.under_way]
        if cell_id is not None and not records:
            raise ValueError(f"cell {cell_id} is under way already: python -m lcbench.status {sweep.name}")
        launch = standing.seen.launch
        if not launch:
            raise ValueError(f"sweep {sweep.name} does not say how it was launched; run its command again")
    if not records:
        print(f"no failed cells in {sweep.name}")
        return 0
    from hydra_plugins.lcbench._plan import Todo, launcher_named

    settings = Settings(**launch["settings"])
    if strange:
        settings = replace(settings, site=here_instead(settings.site))
    if options.exclude:
        sbatch = settings.site.get("sbatch") or {}
        also = ",".join(filter(None, [sbatch.get("exclude"), options.exclude]))
        settings = replace(settings, site={**settings.site, "sbatch": {**sbatch, "exclude": also}})
    cells = [r.entry.cell for r in records]
    made = launcher_named(options.launcher or launch["launcher"])
    return made.launch_cells(sweep, lambda: Todo(cells), settings=settings, wait=options.wait, report=[c.id for c in cells])


def _needs_it(record: Record) -> bool:
    return record.status in ("failed", "missing")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
