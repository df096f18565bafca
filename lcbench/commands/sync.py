"""Publish to MLflow what is in the store and not there yet; safe to repeat. Runs that were deleted there are made again.

A sweep stores no password. Give it in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), or with the
address, in MLFLOW_TRACKING_URI or by --tracking-uri.
"""

from __future__ import annotations

import os
import sys

from lcbench.commands.arguments import add_as_mine_argument, add_sweep_arguments, agree_to_act, chosen_sweep, command_parser
from lcbench.redact import redacted_uri
from lcbench.report.ending import bad_input
from lcbench.report.publishing import publish_sweep
from lcbench.runs.address import NOWHERE, checked_address
from lcbench.runs.jobs import Watch
from lcbench.runs.settle import settled
from lcbench.runs.tracking.links import sweep_url, tracked_at
from lcbench.runs.tracking.server import TrackingUnavailable

EXAMPLES = """
python -m lcbench.sync last
python -m lcbench.sync first --tracking-uri http://mlflow.cluster:5000
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("sync", __doc__, EXAMPLES)
    add_sweep_arguments(parser)
    parser.add_argument("--tracking-uri", metavar="URI", help="default: that of the sweep, else MLFLOW_TRACKING_URI")
    parser.add_argument("--experiment", metavar="NAME", help="MLflow's experiment; default: that of the sweep")
    add_as_mine_argument(parser)
    options = parser.parse_args(arguments)
    with bad_input():
        sweep = chosen_sweep(options)
        agree_to_act(sweep, "this publishes its results", as_mine=options.as_mine)
        given = options.tracking_uri or tracked_at(settled(Watch(sweep)).seen.launch) or os.environ.get("MLFLOW_TRACKING_URI")
        if not given or given == NOWHERE:
            raise ValueError(f"sweep {sweep.name} names no tracking server; add --tracking-uri, such as http://127.0.0.1:5000")
        uri = checked_address(given, "--tracking-uri" if options.tracking_uri else "its tracking_uri")
    try:
        counts = publish_sweep(sweep, uri, options.experiment, thorough=True)
    except TrackingUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{counts.published} cells published to {redacted_uri(uri)}, {counts.unchanged} were there already")
    if uri.startswith("http"):
        print(sweep_url(sweep, uri))
    if counts.files:
        print(counts.files, file=sys.stderr)
    return 0
