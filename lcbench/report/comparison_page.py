"""Two sweeps on one page that needs nothing else: each cell of B against the same of A, by axis and one by one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lcbench.grid.labels import labels, words_of
from lcbench.report.amounts import times
from lcbench.report.comparison import Compared, Comparison
from lcbench.report.page import PAGE, drawn_style, render
from lcbench.report.page_data import packed, short
from lcbench.report.palette import style
from lcbench.runs.store import Sweep

SECTIONS = (
    ("axes", "By axis"), ("figures", "Figures"), ("cells", "Cells"), ("only", "Only in one"), ("environment", "Environments"),
)  # fmt: skip
WORDS = {"choice": "cp", "kernel": "kernel", "mask": "mask", "scale": "scale"}  # axes
REPEATED = ("verdict", *WORDS)
NO_CELLS: dict[str, list[Any]] = {"id": [], **{name: [] for name in REPEATED}}


def write_comparison(found: Comparison, a: Sweep, b: Sweep, page: Path, *, noise: list[str]) -> Path:
    """Write the page of a comparison, with links to the reports of both sweeps where these have been written.

    Args:
        noise: sentences on what of the noise the intervals hold.
    """
    columns = _columns(found)
    choices = list(dict.fromkeys(columns["choice"]))
    data = {
        "name": f"{a.name}-{b.name}", "cells": packed(columns, REPEATED), "repeated": list(REPEATED),
        "styles": {choice: drawn_style(style(number)) for number, choice in enumerate(choices)},
        "reports": [_report_of(sweep, page) for sweep in (a, b)],
    }  # fmt: skip
    shares = [
        {"axis": s.axis, "value": s.value, "cells": s.cells, "ratio": times(s.ratio), "faster": s.faster, "slower": s.slower}
        for s in found.by_axis()
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    text = render(
        "comparison.html",
        ("comparison.js",),
        data,
        title=f"{a.name} and {b.name}",
        sections=SECTIONS,
        a=a.name,
        b=b.name,
        phase=found.phase,
        count=len(found.cells),
        shares=shares,
        noise=noise,
        environment=list(found.environment.items()),
        same=found.same,
        only=[(a.name, b.name, list(found.only_a.items())), (b.name, a.name, list(found.only_b.items()))],
        **_verdict(found, a, b),
    )
    page.write_text(text, encoding="utf-8")
    return page


def _columns(found: Comparison) -> dict[str, list[Any]]:
    cells = [c.cell for c in found.cells]
    words = {"label": labels(cells), **{name: words_of(cells, axis) for name, axis in WORDS.items()}}
    rows = [_row(c, found.phase, {name: by_id[c.cell.id] for name, by_id in words.items()}) for c in found.cells]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else NO_CELLS


def _row(c: Compared, phase: str, words: dict[str, str]) -> dict[str, Any]:
    key = f"time/{phase}/median_s"
    return {
        "id": c.a.cell_id, "other": c.b.cell_id, "verdict": c.verdict, **words, "seqlen": c.cell.problem.seqlen,
        "a": short(c.a.metrics[key]), "b": short(c.b.metrics[key]), "ratio": short(c.ratio.value), "low": short(c.ratio.low),
        "high": short(c.ratio.high), "p": short(c.p_adjusted),
    }  # fmt: skip


def _verdict(found: Comparison, a: Sweep, b: Sweep) -> dict[str, str]:
    if not found.cells:
        return {"verdict": "No cell has a good result in both.", "average": ""}
    whole = found.whole
    average = f"On average {b.name} takes {times(whole.ratio)} the time of {a.name}."
    return {"verdict": f"{whole.counts}.", "average": average}


def _report_of(sweep: Sweep, page: Path) -> str | None:
    """The address of a sweep's report from the page's folder; None if it has not been written."""
    report = sweep.folder / "report" / PAGE
    return quote(Path(os.path.relpath(report, page.parent.absolute())).as_posix()) if report.exists() else None
