"""The results folder as a table: ``lcbench.results.load("results")`` gives a pandas frame, the command writes one to a file."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lcbench.commands.arguments import add_results_argument, command_parser, find_sweep
from lcbench.report.ending import bad_input
from lcbench.report.frame import frame_of
from lcbench.report.inert import csv_cell, printable
from lcbench.runs.attempt import Attempt
from lcbench.runs.store import Sweep, sweeps

if TYPE_CHECKING:
    import pandas as pd

FORMATS = (".parquet", ".csv", ".json")
EXAMPLES = """
python -m lcbench.results last --out cells.parquet
python -m lcbench.results all --out cells.csv --attempts all
python -m lcbench.results last --out cells.json --samples
python -m lcbench.results --schema
"""


def load(
    root: str | Path = "results",
    sweep: str | None = None,
    *,
    attempts: Literal["newest", "all"] = "newest",
    samples: bool = False,
) -> pd.DataFrame:
    """Results below ``root`` as a frame, a row per cell (of each sweep) with its newest attempt.

    Args:
        sweep: the name of one, ``last``, or None for all.
        attempts: ``all`` for a row per attempt; cells that were never tried still have one.
        samples: with a column of lists per kind of sample (``samples/forward_s``).

    Columns: ``sweep``, ``cell``, ``label``, ``status``, ``failure``, ``cause``, ``attempt``, ``started_at``, ``finished_at``;
    the axes (``kernel``, ``cp``, ``mask``, ``seqlen``, ``scale``, options as ``mask.left``); where it ran (``device``, ``gpu``,
    ``nodes``, ``commit``, ``no_speed``); metrics in SI units (docs/metrics.md). A file that cannot be read is set aside, and
    one that may not be read is left out, with a warning that names it.

    Raises:
        ValueError: no such sweep; names those that exist.
    """
    folder = Path(root).absolute()
    chosen = [Sweep(folder, name) for name in sweeps(folder)] if sweep is None else [find_sweep(folder, sweep)]
    return frame_of(chosen, attempts=attempts, samples=samples)


def schema() -> dict[str, Any]:
    """JSON schema of an ``attempt-N.json``."""
    from pydantic import TypeAdapter

    return TypeAdapter(Attempt).json_schema()


def main(arguments: list[str]) -> int:
    parser = command_parser("results", __doc__, EXAMPLES)
    parser.add_argument("sweep", nargs="?", default="last", help="name of the sweep, 'last' (the default) or 'all'")
    parser.add_argument("--out", type=Path, default=Path("results.csv"), help=f"file to write: {', '.join(FORMATS)}")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of a result instead")
    parser.add_argument("--attempts", choices=("newest", "all"), default="newest", help="one row per cell, or per attempt")
    parser.add_argument("--samples", action="store_true", help="with every iteration (not for .csv)")
    add_results_argument(parser)
    options = parser.parse_args(arguments)
    if options.schema:
        print(json.dumps(schema(), indent=1))
        return 0
    out: Path = options.out
    with bad_input():
        if out.suffix not in FORMATS or (options.samples and out.suffix == ".csv"):
            raise ValueError(f"cannot write {out}{' with samples' if options.samples else ''}; formats: {', '.join(FORMATS)}")
        name = None if options.sweep == "all" else options.sweep
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            frame = load(options.results, name, attempts=options.attempts, samples=options.samples)
    for warning in said:
        print(printable(warning.message), file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".parquet":
        # Options that differ in type between masks (a count here, a list there) are written as text.
        mixed = [c for c in frame.columns if "." in c and frame[c].map(type).nunique() > 1]
        frame.astype(dict.fromkeys(mixed, "string")).to_parquet(out, index=False)
    elif out.suffix == ".csv":
        frame.map(csv_cell).rename(columns=csv_cell).to_csv(out, index=False)
    else:
        frame.to_json(out, orient="records", indent=1)
    print(f"{len(frame)} rows, {len(frame.columns)} columns: {out}")
    return 0
