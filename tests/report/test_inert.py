"""What is exported is text: no HTML in Markdown, no formula in CSV, no command in LaTeX, no markup in tables for people."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from lcbench.commands import results
from lcbench.report.inert import csv_cell, latex, markdown, plain
from lcbench.report.table import cells_table
from lcbench.report.tables import Table
from lcbench.runs.attempt import Failure
from tests.report.made import made_sweep

WORDS = (
    "<script>alert(1)</script>", "a|b", "x\ny", "[a](javascript:x)", "![](http://x/y.png)", "`code`", "<https://x>", "a\\", "=1+1",
    "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\r=1", " =1", "\\input{/etc/passwd}", "50% & $x_1^2$ #~{}", "[red]x[/]",
    "[/__w/pytorch/x.cc:537] broken", "\x1b[31mred",
)  # fmt: skip


def test_tables_are_inert_in_every_format(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {"cause": WORDS, "=head": ["-0.5"] * len(WORDS), "n": ["1e-3%"] * len(WORDS)}, index=pd.Index(WORDS, name="=i")
    )
    table = Table("x", "<b>title</b> & \\input{x} 50%", rows)
    lines = table.text("md").splitlines()
    assert len(lines) == 4 + len(WORDS)
    for line in lines[2:]:
        assert line.replace("\\\\", "").replace("\\|", "").count("|") == 5, line
    text = table.text("md")
    assert not {"<", ">"} & set(text)
    assert "](" not in text.replace("\\](", "")
    assert "-0.5" in text
    read = list(csv.reader(io.StringIO(table.text("csv"), newline="")))
    assert read[0] == ["'=i", "cause", "'=head", "n"]
    assert len(read) == 1 + len(WORDS)
    for row in read[1:]:
        assert not row[0].lstrip(" ").startswith(("=", "+", "-", "@")), row
        assert row[2:] == ["-0.5", "1e-3%"]
    tex = table.text("tex")
    assert "\\input" not in tex
    assert "50\\%" in tex
    assert "\x1b" not in "".join(table.text(form) for form in ("md", "csv", "tex"))


@pytest.mark.parametrize("value", ["-", "-0.5", "+3", "-1.5e-3", "-nan", "12%", "causal", "", 1.5, None, ["=x"], "a=b"])
def test_numbers_and_words_stay_as_they_are(value: object) -> None:
    assert csv_cell(value) == value


def test_a_results_file_has_no_formulas_and_its_folder_is_made(tmp_path: Path) -> None:
    why = Failure("crash", "=HYPERLINK(1) [/red] \x1b[2J")
    sweep = made_sweep(
        tmp_path, "s", ["kernel=naive,flex", "cp=none", "seqlen=256", "heads=2x2x8", "dtype=float32"], failed={"flex": why}
    )
    out = tmp_path / "new folder" / "deep" / "x.csv"
    assert results.main(["s", "--out", str(out), "--results", str(tmp_path)]) == 0
    assert "'=HYPERLINK(1)" in out.read_text()
    assert results.load(tmp_path, "s")["cause"].tolist() == ["", why.cause]
    console = Console(width=200, record=True, file=io.StringIO(), force_terminal=False)
    console.print(cells_table(sweep.look(), "[/x]"))
    shown = console.export_text()
    assert "sweep [/x]" in shown
    assert "[/red] \\x1b[2J" in shown


def test_escapes() -> None:
    assert markdown("a_b c") == "a_b c"
    assert latex("a_b\\") == r"a\_b\textbackslash{}"
    assert plain("[bold]x[/]").plain == "[bold]x[/]"
