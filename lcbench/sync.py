"""Publish to MLflow what is in the store and not there yet; safe to repeat."""

from __future__ import annotations

import sys

from lcbench.arguments import add_as_mine_argument, add_sweep_arguments, agree_to_act, bad_input, chosen_sweep, command_parser, run
from lcbench.runs.jobs import Watch
from lcbench.runs.tracking import TrackingUnavailable, publish, tracked_at

EXAMPLES = """
python -m lcbench.sync last
python -m lcbench.sync first --tracking-uri http://mlflow.cluster:5000
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("sync", __doc__, EXAMPLES)
    add_sweep_arguments(parser)
    parser.add_argument("--tracking-uri", help="default: that of the sweep")
    add_as_mine_argument(parser)
    options = parser.parse_args(arguments)
    with bad_input():
        sweep = chosen_sweep(options)
        agree_to_act(sweep, "this publishes its results", as_mine=options.as_mine)
        uri = options.tracking_uri or tracked_at(Watch(sweep).look().seen.launch)
        if not uri:
            raise ValueError(f"sweep {sweep.name} names no tracking server; add --tracking-uri, such as http://127.0.0.1:5000")
    try:
        counts = publish(sweep, uri)
    except TrackingUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{counts.published} cells published to {uri}, {counts.unchanged} were there already")
    return 0


if __name__ == "__main__":
    run(main)
