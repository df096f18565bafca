"""Where a sweep stands: how many cells are done, how long the rest will take, what runs, and what failed, by cause. Without a
sweep: which there are.

``--follow`` keeps showing it until it has ended, or until only jobs are left that Slurm holds, and does what a collector does: what
is to be tried again is submitted, and results are published. Of somebody else's sweep it only shows where it stands.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.live import Live

from lcbench.commands.arguments import add_launch_arguments, add_sweep_arguments, agree_to_act, chosen_sweep, command_parser
from lcbench.commands.launchers import launcher_named
from lcbench.report.ending import bad_input, left_with
from lcbench.report.fitted import console, room_in
from lcbench.report.inert import printable
from lcbench.report.standing import Standing, summary_line, sweeps_table
from lcbench.runs.collector import Collector
from lcbench.runs.jobs import SweepStatus, Watch
from lcbench.runs.ownership import others
from lcbench.runs.settle import settled
from lcbench.runs.store import Sweep, sweeps
from lcbench.runs.tracking.links import tracked_at
from lcbench.runs.tracking.publish import publish_or_say

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
    parser.add_argument("--all", action="store_true", help="with a row for every job and every cell")
    add_launch_arguments(parser)
    options = parser.parse_args(arguments)
    root = options.results.absolute()
    if options.sweep is None:
        names = sweeps(root)
        if options.json:
            print(json.dumps(names))
        elif names:
            console().print(sweeps_table(root))
        else:
            print(f"no sweeps below {printable(root)}")
        return 0
    with bad_input():
        sweep = chosen_sweep(options)
        if options.as_mine and not options.follow:
            raise ValueError("--as-mine goes with --follow: without it status only shows where a sweep stands")
        as_mine = options.as_mine and agree_to_act(sweep, "this submits jobs and publishes", as_mine=True)
    standing = _follow(sweep, options, as_mine=as_mine) if options.follow else settled(Watch(sweep))
    if options.json:
        print(json.dumps(_as_json(sweep, standing), indent=None if options.follow else 1))
    elif options.quiet:
        print(summary_line(standing))
    else:
        shown = Standing(standing, sweep, everything=options.all)
        console().print(shown)
        for line in shown.advice():  # to be copied, so it is not folded
            print(printable(line))
    for damaged in standing.seen.damaged:
        print(printable(damaged), file=sys.stderr)
    for line in standing.held_words():
        print(line, file=sys.stderr)
    return 1 if standing.held or any(c.state in ("failed", "lost") for c in standing.cells) else 0


def _follow(sweep: Sweep, options: argparse.Namespace, *, as_mine: bool) -> SweepStatus:
    """Show where the sweep stands and do what a collector does, until nothing goes on by itself."""
    collector = Collector(sweep, partial(launcher_named, folders=options.config_dir), as_mine=as_mine)
    said = last = ""

    def words() -> str:
        return "\n".join(filter(None, [last, f"the sweep goes on; again: {sweep.command('status', '--follow')}"]))

    terminal = console()
    live = None if options.json or options.quiet else Live(console=terminal, refresh_per_second=2, transient=True)
    with left_with(words), live or nullcontext():
        while not (standing := collector.advance()).at_rest:
            last = summary_line(standing)
            if live is not None:
                live.update(Standing(standing, sweep, everything=options.all, height=room_in(terminal)))
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
