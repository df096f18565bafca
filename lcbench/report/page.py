"""The report of a sweep: an HTML page that needs nothing else, tables as Markdown, CSV and LaTeX, figures as files if asked for.

The page is a template, a style sheet and scripts (``assets/``), d3 and Observable Plot (``vendor/``), and one JSON block of cells
(``page_data``). What answers the first question is written here, so that it stands without scripts too; they draw the rest, and
this again under a filter.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lcbench.grid.axes import CELL_AXES, OF_WORKLOAD, value_of
from lcbench.problem import format_tokens
from lcbench.redact import redacted
from lcbench.report import amounts, page_data, published
from lcbench.report.bars import BY_DISTANCE
from lcbench.report.batches import answers as batch_answers
from lcbench.report.batches import batch_rows, gains
from lcbench.report.batches import table as batch_table
from lcbench.report.batches_figures import page_figures
from lcbench.report.causes import causes, suspects
from lcbench.report.environment import Environment, environment_of, links_of
from lcbench.report.figures import all_figures
from lcbench.report.foretold import Held, held, said
from lcbench.report.foretold import rows_of as held_rows
from lcbench.report.frame import PHASES, column_of, good_rows, rate_column, reported
from lcbench.report.linear import answers as linear_answers
from lcbench.report.linear import linear_rows
from lcbench.report.linear import table as linear_table
from lcbench.report.linear_figures import figures_of as linear_figures
from lcbench.report.palette import Style, styles
from lcbench.report.panel import in_page
from lcbench.report.parts import shown as drawn_from
from lcbench.report.regret import FEWEST_CHOICES, FEWEST_PROBLEMS, NEARLY_ALL, Regret, contests, problem_labels, regrets, verdict
from lcbench.report.serving import answers, pays, served_rows
from lcbench.report.serving import table as serving_table
from lcbench.report.serving_figures import page_panels
from lcbench.report.sparse import answers as sparse_answers
from lcbench.report.sparse import sparse_rows
from lcbench.report.sparse import table as sparse_table
from lcbench.report.sparse_figures import figures_of as sparse_figures
from lcbench.report.step import MEMORY, SCALED, Step, colors_of, reached, steps_of
from lcbench.report.step import table as step_table
from lcbench.report.table import why_not
from lcbench.report.tables import rate_tables, rows_table
from lcbench.report.trace import HOW, rows_of, served
from lcbench.report.winners import CLOSE, UNMEASURED, Winner, winners
from lcbench.report.winners import rows_of as winner_rows
from lcbench.runs.attempt import Status
from lcbench.runs.store import Sweep

if TYPE_CHECKING:
    import pandas as pd

STATUSES = get_args(Status)
SECTIONS = (
    ("fastest", "Fastest"), ("step", "Training step"), ("longest", "Longest length"), ("serving", "Serving"), ("trace", "Trace"),
    ("mixed", "Mixed lengths"), ("sparse", "Sparse attention"), ("linear", "Linear attention"),
    ("figures", "Figures"), ("foretold", "Predicted and measured"), ("failures", "What did not run"), ("cells", "Cells"),
    ("environment", "Where it ran"),
)  # fmt: skip
PAGE = "report.html"
HERE = Path(__file__).parent
LIBRARIES = ("d3.min.js", "plot.umd.min.js")
SCRIPTS = ("basics.js", "view.js", "tables.js", "plots.js")  # of every page
REPORT = (
    "answers.js", "detail.js", "cells.js", "figures-lines.js", "figures-cells.js", "figures-front.js", "figures.js", "step.js",
    "standing.js", "report.js",
)  # fmt: skip
# Of one sweep these should be one; a page says so where they are not.
ONE = ("lcbench", "device", "torch", "driver", "nccl", "cuda")
VERSIONS = ("torch", "nccl", "driver", "cuda")


@dataclass(frozen=True)
class Report:
    """What was written: ``page``, and ``files``, the page among them."""

    page: Path
    files: list[Path]
    cells: int
    tables: int
    figures: int


def write_report(
    sweep: Sweep, folder: Path, devices: Sequence[dict[str, Any]], *, figures: bool = False, predicted: bool = False
) -> Report:
    """Write the report of a sweep into a folder.

    Args:
        devices: the ``conf/device`` entries, for rooflines.
        figures: also as PNG and PDF, which takes longer than all the rest.
        predicted: of its predictions, which are marked as such, whatever was measured; else of what was measured, with predictions
            of other cells beside it, which win nothing.
    """
    seen = sweep.look()
    frame = reported(sweep, seen, predicted=predicted)
    good = good_rows(frame)
    known = [r.prediction if predicted else r.known for r in seen.records.values()]
    attempts = [attempt for attempt in known if attempt is not None and attempt.status in ("ok", "predicted")]
    compared = held(seen.records.values())
    fastest, choices = winners(good), {workload: regrets(rows) for workload, rows in contests(good).items()}
    steps = steps_of(frame) if len(frame) else {}
    searched = page_data.searched_of(seen, predicted=predicted)
    lengths = _lengths(searched, frame)
    traces = rows_of(served(sweep, seen, frame, predicted=predicted))
    batches, mixed, sparse, linear = served_rows(frame, devices), batch_rows(frame), sparse_rows(frame), linear_rows(frame)
    folder.mkdir(parents=True, exist_ok=True)
    tables, ran = folder / "tables", bool(len(good))
    files = _write_tables(
        sweep, frame, fastest, choices, compared, lengths, traces, batches, mixed, sparse, linear, tables, ran=ran
    )
    links = links_of(attempts)
    drawn = [path for figure in all_figures(frame, devices, links) for path in figure.save(folder / "figures")] if figures else []
    data = _block(sweep, frame, good, devices, links, predicted=predicted) | {"details": page_data.details_of(seen.records)}
    data |= _steps(steps, list(choices)) | {"searched": searched}
    standing = {"serving": batches, "mixed": mixed, "sparse": sparse, "linear": linear}
    found: dict[str, Any] = {"foretold": compared, "step": steps, "longest": lengths, "trace": traces, **standing}
    there = {section: len(its) > 0 for section, its in found.items()}
    environment = environment_of(attempts)
    page = folder / PAGE
    page.write_text(
        render(
            "report.html",
            REPORT,
            data,
            title=f"{sweep.name}: predictions" if predicted else sweep.name,
            sections=[section for section in SECTIONS if there.get(section[0], True)],
            steps=there["step"],
            lengths=there["longest"],
            **_standing(frame, standing, devices),
            traces=traces,
            about_traces=[*(f"{trace}. Its batches: {trace.batches}" for trace in seen.traces), HOW],
            predicted=predicted,
            foretold=_foretold(sweep, frame, predicted=predicted),
            compared=[said([h for h in compared if h.phase == p]) for p in PHASES if any(h.phase == p for h in compared)],
            rows=held_rows(compared),
            **_first_screen(frame, good, environment, fastest, choices),
            **_rest(sweep, frame, environment),
            published=published.LABEL if data["published"]["rows"] else None,
        ),
        encoding="utf-8",
    )
    return Report(page, [page, *files, *drawn], len(frame), len(files) // 3, len(drawn) // 2)


def render(template: str, scripts: Sequence[str], data: dict[str, Any], **context: Any) -> str:
    """A page of ``assets/`` that needs no other file.

    Args:
        scripts: files of ``assets/``, after those of every page.
        data: what the scripts find as ``BLOCK``.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE / "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    libraries = [(HERE / "vendor" / name).read_text(encoding="utf-8") for name in LIBRARIES]
    ours = [(HERE / "assets" / name).read_text(encoding="utf-8") for name in (*SCRIPTS, *scripts)]
    css = (HERE / "assets" / "page.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(
        css=css, data=page_data.script_json(data), scripts=[*libraries, *ours], **context
    )


