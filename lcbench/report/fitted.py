"""Tables for a terminal of any width: what matters least is left out first, and long words have lines of their own below a row."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lcbench.report.inert import plain

WIDTH = 200  # of a table that goes to a file or a pipe
COLUMNS = "COLUMNS"  # what a shell sets to the width of its terminal, and who has none may set
GAP = 2  # blanks between columns
INDENT = 2  # of what stands below a row
NOTHING = "-"  # a column of numbers that holds nothing else is left out
LEAST = 20  # columns of words that are folded


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Where tables go: as wide as the terminal, or as COLUMNS says; a file or a pipe gets ``WIDTH`` columns."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, quiet=quiet, highlight=False, width=None if stream.isatty() or COLUMNS in os.environ else WIDTH)


def room_in(terminal: Console) -> int | None:
    """How many lines a view has that is drawn again and again; None where it goes to a file."""
    return terminal.height - 1 if terminal.is_terminal else None


@dataclass(frozen=True)
class Column:
    """A column of a ``Fitted``.

    Attributes:
        head: over it; ``\\n`` begins a second line.
        priority: 0 is always there; of the others those with the highest number are left out first.
        folds: whether its words may take several lines; every other column is as wide as its longest value.
        wanted: columns that folded words get before a column that may be left out has a place, unless they need fewer. Where even
            that is too much they get at least ``LEAST``.
        cut: whether folded words keep to one line, and end with "…" where that is too short: for views that are drawn anew.
    """

    head: str
    priority: int = 0
    right: bool = False
    folds: bool = False
    wanted: int = LEAST
    cut: bool = False


# The values of a row, and what stands below it; an empty line has neither.
Row = tuple[list[Text], Text | None]


@dataclass
class Fitted:
    """A table that is laid out when it is printed, for the width that is there then. All its words are text, never markup.

    ``title`` is a line above, ``caption`` one below, both as wide as the terminal.
    """

    title: str
    columns: Sequence[Column]
    caption: str = ""
    headed: bool = True
    _rows: list[Row] = field(default_factory=list)

    def add(self, *values: str | Text, below: str | Text = "") -> None:
        """A row with a value for each column. ``below``: what has lines of its own under it, in the full width."""
        assert len(values) == len(self.columns)
        said = below if isinstance(below, Text) else plain(below, "dim")
        self._rows.append(([v if isinstance(v, Text) else plain(v) for v in values], said if said.plain else None))

    def gap(self) -> None:
        """An empty line, if there is a row above it that it could part from the next."""
        if self._rows and self._rows[-1][0]:
            self._rows.append(([], None))

    def __len__(self) -> int:
        return sum(bool(values) for values, _ in self._rows)

    def shown(self, width: int) -> list[Column]:
        """The columns that there is room for."""
        return [self.columns[i] for i in self._widths(width)]

    def _widths(self, width: int) -> dict[int, int]:
        """How wide each column is that there is room for, by its place."""
        needs = []
        for place, column in enumerate(self.columns):
            heads = column.head.splitlines() if self.headed else []
            lines = [line for values, _ in self._rows if values for line in values[place].plain.splitlines()]
            empty = column.right and lines and set(lines) == {NOTHING}
            needs.append(0 if empty else max(map(cell_len, [*heads, *lines]), default=0))
        left_out = sorted((c.priority, place) for place, c in enumerate(self.columns) if c.priority)
        kept = [place for place in range(len(self.columns)) if needs[place]]
        while left_out and sum(self._least(p, needs[p], self.columns[p].wanted) for p in kept) + GAP * (len(kept) - 1) > width:
            _, place = left_out.pop()
            kept = [p for p in kept if p != place]
        widths = {place: self._least(place, needs[place], LEAST) for place in kept}
        spare = width - sum(widths.values()) - GAP * (len(kept) - 1)
        # What is folded gets what is left, the narrowest first, as far as it needs it.
        folded = sorted((p for p in kept if self.columns[p].folds), key=lambda p: needs[p])
        for number, place in enumerate(folded):
            more = max(0, min(needs[place] - widths[place], spare // (len(folded) - number)))
            widths[place] += more
            spare -= more
        return widths

    def _least(self, place: int, need: int, folded: int) -> int:
        return min(need, folded) if self.columns[place].folds else need

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield plain(self.title, "bold")
        yield from self.parts(options.max_width, self._rows, headed=self.headed)
        if self.caption:
            yield plain(self.caption, "dim")

    def each(self) -> list[RenderableType]:
        """Every row by itself, as wide as in the table; without title, heads and caption."""
        return [_Row(self, number) for number in range(len(self._rows))]

    def parts(self, width: int, rows: Sequence[Row], *, headed: bool) -> Iterator[RenderableType]:
        """Rows as tables of the same widths, with what stands below a row between them."""
        widths = self._widths(width)
        table = self._empty(widths, headed=headed)
        for values, below in rows:
            if values:
                table.add_row(*(values[place] for place in widths))
            if values and below is None:
                continue
            if table.row_count or headed:
                yield table
            table, headed = self._empty(widths, headed=False), False
            yield Text() if below is None else Padding(below, (0, 0, 0, INDENT))
        if table.row_count or headed:
            yield table

    def _empty(self, widths: dict[int, int], *, headed: bool) -> Table:
        table = Table(box=SIMPLE if headed else None, show_header=headed, show_edge=False, pad_edge=False, padding=0)
        table.padding = (0, 1 if headed else GAP, 0, 0)  # the box has a blank of its own between columns
        for place, width in widths.items():
            column = self.columns[place]
            justify: Literal["left", "right"] = "right" if column.right else "left"
            overflow: Literal["fold", "ellipsis"] = "ellipsis" if column.cut else "fold"
            table.add_column(column.head, width=width, no_wrap=column.cut or not column.folds, overflow=overflow, justify=justify)
        return table


@dataclass(frozen=True)
class _Row:
    table: Fitted
    number: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.table.parts(options.max_width, [self.table._rows[self.number]], headed=False)
