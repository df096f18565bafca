"""Look at strategies without running them: ``python -m lcbench.cp cp=ring,groupcast mask=causal seqlen=1m scale=12x8``.

Takes the overrides of a sweep; every strategy, mask, length and scale that they name is proven and counted once. ``--out`` draws
one of them, ``--grid`` prints its steps, ``--cell`` takes a cell that has run, with the timeline that ``measure.timeline=true``
kept. ``--machine`` draws what is predicted too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lcbench.commands.arguments import add_plan_arguments, add_results_argument, chosen_cell, command_parser, plan_words
from lcbench.cp.base import Scheduled
from lcbench.grid import build, own
from lcbench.grid.build import build_strategy, group_mask
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.predict.predictor import Predictor
from lcbench.report.amounts import digits
from lcbench.report.ending import BAD_INPUT, bad_input, say_error
from lcbench.report.fitted import Column, Fitted, console
from lcbench.report.inert import plain
from lcbench.report.table import Names
from lcbench.schedule.fault import ScheduleError
from lcbench.schedule.lowering import operations_of
from lcbench.schedule.plot import Predicted, Timeline, save
from lcbench.schedule.schedule import Schedule
from lcbench.schedule.verify import ScheduleCost

FIRST_RANKS, FIRST_STEPS = 4, 8  # of a single schedule, where --grid is not asked for
EXAMPLES = """
python -m lcbench.cp cp=ring,usp,groupcast mask=causal seqlen=1m scale=12x8
python -m lcbench.cp cp=ring mask=causal seqlen=8 scale=1x4 --grid
python -m lcbench.cp cp=ring mask=causal_document seqlen=64k scale=1x8 --out ring.png
python -m lcbench.cp cp=ring seqlen=64k scale=1x8 --machine h100 --out ring.png
python -m lcbench.cp cp=hybrid seqlen=1m scale=2x8 --json
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("cp", __doc__, EXAMPLES)
    add_plan_arguments(
        parser, "cp=... mask=... seqlen=... scale=... heads=...", folder="; with --cell: those that name the classes of the cell"
    )
    parser.add_argument("--cell", help="a cell that has run, instead of overrides: its id, or <sweep>/<cell id>")
    add_results_argument(parser)
    parser.add_argument("--grid", action="store_true", help="print steps and ranks of a single one")
    parser.add_argument("--out", type=Path, help="draw a single one (png, pdf, svg)")
    parser.add_argument("--machine", help="with --out: draw a predicted iteration on it too (a name of conf/machine)")
    parser.add_argument("--fit", type=Path, help="with --machine: what lcbench.fit has written")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    with bad_input(), _fault():
        cells, timeline = _asked(options)
        rows, reports = [], []
        for cell in cells:
            row, report = _look(cell)
            rows.append(row)
            reports.append(report)
        if (options.grid or options.out) and (len(reports) != 1 or reports[0] is None):
            raise ValueError(f"--grid and --out show one strategy that can run, these are {len(cells)} cells: {_reasons(rows)}")
        predicted = _predicted(options, cells[0])
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        console().print(_table(rows, cells))
    (report, *_) = reports
    if report is not None and options.grid:
        print(report.schedule)
    elif report is not None and len(reports) == 1 and not options.json:
        console().print(f"\n{_first_ranks(report.schedule)}", markup=False, no_wrap=True, overflow="ellipsis", crop=True)
    if report is not None and options.out:
        save(report, cells[0].label, options.out, timeline, predicted)
        print(f"written to {options.out}", file=sys.stderr)
    return 0


@contextmanager
def _fault() -> Iterator[None]:
    """A schedule that does not verify: one line, as for any bad input, and below it the grid with an arrow at the fault."""
    try:
        yield
    except ScheduleError as error:
        say_error(ValueError(error.fault))
        if error.grid:
            print(error.grid, file=sys.stderr)
        sys.exit(BAD_INPUT)


def _asked(options: argparse.Namespace) -> tuple[list[Cell], Timeline | None]:
    if options.cell is None:
        found: dict[str, Cell] = {}
        for planned in look(plan_words(options)).cells:
            config = planned.cell.config
            key = json.dumps({axis: value for axis, value in config.items() if axis not in ("kernel", "measure")})
            found.setdefault(key, planned.cell)
        return list(found.values()), None
    if options.overrides:
        raise ValueError(f"--cell {options.cell} is a cell, so {options.overrides[0]} says nothing")
    sweep, cell_id = chosen_cell(options.results.absolute(), options.cell)
    build.allow(sweep.allowed().union(*map(build.targets_in, options.config_dir)))
    cell = sweep.entries()[cell_id].cell
    # A schedule is that of one context-parallel group, and all ranks have a timeline.
    first = cell.mesh.groups(cell.scale)[0, 0].tolist()
    every = [a.provenance["timeline"] for a in sweep.attempts(cell_id) if "timeline" in a.provenance]
    timelines = [[timeline[rank] for rank in first] for timeline in every]
    if options.out and not timelines and options.machine is None:
        raise ValueError(f"cell {options.cell} kept no timeline; run it again with measure.timeline=true")
    return [cell], timelines[-1] if timelines else None