def drawn_style(style: Style) -> dict[str, Any]:
    """A style for a page: black is the text's color, which is white on black."""
    color = "currentColor" if style.color == "#000000" else style.color
    return {"color": color, "symbol": style.marker, "dash": style.strokes or None, "hollow": style.hollow}


def _foretold(sweep: Sweep, frame: pd.DataFrame, *, predicted: bool) -> str:
    """What is predicted and not measured on a page, and how far off it may be; empty where nothing is."""
    rows = frame[frame["status"] == "predicted"] if len(frame) else frame
    if not len(rows):
        return ""
    factors = sorted({amounts.times(1 + band) for band in (rows["band"].min(), rows["band"].max())})
    off = f"times within a factor of {' to '.join(f.removesuffix('x') for f in factors)} (95 %)"
    if predicted:
        return f"Every number on this page is a prediction, and none was measured: {off}."
    return (
        f"{len(rows)} cells were not measured but predicted ({off}). They are marked as predicted, are dotted and hollow in "
        f"figures, and win nothing. A report of the predictions: {sweep.command('report', '--predicted')}"
    )


def _write_tables(
    sweep: Sweep, frame: pd.DataFrame, fastest: list[Winner], choices: dict[str, list[Regret]], compared: list[Held],
    lengths: list[dict[str, str]], traces: list[dict[str, str]], batches: pd.DataFrame, mixed: pd.DataFrame,
    sparse: pd.DataFrame, linear: pd.DataFrame, folder: Path, *, ran: bool,
) -> list[Path]:  # fmt: skip
    several = len(choices) > 1
    ranked = [({"workload": name} if several else {}) | r.row() for name, found in choices.items() for r in found]
    tables = [
        rows_table("winners", "Fastest choice of every problem", winner_rows(fastest)),
        rows_table("regret", "If it has to be one choice for everything", ranked),
        rows_table("steps", "Training steps", step_table(frame)),
        rows_table("longest", "The longest length of every choice", lengths),
        rows_table("serving", "Passes of a server", serving_table(batches)),
        rows_table("prefill", "From which length on context parallelism pays", [p.row() for p in pays(batches)]),
        rows_table("batches", "Batches of documents", batch_table(mixed)),
        rows_table("gains", "How much sooner batches are done than with one degree", [g.row() for g in gains(mixed)]),
        rows_table("sparse", "Attention that chooses its mask", sparse_table(sparse)),
        rows_table("linear", "Linear attention", linear_table(linear)),
        rows_table("trace", "The time of a trace with every choice", traces),
        *(rate_tables(frame) if ran else ()),
        rows_table("failures", "What did not run, and why", _failures(frame, sweep)),
        rows_table("cells", "All cells", _cells(frame)),
        rows_table("predicted-measured", "Predictions held against what was measured", held_rows(compared)),
    ]
    return [path for table in tables if len(table.rows) for path in table.write(folder)]


