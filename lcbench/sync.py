"""Publish to MLflow what is in the store and not there yet; safe to repeat."""

from __future__ import annotations

import argparse
import sys

from lcbench.runs.jobs import Watch
from lcbench.runs.tracking import TrackingUnavailable, publish, tracked_at
from lcbench.status import add_sweep_arguments, chosen_sweep


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcbench.sync", description=__doc__)
    add_sweep_arguments(parser)
    parser.add_argument("--tracking-uri", help="default: that of the sweep")
    options = parser.parse_args(arguments)
    try:
        sweep = chosen_sweep(options)
        uri = options.tracking_uri or tracked_at(Watch(sweep).look().seen.launch)
        if not uri:
            raise ValueError(f"sweep {sweep.name} names no tracking server; add --tracking-uri, such as http://127.0.0.1:5000")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        counts = publish(sweep, uri)
    except TrackingUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{counts.published} cells published to {uri}, {counts.unchanged} were there already")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