def _predicted(options: argparse.Namespace, cell: Cell) -> Predicted | None:
    """What is predicted of a cell that is drawn, None where nobody asked."""
    if options.machine is None or options.out is None:
        for option, needs, given in (("--machine", "--out", options.machine), ("--fit", "--machine", options.fit)):
            if given is not None:
                raise ValueError(f"{option} {given} says nothing without {needs}")
        return None
    found = Predictor.of(options.machine, options.fit).predict(cell, memory=False)
    return Predicted(found.draws[0].timeline(), f"{options.machine}; {found.basis}")


def _look(cell: Cell) -> tuple[dict[str, Any], ScheduleCost | None]:
    config, problem = cell.config, cell.problem
    try:
        mask = group_mask(cell)
        strategy = build_strategy(config["cp"])
    except TypeError as error:  # options that this version does not have
        raise ValueError(f"cell {cell.id} cannot be built here: {error}") from error
    refused = own.reason_not("cp", config["cp"], strategy, problem, mask)
    row: dict[str, Any] = {"cp": config["cp"], "label": cell.label, "reason": refused}
    if not isinstance(strategy, Scheduled):
        row["reason"] = row["reason"] or "has no schedule to look at"
        return row, None
    if row["reason"]:
        return row, None
    begun = time.perf_counter()
    schedule = own.scheduled(config["cp"], strategy, problem, mask)
    planned = time.perf_counter() - begun
    report = own.proven(config["cp"], strategy, schedule, problem, mask)
    operations = operations_of(strategy.lowering, "nccl")
    ranks = sorted({0, schedule.world_size // 2, schedule.world_size - 1})
    row |= {
        "steps": len(schedule.steps),
        "imbalance": report.imbalance,
        "forward_bytes": int(report.forward_bytes.max()),
        "forward_bytes_out_of_node": int(report.forward_bytes_out.max()),
        "backward_bytes": int(report.backward_bytes.max()),
        "backward_bytes_out_of_node": int(report.backward_bytes_out.max()),
        "buffer_bytes": max(report.buffer_bytes(rank, operations) for rank in ranks),
        "plan_s": planned,
    }
    return row, report


def _reasons(rows: list[dict[str, Any]]) -> str:
    return "; ".join(sorted({row["reason"] or "can run" for row in rows}))


def _table(rows: list[dict[str, Any]], cells: list[Cell]) -> Fitted:
    names = Names.of(cells)
    table = Fitted(names.title("MiB sent by the rank that sends most; balance 1.00 is perfect"), [
        Column("what", folds=True, wanted=32), Column("steps", 1, right=True), Column("balance", right=True),
        Column("forward", right=True), Column("out of\nthe node", right=True), Column("backward", right=True),
        Column("out of\nthe node", 2, right=True), Column("buffers\nMiB", 3, right=True), Column("plan\nms", 4, right=True),
    ])  # fmt: skip
    numbers = len(table.columns) - 1
    for row, cell in zip(rows, cells, strict=True):
        options = " ".join(f"{k}={v}" for k, v in row["cp"].items() if k not in ("name", "_target_"))
        what = plain(names.what[cell.id])
        if options:
            what = what.append("\n").append_text(plain(options, "dim"))
        if row["reason"]:
            table.add(what, *["-"] * numbers, below=row["reason"])
            continue
        mebi = [digits(row[key] / (1 << 20)) for key in row if "bytes" in key]
        table.add(what, str(row["steps"]), f"{row['imbalance']:.3f}", *mebi, digits(1e3 * row["plan_s"]))
    return table


def _first_ranks(schedule: Schedule) -> str:
    """The first steps of the first ranks, where there is more of it."""
    grid = schedule.grid(range(min(FIRST_RANKS, schedule.world_size)), FIRST_STEPS)
    more = schedule.world_size > FIRST_RANKS or len(schedule.steps) > FIRST_STEPS
    return f"{grid}\n... --grid prints all {len(schedule.steps)} steps of {schedule.world_size} ranks" if more else grid
