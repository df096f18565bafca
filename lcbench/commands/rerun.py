"""Run cells again, exactly: from their stored, resolved config, as a new attempt beside the old ones."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcbench.commands.arguments import (
    add_as_mine_argument,
    add_results_argument,
    agree_to_act,
    chosen_cell,
    command_parser,
    find_sweep,
)
from lcbench.commands.launchers import launcher_named
from lcbench.grid import build
from lcbench.report.ending import bad_input
from lcbench.report.inert import printable
from lcbench.runs.jobs import SweepStatus, Watch
from lcbench.runs.launch import Todo
from lcbench.runs.ownership import here_instead
from lcbench.runs.pack import Settings
from lcbench.runs.records import Record
from lcbench.runs.settle import settled
from lcbench.runs.store import Sweep

EXAMPLES = """
python -m lcbench.rerun 1a2b3c4d5e6f
python -m lcbench.rerun --failed last
python -m lcbench.rerun --failed last --exclude n[03-05] --wait
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("rerun", __doc__, EXAMPLES)
    parser.add_argument("cell", nargs="?", help="cell id, or its beginning; <sweep>/<cell id> where several sweeps hold it")
    parser.add_argument("--failed", metavar="SWEEP", help="every failed or lost cell of a sweep ('last': the newest)")
    parser.add_argument("--launcher", metavar="NAME", help="default: that of the sweep")
    parser.add_argument("--wait", action="store_true", help="wait for Slurm jobs and print their table")
    parser.add_argument("--exclude", metavar="NODES", help="nodes to keep away from, as sbatch writes them, e.g. n[03-05]")
    add_as_mine_argument(parser)
    parser.add_argument(
        "--config-dir", type=Path, action="append", default=[], metavar="FOLDER",
        help="whose files name the classes (_target_) of cells that are neither lcbench's nor conf/'s",
    )  # fmt: skip
    add_results_argument(parser)
    options = parser.parse_args(arguments)
    root = options.results.absolute()
    with bad_input():
        sweep, cell_id = (find_sweep(root, options.failed), None) if options.failed else chosen_cell(root, options.cell)
        if cell_id and (why := sweep.entries()[cell_id].skip):
            raise ValueError(f"cell {cell_id} cannot run: {why}")
        for folder in options.config_dir:
            if not folder.is_dir():
                raise ValueError(f"--config-dir {folder} is no folder")
            build.allow(build.targets_in(folder))
        build.allow(sweep.allowed())
        strange = options.launcher != "dry" and agree_to_act(sweep, "this runs cells again", as_mine=options.as_mine)
        standing = settled(Watch(sweep), as_mine=strange)
        wanted = _wanted(standing, cell_id)
        records = {i: r for i, r in wanted.items() if i not in standing.under_way}
        if cell_id is not None and not records:
            raise ValueError(f"cell {cell_id} is under way already: {sweep.command('status')}")
        settings = _settings(sweep, standing.seen.launch)
        for record in records.values():
            build.check_targets(record.entry.cell.config)
        name = options.launcher or standing.seen.launch["launcher"]  # type: ignore[index]
    if not records:
        busy = f"; {len(wanted)} are under way already" if wanted else ""
        print(f"no failed cells in {printable(sweep.name)}{busy}")
        return 0
    with bad_input():
        launcher = launcher_named(name, options.config_dir)
    if strange:
        settings = replace(settings, site=here_instead(settings.site))
    if options.exclude:
        sbatch = settings.site.get("sbatch") or {}
        also = ",".join(filter(None, [sbatch.get("exclude"), options.exclude]))
        settings = replace(settings, site={**settings.site, "sbatch": {**sbatch, "exclude": also}})

    def choose() -> Todo:
        return _still_wanted(sweep, records, as_mine=strange)

    return launcher.launch_cells(sweep, choose, settings=settings, wait=options.wait, report=list(records))


def _wanted(standing: SweepStatus, cell_id: str | None) -> dict[str, Record]:
    if cell_id is not None:
        return {cell_id: standing.seen.records[cell_id]}
    return {
        i: r for i, r in standing.seen.records.items() if r.status == "failed" or (r.status == "missing" and not r.entry.predicted)
    }


def _still_wanted(sweep: Sweep, chosen: dict[str, Record], *, as_mine: bool = False) -> Todo:
    """Of what was chosen, under the sweep's lock, what nobody has taken up or tried since."""
    now = settled(Watch(sweep), as_mine=as_mine)
    cells, under_way = [], []
    for cell_id, before in chosen.items():
        record = now.seen.records[cell_id]
        if cell_id in now.under_way:
            under_way.append(record.entry.cell)
        elif len(record.attempts) == len(before.attempts):
            cells.append(record.entry.cell)
    taken = len(chosen) - len(cells)
    if taken:
        print(f"{taken} of {len(chosen)} cells: somebody else runs them, or has just run them, again", file=sys.stderr)
    return Todo(cells, under_way=under_way)


def _settings(sweep: Sweep, launch: dict[str, Any] | None) -> Settings:
    """How the sweep is run.

    Raises:
        ValueError: it does not say, or another version said it.
    """
    if not launch:
        raise ValueError(f"sweep {sweep.name} does not say how it was launched; run its command again")
    try:
        return Settings(**launch["settings"])
    except TypeError as error:
        raise ValueError(
            f"sweep {sweep.name} was launched by another version of lcbench ({error}); run its command again"
        ) from error
