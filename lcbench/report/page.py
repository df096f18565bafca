"""The report of a sweep: an HTML page that needs nothing else, figures as PNG and PDF, tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

import base64
import io
import itertools
import re
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcbench.grid.cell import format_tokens
from lcbench.redact import redacted
from lcbench.report import published
from lcbench.report.environment import environment_of, links_of
from lcbench.report.figures import Drawn, all_figures
from lcbench.report.frame import good_rows, reported
from lcbench.report.table import why_not
from lcbench.report.tables import Table, rate_tables, rows_table
from lcbench.report.winners import winners
from lcbench.runs.store import Sweep

if TYPE_CHECKING:
    import pandas as pd

SECTIONS = (
    ("winners", "Fastest"), ("figures", "Figures"), ("tables", "Tables"), ("failures", "What did not run"), ("cells", "Cells"),
    ("environment", "Where it ran"),
)  # fmt: skip
PAGE = "report.html"
DPI = 150
EXAMPLES = 3
MOST_FIGURES = 40
# Of one sweep these should be one; a page says so where they are not.
ONE = ("lcbench", "device", "torch", "driver", "nccl", "cuda")


@dataclass(frozen=True)
class Report:
    """What was written: ``page``, and ``files``, the page among them."""

    page: Path
    files: list[Path]
    figures: int
    tables: int


def write_report(sweep: Sweep, folder: Path, devices: Sequence[dict[str, Any]]) -> Report:
    """Write the report of a sweep into a folder.

    Args:
        devices: the ``conf/device`` entries, for rooflines.
    """
    seen = sweep.look()
    frame = reported(sweep, seen)
    good = good_rows(frame)
    attempts = [record.last for record in seen.records.values() if record.last is not None and record.last.status == "ok"]
    fastest = winners(good)
    best = rows_table("winners", "Fastest choice of every problem", [w.row() for w in fastest])
    tables = [*rate_tables(frame)] if len(good) else []
    failures = rows_table("failures", "What did not run, and why", _failures(frame))
    cells = rows_table("cells", "All cells", _cells(frame))
    files = [path for table in (best, *tables, failures, cells) if len(table.rows) for path in table.write(folder / "tables")]
    drawn = []
    for figure in itertools.islice(all_figures(good, devices, links_of(attempts)), MOST_FIGURES):
        files += _save(figure, folder / "figures")
        drawn.append({"title": figure.title, "caption": figure.caption, "svg": _svg(figure)})
    environment = environment_of(attempts)
    manifest = sweep.manifest()
    text = _template().render(
        name=sweep.name,
        span=_span(frame, manifest["created_at"]),
        counts=Counter(frame["status"]).most_common() if len(frame) else [],
        warnings=_warnings(environment),
        sections=SECTIONS,
        seeds=len(frame) and frame["seed"].nunique() > 1,
        winners=_html(best),
        known=all(w.known for w in fastest),
        figures=drawn,
        tables=[_html(t) for t in tables],
        failures=_html(failures),
        cells=_html(cells),
        environment=_html(
            rows_table("environment", "Where it ran", [{"what": k, "value": ", ".join(sorted(v))} for k, v in environment.items()])
        ),
        commands=[redacted(shlex.join(command)) for command in manifest["commands"]],
        published=published.LABEL if any(published.LABEL in d["caption"] for d in drawn) else None,
        most=MOST_FIGURES if len(drawn) == MOST_FIGURES else None,
    )
    page = folder / PAGE
    page.write_text(text, encoding="utf-8")
    return Report(page, [page, *files], len(drawn), len(tables))


def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    environment.filters["is_number"] = lambda value: bool(re.fullmatch(r"[-\d.][\d.e+-]*%?", str(value)))
    return environment.get_template("page.html")


def _html(table: Table) -> dict[str, Any]:
    flat = table.flat()
    return {"title": table.title, "columns": list(flat.columns), "rows": [list(map(str, row)) for row in flat.to_numpy()]}


def _save(drawn: Drawn, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{drawn.name}.{form}" for form in ("png", "pdf")]
    for path in paths:
        drawn.figure.savefig(path, dpi=DPI)
    return paths


def _svg(drawn: Drawn) -> str:
    made = io.BytesIO()
    drawn.figure.savefig(made, format="svg", metadata={"Date": None})
    return base64.b64encode(made.getvalue()).decode()


def _span(frame: pd.DataFrame, created_at: float) -> str:
    times = list(frame["finished_at"].dropna()) if len(frame) else []
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(created_at))
    return f"{begun} to {time.strftime('%Y-%m-%d %H:%M', time.localtime(max(times)))}" if len(times) else f"begun {begun}"


def _warnings(environment: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} differs between cells ({', '.join(sorted(environment[name]))}): compare them with care."
        for name in ONE
        if len(environment.get(name, ())) > 1
    ]


def _failures(frame: pd.DataFrame) -> list[dict[str, str]]:
    """Cells without a good result by reason, the most frequent first."""
    if not len(frame):
        return []
    bad = frame[frame["status"] != "ok"].fillna({"failure": "", "cause": ""})
    rows = []
    for (status, failure, cause), cells in bad.groupby(["status", "failure", "cause"], sort=False):
        examples = ", ".join(f"{row['label']} ({row['cell']})" for row in cells.head(EXAMPLES).to_dict("records"))
        more = f" and {len(cells) - EXAMPLES} more" if len(cells) > EXAMPLES else ""
        rows.append({"cells": str(len(cells)), "status": status, "class": failure, "first cause": cause, "which": examples + more})
    return sorted(rows, key=lambda r: -int(r["cells"]))


def _cells(frame: pd.DataFrame) -> list[dict[str, str]]:
    """Every cell for the long table; empty where there is no number."""

    def shown(row: Any, column: str, factor: float = 1.0, form: str = ".4g") -> str:
        value = row.get(column)
        return "" if value is None or value != value else f"{value * factor:{form}}"

    return [
        {
            "cell": row["cell"], "status": row["status"], "choice": row["choice"], "mask": row["what_mask"],
            "length": format_tokens(int(row["seqlen"])), "scale": row["scale"], "setting": row["where"],
            "fwd ms": shown(row, "time/forward/median_s", 1e3), "bwd ms": shown(row, "time/backward/median_s", 1e3),
            "noise %": shown(row, "time/noise", 100, ".1f"), "TFLOP/s per GPU": shown(row, "compute/tflops_per_gpu"),
            "by mean over ranks": shown(row, "total_by_mean"), "MFU %": shown(row, "compute/mfu", 100, ".1f"),
            "peak MiB": shown(row, "memory/peak_bytes", 2**-20, ".1f"), "sent MiB": shown(row, "comm/bytes", 2**-20, ".3g"),
            "attempt": str(row["attempt"]), "why not": why_not(row),
        }
        for row in frame.to_dict("records")
    ]  # fmt: skip
