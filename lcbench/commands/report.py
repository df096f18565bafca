"""Write the report of a sweep: one HTML page that works offline, and its tables as Markdown, CSV and LaTeX.

It is put into the sweep's folder, and beside the sweep on its tracking server, which for somebody else's sweep has to be asked for
(--publish). A sweep that still runs can be reported too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lcbench.commands.arguments import add_sweep_arguments, chosen_sweep, command_parser
from lcbench.grid.devices import known_devices
from lcbench.report.ending import REFUSED, bad_input, say_error
from lcbench.report.inert import printable
from lcbench.report.page import write_report
from lcbench.runs.ownership import others, whose
from lcbench.runs.tracking.links import tracked_at
from lcbench.runs.tracking.publish import attach_or_say

EXAMPLES = """
python -m lcbench.report last
python -m lcbench.report last --figures
python -m lcbench.report last --predicted
python -m lcbench.report first --out /tmp/report --no-publish
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("report", __doc__, EXAMPLES)
    add_sweep_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder to write to (default: report, or report-predicted, in the sweep's own)")
    parser.add_argument(
        "--predicted",
        action="store_true",
        help="report predictions (hydra/launcher=simulate), marked as such, whatever was measured",
    )
    parser.add_argument("--figures", action="store_true", help="draw figures as PNG and PDF too, for slides and papers")
    parser.add_argument(
        "--publish",
        action=argparse.BooleanOptionalAction,
        help="attach it to the sweep on the tracking server (default: to your own)",
    )
    options = parser.parse_args(arguments)
    with bad_input():
        sweep = chosen_sweep(options)
        if options.predicted and not any(r.prediction for r in sweep.look().records.values()):
            raise ValueError(f"sweep {sweep.name} has no predictions: hydra/launcher=simulate makes them")
    folder: Path = options.out or sweep.folder / ("report-predicted" if options.predicted else "report")
    try:
        report = write_report(sweep, folder, known_devices(), figures=options.figures, predicted=options.predicted)
    except PermissionError as error:
        say_error(error)
        print(f"write it elsewhere:  {sweep.command('report', '--out', f'report-{sweep.name}')}", file=sys.stderr)
        return REFUSED
    drawn = f", {report.figures} figures" if options.figures else ""
    print(f"{printable(report.page)}  ({report.cells} cells, {report.tables} tables{drawn})")
    people = others(sweep)
    if options.publish is None and people:
        print(f"not attached to the sweep's run: {printable(whose(sweep, people))}, and names the server; --publish attaches it")
    elif options.publish is not False:
        attach_or_say(sweep, tracked_at(sweep.manifest()["launch"]), folder)
    return 0
