"""Pictures for the docs: the newest sweep's report, and MLflow's pages of it in a real server. ``make pictures``."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from lcbench.commands.arguments import find_sweep
from lcbench.grid.devices import known_devices
from lcbench.report.page import write_report
from lcbench.runs.tracking import publish, view_url
from tests.browser import CHROMIUM, browser
from tests.slurm.stage import ROOT, Server

SETTLED_MS = 5000  # MLflow's page lays its charts out several times
COMPARED = 4


def main() -> int:
    if CHROMIUM is None:
        print("pictures need Chromium: tests/browser.sh installs Debian's, as root", file=sys.stderr)
        return 1
    try:
        sweep = find_sweep(ROOT / "results", "last")
    except ValueError as error:
        print(f"error: {error}; make demo makes one", file=sys.stderr)
        return 2
    docs = ROOT / "docs"
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(sweep, Path(folder) / "report", known_devices()).page
        server = Server(Path(folder) / "mlflow")
        server.start()
        try:
            publish(sweep, server.uri)
            with browser(1240, 1000) as b:
                b.page.goto(page.as_uri())
                b.page.screenshot(path=docs / "report.png")
                if b.complaints:
                    raise AssertionError(f"the report's page complains: {b.complaints}")
                b.page.set_viewport_size({"width": 1500, "height": 1250})
                url = view_url(sweep, server.uri)
                assert url is not None
                b.page.goto(url)
                b.page.locator(".js-plotly-plot").nth(2).wait_for(timeout=60_000)
                b.page.get_by_role("button", name="Close").first.click()
                b.page.wait_for_timeout(SETTLED_MS)
                b.page.screenshot(path=docs / "dashboard.png")
                b.page.set_viewport_size({"width": 1500, "height": 800})
                b.page.goto(url.replace("compareRunsMode=CHART", "compareRunsMode=TABLE"))
                b.page.wait_for_timeout(SETTLED_MS)
                b.page.screenshot(path=docs / "runs.png")
                mine = sweep.remembered()[server.uri]
                runs = json.dumps([run for run, *_ in list(mine["cells"].values())[:COMPARED]])
                b.page.goto(f"{server.uri}/#/compare-runs?runs={runs}&experiments={json.dumps([mine['experiment']])}")
                b.page.wait_for_timeout(SETTLED_MS)
                b.page.screenshot(path=docs / "compare.png")
        finally:
            server.kill()
    print(f"report.png, dashboard.png, runs.png and compare.png in {docs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
