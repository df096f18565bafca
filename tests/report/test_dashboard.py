"""MLflow's stock page as it opens from our links: what a sweep comes to, each mask's cells, failures, all sweeps. In a real
browser, since the views' format is the page's own and may change with any release.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lcbench.grid.command_line import look
from lcbench.grid.devices import known_devices
from lcbench.report.page import write_report
from lcbench.report.publishing import publish_sweep, summary_of
from lcbench.runs.attempt import Attempt, Failure
from lcbench.runs.manifest import Entry
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.dashboard import PAGE, PLACE, SWEEPS, TABLE, VIEW, cell_views, place_tag, view_path
from lcbench.runs.tracking.links import failures_url, sweep_url, view_url
from lcbench.runs.tracking.publish import attach, publish
from tests.browser import browser, needs_browser
from tests.report.made import MEMORY_FAILURE, NODE_FAILURE, SOCKET_FAILURE, made_sweep

# The stock page asks for a user that a server without accounts does not have; on a busy machine its layout takes a frame more. It
# has telemetry, which is off, and which the next page interrupts.
ITS_OWN = ("404", "ResizeObserver loop", "TelemetryLogger")
# 200 cells, of which ulysses cannot run 10.
TWO_HUNDRED = [
    "cp=ring,allgather,ulysses,usp,groupcast", "mask=full,causal", "seqlen=64k,128k,256k,512k,1m", "scale=1x8,2x8,4x8,8x8",
    "heads=32x8x128", "kernel=flash_attn3", "site=plain",
]  # fmt: skip
FAILED = {
    "ring flash_attn3 full 128k 4x8": NODE_FAILURE,
    "usp flash_attn3 causal 128k 4x8": NODE_FAILURE,
    "groupcast flash_attn3 full 64k 4x8": SOCKET_FAILURE,
    "allgather flash_attn3 causal 1m 1x8": MEMORY_FAILURE,
}


def state_of(value: str) -> dict[str, Any]:
    """The page's state in a view's tag."""
    packed = json.loads(value)["state"].removeprefix("deflate;")
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return state


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, server: Any) -> tuple[Sweep, str]:
    """A sweep of 200 cells on a real server, and one of one strategy's."""
    root = tmp_path_factory.mktemp("results")
    factors = {"ring": 1.3, "allgather": 1.2, "ulysses": 1.1, "usp": 1.0, "groupcast": 1.05}
    sweep = made_sweep(root, "two", TWO_HUNDRED, failed=FAILED, blocks=1, factor_of=lambda c: factors[c.config["cp"]["name"]])
    other = made_sweep(root, "other", ["cp=ring", "seqlen=64k", "scale=1x8"], blocks=1)
    for each in (sweep, other):
        done = subprocess.run(
            [sys.executable, "-m", "lcbench.sync", each.name, "--results", str(root), "--tracking-uri", server.uri],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == sweep_url(each, server.uri)
    return sweep, server.uri


@pytest.mark.parametrize(
    "grid",
    [
        TWO_HUNDRED,
        ["cp=ring,ulysses", "mask=full,causal", "seqlen=64k", "scale=1x8"],
        ["cp=ring", "mask=causal", "seqlen=64k", "scale=1x8", "seed=range(0,250)"],
        ["cp=ring,usp", "mask=causal_document", "lengths=web_text,long_text_64k", "seqlen=64k,128k,256k", "scale=1x8",
         "seed=range(0,20)"],
        ["cp=ring", "mask=sliding_window", "mask.left=1k,2k,4k", "seqlen=64k", "scale=1x8", "seed=range(0,40)"],
    ],
)  # fmt: skip
def test_a_view_has_no_more_cells_than_the_page_shows_and_says_how_many(grid: list[str]) -> None:
    planned = look(grid).cells
    views = cell_views("s", "0123456789abcdef", 1e9, {p.cell.id: Entry(p.cell, p.skip) for p in planned})
    flat = [{**{k: str(v) for k, v in p.cell.flat.items()}, PLACE: place_tag(i)} for i, p in enumerate(planned) if not p.skip]
    seen: Counter[int] = Counter()
    for view in views:
        where = state_of(view.value)["searchFilter"]
        wanted = dict(re.findall(r"params\.`([^`]+)` = '([^']*)'", where))
        place = "".join(re.findall(rf"tags\.`{PLACE}` LIKE '(\d*)%'", where))
        shown = [i for i, cell in enumerate(flat) if cell[PLACE].startswith(place) and all(cell[k] == v for k, v in wanted.items())]
        assert 0 < len(shown) == view.cells <= PAGE
        assert f", {len(shown)} cell" in view.name
        assert json.loads(view.value)["name"] == view.name
        assert len(view.value) < 5000
        assert re.fullmatch(r"[\w.-]+", view.key)
        seen.update(shown)
    assert len(seen) == len(flat)
    assert len({view.key for view in views}) == len(views) <= len(flat) / 20 + 1 + len({cell["mask"] for cell in flat})


@pytest.mark.slow
def test_views_of_a_sweep_and_the_report_beside_its_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    sweep = made_sweep(tmp_path, "s", ["seqlen=64k,128k", "scale=1x8"])
    assert view_url(sweep, uri) is sweep_url(sweep, uri) is failures_url(sweep, uri) is None
    publish(sweep, uri)
    assert failures_url(sweep, uri) is None
    publish(made_sweep(tmp_path, "t", ["seqlen=64k", "scale=1x8"], failed={"": Failure("oom", "too large")}), uri)
    assert "failed" in str(failures_url(Sweep(tmp_path, "t"), uri))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("lcbench")
    assert experiment is not None
    names = [json.loads(v)["name"] for k, v in experiment.tags.items() if k.startswith(VIEW)]
    assert sorted(names) == ["All sweeps", "s: all, 2 cells", "t: 1 failed", "t: all, 1 cell"]
    assert all(len(v) < 5000 for v in experiment.tags.values())
    assert experiment.tags["mlflow.note.content"].startswith(
        f"[**All sweeps**](#{view_path(experiment.experiment_id, SWEEPS, TABLE)})"
    )
    assert sweep.manifest()["id"] in str(view_url(sweep, uri))
    report = write_report(sweep, tmp_path / "report", known_devices())
    attach(sweep, uri, report.page.parent)
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`lcbench.sweep` = 's' and tags.`lcbench.cells` = '2'")
    assert "report/report.html" in {a.path for a in client.list_artifacts(parent.info.run_id, "report")}


@pytest.mark.slow
def test_a_sweep_that_grows_loses_the_view_that_held_all_of_it(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    sweep = made_sweep(tmp_path, "s", ["cp=ring", "seqlen=64k", "scale=1x8"])
    publish(sweep, uri)
    grid = ["cp=ring", "mask=causal", "seqlen=64k,128k", "scale=1x8", "seed=range(1,70)"]
    sweep.add([Entry(p.cell, p.skip) for p in look(grid).cells], command=grid)
    (cell,) = [p.cell for p in look(["cp=ring", "seqlen=128k", "scale=1x8", "seed=1", "mask=causal"]).cells]
    running = sweep.begin(cell.id, "p")
    sweep.finish(Attempt(cell.id, "s", running.number, "ok", None, {}, {}, started_at=1.0, finished_at=2.0))
    publish(sweep, uri)
    experiment = MlflowClient(tracking_uri=uri).get_experiment_by_name("lcbench")
    assert experiment is not None
    names = [json.loads(v)["name"] for k, v in experiment.tags.items() if k.startswith(VIEW)]
    assert "s: all, 1 cell" not in names
    assert sum(int(re.findall(r"(\d+) cells", name)[0]) for name in names if "cells" in name) == 139


@pytest.mark.slow
def test_the_run_of_a_sweep_says_what_to_use_and_why_cells_failed(published: tuple[Sweep, str]) -> None:
    sweep, uri = published
    client = MlflowClient(tracking_uri=uri)
    (parent,) = client.search_runs(["1"], "tags.`lcbench.cells` = '200'")
    data, run = parent.data, parent.info.run_id
    assert parent.info.status == "FINISHED"
    counts = {key.removeprefix("cells/"): value for key, value in data.metrics.items() if key.startswith("cells/")}
    assert counts == {"ok": 186.0, "failed": 4.0, "skipped": 10.0, "missing": 0.0}
    # A second each, by 8 to 64 GPUs.
    seconds = sum(a.config and e.cell.scale.world_size for i, e in sweep.entries().items() for a in sweep.attempts(i) if not e.skip)
    assert data.metrics["gpu_hours"] == pytest.approx(seconds / 3600, abs=1e-3)
    note = data.tags["mlflow.note.content"]
    verdict, links = note.split("\n\n")[:2]
    assert re.fullmatch(r"\*\*Use \w+\. Over 39 problems it takes on average 1\.\d\dx the time of the best, .*\*\*", verdict)
    assert re.findall(r"\[(.*?)\]\(", links) == ["**4 failed**", "Report", "full, 95 cells", "causal, 95 cells"]
    assert f"/runs/{run}/artifacts/report/report.html)" in links
    assert "| choice | mean | worst |" in note
    assert "fell off the bus" in note
    assert "--exclude node003" in note
    assert "report/report.html" in {a.path for a in client.list_artifacts(run, "report")}
    colors = {
        (r.data.params["cp"], r.data.tags["mlflow.runColor"])
        for r in client.search_runs(
            ["1"], f"tags.`lcbench.sweep` = '{sweep.name}' and tags.`lcbench.cell_id` != ''", max_results=500
        )
    }
    assert len(colors) == len({cp for cp, _ in colors}) == len({color for _, color in colors}) == 5
    again = publish_sweep(sweep, uri, thorough=True)
    assert (again.published, again.unchanged, again.told) == (0, 190, True)


def test_a_cause_is_no_markup_and_a_sweep_of_one_problem_has_its_winner(tmp_path: Path) -> None:
    grid = ["cp=ring,usp,ulysses", "seqlen=64k", "scale=1x8"]
    evil = Failure("crash", "a | b <img src=x> [c](http://evil.example) `d` *e*")
    sweep = made_sweep(tmp_path, "s", grid, failed={"ulysses": evil})
    told = summary_of(sweep, sweep.look())
    assert "is fastest" in told.verdict
    assert "usp" in told.verdict
    (row,) = [line for line in told.body.splitlines() if "evil" in line]
    assert "\\[c\\](http" in row
    assert "\\<img" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 5
    empty = Sweep(tmp_path, "empty")
    empty.add([Entry(e.cell, None) for e in sweep.entries().values()], command=[])
    assert summary_of(empty, empty.look()).verdict == "No cell has a good result with a time."


@needs_browser
@pytest.mark.slow
def test_the_stock_page_opens_each_mask_with_all_its_cells(published: tuple[Sweep, str]) -> None:
    sweep, uri = published
    manifest = sweep.manifest()
    views = cell_views(sweep.name, manifest["id"], manifest["created_at"], sweep.entries())
    answers: list[tuple[str, int]] = []

    def keep(response: Any) -> None:
        if "runs/search" in response.url and response.request.post_data:
            asked = json.loads(response.request.post_data).get("filter", "")
            answers.append((asked, len(response.json().get("runs", []))))

    with browser() as b:
        b.page.on("response", keep)
        for view, mask in zip(views, ("full", "causal"), strict=True):
            b.page.goto("about:blank")
            b.page.goto(f"{uri}/#{view.path('1')}")
            b.page.get_by_text("95 matching runs").wait_for(timeout=60_000)
            b.page.get_by_text(f"Which choice: two: {mask}, 95 cells").wait_for(timeout=60_000)
            b.page.locator(".js-plotly-plot").nth(2).wait_for(timeout=60_000)
            assert b.page.get_by_text("Load more").count() == 0
            assert b.page.get_by_text("length vs. tflops").count() == 1
            assert b.page.get_by_text("Parallel Coordinates").count() == 1
            assert b.page.get_by_text("Group: ring").count() == 1
            assert {count for asked, count in answers if f"params.`mask` = '{mask}'" in asked} == {95}
        assert [c for c in b.complaints if not any(own in c for own in ITS_OWN)] == []


@needs_browser
@pytest.mark.slow
def test_the_stock_page_opens_a_sweep_its_report_its_failures_and_all_sweeps(published: tuple[Sweep, str]) -> None:
    sweep, uri = published
    with browser() as b:
        b.page.goto(str(sweep_url(sweep, uri)))
        b.page.get_by_text("Over 39 problems it takes").first.wait_for(timeout=60_000)
        b.page.get_by_role("link", name="causal, 95 cells").wait_for()
        more = b.page.get_by_text("Show more")
        if more.count():
            more.first.click()
        report = b.page.get_by_role("link", name="Report").first.get_attribute("href")
        b.page.goto("about:blank")
        b.page.goto(f"{uri}/{report}")
        b.page.frame_locator("iframe").get_by_role("heading", name="two").first.wait_for(timeout=60_000)
        b.page.goto("about:blank")
        b.page.goto(str(failures_url(sweep, uri)))
        b.page.get_by_text("4 matching runs").wait_for(timeout=60_000)
        b.page.get_by_text("fell off the bus").first.wait_for(timeout=60_000)
        b.page.goto("about:blank")
        b.page.goto(f"{uri}/#{view_path('1', SWEEPS, TABLE)}")
        b.page.get_by_text("2 matching runs").wait_for(timeout=60_000)
        b.page.get_by_text("cells/ok").first.wait_for(timeout=60_000)
        assert [c for c in b.complaints if not any(own in c for own in ITS_OWN)] == []
