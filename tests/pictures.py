"""Pictures for the docs: a report of cells that nobody measured, and MLflow's pages of the newest sweep in a real server.

``make pictures`` makes all of them; ``python -m tests.pictures report`` those of the report, which need no sweep and no server.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path

from lcbench.commands.arguments import find_sweep
from lcbench.grid.devices import known_devices
from lcbench.report.page import write_report
from lcbench.report.publishing import publish_sweep
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.links import view_url
from tests.browser import CHROMIUM, Browser, browser
from tests.report.made import big_sweep, serving_sweep, steps_sweep
from tests.slurm.stage import ROOT, Server

DOCS = ROOT / "docs"
SETTLED_MS = 5000  # MLflow's page lays its charts out several times
DRAWN_MS = 3000
COMPARED = 4
WIDTH = 1440
CELLS_PX = 200  # of the table of cells
# When the synthetic sweep was begun, local time: a picture that is made again differs only where the page does.
BEGUN = time.mktime((2026, 11, 27, 13, 26, 0, 0, 0, -1))
# What the annotated picture numbers, in the order of the list in docs/reports.md.
MARKED = ("p.about", "#verdict", "#regret", "#matrix", "#facets", "#tab-length", "#figure-length", "#causes", "#rows")
BANNER = """([before, count]) => {
  const banner = document.createElement("div");
  banner.textContent = `Synthetic numbers: a program made these ${count} cells, nobody measured them.`;
  banner.style = "background: #f0e442; color: #000; padding: 4px 12px; font-weight: bold";
  document.querySelector(before).before(banner);
}"""
MARK = """(number, selector) => {
  const at = document.querySelector(selector).getBoundingClientRect();
  const mark = document.createElement("div");
  mark.textContent = number;
  const left = at.left < 26 ? at.right - 26 : at.left - 26;
  mark.style = `position: absolute; left: ${left + scrollX}px; top: ${at.top + scrollY - 4}px; width: 24px; height: 24px;
    border-radius: 50%; background: #d55e00; color: #fff; font: bold 15px/24px sans-serif; text-align: center; z-index: 99`;
  document.body.append(mark);
}"""


def main(arguments: list[str]) -> int:
    if CHROMIUM is None:
        print("pictures need Chromium: tests/browser.sh installs Debian's, as root", file=sys.stderr)
        return 1
    report_pictures()
    if "report" in arguments:
        return 0
    try:
        sweep = find_sweep(ROOT / "results", "last")
    except ValueError as error:
        print(f"error: {error}; make demo makes one", file=sys.stderr)
        return 2
    dashboard_pictures(sweep)
    return 0


def report_pictures(docs: Path = DOCS) -> None:
    """The first screen of a report, the same page with numbers at its parts, and sections of training steps and of serving; a line
    in each says that it is synthetic.
    """
    with tempfile.TemporaryDirectory() as folder, chdir(folder):  # so that commands on the page name no folder
        page = write_report(big_sweep(Path("results"), "big", begun=BEGUN), Path("report"), known_devices()).page
        with browser(WIDTH, 900) as b:
            b.page.goto(page.resolve().as_uri())
            b.page.wait_for_timeout(DRAWN_MS)
            b.page.evaluate(BANNER, ["#verdict", 512])
            _keep(b.page.screenshot(), docs / "decision.png")
            for number, selector in enumerate(MARKED, 1):
                b.page.evaluate(f"() => ({MARK})({number}, {json.dumps(selector)})")
            end = b.page.locator("#rows").bounding_box()
            assert end is not None
            whole = {"x": 0, "y": 0, "width": WIDTH, "height": end["y"] + CELLS_PX}
            _keep(b.page.screenshot(full_page=True, clip=whole), docs / "report.png")
            _no_complaints(b)
        page = write_report(steps_sweep(Path("results"), "steps", begun=BEGUN), Path("steps"), known_devices()).page
        with browser(WIDTH, 900) as b:
            b.page.goto(page.resolve().as_uri())
            b.page.wait_for_timeout(DRAWN_MS)
            b.page.evaluate(BANNER, ["#steps", b.page.evaluate("CELLS.length")])
            _keep(b.page.locator("#step").screenshot(), docs / "training.png")
            _no_complaints(b)
        page = write_report(serving_sweep(Path("results"), "serving", begun=BEGUN), Path("serving"), known_devices()).page
        with browser(WIDTH, 900) as b:
            b.page.goto(page.resolve().as_uri())
            b.page.evaluate(BANNER, ["#serving .answer", b.page.evaluate("CELLS.length")])
            _keep(b.page.locator("#serving").screenshot(), docs / "serving.png")
            _no_complaints(b)
    print(f"decision.png, report.png, training.png and serving.png in {docs}")


def _keep(png: bytes, path: Path) -> None:
    """Write a screenshot in 256 colours, which is a third of its bytes."""
    from PIL import Image

    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def dashboard_pictures(sweep: Sweep, docs: Path = DOCS) -> None:
    """MLflow's stock pages of a sweep: its charts, its table, four runs compared."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "mlflow")
        server.start()
        try:
            publish_sweep(sweep, server.uri)
            with browser(1500, 1250) as b:
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
    print(f"dashboard.png, runs.png and compare.png in {docs}")


def _no_complaints(b: Browser) -> None:
    if b.complaints:
        raise AssertionError(f"the report's page complains: {b.complaints}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
