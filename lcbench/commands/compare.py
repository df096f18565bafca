"""Compare two sweeps cell by cell: how many times as long B takes as A, with a 95 % interval, and what of it is beyond the noise.

A sweep is named, or given by its folder, so that those of different people can be compared. How their environments differ
comes first. The intervals hold what blocks of one run differ by and, from 4 cells on, what two runs of the same differ by
beyond that.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lcbench.commands.arguments import add_results_argument, command_parser, find_sweep
from lcbench.report.comparison import Compared, Comparison, compare, side_of
from lcbench.report.ending import BAD_INPUT, bad_input
from lcbench.report.frame import PHASES
from lcbench.report.inert import plain
from lcbench.report.intervals import ENOUGH
from lcbench.runs.store import Sweep

if TYPE_CHECKING:
    from rich.text import Text

EXAMPLES = """
python -m lcbench.compare before after
python -m lcbench.compare before after --fail-on-regression 5%
python -m lcbench.compare results/before ../colleague/results/after --phase backward --json
python -m lcbench.compare flash2 flash3 --across kernel
"""
MANY = 40
UNKNOWN = "run-to-run noise not measured: what has one block only may differ as much from one run to the next without a change"


def main(arguments: list[str]) -> int:
    parser = command_parser("compare", __doc__, EXAMPLES)
    parser.add_argument("a", metavar="A", help="name of a sweep, or the path of its folder")
    parser.add_argument("b", metavar="B", help="the one to judge")
    parser.add_argument("--phase", choices=PHASES, default="total", help="whose times (default: total)")
    parser.add_argument(
        "--across", action="append", default=[], metavar="AXIS", help="an axis in which the same cell may differ, such as kernel"
    )
    parser.add_argument(
        "--fail-on-regression",
        type=_share,
        metavar="5%",
        help="exit code 1 if a cell is slower beyond the noise, corrected for the number of cells (Holm), and by more than this",
    )
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.add_argument("--all", action="store_true", help="list the cells that did not change too")
    add_results_argument(parser)
    options = parser.parse_args(arguments)
    with bad_input():
        a, b = (side_of(_sweep(options.results.absolute(), name), options.across) for name in (options.a, options.b))
        found = compare(a, b, options.phase)
    if not found.cells:
        print(f"error: {options.a} and {options.b} have no cell with a good result in both", file=sys.stderr)
    if options.json:
        print(json.dumps(_plain(found), indent=1))
    else:
        _show(found, options.a, options.b, everything=options.all)
    if not found.cells:
        return BAD_INPUT
    share = options.fail_on_regression
    if share is not None and (worse := found.regressions(share)):
        print(f"{len(worse)} cells are slower by more than {share:.3g} of their time", file=sys.stderr)
        if not found.known:
            print(UNKNOWN, file=sys.stderr)
        return 1
    return 0


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write 5% or 0.05")
    return value


def _sweep(root: Path, name: str) -> Sweep:
    """A sweep by the path of its folder, else by name."""
    folder = Path(name)
    if (folder / "manifest.json").is_file():
        return Sweep(folder.absolute().parent, folder.absolute().name)
    return find_sweep(root, name)


def _plain(found: Comparison) -> dict[str, object]:
    return {
        "phase": found.phase, "run_to_run": found.run_to_run, "known": found.known, "median_ratio": found.median_ratio,
        "environment": found.environment,
        "cells": [
            {
                "cell": c.cell.id, "label": c.cell.label, "verdict": c.verdict, **asdict(c.ratio), "p_adjusted": c.p_adjusted,
                "a_blocks": c.a.blocks, "b_blocks": c.b.blocks,
                "a_s": c.a.metrics[f"time/{found.phase}/median_s"], "b_s": c.b.metrics[f"time/{found.phase}/median_s"],
            }
            for c in found.cells
        ],
        "only_a": found.only_a, "only_b": found.only_b,
    }  # fmt: skip


def _show(found: Comparison, a: str, b: str, *, everything: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from lcbench.report.table import WIDTH

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    environment = Table(title="environments differ", title_justify="left")
    for column in ("what", f"A: {a}", f"B: {b}"):
        environment.add_column(plain(column), overflow="fold")
    for name, values in found.environment.items():
        environment.add_row(*map(plain, (name, *values)))
    console.print(environment if found.environment else "environments: no difference")
    cells = [*found.by("slower"), *found.by("faster"), *(found.by("same") if everything else ())]
    table = Table(title=f"time of {found.phase}, B over A", title_justify="left")
    for column in ("verdict", "cell", "what"):
        table.add_column(column, no_wrap=column != "what")
    for column in ("A ms", "B ms", "B / A", "95 % interval", "p, Holm"):
        table.add_column(column, justify="right", no_wrap=True)
    for c in cells if everything else cells[:MANY]:
        table.add_row(*_row(c, found.phase))
    if len(cells) > MANY and not everything:
        table.caption = f"and {len(cells) - MANY} more (--all)"
    if cells:
        console.print(table)
    for name, only in ((a, found.only_a), (b, found.only_b)):
        for what, why in list(only.items())[: None if everything else MANY]:
            console.print(plain(f"only in {name}: {what} (the other: {why})"), soft_wrap=True)
    for sentence in _noise(found):
        print(sentence)
    print(
        ", ".join(f"{len(found.by(verdict))} {verdict}" for verdict in ("slower", "faster", "same"))
        + f" of {len(found.cells)} cells in both"
    )


def _noise(found: Comparison) -> Iterator[str]:
    """What of the noise the intervals hold, and what they cannot."""
    if not found.cells:
        return
    if found.run_to_run is None:
        yield f"fewer than {ENOUGH} cells: the intervals hold the noise within each run, not what a cell's blocks of one run share"
    elif found.run_to_run:
        more = f"{math.expm1(found.run_to_run):.1%} from cell to cell (one standard deviation)"
        yield f"two runs of the same differ by {more} beyond the noise within a run, which the intervals hold"
    else:
        yield "the ratios spread no more than the noise within each run explains"
    single = sum(min(c.a.blocks, c.b.blocks) < 2 for c in found.cells)
    if not found.known:
        yield UNKNOWN
    elif single:
        yield f"{single} cells have one block in a sweep: their run-to-run noise is not known from themselves, but from the others"
    yield (
        f"median ratio of all cells: {found.median_ratio:.3f}; what all cells of a sweep share, such as a slower node, cannot be"
        " told from a change by two sweeps"
    )


def _row(c: Compared, phase: str) -> list[str | Text]:
    key, color = f"time/{phase}/median_s", {"slower": "red", "faster": "green"}.get(c.verdict, "dim")
    return [
        plain(c.verdict, color), plain(c.cell.id), plain(c.cell.label),
        f"{c.a.metrics[key] * 1e3:.4g}", f"{c.b.metrics[key] * 1e3:.4g}",
        f"{c.ratio.value:.3f}", f"{c.ratio.low:.3f} to {c.ratio.high:.3f}", f"{c.p_adjusted:.2g}",
    ]  # fmt: skip