def _block(
    sweep: Sweep, frame: pd.DataFrame, good: pd.DataFrame, devices: Sequence[dict[str, Any]], links: dict[str, float], *,
    predicted: bool,
) -> dict[str, Any]:  # fmt: skip
    drawn = frame[frame["good"] | (frame["status"] == "predicted")] if len(frame) else frame
    unit = _rate_unit(good if len(good) else drawn)
    cells = page_data.cells_of(frame, unit)
    cells["place"] = list(problem_labels(frame)) if len(frame) else []
    phases = [p for p in ("total", "forward", "backward") if rate_column(p) in drawn and drawn[rate_column(p)].notna().any()]
    return {
        "name": sweep.name, "cells": page_data.packed(cells, page_data.REPEATED), "repeated": sorted(page_data.REPEATED),
        "rate": {"name": unit.name, "flops": unit.size * 1e12},
        "part": page_data.PART, "byDistance": BY_DISTANCE, "nearlyAll": NEARLY_ALL, "fewestProblems": FEWEST_PROBLEMS,
        "fewestChoices": FEWEST_CHOICES, "close": CLOSE, "unmeasured": UNMEASURED,
        "good": "predicted" if predicted else "ok", "styles": _styles(frame), "phases": phases,
        "settings": bool(len(frame) and frame["where"].nunique() > 1),
        "matrixBy": _matrix_by(good), "known": bool(len(good)) and all(t.known for t in good["timed/total"]),
        "published": {"label": published.LABEL, "share": published.TOKENS_PER_GPU, "rows": page_data.published_for(good)},
        "ofWorkload": OF_WORKLOAD,
        "devices": page_data.devices_of(frame, devices), "links": {k: page_data.short(v) for k, v in links.items()},
        "commands": page_data.commands_of(sweep),
    }  # fmt: skip


def _lengths(searched: dict[str, Any] | None, frame: pd.DataFrame) -> list[dict[str, str]]:
    """The longest length of every choice as text: a search's answers, else what training steps reached."""
    if searched is None:
        return [found.row() for found in reached(frame)] if len(frame) else []
    known = {str(row["cell"]): row for row in frame.to_dict("records")}
    found = []
    for row in searched["rows"]:
        cell = known[row["cells"][0]]
        found.append({
            "mask": cell["what_mask"], "scale": cell["scale"], "setting": cell["where"], "choice": cell["choice"],
            "longest that fits": format_tokens(row["tokens"]) if row["tokens"] else "none", "needs": amounts.size(row["needs"]),
            "does not fit": format_tokens(row["beyond"]) if row["beyond"] else "", "why": row["why"], "search": row["end"],
        })  # fmt: skip
    return found


