"""Fit a machine to measured times: ``python -m lcbench.fit shipped --machine h100 --gpus 8 --out h100.fit.json``.

Takes files (tables of calls, tables of published rows, what ``make gpu-check`` writes; docs/predicting.md), sweeps by their names,
and ``shipped``: the tables that come with lcbench. Prints how far the fit is from what it was fitted on, and how far
predictions may be off. ``--table`` holds it against every published row of the files, those that it has not seen among them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lcbench.commands.arguments import add_results_argument, command_parser, find_sweep
from lcbench.grid.cell import Cell
from lcbench.grid.paths import CONF
from lcbench.grid.values import axis_values
from lcbench.predict import tables
from lcbench.predict.cells import cell_peaks, cell_times
from lcbench.predict.fit import FOLDS, fit
from lcbench.predict.fitted import Fit
from lcbench.predict.machines import known, machine_of
from lcbench.predict.predictor import Prediction, Predictor
from lcbench.predict.tables import Read, Row
from lcbench.report import published
from lcbench.report.ending import bad_input
from lcbench.report.fitted import Column, Fitted, console
from lcbench.runs.store import sweeps
from lcbench.schedule.machine import Machine

SHIPPED = "shipped"
TABLES = (tables.DATA / "calls.csv", tables.DATA / "published_cp.csv", Path(published.__file__).parent / "h100_cp.csv")
EXAMPLES = """
python -m lcbench.fit shipped --machine h100 --gpus 8 --out h100.fit.json
python -m lcbench.fit shipped --machine b200 --out b200.fit.json
python -m lcbench.fit shipped --machine h100 --fit h100.fit.json --table
python -m lcbench.fit results/h200/gpu-check.json --machine h200 --out h200.fit.json
"""


def asked(arguments: list[str]) -> argparse.Namespace:
    """What a command line asks for; raises SystemExit(2) for what does not go together."""
    parser = command_parser("fit", __doc__, EXAMPLES)
    parser.add_argument("what", nargs="+", metavar="FILE_OR_SWEEP", help="files, names of sweeps, or 'shipped'")
    parser.add_argument("--machine", required=True, help=f"what to fit: {', '.join(known())}")
    parser.add_argument("--out", type=Path, help="where to write the fit")
    parser.add_argument("--fit", type=Path, help="a fit that is there already, for --table; nothing is fitted")
    parser.add_argument("--gpus", type=int, help="published rows of more GPUs are not fitted on (default: all are)")
    parser.add_argument("--kernel", help="what published rows were computed with (default: what is known of their GPU)")
    parser.add_argument("--folds", type=int, default=FOLDS, help=f"parts left out in turn, for the error (default: {FOLDS})")
    parser.add_argument("--table", action="store_true", help="print every published row with its prediction")
    parser.add_argument("--json", action="store_true", help="print the fit as JSON")
    add_results_argument(parser)
    options = parser.parse_args(arguments)
    with bad_input():
        _check(options)
    return options


def main(arguments: list[str]) -> int:
    options = asked(arguments)
    with bad_input():
        machine = machine_of(options.machine)
        found = _read(options, machine)
        fitted = Fit.read(options.fit) if options.fit else fit(found.observations, machine, folds=options.folds)
        if options.out:
            fitted.write(options.out)
        predictor = Predictor.of(options.machine, options.fit) if options.fit else Predictor(fitted.links.of(machine), fitted)
    if options.json:
        print(fitted.model_dump_json(indent=1))
    else:
        _tell(fitted, found)
    if options.table:
        _table(predictor, found.rows, set(fitted.cells))
    if options.out:
        print(f"written to {options.out}; predict with it:  python -m lcbench.sweep hydra/launcher=simulate machine={machine.name}"
              f" --fit {options.out} ...", file=sys.stderr)  # fmt: skip
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together."""
    if options.fit and options.out:
        raise ValueError("--fit takes a fit that is there, --out writes a new one; write one of them")
    if options.json and options.table:
        raise ValueError("--json prints the fit, --table published rows; write one of them")
    if options.fit and not options.table:
        raise ValueError("--fit goes with --table, which holds it against published rows")
    for name, least in (("gpus", 1), ("folds", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} is less than {least}")
    if options.kernel is not None and options.kernel not in axis_values(CONF, "kernel"):
        raise ValueError(f"--kernel {options.kernel} is none of {', '.join(axis_values(CONF, 'kernel'))}")


def _read(options: argparse.Namespace, machine: Machine) -> Read:
    """What all files and sweeps hold for the machine.

    Raises:
        ValueError: one is neither a file nor a sweep, or holds nothing of this machine, and nor do the others.
    """
    found, root = Read(), options.results.absolute()
    for what in options.what:
        if what in sweeps(root):
            results = [(r.entry.cell, r.attempts) for r in find_sweep(root, what).look().records.values()]
            found.observations += cell_times(results, machine, f"sweep {what}")
            found.observations += cell_peaks(results, machine, f"sweep {what}")
            continue
        for path in TABLES if what == SHIPPED else [Path(what)]:
            if not path.is_file():
                raise ValueError(f"{what} is no file, no sweep below {root}, and not '{SHIPPED}'")
            found.add(tables.read(path, machine, ranks=options.gpus, kernel=options.kernel))
    if not found.observations:
        raise ValueError(f"nothing in {', '.join(options.what)} is of machine={machine.name}: {_left_out(found)}")
    return found


def _left_out(found: Read) -> str:
    return ", ".join(f"{count} rows {why}" for why, count in found.left_out.most_common()) or "no rows"


# -- what is printed ---------------------------------------------------------------------------------------------------------


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1%}"


