"""MLflow's stock page as it opens from our link: the sweep's cells, out of their parent, and their charts. In a real browser, since
the view's format is the page's own and may change with any release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lcbench.grid.devices import known_devices
from lcbench.report.page import write_report
from lcbench.runs.dashboard import EVERYTHING, VIEW
from lcbench.runs.store import Failure
from lcbench.runs.tracking import attach, publish, view_url
from tests.browser import browser, needs_browser
from tests.report.made import made_sweep

# The stock page asks for a user that a server without accounts does not have; on a busy machine its layout takes a frame more.
ITS_OWN = ("404", "ResizeObserver loop")
GRID = ["cp=ring,ulysses,usp", "mask=full,causal", "seqlen=64k,128k", "scale=1x8,2x8"]


def test_a_view_per_sweep_and_the_report_beside_its_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    sweep = made_sweep(tmp_path, "s", ["seqlen=64k,128k", "scale=1x8"])
    assert view_url(sweep, uri) is None
    publish(sweep, uri)
    publish(made_sweep(tmp_path, "t", ["seqlen=64k", "scale=1x8"]), uri)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("lcbench")
    assert experiment is not None
    views = {k.removeprefix(VIEW) for k in experiment.tags if k.startswith(VIEW)}
    assert len(views) == 3
    assert EVERYTHING in views
    assert all(len(v) < 5000 for v in experiment.tags.values())
    url = view_url(sweep, uri)
    assert url is not None
    assert sweep.manifest()["id"] in url
    report = write_report(sweep, tmp_path / "report", known_devices())
    attach(sweep, uri, report.page.parent)
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`lcbench.sweep` = 's' and tags.`lcbench.cells` = '2'")
    assert "report/report.html" in {a.path for a in client.list_artifacts(parent.info.run_id, "report")}


@needs_browser
@pytest.mark.slow
def test_the_stock_page_opens_with_every_cell_and_its_charts(tmp_path: Path, server: Any) -> None:
    sweep = made_sweep(tmp_path, "shown", GRID, failed={"usp sdpa_flash full 64k 1x8": Failure("oom", "out of memory", 0)})
    publish(sweep, server.uri)
    url = view_url(sweep, server.uri)
    with browser() as b:
        b.page.goto(url)
        b.page.get_by_text("24 matching runs").wait_for(timeout=60_000)
        b.page.get_by_text("Which choice").wait_for(timeout=60_000)
        b.page.locator(".js-plotly-plot").nth(2).wait_for(timeout=60_000)
        assert b.page.get_by_text("world_size vs. compute").count() == 1
        assert b.page.get_by_text("Parallel Coordinates").count() == 1
        assert b.page.get_by_text("ring sdpa_flash full 128k 2x8").count() >= 1
        assert [c for c in b.complaints if not any(own in c for own in ITS_OWN)] == []
