"""Write the report of a sweep: one HTML page that works offline, its figures as PNG and PDF, its tables as Markdown, CSV and LaTeX.

It is put into the sweep's folder, and beside the sweep on its tracking server. A sweep that still runs can be reported too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lcbench.arguments import add_sweep_arguments, bad_input, chosen_sweep, command_parser
from lcbench.grid.devices import known_devices
from lcbench.report.page import write_report
from lcbench.runs.tracking import attach_or_say, tracked_at

EXAMPLES = """
python -m lcbench.report last
python -m lcbench.report first --out /tmp/report --no-publish
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("report", __doc__, EXAMPLES)
    add_sweep_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder to write to (default: report in the sweep's own)")
    parser.add_argument("--no-publish", action="store_true", help="do not attach it to the sweep on the tracking server")
    options = parser.parse_args(arguments)
    with bad_input():
        sweep = chosen_sweep(options)
    folder: Path = options.out or sweep.folder / "report"
    report = write_report(sweep, folder, known_devices())
    print(f"{report.page}  ({report.figures} figures, {report.tables} tables)")
    if not options.no_publish:
        attach_or_say(sweep, tracked_at(sweep.manifest()["launch"]), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
