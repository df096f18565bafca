"""Run cells again, exactly: from their stored, resolved config, as a new attempt beside the old ones."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lcbench.grid.cell import Cell
from lcbench.runs.jobs import cell_states, settle
from lcbench.runs.pack import Pack
from lcbench.runs.store import Sweep, find_cell, read_json
from lcbench.status import find_sweep

BAD_INPUT = 2


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcbench.rerun", description=__doc__)
    parser.add_argument("cell", nargs="?", help="cell id, or its beginning")
    parser.add_argument("--failed", metavar="SWEEP", help="every failed or lost cell of a sweep ('last': the newest)")
    parser.add_argument("--sweep", help="where the cell is, if several sweeps hold it")
    parser.add_argument("--launcher", choices=("local", "slurm", "dry"), help="default: that of its last run")
    parser.add_argument("--wait", action="store_true", help="wait for Slurm jobs and print their table")
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: results)")
    options = parser.parse_args(arguments)
    root = options.results.absolute()
    try:
        sweep, cells = _failed(root, options.failed) if options.failed else _one(root, options.cell, options.sweep)
        packs = _last_packs(sweep, cells)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if not cells:
        print(f"no failed cells in {sweep.name}")
        return 0
    from hydra_plugins.lcbench._plan import launch_cells

    worst = 0
    for path, members in packs.items():
        pack = Pack.read(path)
        launcher = options.launcher or read_json(path.parent / "job.json")["launcher"]
        code = launch_cells(
            launcher=launcher, sweep=sweep, cells=members, site=pack.site, devices=pack.devices,
            tracking_uri=pack.tracking_uri, max_cells=pack.site.get("max_cells"), wait=options.wait,
        )  # fmt: skip
        worst = max(worst, code)
    return worst


def _one(root: Path, cell_id: str | None, sweep: str | None) -> tuple[Sweep, list[Cell]]:
    if not cell_id:
        raise ValueError("which cell? write its id, or --failed <sweep>; python -m lcbench.status <sweep> lists them")
    found = list(find_cell(root, cell_id, sweep))
    if not found:
        raise ValueError(f"no cell {cell_id!r} below {root}; python -m lcbench.status <sweep> lists them")
    if len({entry.cell.id for _, entry in found}) > 1:
        raise ValueError(f"cell {cell_id!r} is ambiguous: {', '.join(entry.cell.id for _, entry in found)}")
    if len(found) > 1:
        raise ValueError(f"several sweeps hold cell {cell_id}; add --sweep: {', '.join(s.name for s, _ in found)}")
    ((owner, entry),) = found
    if entry.skip:
        raise ValueError(f"cell {entry.cell.id} cannot run: {entry.skip}")
    return owner, [entry.cell]


def _failed(root: Path, name: str) -> tuple[Sweep, list[Cell]]:
    sweep = find_sweep(root, name)
    settle(sweep)
    wanted = {c.id for c in cell_states(sweep) if c.state in ("failed", "lost", "missing")}
    return sweep, [entry.cell for cell_id, entry in sweep.entries().items() if cell_id in wanted]


def _last_packs(sweep: Sweep, cells: list[Cell]) -> dict[Path, list[Cell]]:
    """The newest pack of each cell: what it ran with and where."""
    packs: dict[Path, list[Cell]] = {}
    for cell in cells:
        paths = [sweep.pack_folder(p) / "pack.json" for p in sweep.packs()]
        own = [p for p in paths if cell.id in read_json(p)["cells"]]
        if not own:
            raise ValueError(f"cell {cell.id} was never launched; run its sweep again: the same command does what is missing")
        packs.setdefault(own[-1], []).append(cell)
    return packs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
