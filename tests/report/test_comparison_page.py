"""Two sweeps on one page: what changed comes first, the figure and the table have every cell, and links lead to reports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lcbench.commands import compare
from lcbench.grid.devices import known_devices
from lcbench.report.page import write_report
from lcbench.runs.attempt import Failure
from tests.browser import browser, needs_browser
from tests.report.made import made_sweep

GRID = ["cp=ring,ulysses,usp", "mask=full,causal", "seqlen=64k,128k,256k", "scale=1x8,2x8"]


def write(tmp_path: Path, *words: str) -> Path:
    made_sweep(tmp_path, "before", GRID, noise=0.002, run_to_run=0.001)
    failed = {"usp sdpa_flash full 64k 1x8": Failure("oom", "<b>out</b> of memory", 0)}
    made_sweep(tmp_path, "after", GRID, seed=1, noise=0.002, run_to_run=0.001, slower={"ring": 1.1}, failed=failed)
    assert compare.main(["before", "after", "--results", str(tmp_path), "--html", *words]) == 0
    return tmp_path / "after" / "report" / "compare-before.html"


def test_the_page_says_what_changed_by_axis_without_scripts(tmp_path: Path) -> None:
    text = re.sub(r"<script.*?</script>", "", write(tmp_path).read_text(), flags=re.DOTALL)
    assert "12 slower, 0 faster, 23 same of 35 cells." in text
    assert re.search(r'<td>cp</td><td>ring</td><td class="number">12</td><td class="number failed">1\.(09|10|11)x</td>', text)
    assert "&lt;b&gt;out&lt;/b&gt; of memory" in text
    assert "torch" in text  # what of the environments is the same


@pytest.mark.slow
def test_the_page_may_lie_elsewhere_and_a_folder_that_refuses_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, str(tmp_path / "x" / "page.html"))
    assert (tmp_path / "x" / "page.html").stat().st_size < 1e6

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr(compare, "write_comparison", refuse)
    assert compare.main(["before", "after", "--results", str(tmp_path), "--html"]) == 3
    assert "--html FILE" in capsys.readouterr().err


@needs_browser
@pytest.mark.slow
def test_figure_filter_and_links(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path, "before", GRID, noise=0.002, run_to_run=0.001)
    report = write_report(sweep, sweep.folder / "report", known_devices())
    page = write(tmp_path)
    with browser(1440, 900) as b:
        b.page.goto(f"{page.as_uri()}#verdict=slower")
        assert b.page.locator("#rows tbody tr:visible").count() == 12
        assert b.page.evaluate(
            "[...document.querySelectorAll('#rows tbody tr')].filter(r => !r.hidden).every(r => r.cell.choice === 'ring')"
        )
        assert b.page.locator("figure svg[role=img]").count() == 2
        assert "12 outside of the band" in b.page.locator("figure svg[role=img]").first.get_attribute("aria-label")
        assert not b.page.evaluate("document.documentElement.scrollWidth > innerWidth")
        link = b.page.locator("#rows tbody tr:visible a").first
        cell = link.inner_text()
        link.click()
        b.page.wait_for_url(f"{report.page.as_uri()}#c-{cell}")
        assert b.page.locator(f"#c-{cell}").is_visible()
        assert b.complaints == []
