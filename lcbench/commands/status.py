"""Where a sweep stands: every pack with its job, every cell with its state, failure class and first cause.

``--follow`` keeps showing it until it has ended, or until only jobs are left that Slurm holds, and does what a collector does: what
is to be tried again is submitted, and results are published. Of somebody else's sweep it only shows where it stands.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.live import Live

from lcbench.commands.arguments import add_as_mine_argument, add_sweep_arguments, agree_to_act, chosen_sweep, command_parser
from lcbench.commands.launchers import launcher_named
from lcbench.report.ending import bad_input
from lcbench.report.inert import printable
from lcbench.report.table import WIDTH, status_tables, summary_line
from lcbench.runs.collector import Collector
from lcbench.runs.jobs import SweepStatus, Watch
from lcbench.runs.ownership import others
from lcbench.runs.settle import settled
from lcbench.runs.store import Sweep, sweeps
from lcbench.runs.tracking import publish_or_say, tracked_at

EXAMPLES = """
python -m lcbench.status
python -m lcbench.status last
python -m lcbench.status last --follow
python -m lcbench.status first --json --all
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("status", __doc__, EXAMPLES)
    add_sweep_arguments(parser, optional=True)
    parser.add_argument("--follow", action="store_true", help="keep showing it until every job has ended")
    parser.add_argument(
        "--json", action="store_true", help="for scripts; with --follow a line of JSON whenever something has changed"
    )
    parser.add_argument("--quiet", action="store_true", help="only the counts; the exit code says if all is well")
    parser.add_argument("--all", action="store_true", help="list every cell, also of a large sweep, and those that are well")
    add_as_mine_argument(parser)
    options = parser.parse_args(arguments)
    root = options.results.absolute()
    if options.sweep is None:
        names = sweeps(root)
        print(json.dumps(names) if options.json else "\n".join(map(printable, names)) or f"no sweeps below {root}")
        return 0
    with bad_input():
        sweep = chosen_sweep(options)
        if options.as_mine and not options.follow:
            raise ValueError("--as-mine goes with --follow: without it status only shows where a sweep stands")
        as_mine = options.as_mine and agree_to_act(sweep, "this submits jobs and publishes", as_mine=True)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    standing = _follow(sweep, options, console, as_mine=as_mine) if options.follow else settled(Watch(sweep))
    if options.json:
        print(json.dumps(_as_json(sweep, standing), indent=None if options.follow else 1))
    elif options.quiet:
        print(summary_line(standing))
    else:
        console.print(status_tables(standing, sweep.name, everything=options.all))
    for damaged in standing.seen.damaged:
        print(printable(damaged), file=sys.stderr)
    for line in standing.held_words():
        print(line, file=sys.stderr)
    return 1 if standing.held or any(c.state in ("failed", "lost") for c in standing.cells) else 0


def _follow(sweep: Sweep, options: argparse.Namespace, console: Console, *, as_mine: bool) -> SweepStatus:
    """Show where the sweep stands and do what a collector does, until nothing goes on by itself."""
    collector = Collector(sweep, launcher_named, as_mine=as_mine)
    said = ""
    with nullcontext() if options.json or options.quiet else Live(console=console, refresh_per_second=2) as live:
        while not (standing := collector.advance()).at_rest:
            if live is not None:
                live.update(status_tables(standing, sweep.name, everything=options.all))
            elif options.json:
                line = json.dumps({"sweep": sweep.name, "ended": False, "counts": standing.counts()})
                if line != said:
                    print(said := line, flush=True)
            collector.pause()
    if as_mine or not others(sweep):
        from lcbench.report.publishing import publish_sweep  # with SciPy, which a look at a sweep does not need

        publish_or_say(sweep, tracked_at(standing.seen.launch), publish_sweep)
    return standing


def _as_json(sweep: Sweep, standing: SweepStatus) -> dict[str, Any]:
    return {
        "sweep": sweep.name,
        "ended": standing.ended,
        "counts": standing.counts(),
        "left": asdict(standing.left()),
        "packs": [asdict(p) for p in standing.packs],
        "cells": [asdict(c) for c in standing.cells],
        "set_aside": [{"path": str(d.path), "reason": d.reason} for d in standing.seen.damaged],
    }
