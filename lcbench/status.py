"""Where a sweep stands: every pack with its job, every cell with its state, failure class and first cause.

``--follow`` keeps showing it until it has ended, and does what a collector does: what is to be tried again is submitted, and
results are published.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from lcbench.report.table import WIDTH, status_tables
from lcbench.runs.jobs import Watch
from lcbench.runs.store import Sweep, find_cell, sweeps


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcbench.status", description=__doc__)
    add_sweep_arguments(parser, optional=True)
    parser.add_argument("--follow", action="store_true", help="keep showing it until every job has ended")
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.add_argument("--all", action="store_true", help="list every cell, also of a large sweep, and those that are well")
    options = parser.parse_args(arguments)
    root = options.results.absolute()
    if options.sweep is None:
        names = sweeps(root)
        print(json.dumps(names) if options.json else "\n".join(names) or f"no sweeps below {root}")
        return 0
    try:
        sweep = chosen_sweep(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from rich.console import Console
    from rich.live import Live

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if options.follow:
        from hydra_plugins.lcbench._plan import Collector

        from lcbench.runs.tracking import publish_or_say, tracked_at

        collector = Collector(sweep)
        with Live(console=console, refresh_per_second=2) as live:
            while not (standing := collector.advance()).ended:
                live.update(status_tables(standing, sweep.name, everything=options.all))
                collector.pause()
        publish_or_say(sweep, tracked_at(standing.seen.launch))
    else:
        standing = Watch(sweep).look()
    if options.json:
        shown = {
            "sweep": sweep.name,
            "ended": standing.ended,
            "packs": [asdict(p) for p in standing.packs],
            "cells": [asdict(c) for c in standing.cells],
            "set_aside": [{"path": str(d.path), "reason": d.reason} for d in standing.seen.damaged],
        }
        print(json.dumps(shown, indent=1))
    else:
        console.print(status_tables(standing, sweep.name, everything=options.all))
    for damaged in standing.seen.damaged:
        print(f"set aside: {damaged.path}: {damaged.reason}", file=sys.stderr)
    return 1 if any(c.state in ("failed", "lost") for c in standing.cells) else 0


def add_sweep_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The arguments of every command about one sweep."""
    where = "name of the sweep, or 'last'" + ("; without it: the sweeps there are" if optional else "")
    parser.add_argument("sweep", nargs="?" if optional else None, help=where)
    add_results_argument(parser)


def add_results_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: results)")


def chosen_sweep(options: argparse.Namespace) -> Sweep:
    """The sweep that a command names.

    Raises:
        ValueError: there is none; names those that exist.
    """
    return find_sweep(options.results.absolute(), options.sweep)


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


def chosen_cell(root: Path, cell: str | None) -> tuple[Sweep, str]:
    """The sweep and the id of a cell named by the beginning of its id, or as ``<sweep>/<cell id>``.

    Raises:
        ValueError: there is none, or more than one; names them.
    """
    if not cell:
        raise ValueError("which cell? write its id; python -m lcbench.status <sweep> lists them")
    name, _, cell_id = cell.rpartition("/")
    found = list(find_cell(root, cell_id, find_sweep(root, name).name if name else None))
    ids = sorted({entry.cell.id for _, entry in found})
    if not found:
        raise ValueError(f"no cell {cell!r} below {root}; python -m lcbench.status <sweep> lists them")
    if len(ids) > 1:
        raise ValueError(f"cell {cell!r} is ambiguous: {', '.join(ids)}")
    if len(found) > 1:
        raise ValueError(f"several sweeps hold cell {ids[0]}; write one of {', '.join(f'{s.name}/{ids[0]}' for s, _ in found)}")
    return found[0][0], ids[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
