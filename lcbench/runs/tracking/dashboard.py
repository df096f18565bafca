"""What the stock MLflow page of our experiment shows as it opens: a description, and named views with their charts and columns.

A view is an experiment tag ``mlflow.sharedViewState.<key>``, which the page's own "save and share view" writes: JSON with a name,
and in it the page's state, compressed. It is the page's private format (of MLflow 3.17), so it is made here only, and a test looks
at it in a browser.

The page loads ``PAGE`` runs and hides the rest behind a button, so that a view with more of them shows a choice that nobody made.
Cells are therefore cut into views that the page shows whole: by mask, and where a mask has too many, by scale, length, and so on.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcbench.grid.axes import OF_WORKLOAD, value_of
from lcbench.problem import format_tokens
from lcbench.runs.manifest import Entry, entries_of
from lcbench.runs.tracking.shown import BAND, PREDICTIONS_OF

VIEW = "mlflow.sharedViewState."
SWEEPS = "lcbench"
PAGE = 100  # runs that MLflow's page loads at once
# What is never in one view of a part; and what else cells are told apart by where there are too many for one view, in this order,
# then by their place in the plan.
APART = ("workload", "mask", "mask.lengths")
CUTS = (*APART, "workload.model", *OF_WORKLOAD, "scale", "seqlen", "kernel", "heads", "dtype")
PLACE = "lcbench.place"
CHARTS, TABLE = "CHART", "TABLE"
LINES = ("cp", "kernel", *OF_WORKLOAD, "length", "scale")  # axes of the parallel coordinates, where they differ
NARROW, MEDIUM, WIDE = 90, 150, 420  # px of a column
CELL_COLUMNS = {
    "params.`cp`": NARROW, "params.`kernel`": NARROW, "params.`mask`": MEDIUM, "params.`length`": NARROW, "params.`scale`": NARROW,
    "metrics.`tflops`": NARROW, "metrics.`mfu_percent`": MEDIUM, "metrics.`total_ms`": NARROW, "metrics.`fwd_ms`": NARROW,
    "metrics.`bwd_ms`": NARROW, "metrics.`peak_gib`": NARROW, "metrics.`noise_percent`": MEDIUM, "tags.`lcbench.status`": MEDIUM,
    "tags.`lcbench.failure`": MEDIUM, "tags.`lcbench.cause`": WIDE,
}  # fmt: skip
# Of training steps, behind what a cell is.
STEP_COLUMNS = {
    "params.`workload.model`": MEDIUM, "params.`workload.layers`": NARROW, "params.`recompute`": NARROW,
    "metrics.`tokens_per_s`": MEDIUM, "metrics.`hfu_percent`": MEDIUM, "metrics.`attention_percent`": MEDIUM,
    "metrics.`model_step_ms_scaled`": MEDIUM,
}  # fmt: skip
# Of batches of documents, whose makespan is ``total_ms``.
BATCH_COLUMNS = {
    "params.`planner`": MEDIUM, "metrics.`batch_tokens_per_s`": MEDIUM, "metrics.`padding_percent`": MEDIUM,
    "metrics.`idle_percent`": MEDIUM, "metrics.`planning_ms`": MEDIUM,
}  # fmt: skip
# Of attention that chooses its mask.
SPARSE_COLUMNS = {
    "params.`selector`": MEDIUM, "metrics.`recall_percent`": MEDIUM, "metrics.`density_percent`": MEDIUM,
    "metrics.`select_ms`": NARROW, "metrics.`replan_ms`": NARROW, "metrics.`mean_step_ms`": MEDIUM,
}  # fmt: skip
CALL_BARS = ("tflops", "mfu_percent", "fwd_ms", "bwd_ms", "peak_gib", "overlap/forward/exposed_ms")
STEP_SCATTERS = (("length", "tokens_per_s"), ("recompute", "total_ms"), ("recompute", "peak_gib"))
BATCH_SCATTERS = (("planner", "total_ms"), ("planner", "idle_percent"))
SPARSE_SCATTERS = (("selector", "recall_percent"), ("selector", "total_ms"))
SPARSE_BARS = ("recall_percent", "density_percent", "select_ms", "replan_ms", "mean_step_ms")
BATCH_BARS = ("total_ms", "batch_tokens_per_s", "idle_percent", "padding_percent", "planning_ms")
STEP_BARS = ("total_ms", "tokens_per_s", "mfu_percent", "hfu_percent", "attention_percent", "peak_gib")
FAILURE_COLUMNS = {
    "tags.`lcbench.failure`": MEDIUM, "tags.`lcbench.cause`": WIDE, "tags.`lcbench.nodes`": MEDIUM,
    "tags.`lcbench.slurm_job_id`": MEDIUM, "tags.`lcbench.attempt`": MEDIUM, "tags.`lcbench.cell_id`": MEDIUM,
}  # fmt: skip
PREDICTION_COLUMNS = {
    "params.`cp`": NARROW, "params.`kernel`": NARROW, "params.`mask`": MEDIUM, "params.`length`": NARROW, "params.`scale`": NARROW,
    "metrics.`tflops`": NARROW, "metrics.`total_ms`": NARROW, f"metrics.`{BAND}`": MEDIUM, "metrics.`peak_gib`": NARROW,
    "tags.`lcbench.status`": MEDIUM, "tags.`lcbench.machine`": NARROW, "tags.`lcbench.fit`": MEDIUM, "tags.`lcbench.basis`": WIDE,
}  # fmt: skip
SWEEP_COLUMNS = {
    "metrics.`cells/ok`": NARROW, "metrics.`cells/failed`": NARROW, "metrics.`cells/skipped`": MEDIUM,
    "metrics.`gpu_hours`": NARROW, "tags.`lcbench.device`": MEDIUM, "tags.`lcbench.verdict`": WIDE, "attributes.`User`": NARROW,
}  # fmt: skip
Flat = dict[str, Any]  # a cell's config, as parameters of its run
NOTE = """A sweep has a run of its own, which says what to use, what failed and why, and holds its report. Below it every run is a
cell: a kernel x context-parallel strategy x mask x length x scale, checked against a float64 reference, then timed.