def _steps(steps: dict[str, Step], workloads: list[str]) -> dict[str, Any]:
    """What a page draws of training steps, and of which workloads it has a verdict, in their order."""
    colors = colors_of(phase for step in steps.values() for phase in step.phases)
    return {
        "steps": page_data.steps_data(steps), "stepPhases": list(colors.items()), "stepMemory": list(MEMORY.items()),
        "scaled": SCALED, "workloads": workloads,
    }  # fmt: skip


def _standing(frame: pd.DataFrame, rows: dict[str, pd.DataFrame], devices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sections that stand without scripts, from the rows of each; None of those that have none."""
    made = {"serving": _serving, "mixed": _mixed, "sparse": _sparse, "linear": _linear}
    return {name: make(frame, rows[name], devices) if len(rows[name]) else None for name, make in made.items()}


def _serving(frame: pd.DataFrame, batches: pd.DataFrame, devices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The section of batches of requests, all of which stands in the page without scripts."""
    return {
        "answers": answers(batches), "panels": list(page_panels(drawn_from(frame, devices))),
        "pays": [{"cells": p.cells, "row": p.row()} for p in pays(batches)],
        "rows": _telling(serving_table(batches), ("mask", "setting")),
    }  # fmt: skip


def _mixed(frame: pd.DataFrame, mixed: pd.DataFrame, devices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The section of batches of documents, all of which stands in the page without scripts."""
    return {
        "answers": batch_answers(mixed), "panels": list(page_figures(drawn_from(frame, devices))),
        "gains": [{"cells": g.cells, "row": g.row()} for g in gains(mixed)],
        "rows": _telling(batch_table(mixed), ("documents", "length", "scale", "setting")),
    }  # fmt: skip


def _sparse(frame: pd.DataFrame, sparse: pd.DataFrame, devices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The section of attention that chooses its mask, all of which stands in the page without scripts."""
    return {
        "answers": sparse_answers(sparse), "panels": list(in_page(sparse_figures(drawn_from(frame, devices)))),
        "rows": _telling(sparse_table(sparse), ("mask", "length", "scale", "setting")),
    }  # fmt: skip


def _linear(frame: pd.DataFrame, linear: pd.DataFrame, devices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The section of linear attention, all of which stands in the page without scripts."""
    return {
        "answers": linear_answers(linear), "panels": list(in_page(linear_figures(drawn_from(frame, devices)))),
        "rows": _telling(linear_table(linear), ("length", "scale", "setting")),
    }  # fmt: skip


def _telling(rows: list[dict[str, str]], problem: Sequence[str]) -> list[dict[str, str]]:
    """Rows for the page: what is empty in all of them, and what of the problem is the same in all, is no column."""
    told = {name: {row[name] for row in rows} for name in (rows[0] if rows else ())}
    kept = [name for name, values in told.items() if values != {""} and (len(values) > 1 or name not in problem)]
    return [{name: row[name] for name in kept} for row in rows]


def _styles(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    return {choice: drawn_style(style) for choice, style in styles(frame).items()}


def _rate_unit(good: pd.DataFrame) -> amounts.Unit:
    """One unit for all rates of a page: that of the highest."""
    return amounts.unit_for(good[rate_column("total")].max() if len(good) else 1.0, amounts.TFLOPS)


def _matrix_by(good: pd.DataFrame) -> str:
    """What the columns of the matrix are: lengths, or tokens per GPU (``share``) where these are fewer, as in weak scaling."""
    return "share" if len(good) and good["tokens_per_rank"].nunique() < good["seqlen"].nunique() else "seqlen"


def _first_screen(
    frame: pd.DataFrame, good: pd.DataFrame, environment: Environment, fastest: list[Winner], choices: dict[str, list[Regret]]
) -> dict[str, Any]:
    drawn, unit = _styles(frame), _rate_unit(good)
    counts = frame["status"].value_counts().to_dict() if len(frame) else {}
    return {
        "about": _about(frame, environment),
        "counts": {status: counts.get(status, 0) for status in STATUSES}
        | {"missing": sum(n for status, n in counts.items() if status not in STATUSES)},
        "contests": [
            {
                # An id says the workload where there are several.
                "workload": name if len(choices) > 1 else "", "id": f"-{name}" if place else "",
                "verdict": _bold(verdict(found), found) or _alone([w for w in fastest if w.workload == name]),
                "regrets": _regret_rows(found, drawn),
            }
            for place, (name, found) in enumerate(choices.items())
        ],
        "matrix": _matrix(good, fastest, drawn, unit),
        "rate": unit.name,
        "ran": bool(len(good)),
        "known": all(w.known for w in fastest if w.margin is not None),
        "seeds": bool(len(frame)) and frame["seed"].nunique() > 1,
    }  # fmt: skip


def _regret_rows(choices: list[Regret], drawn: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    widest = max((r.mean for r in choices), default=1.0) - 1.0
    return [
        {
            "named": r.named, "mean": amounts.times(r.mean), "worst": amounts.times(r.worst), "where": r.where, "ran": r.ran,
            "worst_cell": r.worst_cell, "fastest": r.fastest, "compared": r.compared, "problems": r.problems,
            "bar": round(max(2.0, 100 * (r.mean - 1) / widest)) if widest > 0 else 2, "color": drawn[r.choice]["color"],
        }
        for r in choices
    ]  # fmt: skip


def _bold(text: str | None, choices: list[Regret]) -> list[tuple[bool, str]]:
    """The verdict in parts, and whether each is bold: what to use, and what is fastest most often."""
    if text is None:
        return []
    names = "|".join(re.escape(r.choice) for r in choices)
    parts = re.split(rf"(^Use (?:{names})\.|(?<= )(?:{names})(?= is fastest))", text)
    return [(place % 2 == 1, part) for place, part in enumerate(parts) if part]


def _alone(fastest: list[Winner]) -> list[tuple[bool, str]]:
    """The answer where there are too few problems for a verdict: that of the first problem with several choices."""
    found = next((w for w in fastest if w.margin is not None), None)
    if found is None or found.margin is None:
        return []
    where = f"{found.mask} {format_tokens(found.seqlen)} {found.scale}"
    rest = "" if len(fastest) == 1 else f", one of {len(fastest)} problems"
    unsure = f" The order of the two is not known: {found.why}." if found.verdict == "close" else ""
    said = f" is fastest for {where}{rest}: {amounts.duration(found.seconds)}. Next: {found.next_choice}, {found.slower}.{unsure}"
    said += f" No rival: {found.approximate}." if found.approximate else ""
    return [(True, found.choice), (False, said)]


def _matrix(good: pd.DataFrame, fastest: list[Winner], drawn: dict[str, dict[str, Any]], unit: amounts.Unit) -> dict[str, Any]:
    """Rows mask x scale (x setting), columns of ``_matrix_by``."""
    by = _matrix_by(good)
    ranks = dict(zip(good["scale"], good["world_size"], strict=True)) if len(good) else {}
    column_of = {id(w): w.seqlen // int(ranks[w.scale]) if by == "share" else w.seqlen for w in fastest}
    columns = sorted(set(column_of.values()))
    rows: dict[tuple[str, str, str], dict[int, Winner]] = {}
    for w in fastest:
        rows.setdefault((w.mask, w.scale, w.setting), {})[column_of[id(w)]] = w
    masks = list(dict.fromkeys(w.mask for w in fastest))
    ordered = sorted(rows, key=lambda key: (masks.index(key[0]), ranks[key[1]]))
    return {
        "columns": [f"{format_tokens(c)} per GPU" if by == "share" else format_tokens(c) for c in columns],
        "settings": len({setting for *_, setting in rows}) > 1,
        "rows": [
            {
                "mask": mask, "mask_at": masks.index(mask), "scale": scale, "setting": setting,
                "winners": [_shown(rows[mask, scale, setting].get(c), unit, drawn) for c in columns],
            }
            for mask, scale, setting in ordered
        ],
    }  # fmt: skip


def _shown(w: Winner | None, unit: amounts.Unit, drawn: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    if w is None:
        return None
    next_is = f"; next: {w.next_choice}, {w.slower}" if w.margin is not None else ""
    beside = f"; no rival: {w.approximate}" if w.approximate else ""
    return {
        "choice": w.choice, "cell": w.cell, "close": w.verdict == "close", "rate": unit.of(w.tflops_per_gpu, named=False),
        "margin": amounts.more(w.margin.value) if w.margin is not None else "", "color": drawn[w.choice]["color"],
        "title": f"{amounts.duration(w.seconds)}{next_is}; {w.verdict}{f': {w.why}' if w.why else ''}{beside}",
    }  # fmt: skip


def _rest(sweep: Sweep, frame: pd.DataFrame, environment: Environment) -> dict[str, Any]:
    manifest = sweep.manifest()
    labels = dict(zip(frame["cell"], frame["label"], strict=True)) if len(frame) else {}
    return {
        "span": _span(frame, manifest["created_at"]),
        "warnings": _warnings(environment),
        "causes": [
            {
                "count": len(c.cells), "status": c.status, "kind": c.kind, "cause": c.cause, "help": c.help, "command": c.command,
                "cells": [(cell, labels[cell]) for cell in c.cells],
            }
            for c in causes(frame, sweep)
        ],
        "nodes": suspects(frame, sweep),
        "environment": [(name, ", ".join(sorted(values))) for name, values in environment.items()],
        "commands": [redacted(shlex.join(command)) for command in manifest["commands"]],
    }  # fmt: skip


def _about(frame: pd.DataFrame, environment: Environment) -> list[str]:
    """What all cells share, for the first line: how many, on what, and what is the same in all."""
    if not len(frame):
        return ["0 cells"]
    ranks, devices = sorted(set(frame["world_size"])), sorted(environment.get("device", ()))
    devices += [f"{machine} (predicted)" for machine in sorted(environment.get("machine", ()))]
    on = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    first = [f"{len(frame)} cells on {on} x {' or '.join(devices) or 'devices of which nothing is known yet'}"]
    for column, shown in (("what_kernel", "{}"), ("what_mask", "{}"), ("dtype", "{}"), ("heads", "heads {}")):
        values = set(frame[column])
        first += [shown.format(*values)] if len(values) == 1 else []
    for axis in (name for name, axis in CELL_AXES.items() if axis.unsaid is not None):
        values = set(frame[column_of(axis)])
        said = len(values) == 1 and values != {value_of({}, axis)}
        first += [f"{axis} {values.pop()}"] if said else []
    versions = [f"{name} {' or '.join(sorted(environment[name]))}" for name in VERSIONS if environment.get(name)]
    commit = [f"lcbench {' or '.join(sorted(environment['lcbench']))}"] if environment.get("lcbench") else []
    return [", ".join(first), *([", ".join(versions)] if versions else []), *commit]


def _span(frame: pd.DataFrame, created_at: float) -> str:
    times = list(frame["finished_at"].dropna()) if len(frame) else []
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(created_at))
    return f"{begun} to {time.strftime('%Y-%m-%d %H:%M', time.localtime(max(times)))}" if len(times) else f"begun {begun}"


def _warnings(environment: Environment) -> list[str]:
    return [
        f"{name} differs between cells ({', '.join(sorted(environment[name]))}): compare them with care."
        for name in ONE
        if len(environment.get(name, ())) > 1
    ]


def _band(band: Any) -> str:
    return f"within {amounts.times(1 + band)}" if band is not None and band == band else ""


def _failures(frame: pd.DataFrame, sweep: Sweep) -> list[dict[str, str]]:
    """Cells without a good result by cause, the most frequent first."""
    return [
        {
            "cells": str(len(c.cells)), "status": c.status, "class": c.kind, "first cause": c.cause, "what helps": c.help,
            "command": c.command, "which": ", ".join(c.cells),
        }
        for c in causes(frame, sweep)
    ]  # fmt: skip


def _cells(frame: pd.DataFrame) -> list[dict[str, str]]:
    """Every cell for the long table; empty where there is no number."""
    shown: list[tuple[str, str, Callable[[Any], str]]] = [
        ("forward", "time/forward/median_s", amounts.duration), ("backward", "time/backward/median_s", amounts.duration),
        ("total", "time/total/median_s", amounts.duration), ("noise", "time/noise", amounts.percent),
        ("TFLOP/s per GPU", "compute/tflops_per_gpu", amounts.digits), ("by mean over ranks", "total_by_mean", amounts.digits),
        ("MFU", "compute/mfu", amounts.percent), ("peak memory", "memory/peak_bytes", amounts.size),
        ("sent", "comm/bytes", amounts.size), ("95 % band of a prediction", "band", _band),
    ]  # fmt: skip
    return [
        {
            "cell": row["cell"], "status": row["status"], "choice": row["choice"], "mask": row["what_mask"],
            "length": format_tokens(int(row["seqlen"])), "scale": row["scale"], "setting": row["where"],
            **{name: form(row.get(column)) for name, column, form in shown},
            "attempt": str(row["attempt"]), "why not": why_not(row),
        }
        for row in frame.to_dict("records")
    ]  # fmt: skip