def _tell(fitted: Fit, found: Read) -> None:
    """How far the fit is from what it was fitted on, and what it found."""
    table = Fitted("How far the fit is from what it was fitted on", [
        Column("group"), Column("times", right=True), Column("median error", right=True), Column("90 % within", right=True),
        Column("left out: median", right=True),
    ])  # fmt: skip
    for each in fitted.residuals:
        table.add(each.group, str(each.count), _percent(each.median), _percent(each.p90), _percent(each.left_out))
    console().print(table)
    print("Predictions may be off by, 95 %: " + ", ".join(f"{phase} {error:.0%}" for phase, error in fitted.error.items())
          + ", by leaving groups of cells out.")  # fmt: skip
    for held in fitted.memory:
        passes = "forward and backward" if held.backward else "forward"
        print(
            f"Memory of {held.kernel} ({held.dtype}, {passes}): of {held.cells} cells; peaks may be off by {held.error:.0%}, 95 %."
        )
    for name, factor in fitted.factors.items():
        if (factor.compute, factor.operand_s) == (1.0, 0.0):
            continue  # our own engine ran its schedule
        strategy, phase = name.split("/")
        print(
            f"cp={strategy} {phase}: {factor.compute:.2f} x the kernel, and {factor.operand_s * 1e12:.2f} ps per byte of operands"
        )
    if found.left_out:
        print(f"Left out: {_left_out(found)}.")


def _table(predictor: Predictor, rows: Sequence[Row], seen: set[str]) -> None:
    """Every published row with its prediction; which of them the fit has seen; what it comes to."""
    predicted: dict[Cell, Prediction] = {}
    table = Fitted(f"Published rows and predictions, machine={predictor.machine.name}", [
        Column("strategy"), Column("mask"), Column("GPUs", right=True), Column("phase"), Column("published TFLOP/s", right=True),
        Column("predicted TFLOP/s", right=True), Column("error", right=True), Column("band", right=True), Column("fitted on"),
    ])  # fmt: skip
    errors: dict[bool, list[float]] = {True: [], False: []}
    within = 0
    for row in rows:
        if row.cell not in predicted:
            predicted[row.cell] = predictor.predict(row.cell, memory=False)
        found = predicted[row.cell]
        tflops = found.metrics()[f"compute/{row.phase}/tflops_per_gpu"]
        error, fitted_on = tflops / row.tflops - 1, row.cell.id in seen
        errors[fitted_on].append(abs(error))
        within += not fitted_on and abs(np.log(tflops / row.tflops)) <= np.log1p(found.error)
        table.add(row.name, row.cell.config["mask"]["name"], str(row.cell.scale.world_size), row.phase, f"{row.tflops:.0f}",
                  f"{tflops:.0f}", _percent(error, "+"), f"{found.error:.0%}", "yes" if fitted_on else "no")  # fmt: skip
    console().print(table)
    for fitted_on, words in ((True, "fitted on"), (False, "not seen by the fit")):
        if some := errors[fitted_on]:
            print(f"{len(some)} rows {words}: median error {np.median(some):.1%}, 90 % within {np.quantile(some, 0.9):.1%}"
                  + ("" if fitted_on else f"; {within} within their bands"))  # fmt: skip
