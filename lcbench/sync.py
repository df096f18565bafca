"""Publish to MLflow what is in the store and not there yet; safe to repeat."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lcbench.runs.jobs import settle
from lcbench.runs.pack import Pack
from lcbench.runs.store import Sweep
from lcbench.runs.tracking import TrackingUnavailable, publish
from lcbench.status import find_sweep


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcbench.sync", description=__doc__)
    parser.add_argument("sweep", help="name of the sweep, or 'last'")
    parser.add_argument("--tracking-uri", help="default: that of the sweep's last job")
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: results)")
    options = parser.parse_args(arguments)
    try:
        sweep = find_sweep(options.results.absolute(), options.sweep)
        uri = options.tracking_uri or _last_uri(sweep)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settle(sweep)
    try:
        counts = publish(sweep, uri)
    except TrackingUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{counts.published} cells published to {uri}, {counts.unchanged} were there already")
    return 0


def _last_uri(sweep: Sweep) -> str:
    packs = sweep.packs()
    uri = Pack.read(sweep.pack_folder(packs[-1]) / "pack.json").tracking_uri if packs else None
    if not uri:
        raise ValueError(f"sweep {sweep.name} names no tracking server; add --tracking-uri, such as http://127.0.0.1:5000")
    return uri


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
