"""What the stock MLflow page of our experiment shows as it opens: a description, and shared views with their charts.

A view is an experiment tag ``mlflow.sharedViewState.<key>``, which the page's own "share" writes: JSON, compressed. It is the
page's private format (of MLflow 3.17), so it is made here only, and a test looks at it in a browser.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

VIEW = "mlflow.sharedViewState."
EVERYTHING = "lcbench"
RUNS = 100  # at most in a chart
COLUMNS = (
    "params.`cp`", "params.`kernel`", "params.`mask`", "params.`seqlen`", "params.`scale`", "metrics.`compute/tflops_per_gpu`",
    "metrics.`compute/mfu`", "metrics.`time/forward/median_ms`", "metrics.`time/backward/median_ms`", "metrics.`memory/peak_bytes`",
    "metrics.`time/noise`", "tags.`lcbench.status`", "tags.`lcbench.failure`", "tags.`lcbench.cause`",
)  # fmt: skip
NOTE = """Every run is a cell: a kernel x context-parallel strategy x mask x length x scale, checked against a float64
reference, then timed. A sweep's cells are below its own run, which holds its report.

- `compute/`: TFLOP/s per GPU and MFU, by unmasked pairs; `time/`: medians in ms, of the slowest rank; `memory/`: worst rank's peak
- `overlap/`, `comm/`, `balance/`: what communication costs; `check/`: errors and their bounds; `samples/`: every iteration
- tags `lcbench.status`, `lcbench.failure`, `lcbench.cause`: what did not run, and why
"""


def note(experiment: str) -> str:
    """The experiment's description, Markdown."""
    return f"{NOTE}\n[Charts of all good cells](#{view_path(experiment, EVERYTHING)})\n"


def view_path(experiment: str, key: str) -> str:
    """Path of a view behind the ``#`` of the server's address."""
    return f"/experiments/{experiment}/runs?viewStateShareKey={key}&compareRunsMode=CHART&workflowType=machine_learning"


def view(where: str) -> str:
    """The value of a view's tag. ``where``: MLflow's filter of its runs; children show without their parents only under one."""
    rate, mfu, memory = "compute/tflops_per_gpu", "compute/mfu", "memory/peak_bytes"
    axes = ["cp", "kernel", "mask", "seqlen", "scale"]
    charts: list[dict[str, Any]] = [
        {
            "type": "PARALLEL",
            "metricSectionId": "overview",
            "selectedParams": axes,
            "selectedMetrics": [rate],
            "showAllRuns": False,
        },
        {
            "type": "SCATTER",
            "metricSectionId": "overview",
            "xaxis": {"key": "seqlen", "type": "PARAM"},
            "yaxis": {"key": rate, "type": "METRIC"},
        },
        {
            "type": "SCATTER",
            "metricSectionId": "overview",
            "xaxis": {"key": "world_size", "type": "PARAM"},
            "yaxis": {"key": rate, "type": "METRIC"},
        },
        {
            "type": "SCATTER",
            "metricSectionId": "overview",
            "xaxis": {"key": "seqlen", "type": "PARAM"},
            "yaxis": {"key": memory, "type": "METRIC"},
        },
        *(
            {"type": "BAR", "metricSectionId": "cells", "metricKey": key}
            for key in (rate, mfu, "time/forward/median_ms", "time/backward/median_ms", memory, "overlap/forward/exposed_ms")
        ),
    ]
    state = {
        "searchFilter": where, "orderByKey": f"metrics.`{rate}`", "orderByAsc": False, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs", "selectedColumns": list(COLUMNS),
        "runsPinned": [], "runsHidden": [], "runsHiddenMode": "SHOW_ALL", "hideEmptyCharts": True, "viewMaximized": True,
        "runListHidden": False, "isAccordionReordered": True,
        "compareRunSections": [
            {"uuid": "overview", "name": "Which choice", "display": True, "isReordered": True},
            {"uuid": "cells", "name": "Cell by cell", "display": True, "isReordered": True},
        ],
        "compareRunCharts": [
            {"uuid": f"chart-{number}", "isGenerated": False, "deleted": False, "runsCountToCompare": RUNS, **chart}
            for number, chart in enumerate(charts)
        ],
    }  # fmt: skip
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
