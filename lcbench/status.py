"""Where a sweep stands: every pack with its job, every cell with its state, failure class and first cause."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from lcbench.report.table import COLORS
from lcbench.runs.jobs import CellState, PackState, cell_states, pack_states, settle
from lcbench.runs.store import Sweep, sweeps

INTERVAL_S = 2.0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcbench.status", description=__doc__)
    parser.add_argument("sweep", nargs="?", help="name of the sweep, or 'last'; without it: the sweeps there are")
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: results)")
    parser.add_argument("--watch", action="store_true", help="keep showing it until every job has ended")
    parser.add_argument("--json", action="store_true", help="for scripts")
    options = parser.parse_args(arguments)
    root = options.results.absolute()
    if options.sweep is None:
        names = sweeps(root)
        print(json.dumps(names) if options.json else "\n".join(names) or f"no sweeps below {root}")
        return 0
    try:
        sweep = find_sweep(root, options.sweep)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    packs, cells = look(sweep)
    if options.json:
        print(json.dumps({"sweep": sweep.name, "packs": list(map(asdict, packs)), "cells": list(map(asdict, cells))}, indent=1))
    elif options.watch:
        with Live(tables(sweep, packs, cells), refresh_per_second=2) as live:
            while not all(p.ended for p in packs):
                time.sleep(INTERVAL_S)
                packs, cells = look(sweep)
                live.update(tables(sweep, packs, cells))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(tables(sweep, packs, cells))
    return 1 if any(c.state in ("failed", "lost") for c in cells) else 0


def find_sweep(root: Path, name: str) -> Sweep:
    """The sweep of that name; ``last`` is the newest.

    Raises:
        ValueError: there is none; names those that exist.
    """
    names = sweeps(root)
    if name == "last" and names:
        name = names[-1]
    if name not in names:
        raise ValueError(f"no sweep {name!r} below {root}; there are: {', '.join(names) or 'none'}")
    return Sweep(root, name)


def look(sweep: Sweep) -> tuple[list[PackState], list[CellState]]:
    settle(sweep)
    packs = pack_states(sweep)
    return packs, cell_states(sweep, packs)


def tables(sweep: Sweep, packs: list[PackState], cells: list[CellState]) -> Group:
    jobs = Table(title=f"packs of {sweep.name}", title_justify="left")
    for column in ("pack", "launcher", "job", "state", "cells", "reason"):
        jobs.add_column(column)
    for p in packs:
        jobs.add_row(p.id, p.launcher, p.job_id, p.state, f"{p.done}/{p.cells}", p.reason)
    table = Table(title="cells", title_justify="left")
    for column in ("state", "cell", "what", "attempt", "job", "job state", "class", "first cause"):
        table.add_column(column, no_wrap=column == "cell")
    for c in cells:
        color = COLORS.get(c.state, "cyan")
        table.add_row(f"[{color}]{c.state}[/]", c.id, c.label, str(c.attempt or "-"), c.job_id, c.job_state, c.failure, c.cause)
    counts = Counter(c.state for c in cells)
    return Group(jobs, table, ", ".join(f"{count} {state}" for state, count in counts.most_common()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