- `compute/`: TFLOP/s per GPU and MFU, by unmasked pairs; `time/`: medians in ms, of the slowest rank; `memory/`: worst rank's peak
- `overlap/`, `comm/`, `balance/`, `mesh/`: what communication costs; `check/`: errors and their bounds; `samples/`: every iteration
- short names for tables: `tflops`, `mfu_percent`, `total_ms`, `fwd_ms`, `bwd_ms`, `peak_gib`, `noise_percent`
- of a training step besides: `step/`, `attention/`, `memory/` by class, `tokens_per_s` (per GPU), `hfu_percent`; `model/` and
  `model_step_ms_scaled` are of the whole model, scaled from the layers that were run, not measured
- of a batch of documents besides: `batch/`, `plan/`, `batch_tokens_per_s` (of all ranks), `idle_percent`, `padding_percent`,
  `planning_ms` (in no other time); `total_ms` is the makespan
- of attention that chooses its mask besides: `select/`, `recall_percent` (of the softmax's mass), `density_percent`, `select_ms`
  and `replan_ms` (both in `total_ms`), `mean_step_ms` (where several steps share a choice)
- tags `lcbench.status`, `lcbench.failure`, `lcbench.cause`: what did not run, and why
- a prediction is a run of its own, grey, with the tag `lcbench.predicted`; no view of a sweep's cells has it
"""


@dataclass(frozen=True)
class View:
    """A view of runs.

    Attributes:
        key: in its address.
        name: in the page's menu of views.
        value: of its tag.
        mode: ``CHARTS`` or ``TABLE``.
        cells: how many runs it shows when all have run.
        short: its name without the sweep's.
    """

    key: str
    name: str
    value: str
    mode: str
    cells: int
    short: str

    def path(self, experiment: str) -> str:
        """Its path behind the ``#`` of the server's address."""
        return view_path(experiment, self.key, self.mode)


def note(experiment: str) -> str:
    """The experiment's description, Markdown."""
    return f"[**All sweeps**](#{view_path(experiment, SWEEPS, TABLE)})\n\n{NOTE}"


def view_path(experiment: str, key: str, mode: str) -> str:
    """Path of a view behind the ``#`` of the server's address."""
    return f"/experiments/{experiment}/runs?viewStateShareKey={key}&compareRunsMode={mode}&workflowType=machine_learning"


def run_path(experiment: str, run: str, artifact: str = "") -> str:
    """Path of a run's page, or of a file of it, behind the ``#`` of the server's address."""
    return f"/experiments/{experiment}/runs/{run}" + (f"/artifacts/{artifact}" if artifact else "")


def place_tag(place: int) -> str:
    """A cell's place in the plan, as a text that sorts as it does, and of which views ask for hundreds."""
    return f"{place:06}"


def sweeps_view() -> View:
    """All sweeps of an experiment, the newest first."""
    state = _state("tags.`lcbench.cells` != ''", SWEEP_COLUMNS, order="attributes.start_time", descending=True)
    return View(SWEEPS, "All sweeps", _tag("All sweeps", _FIRST, state), TABLE, 0, "all sweeps")


def failures_view(sweep: str, sweep_id: str, created_at: float, failed: int) -> View:
    """The failed cells of a sweep, by class. ``failed``: how many there are; the page loads the first ``PAGE`` of them."""
    where = f"{_of(sweep_id)} and tags.`lcbench.status` = 'failed'"
    short = f"{failed} failed" + (f", {PAGE} at a time" if failed > PAGE else "")
    name, state = f"{sweep}: {short}", _state(where, FAILURE_COLUMNS, order="tags.`lcbench.failure`")
    return View(f"{sweep_id}.failed", name, _tag(name, created_at, state), TABLE, failed, short)


def predictions_view(sweep: str, sweep_id: str, created_at: float, predicted: int) -> View:
    """The predictions of a sweep, which no other view of it has. ``predicted``: how many there are."""
    short = f"{predicted} predicted, not measured" + (f", {PAGE} at a time" if predicted > PAGE else "")
    state = _state(f"tags.`{PREDICTIONS_OF}` = '{sweep_id}'", PREDICTION_COLUMNS, order="metrics.`total_ms`")
    name = f"{sweep}: {short}"
    return View(f"{sweep_id}.predicted", name, _tag(name, created_at, state), TABLE, predicted, short)


def cell_views(sweep: str, sweep_id: str, created_at: float, entries: Mapping[str, Entry]) -> list[View]:
    """Views that the page shows whole, of all cells of a sweep that can run: of all together if they are few enough, and of every
    mask, or of parts of it.
    """
    flat = [{**e.cell.flat, PLACE: place // PAGE} for place, e in enumerate(entries.values()) if not e.skip]
    whole: list[tuple[Flat, list[Flat]]] = [] if len(flat) > PAGE else [({}, flat)]
    masks = [key for key in APART if _differs(key, flat)]
    parts = [part for group in _cut(flat, masks, {}) for part in _small_enough(*group)] if masks or not whole else []
    skipped = len(entries) - len(flat)
    made: list[View] = []
    for number, (values, cells) in enumerate([*whole, *parts]):
        words = " ".join(_word(key, value) for key, value in values.items()) or "all"
        short = f"{words}, {len(cells)} cell{'s' * (len(cells) != 1)}"
        if not values and skipped:
            short += f" ({skipped} more cannot run)"
        name = f"{sweep}: {short}"
        key = ".".join([sweep_id, *([re.sub(r"[^\w.-]+", "-", words)] if values else [])])
        if key in {view.key for view in made}:
            key += f"-{number}"
        where = " and ".join([f"{_of(sweep_id)} and tags.`lcbench.status` != ''", *(_is(k, v) for k, v in values.items())])
        # Menus list the newest first.
        made.append(View(key, name, _tag(name, created_at - number - 1, _charts(name, where, cells)), CHARTS, len(cells), short))
    return made


def views_of(sweep: str, manifest: dict[str, Any]) -> list[View]:
    """``cell_views`` of a sweep by its manifest."""
    return cell_views(sweep, manifest["id"], manifest["created_at"], entries_of(manifest))


def _cut(cells: list[Flat], keys: Sequence[str], values: Flat) -> list[tuple[Flat, list[Flat]]]:
    """Cells in groups that have the same under these keys; (what they have, cells)."""
    groups: dict[str, tuple[Flat, list[Flat]]] = {}
    for cell in cells:
        mine = {**values, **{key: cell[key] for key in keys if cell.get(key) is not None}}
        groups.setdefault(json.dumps(mine), (mine, []))[1].append(cell)
    return list(groups.values())


def _small_enough(values: Flat, cells: list[Flat]) -> list[tuple[Flat, list[Flat]]]:
    """A group in parts of at most ``PAGE`` cells."""
    if len(cells) <= PAGE:
        return [(values, cells)]
    first = next((key for key in CUTS if _differs(key, cells)), PLACE)
    return [part for group in _cut(cells, [first], values) for part in _small_enough(*group)]


def _differs(key: str, cells: list[Flat]) -> bool:
    return len({json.dumps(cell.get(key)) for cell in cells}) > 1


def _word(key: str, value: Any) -> str:
    """A value in the name of a view."""
    if key == PLACE:
        return f"from {PAGE * value}"
    return format_tokens(int(value)) if key == "seqlen" else str(value)


def _of(sweep_id: str) -> str:
    return f"tags.`lcbench.sweep_id` = '{sweep_id}'"


def _is(key: str, value: Any) -> str:
    if key == PLACE:
        return f"tags.`{PLACE}` LIKE '{value:04}%'"
    quote = '"' if "'" in str(value) else "'"
    return f"params.`{key}` = {quote}{value}{quote}"


def _charts(name: str, where: str, cells: list[Flat]) -> dict[str, Any]:
    """The state of a view of charts, runs grouped by strategy, in the colours of their choices (``mlflow.runColor``)."""
    steps = any("workload.model" in cell for cell in cells)
    mixed = any("workload.capacity" in cell for cell in cells)
    none = value_of({}, "selector")
    sparse = any(cell.get("selector", none) != none for cell in cells)
    columns = (STEP_COLUMNS if steps else {}) | (BATCH_COLUMNS if mixed else {}) | (SPARSE_COLUMNS if sparse else {})
    calls = STEP_BARS if steps else () if mixed else CALL_BARS
    bars = tuple(dict.fromkeys((*calls, *(BATCH_BARS if mixed else ()), *(SPARSE_BARS if sparse else ()))))
    scatters = (*(STEP_SCATTERS if steps else ()), *(BATCH_SCATTERS if mixed else ()), *(SPARSE_SCATTERS if sparse else ()))
    lines = [axis for axis in LINES if _differs({"length": "seqlen"}.get(axis, axis), cells)] or ["cp"]
    charts = [
        _scatter("length", "tflops"),
        _scatter("scale", "tflops"),
        _scatter("length", "peak_gib"),
        *(_scatter(x, y) for x, y in scatters),
        {"type": "PARALLEL", "metricSectionId": "overview", "selectedParams": lines, "selectedMetrics": ["tflops"],
         "showAllRuns": False},
        *(
            {"type": "BAR", "metricSectionId": "cells", "metricKey": key}
            for key in bars
        ),
    ]  # fmt: skip
    colored = ["cp", *(axis for axis in OF_WORKLOAD if _differs(axis, cells))]
    return {
        # The page lays out categories by where they come first, from the last run: so lengths and scales are in the plan's order.
        **_state(where, _columns(columns), order=f"tags.`{PLACE}`", descending=True),
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": key} for key in colored]},
        "useGroupedValuesInCharts": False,
        "compareRunSections": [
            {"uuid": uuid, "name": words, "display": True, "isReordered": True}
            for uuid, words in (("overview", f"Which choice: {name}"), ("cells", "Cell by cell"))
        ],
        "compareRunCharts": [
            {"uuid": f"chart-{number}", "isGenerated": False, "deleted": False, "runsCountToCompare": PAGE, **chart}
            for number, chart in enumerate(charts)
        ],
    }  # fmt: skip


def _columns(more: Mapping[str, int]) -> dict[str, int]:
    """The columns of cells with more of them behind what a cell is."""
    columns = list(CELL_COLUMNS.items())
    first = next(place for place, (name, _) in enumerate(columns) if name.startswith("metrics."))
    return dict([*columns[:first], *more.items(), *columns[first:]])


def _scatter(x: str, y: str) -> dict[str, Any]:
    axes = {"xaxis": {"key": x, "type": "PARAM"}, "yaxis": {"key": y, "type": "METRIC"}}
    return {"type": "SCATTER", "metricSectionId": "overview", **axes}


def _state(where: str, columns: Mapping[str, int], *, order: str, descending: bool = False) -> dict[str, Any]:
    """The page's state. ``where``: MLflow's filter of its runs; children show without their parents only under one."""
    return {
        "searchFilter": where, "orderByKey": order, "orderByAsc": not descending, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs", "selectedColumns": list(columns),
        "columnOrder": list(columns), "columnWidths": dict(columns), "runsHiddenMode": "SHOW_ALL", "hideEmptyCharts": True,
        "viewMaximized": True, "runListHidden": False, "isAccordionReordered": True,
    }  # fmt: skip


_FIRST = 4_102_444_800.0  # of 2100: a view that menus list before those of any sweep


def _tag(name: str, created_at: float, state: dict[str, Any]) -> str:
    """The value of a view's tag. ``created_at``: seconds since the epoch, by which the page's menu lists it."""
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": int(created_at * 1000), "state": f"deflate;{packed}"})
