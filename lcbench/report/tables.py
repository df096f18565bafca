"""Tables for papers and notes, in the layout of LongCA-bench's: a row per choice, a column per mask and length, or per mask and
number of GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcbench.problem import format_tokens
from lcbench.report.amounts import digits
from lcbench.report.frame import over_seeds, rate_column
from lcbench.report.inert import csv_cell, latex, markdown, printable
from lcbench.report.parts import slug

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("md", "csv", "tex")
NOT_RUN = "-"


@dataclass(frozen=True)
class Table:
    """``rows`` hold text; columns may have two levels."""

    name: str
    title: str
    rows: pd.DataFrame

    def text(self, form: str) -> str:
        """As ``md``, ``csv`` or ``tex`` (booktabs). All of it is text, whatever is in it: no HTML, no formula, no command.

        Raises:
            ValueError: another format.
        """
        if form == "tex":
            columns = "l" * self.rows.index.nlevels + "r" * len(self.rows.columns)
            shown = self.rows.map(printable).rename(index=printable).rename(columns=printable)
            caption, label = latex(self.title), f"tab:{self.name}"
            return str(shown.to_latex(escape=True, multicolumn_format="c", column_format=columns, caption=caption, label=label))
        flat = self.flat()
        if form == "csv":
            return str(flat.map(csv_cell).rename(columns=csv_cell).to_csv(index=False))
        if form != "md":
            raise ValueError(f"no format {form!r}; there are: {', '.join(FORMATS)}")
        head, *rows = [list(map(markdown, line)) for line in (flat.columns, *flat.to_numpy())]
        lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
        return f"{markdown(self.title)}\n\n" + "\n".join(lines) + "\n"

    def flat(self) -> pd.DataFrame:
        """With one level of columns, the index as the first."""
        made = self.rows.copy()
        made.columns = [" ".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in made.columns]
        return made.reset_index() if len(made) else made

    def write(self, folder: Path) -> list[Path]:
        """One file per format."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.{form}" for form in FORMATS]
        for path, form in zip(paths, FORMATS, strict=True):
            path.write_text(self.text(form))
        return paths


def rate_tables(frame: pd.DataFrame) -> Iterator[Table]:
    """TFLOP/s per GPU of every choice: by mask and length where one GPU ran them, by mask and GPUs at the same tokens per GPU or in
    all where several did; a table per phase and setting, the total, by which choices are ranked, first; of several seeds the
    median. What has no number says why: ``oom``, ``hang``; ``-`` did not run. Tables are named by what they hold.

    Args:
        frame: all cells (``frame.reported``), those without a good result too.
    """
    frame = over_seeds(frame)
    several = frame["setting"].nunique() > 1
    for kind, columns, split in (
        ("length", ["what_mask", "seqlen"], ["scale", "setting"]),
        ("gpus", ["what_mask", "world_size"], ["tokens_per_rank", "setting"]),
    ):
        for (first, setting), rows in frame.groupby(split, sort=False):
            if kind == "gpus" and rows["world_size"].nunique() < 2:
                continue
            value = format_tokens(int(first)) if kind == "gpus" else str(first)
            where = f"{value} tokens per GPU, {setting}" if kind == "gpus" else ", ".join(filter(None, [value, setting]))
            name = "_".join([f"by-{kind}", value, *([slug(setting)] if several else [])])
            for phase in _phases(rows):
                yield Table(f"{phase}-{name}", f"TFLOP/s per GPU, {phase}, {where}", _pivot(rows, phase, columns))


def _phases(rows: pd.DataFrame) -> list[str]:
    """Phases that have rates, the total first; it is left out where there is one phase only."""
    there = [p for p in ("total", "forward", "backward") if rate_column(p) in rows and rows[rate_column(p)].notna().any()]
    return there if len(there) != 2 else there[1:]


def _pivot(rows: pd.DataFrame, phase: str, columns: list[str]) -> pd.DataFrame:
    """Rates as text, a row per choice, a column for each pair of values of these columns."""
    values = [_value(*row) for row in zip(rows["status"], rows["failure"], rows[rate_column(phase)], strict=True)]
    pivot = rows.assign(value=values).pivot_table(index="choice", columns=columns, values="value", aggfunc="first", sort=False)
    order = list(dict.fromkeys(rows["what_mask"]))
    pivot = pivot.fillna(NOT_RUN)[sorted(pivot.columns, key=lambda c: (order.index(c[0]), c[1]))]
    if columns[1] == "seqlen":
        pivot.columns = pivot.columns.set_levels([format_tokens(int(v)) for v in pivot.columns.levels[1]], level=1)
    pivot.columns.names, pivot.index.name = [None, None], "TFLOP/s per GPU"
    return pivot


def rows_table(name: str, title: str, rows: list[dict[str, Any]]) -> Table:
    """A table of dictionaries that share their keys; the first is the index."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    return Table(name, title, frame.set_index(frame.columns[0]) if len(frame) else frame)


def _value(status: str, failure: str, rate: float) -> str:
    """A rate with three digits, the class of a failure, or that it did not run."""
    if status == "ok" and rate == rate:
        return digits(rate)
    return (failure or status) if status == "failed" else NOT_RUN
