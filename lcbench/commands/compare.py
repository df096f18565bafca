"""Compare two sweeps cell by cell: how many times as long B takes as A, with a 95 % interval, and what of it is beyond the noise.

A sweep is named, or given by its folder, so that those of different people can be compared. The answer comes first, then how their
environments differ, the change by axis, and the cells that changed. The intervals hold what blocks of one run differ by and, from
4 cells on, what two runs of the same differ by beyond that.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.text import Text

from lcbench.commands.arguments import add_results_argument, command_parser, find_sweep
from lcbench.grid.labels import labels
from lcbench.report.amounts import digits, percent, times
from lcbench.report.causes import Unwell, grouped
from lcbench.report.comparison import Compared, Comparison, Share, Side, compare, predictions_of, side_of
from lcbench.report.comparison_page import write_comparison
from lcbench.report.ending import BAD_INPUT, REFUSED, bad_input, say_error
from lcbench.report.fitted import Column, Fitted, console
from lcbench.report.foretold import said, signed
from lcbench.report.frame import PHASES
from lcbench.report.inert import plain, printable
from lcbench.report.intervals import ENOUGH
from lcbench.report.table import WHAT, Names
from lcbench.runs.store import Sweep

EXAMPLES = """
python -m lcbench.compare before after
python -m lcbench.compare before after --fail-on-regression 5%
python -m lcbench.compare results/before ../colleague/results/after --phase backward --json
python -m lcbench.compare flash2 flash3 --across kernel
python -m lcbench.compare before after --html
python -m lcbench.compare before after --predicted
"""
DEFAULT = ""  # of --html: in the folder of B
MANY = 40
FEW = 3  # cells that share a cause are named
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
    parser.add_argument(
        "--predicted", action="store_true", help="hold what was predicted in one against what was measured in the other, row by row"
    )
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.add_argument("--all", action="store_true", help="list the cells that did not change too")
    parser.add_argument(
        "--html", nargs="?", const=DEFAULT, metavar="FILE", help="write a page too (default: report/compare-<A>.html in B's folder)"
    )
    add_results_argument(parser)
    options = parser.parse_args(arguments)
    with bad_input():
        a, b = (_sweep(options.results.absolute(), name) for name in (options.a, options.b))
        sides = side_of(a, options.across), side_of(b, options.across)
        if options.predicted:
            return _held(sides, options)
        found = compare(*sides, options.phase)
    if not found.cells:
        only = [name for name, side in zip((options.a, options.b), sides, strict=True) if side.foretold and not side.good]
        why = f": in {' and '.join(only)} nothing was measured, only predicted (--predicted)" if only else ""
        print(f"error: {options.a} and {options.b} have no cell with a good result in both{why}", file=sys.stderr)
    if options.json:
        print(json.dumps(_plain(found), indent=1))
    else:
        _show(found, options.a, options.b, everything=options.all)
    if not found.cells:
        return BAD_INPUT
    if options.html is not None and not _write_page(found, a, b, options.html, quiet=options.json):
        return REFUSED
    share = options.fail_on_regression
    if share is not None and (worse := found.regressions(share)):
        print(f"{len(worse)} cells are slower by more than {share:.3g} of their time", file=sys.stderr)
        if not found.known:
            print(UNKNOWN, file=sys.stderr)
        return 1
    return 0


def _held(sides: tuple[Side, Side], options: argparse.Namespace) -> int:
    """Show predictions beside what was measured, the worst first.

    Raises:
        ValueError: there is no cell that has both, or an option has no meaning for them.
    """
    if options.html is not None or options.fail_on_regression is not None:
        raise ValueError("--predicted compares predictions with measurements, and takes neither --html nor --fail-on-regression")
    rows = sorted(predictions_of(*sides, options.phase), key=lambda row: -abs(math.log1p(row.error)))
    if not rows:
        raise ValueError(f"no cell is predicted in one of {options.a} and {options.b} and measured in the other")
    if options.json:
        named = labels(r.cell for r in rows)
        found = [
            {"cell": r.cell.id, "label": named[r.cell.id], "phase": r.phase, "predicted_s": r.predicted_s,
             "measured_s": r.measured_s, "error": r.error, "band": r.band, "within": r.within}
            for r in rows
        ]  # fmt: skip
        print(json.dumps({"phase": options.phase, "said": said(rows), "cells": found}, indent=1))
        return 0
    names = Names.of(r.cell for r in rows)
    table = Fitted(names.title(f"time of {options.phase}, predicted and measured, the furthest off first"), [
        Column("cell"), Column("what", folds=True, wanted=WHAT), Column("predicted\nms", right=True),
        Column("measured\nms", right=True), Column("error", right=True), Column("95 % band", 1, right=True), Column("in it", 2),
    ])  # fmt: skip
    shown = rows if options.all else rows[:MANY]
    for row in shown:
        inside = plain("yes", "green") if row.within else plain("no", "red")
        table.add(
            row.cell.id, names.what[row.cell.id], digits(row.predicted_s * 1e3), digits(row.measured_s * 1e3), signed(row.error),
            f"within {times(1 + row.band)}", inside,
        )  # fmt: skip
    table.caption = f"and {len(rows) - len(shown)} more (--all)" if len(shown) < len(rows) else ""
    terminal = console()
    terminal.print(plain(said(rows), "bold"), table, sep="\n")
    return 0


def _write_page(found: Comparison, a: Sweep, b: Sweep, file: str, *, quiet: bool) -> bool:
    """Write the page of ``--html`` and say where it is, on stderr if ``quiet``; False where the file system refuses."""
    page = Path(file) if file else b.folder / "report" / f"compare-{a.name}.html"
    try:
        write_comparison(found, a, b, page, noise=list(_noise(found)))
    except PermissionError as error:
        say_error(error)
        print("write it elsewhere:  --html FILE", file=sys.stderr)
        return False
    print(printable(page), file=sys.stderr if quiet else sys.stdout)
    return True


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
    named = labels(c.cell for c in found.cells)
    return {
        "phase": found.phase, "run_to_run": found.run_to_run, "known": found.known, "median_ratio": found.median_ratio,
        "environment": found.environment,
        "cells": [
            {
                "cell": c.cell.id, "label": named[c.cell.id], "verdict": c.verdict, **asdict(c.ratio), "p_adjusted": c.p_adjusted,
                "a_blocks": c.a.blocks, "b_blocks": c.b.blocks,
                "a_s": c.a.metrics[f"time/{found.phase}/median_s"], "b_s": c.b.metrics[f"time/{found.phase}/median_s"],
            }
            for c in found.cells
        ],
        "only_a": found.only_a, "only_b": found.only_b,
    }  # fmt: skip


def _show(found: Comparison, a: str, b: str, *, everything: bool) -> None:
    terminal = console()
    if found.cells:
        terminal.print(_verdict(found, a, b))
    environment = Fitted("environments differ", [Column("what"), *(Column(name, folds=True) for name in (f"A: {a}", f"B: {b}"))])
    for name, values in found.environment.items():
        environment.add(name, *values)
    named = ", ".join(found.same) or "nothing"
    terminal.print(environment if len(environment) else plain(f"environments: no difference in {named}"))
    if shares := found.by_axis():
        terminal.print(_shares(shares))
    cells = [*found.by("slower"), *found.by("faster"), *(found.by("same") if everything else ())]
    if cells:
        terminal.print(_cells(cells if everything else cells[:MANY], found.phase, len(cells)))
    for name, other, only in ((a, b, found.only_a), (b, a, found.only_b)):
        if only:
            terminal.print(_only(name, other, only, everything=everything))
    for sentence in _noise(found):
        terminal.print(plain(sentence))


def _verdict(found: Comparison, a: str, b: str) -> Text:
    """The answer in a line: red if anything became slower, green if some became faster and none slower."""
    whole = found.whole
    said = f"{whole.counts} in both; on average {b} takes {times(whole.ratio)} the time of {a}"
    return plain(said, "bold red" if whole.slower else "bold green" if whole.faster else "bold")


def _shares(shares: Sequence[Share]) -> Fitted:
    table = Fitted("by axis: B over A is a geometric mean", [
        Column("axis"), Column("value", folds=True), Column("cells", right=True), Column("B / A", right=True),
        Column("faster", right=True), Column("slower", right=True),
    ])  # fmt: skip
    before = ""
    for share in shares:
        if share.axis != before:
            table.gap()
        color = "red" if share.slower > share.faster else "green" if share.faster else "dim"
        table.add(
            share.axis if share.axis != before else "", share.value, str(share.cells), plain(times(share.ratio), color),
            str(share.faster), str(share.slower),
        )  # fmt: skip
        before = share.axis
    return table


def _cells(cells: Sequence[Compared], phase: str, count: int) -> Fitted:
    names = Names.of(c.cell for c in cells)
    table = Fitted(names.title(f"time of {phase}, B over A"), [
        Column("verdict"), Column("cell"), Column("what", folds=True, wanted=WHAT), Column("A ms", 2, right=True),
        Column("B ms", 2, right=True), Column("B / A", right=True), Column("95 % interval", 1, right=True),
        Column("p, Holm", 3, right=True),
    ])  # fmt: skip
    for c in cells:
        key, color = f"time/{phase}/median_s", {"slower": "red", "faster": "green"}.get(c.verdict, "dim")
        table.add(
            plain(c.verdict, color), c.cell.id, names.what[c.cell.id],
            digits(c.a.metrics[key] * 1e3), digits(c.b.metrics[key] * 1e3),
            f"{c.ratio.value:.3f}", f"{c.ratio.low:.3f} to {c.ratio.high:.3f}", digits(c.p_adjusted),
        )  # fmt: skip
    if len(cells) < count:
        table.caption = f"and {count - len(cells)} more (--all)"
    return table


def _only(name: str, other: str, only: Mapping[str, str], *, everything: bool) -> Fitted:
    """Cells that one sweep has a good result of, counted by why the other has none."""
    why = Column(f"why {other} has no result", folds=True)
    table = Fitted(f"only in {name}: {len(only)} cells", [Column("cells", right=True), why])
    causes = grouped([Unwell(what, "failed", "", why) for what, why in only.items()], Sweep(Path(), other))
    for cause in causes:
        shown = cause.cells if everything else cause.cells[:FEW]
        more = f" and {len(cause.cells) - len(shown)} more (--all)" if len(shown) < len(cause.cells) else ""
        table.add(str(len(cause.cells)), cause.cause, below=f"{'; '.join(shown)}{more}")
    return table


def _noise(found: Comparison) -> Iterator[str]:
    """What of the noise the intervals hold, and what they cannot."""
    if not found.cells:
        return
    if found.run_to_run is None:
        yield f"fewer than {ENOUGH} cells: the intervals hold the noise within each run, not what a cell's blocks of one run share"
    elif found.run_to_run:
        change = percent(math.expm1(found.run_to_run))
        yield f"Repeating the same cell changes its time by about {change} (one standard deviation); the intervals include that."
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
